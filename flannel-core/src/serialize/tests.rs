//! Tests of the shapes, as JSON.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::admit::Reason;
use crate::backend::{Skip, Uplink};
use crate::firewall_keeper::RulesState;
use crate::kernel::{Limitation, LinkId, LinkName, Object, Op, OverlayName, PeerState, Route, Scope};
use crate::lease::LeaseKey;
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix};
use crate::overlay::{
    End, Event, Explanation, Held, HeldBecause, LossReason, Preview, Refusal, Status, UplinkState, Verdict,
    WithheldBecause,
};
use crate::plan::{Conflict, Plan};
use crate::testing::samples;

fn json(value: &impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(value).unwrap()
}

#[test]
fn values() {
    let subnet = samples::node_subnet(Family::V4, 3);
    assert_eq!(json(&subnet), "10.42.3.0/24");
    assert_eq!(json(&MacAddr([2, 0, 0, 0, 0, 1])), "02:00:00:00:00:01");
    assert_eq!(json(&Dual { v4: Some(subnet), v6: None }), json!({"v4": "10.42.3.0/24"}));
    assert_eq!(json(&Family::V6), "v6");
    assert_eq!(json(&Object::Route(subnet)), Object::Route(subnet).to_string());
    let lease = samples::lease(3, &[Family::V4], "tunnel").expiring(Some(samples::at(90)));
    let lease = json(&lease);
    assert_eq!(lease["subnets"], json!({"v4": "10.42.3.0/24"}));
    assert_eq!((&lease["backend_type"], &lease["expires"]), (&json!("tunnel"), &json!(90.0)));
    assert_eq!(lease["public_ip"], json!({"v4": samples::node_address(Family::V4, 3)}));
    let config = json(&samples::config(&[Family::V4], r#"{"Type":"vxlan","VNI":3}"#));
    assert_eq!((&config["backend"], &config["enable_nftables"]), (&json!("vxlan"), &json!(false)));
    assert_eq!(config["document"]["Backend"], json!({"Type": "vxlan", "VNI": 3}));
    let name = LinkName::new("eth0").unwrap();
    let addrs = Dual { v4: Some(samples::node_address(Family::V4, 1)), v6: None };
    let uplink = json(&Uplink::new(2, name, Mtu(1500), addrs));
    assert_eq!(uplink, json!({"name": "eth0", "index": 2, "mtu": 1500, "addresses": addrs.map(|_, addr| *addr)}));
}

#[test]
fn reasons() {
    let reason = Reason::WholeNetwork(samples::node_subnet(Family::V4, 3));
    let expected = json!({"kind": "whole_network", "text": reason.to_string(), "remedy": reason.remedy()});
    assert_eq!(json(&reason), expected);
    let skip = Skip::NoAddress(Family::V6);
    assert_eq!(json(&skip), json!({"kind": "no_address", "text": skip.to_string()}));
}

#[test]
fn plans_and_explanations() {
    let prefix = samples::node_subnet(Family::V4, 3);
    let route = Route::direct(prefix, samples::node_address(Family::V4, 3), LinkId::Uplink);
    let write = Op::CreateRoute { prefix, route: route.clone() };
    let conflict =
        Conflict { object: Object::Route(prefix), found: "a route".to_owned(), remedy: "delete it".to_owned() };
    let plan = Plan { ops: vec![write.clone()], conflicts: vec![conflict] };
    let mut preview = Preview::new(plan, Scope::new(OverlayName::default(), Dual::default()));
    preview.held.push(Held { op: write, because: HeldBecause::Withheld(WithheldBecause::BadRecord) });
    let preview = json(&preview);
    assert_eq!(preview["writes"][0], preview["deferred"][0]["write"]);
    assert!(preview["writes"][0].as_str().unwrap().contains("10.42.3.0/24"), "{preview}");
    let expected = json!([{"object": json(&Object::Route(prefix)), "found": "a route", "remedy": "delete it"}]);
    assert_eq!((&preview["conflicts"], &preview["conflict_count"]), (&expected, &json!(1)));

    let state = PeerState::default().with_route(prefix, route);
    let explanation = Explanation {
        key: samples::lease(3, &[Family::V4], "tunnel").key,
        verdict: Verdict::Quarantined(Reason::NoSubnet),
        lease: None,
        states: vec![(Family::V4, Ok(state)), (Family::V6, Err(Skip::NoAddress(Family::V6)))],
        unsettled: vec![Object::Route(prefix)],
    };
    let explanation = json(&explanation);
    assert_eq!((&explanation["verdict"]["kind"], &explanation["lease"]), (&json!("quarantined"), &json!(null)));
    assert_eq!(explanation["verdict"]["reason"]["kind"], "no_subnet");
    let states = &explanation["states"];
    assert_eq!((&states[0]["family"], &states[0]["skipped"]), (&json!("v4"), &json!(null)));
    let route = json!({"prefix": prefix.to_string(), "gateway": samples::node_address(Family::V4, 3), "table": 254, "metric": 0});
    assert_eq!((&states[0]["wanted"]["routes"][0], &states[0]["wanted"]["fdb"]), (&route, &json!(null)));
    assert_eq!((&states[1]["wanted"], &states[1]["skipped"]["kind"]), (&json!(null), &json!("no_address")));
    assert_eq!(explanation["unsettled"], json!([json(&Object::Route(prefix))]));
}

#[test]
fn statuses() {
    let mut status = Status::default();
    let empty = json(&status);
    assert_eq!(
        (&empty["phase"], &empty["ready"], &empty["uplink"]),
        (&json!("starting"), &json!(false), &json!({"kind": "unknown"}))
    );
    assert_eq!((&empty["store"], &empty["lease"]), (&json!({"kind": "never"}), &json!(null)));
    assert_eq!(empty["waits_for"][0]["kind"], "run");
    let key = samples::lease(3, &[Family::V4], "tunnel").key;
    let (object, device) = (Object::Route(samples::node_subnet(Family::V4, 3)), LinkName::new("flannel0").unwrap());
    status.quarantined = Arc::new([(key.clone(), Reason::NoSubnet)].into());
    status.skipped = Arc::new([((key.clone(), Family::V6), Skip::NoAddress(Family::V6))].into());
    status.limitations = Arc::new(vec![(device, Limitation::new("offload", "none"))]);
    status.refused = Arc::new([(object.clone(), Refusal { peer: Some(key.clone()), error: "no".to_owned() })].into());
    let until = samples::at(7);
    status.withheld = Arc::new([(samples::node_subnet(Family::V4, 3), WithheldBecause::MassRemoval(until))].into());
    status.uplink = UplinkState::Lost { last: None, since: until, error: "no carrier".to_owned() };
    let shown = json(&status);
    assert_eq!(
        (&shown["quarantined"][0]["key"], &shown["quarantined"][0]["reason"]["kind"]),
        (&json(&key), &json!("no_subnet"))
    );
    assert_eq!(
        (&shown["skipped"][0]["family"], &shown["skipped"][0]["reason"]["kind"]),
        (&json!("v6"), &json!("no_address"))
    );
    assert_eq!(shown["limitations"], json!([{"device": "flannel0", "what": "offload", "cause": "none"}]));
    let refused = &shown["refused"][0];
    assert_eq!((&refused["object"], &refused["peer"], &refused["error"]), (&json(&object), &json(&key), &json!("no")));
    let withheld = &shown["withheld"][0];
    assert_eq!(
        (&withheld["prefix"], &withheld["kind"], &withheld["until"]),
        (&json!("10.42.3.0/24"), &json!("mass_removal"), &json!(7.0))
    );
    assert_eq!(shown["uplink"], json!({"kind": "lost", "last": null, "since": 7.0, "error": "no carrier"}));
    assert_eq!(json(&End::Failed("why".to_owned())), json!({"kind": "failed", "error": "why"}));
    let rules = RulesState::WithoutForward("no nft".to_owned());
    assert_eq!(json(&rules), json!({"kind": "without_forward", "error": "no nft"}));
    assert_eq!(json(&RulesState::InPlace), json!({"kind": "in_place"}));
}

#[test]
fn long_lists_are_cut_and_counted() {
    let mut status = Status::default();
    let many = 2 * Status::MAX_LISTED;
    let subnets =
        (0..many).map(|n| Prefix::new(IpAddr::from(0x0a00_0000_u32.wrapping_add(n as u32).to_be_bytes()), 32));
    let subnets: Vec<_> = subnets.map(Result::unwrap).collect();
    status.withheld = Arc::new(subnets.iter().map(|subnet| (*subnet, WithheldBecause::BadRecord)).collect());
    status.flapping = Arc::new(subnets.iter().copied().map(Object::Route).collect());
    let skip = Skip::NoAddress(Family::V6);
    let keys = (0..many).map(|n| LeaseKey::new(&n.to_string()));
    status.skipped = Arc::new(keys.map(|key| ((key, Family::V6), skip.clone())).collect());
    let shown = json(&status);
    for list in ["withheld", "flapping", "skipped"] {
        assert_eq!(shown[list].as_array().unwrap().len(), Status::MAX_LISTED, "{list}");
        assert_eq!(shown[format!("{list}_count")], many, "{list}");
    }
}

#[test]
fn events() {
    let lease = Arc::new(samples::lease(3, &[Family::V4], "tunnel"));
    let object = Object::Route(samples::node_subnet(Family::V4, 3));
    for (event, rest) in [
        (Event::PeerAdded(Arc::clone(&lease)), json!({"lease": json(&*lease)})),
        (
            Event::LeaseLost(LossReason::Taken),
            json!({"reason": {"kind": "taken", "text": LossReason::Taken.to_string()}}),
        ),
        (Event::OwnTrouble(None), json!({"reason": null})),
        (Event::DriftRepaired { writes: 2, took: Duration::from_millis(500) }, json!({"writes": 2, "seconds": 0.5})),
        (Event::Flapping(object.clone()), json!({"object": json(&object)})),
        (Event::Missed(3), json!({"events": 3})),
        (Event::Stopped(End::Dropped), json!({"end": {"kind": "dropped"}})),
        (Event::Ready, json!({})),
    ] {
        let mut expected = rest;
        expected["kind"] = event.kind().into();
        assert_eq!(json(&event), expected);
    }
}
