//! The shapes, as JSON.

use serde_json::json;

use crate::admit::Reason;
use crate::backend::{Skip, Uplink};
use crate::kernel::{LinkId, LinkName, Object, Op, OverlayName, PeerState, Route, Scope};
use crate::net::{Dual, Family, MacAddr, Mtu};
use crate::overlay::{Explanation, Held, HeldBecause, Preview, Verdict, WithheldBecause};
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
    assert_eq!(preview["writes"][0], preview["held"][0]["write"]);
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
