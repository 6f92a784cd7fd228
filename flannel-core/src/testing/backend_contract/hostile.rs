//! Hostile peer data and unusual hosts must not cause a panic.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde_json::{Value, json};

use super::inside::{check_base, check_peer};
use super::world::{Node, World};
use super::{Families, Harness};
use crate::backend::{LocalNode, NodeContext, Peer, Skip};
use crate::kernel::HostFacts;
use crate::lease::{Json, Lease, LeaseAttrs};
use crate::net::{Dual, Family, Mtu, Prefix};

/// The longest text of a reason, in bytes: there is one per skipped peer.
const MOST_OF_A_REASON: usize = 1024;

/// How many places of a text are changed, and how deep values are nested.
const PLACES: usize = 40;
const DEPTH: usize = 4;

/// Whatever a peer publishes results in state inside the scope, or in a skip with a reason of at most 1 KiB, and never
/// in a panic: no data, data of the wrong type, cut short or far too long, of another backend or family, and subnets of
/// any length.
pub fn no_peers_data_makes_it_panic(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let good = world.peer(2);
    for family in world.families() {
        let published = good.attrs.backend_data.get(family).map(Json::as_str).unwrap_or("{}");
        let mut variants: Vec<_> = texts(published).iter().map(|text| Json::parse(text).ok()).collect();
        variants.extend([None, good.attrs.backend_data.v4.clone(), good.attrs.backend_data.v6.clone()]);
        for data in variants {
            let mut peer = good.clone();
            *peer.attrs.backend_data.slot(family) = data;
            check(&node, &peer, family);
        }
        for wire_type in ["", "vxlan", "no-such-type", "\u{0}\u{202e}"] {
            let mut peer = good.clone();
            peer.attrs.backend_type = wire_type.into();
            check(&node, &peer, family);
        }
        for change in [
            (|peer, family| *peer.subnets.slot(family) = None) as fn(&mut Peer, Family),
            |peer, family| *peer.attrs.public_ip.slot(family) = None,
            |peer, _| peer.attrs = LeaseAttrs::default(),
            |peer, _| peer.subnets = Dual::default(),
        ] {
            let mut peer = good.clone();
            change(&mut peer, family);
            check(&node, &peer, family);
        }
        // The shortest and the longest prefix length that admission accepts.
        let lens = match family {
            Family::V4 => [17, 30],
            Family::V6 => [49, 126],
        };
        for len in lens {
            let mut peer = good.clone();
            let addr = peer.subnets.get(family).map(Prefix::addr);
            *peer.subnets.slot(family) = addr.and_then(|addr| Prefix::masked(addr, len).ok());
            check(&node, &peer, family);
        }
    }
}

/// Checks one peer in one family: no panic, the same result each time, and all of it inside the scope.
fn check(node: &Node, peer: &Peer, family: Family) {
    let backend = &*node.backend;
    let what = || format!("{family} of a peer that publishes {}", short(&peer.attrs.to_json()));
    let address = alive("hardware_address", &what, || backend.hardware_address(&peer.attrs, family));
    let outcome = alive("peer", &what, || backend.peer(&node.local, peer, family));
    assert!(outcome == backend.peer(&node.local, peer, family), "peer: another answer the second time for {}", what());
    for skip in [address.as_ref().err(), outcome.as_ref().err()].into_iter().flatten() {
        let len = Skip::to_string(skip).len();
        assert!(len <= MOST_OF_A_REASON, "peer: a reason of {len} bytes for {}", what());
    }
    let Ok(state) = outcome else { return };
    let (scope, base) = (node.scope(), backend.base(&node.local));
    check_peer(&format!("peer: for {}", what()), &scope, &base, &state, &node.local, peer, family);
    let forwarded = state.fdb.map(|(key, _)| key.mac);
    let is_its = forwarded.is_none_or(|mac| address == Ok(Some(mac)));
    assert!(is_its, "peer: a forwarding entry for {forwarded:?}, but hardware_address says {address:?} for {}", what());
}

/// A change of a host.
type Change = fn(&mut NodeContext);

/// Whatever the host and the node's own lease, nothing panics, and `base` stays inside the scope: without addresses,
/// links or a useful MTU, with a lease of other families, and with a current or previous lease that was edited.
pub fn no_host_or_lease_of_ones_own_makes_it_panic(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let peer = world.peer(2);
    let hosts: [(&str, Change); 8] = [
        ("without facts of the host", |it| it.host = Arc::new(HostFacts::default())),
        ("without public addresses", |it| it.public = Dual::default()),
        ("without addresses of the uplink", |it| it.uplink.addrs = Dual::default()),
        ("with an uplink that is gone", |it| it.uplink.index = 9999),
        ("with an MTU of 0", |it| it.uplink.mtu = Mtu(0)),
        ("with an MTU of 68", |it| it.uplink.mtu = Mtu(68)),
        ("with an MTU of 65535", |it| it.uplink.mtu = Mtu(65_535)),
        ("with the largest MTU there is", |it| it.uplink.mtu = Mtu(u32::MAX)),
    ];
    for (how, change) in hosts {
        let mut local = node.local.clone();
        change(&mut local.context);
        check_local(&node, &local, &peer, how);
    }
    for family in world.families() {
        let published = node.local.lease.attrs.backend_data.get(family).map(Json::as_str).unwrap_or("{}");
        for data in texts(published).iter().map(|text| Json::parse(text).ok()).chain([None]) {
            let mut lease = Lease::clone(&node.local.lease);
            *lease.attrs.backend_data.slot(family) = data;
            let how = format!("with a lease of {}", short(&lease.attrs.to_json()));
            let mut local = LocalNode { lease: Arc::new(lease), ..node.local.clone() };
            check_local(&node, &local, &peer, &how);
            local.context.previous = Some(std::mem::replace(&mut local.lease, node.local.lease.clone()));
            let advertised = alive("advertise", &|| how.clone(), || node.backend.advertise(&local.context));
            assert!(advertised.is_ok(), "advertise: must not be kept from a start by a previous lease: {advertised:?}");
        }
        let mut lease = Lease::clone(&node.local.lease);
        *lease.subnets.slot(family) = None;
        let local = LocalNode { lease: Arc::new(lease), ..node.local.clone() };
        check_local(&node, &local, &peer, "with a lease without a subnet of one family");
    }
    for wire_type in ["", "no-such-type"] {
        let attrs = LeaseAttrs { backend_type: wire_type.into(), ..LeaseAttrs::default() };
        let lease = Arc::new(Lease { attrs, ..Lease::clone(&node.local.lease) });
        let mut local = LocalNode { lease: lease.clone(), ..node.local.clone() };
        local.context.previous = Some(lease);
        check_local(&node, &local, &peer, "with a lease that says nothing");
        let advertised = node.backend.advertise(&local.context);
        assert!(advertised.is_ok(), "advertise: must not be kept from a start by a previous lease: {advertised:?}");
    }
}

fn check_local(node: &Node, local: &LocalNode, peer: &Peer, how: &str) {
    let (backend, what) = (&*node.backend, || how.to_owned());
    // The backend may refuse to run on such a host.
    let _ = alive("advertise", &what, || backend.advertise(&local.context));
    let _ = alive("mtu", &what, || backend.mtu(&local.context));
    let scope = alive("devices", &what, || local.scope(backend, &node.slots));
    let base = alive("base", &what, || backend.base(local));
    check_base(&scope, &base, local);
    for family in Family::BOTH {
        if let Ok(state) = alive("peer", &what, || backend.peer(local, peer, family)) {
            check_peer(&format!("peer: {how}"), &scope, &base, &state, local, peer, family);
        }
    }
}

/// Calls a method of the backend, and fails the check if it panics.
#[track_caller]
pub(super) fn alive<T>(method: &str, what: &dyn Fn() -> String, call: impl FnOnce() -> T) -> T {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(value) => value,
        Err(payload) => panic!("{method}: must not panic: {}: {}", what(), text(&*payload)),
    }
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("")
}

fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Returns JSON texts that a node may publish in place of `published`.
fn texts(published: &str) -> Vec<String> {
    let mut texts: Vec<_> = values().iter().map(Value::to_string).collect();
    texts.extend(["1e400", "-0.0", r#"{"":""}"#, r#""\ud800""#].map(str::to_owned));
    texts.push(format!("{}{}", "[".repeat(100), "]".repeat(100)));
    texts.push(published.to_lowercase());
    texts.push(published.to_uppercase());
    // Every member twice.
    let members = published.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    texts.extend(members.filter(|members| !members.is_empty()).map(|members| format!("{{{members},{members}}}")));
    if let Ok(value) = serde_json::from_str(published) {
        texts.extend(changed(&value, DEPTH).iter().map(Value::to_string));
    }
    texts
}

/// Returns values of every type.
fn values() -> Vec<Value> {
    let long = "A".repeat(LeaseAttrs::MAX_BYTES);
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(0.5),
        json!(u64::MAX),
        json!(""),
        json!("é\u{0}\u{202e}"),
        json!(&long),
        json!([]),
        json!(["a", 1, {}]),
        json!({}),
        json!({ &long: &long }),
    ]
}

/// Returns variants of a value, with each of its parts replaced, left out, or cut.
fn changed(value: &Value, depth: usize) -> Vec<Value> {
    let mut all = values();
    match value {
        _ if depth == 0 => {}
        Value::Object(members) => {
            for (name, member) in members {
                let with = |other: Value| {
                    let mut members = members.clone();
                    members.insert(name.clone(), other);
                    Value::Object(members)
                };
                all.extend(changed(member, depth - 1).into_iter().map(with));
                let mut without = members.clone();
                without.remove(name);
                all.push(Value::Object(without));
            }
        }
        Value::Array(items) => {
            for (nth, item) in items.iter().enumerate().take(PLACES) {
                let with = |other: Value| {
                    let mut items = items.clone();
                    items[nth] = other;
                    Value::Array(items)
                };
                all.extend(changed(item, depth - 1).into_iter().map(with));
                all.push(Value::Array(items[..nth].to_vec()));
            }
        }
        Value::String(text) => {
            let chars: Vec<_> = text.chars().take(PLACES).collect();
            for nth in 0..chars.len() {
                all.push(chars[..nth].iter().collect::<String>().into());
                // Two bytes in place of one, so that cutting at byte offsets fails.
                all.push([&chars[..nth], &['é'], &chars[nth + 1..]].concat().iter().collect::<String>().into());
            }
            all.push(format!("{text}{text}").into());
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    all
}
