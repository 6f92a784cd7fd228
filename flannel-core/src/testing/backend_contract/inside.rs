//! The wanted state must be inside the scope, and must not include what the agent or another program decides.

use std::collections::BTreeSet;

use super::world::World;
use super::{Families, Harness};
use crate::backend::{LocalNode, Peer};
use crate::kernel::{LinkId, LinkKind, PeerState, Route, RouteKind, Scope, State};
use crate::net::{Family, Prefix, is_link_local};

/// The devices are distinguishable. `base` and `peer` only request these devices, addresses, neighbours and FDB entries
/// on them, and routes in the network and its slots through existing links. They leave the group and alias of a device
/// to the agent, and their objects on an external device are distinguishable from those of the device's program.
pub fn everything_wanted_is_inside_the_scope(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let (scope, base) = (node.scope(), node.backend.base(&node.local));
    check_scope(&scope);
    check_base(&scope, &base, &node.local);
    check_mtu(&base, &node.local, node.backend.mtu(&node.local.context).map(|mtu| mtu.0));
    for peer in world.peers() {
        for family in world.families() {
            if let Ok(state) = node.backend.peer(&node.local, &peer, family) {
                check_peer("peer", &scope, &base, &state, &node.local, &peer, family);
                if let Some((key, _)) = state.fdb {
                    let published = node.backend.hardware_address(&peer.attrs, family).ok().flatten();
                    let rule = "peer: a forwarding entry must be for the MAC address that hardware_address() says";
                    assert_eq!(Some(key.mac), published, "{rule}, so that no two peers share one");
                }
            }
        }
    }
}

fn check_scope(scope: &Scope) {
    for (nth, device) in scope.devices.iter().enumerate() {
        let name = &device.name;
        match &device.kind {
            LinkKind::External(kind) if &**kind == "vxlan" => {
                panic!("devices: {name} must not be an external VXLAN device")
            }
            LinkKind::Other(_) => panic!("devices: {name} is of a kind that is only ever seen: {:?}", device.kind),
            LinkKind::Vxlan(vxlan) => {
                let lower = matches!(vxlan.lower, None | Some(LinkId::Uplink | LinkId::Other(_)));
                assert!(lower, "devices: {name} must not be over a device of the overlay");
            }
            LinkKind::Tun(_) | LinkKind::External(_) => {}
        }
        for other in &scope.devices[nth + 1..] {
            assert_ne!(*name, other.name, "devices: two have one name");
            let is_one = device.kind.excludes(&other.kind) || device.kind.is_same_device(&other.kind);
            assert!(!is_one, "devices: {name} and {} cannot be told apart", other.name);
        }
    }
    assert!(u8::try_from(scope.devices.len()).is_ok(), "devices: {} are too many", scope.devices.len());
}

/// Checks the wanted state of `base`.
pub(super) fn check_base(scope: &Scope, base: &State, local: &LocalNode) {
    for (id, link) in &base.links {
        let device = slot(*id).and_then(|slot| scope.devices.get(slot));
        let Some(device) = device else { panic!("base: wants {}, {id:?}, which is not in the scope", link.name) };
        if let (LinkKind::Tun(want), LinkKind::Tun(scope)) = (&link.kind, &device.kind) {
            assert_eq!(
                (&link.name, want.multi_queue),
                (&device.name, scope.multi_queue),
                "base: {id:?} must be as the scope has it"
            );
            assert!(want.tunnel.is_some(), "base: must say how the packets of {} are carried", link.name);
        } else {
            assert_eq!(
                (&link.name, &link.kind),
                (&device.name, &device.kind),
                "base: {id:?} must be as the scope has it"
            );
        }
        assert!(
            link.group == 0 && link.alias.is_none(),
            "base: must leave group and alias of {} to the agent",
            link.name
        );
        let usable = link.mac.is_none_or(|mac| !mac.is_zero() && !mac.is_multicast());
        assert!(usable, "base: {:?} can be the MAC address of no device", link.mac);
    }
    for key in base.addresses.keys() {
        let what = format!("address {}/{}", key.addr, key.len);
        check_on_device("base", &what, key.link, base);
        check_address("base", &what, key.link, key.addr, scope);
        assert!(!is_link_local(key.addr), "base: {what} is link-local: it would never be removed");
        assert!(Prefix::masked(key.addr, key.len).is_ok(), "base: {what} has no such length");
    }
    check_entries("base", scope, base, base);
    for (key, route) in &base.routes {
        check_route("base", key.prefix, route, scope, base, local);
    }
}

/// Checks the wanted state of one peer. Failure messages begin with `from`.
pub(super) fn check_peer(
    from: &str,
    scope: &Scope,
    base: &State,
    state: &PeerState,
    local: &LocalNode,
    peer: &Peer,
    family: Family,
) {
    let mut wanted = State::default();
    wanted.add(state);
    check_entries(from, scope, base, &wanted);
    let mut places = BTreeSet::new();
    for (prefix, route) in &state.routes {
        let prefix = *prefix;
        check_route(from, prefix, route, scope, base, local);
        assert!(places.insert((prefix, route.slot())), "{from}: two routes to {prefix} in one table with one metric");
        let subnet = peer.subnets.get(family);
        let its_own = subnet == Some(&prefix);
        assert!(its_own, "{from}: a route to {prefix} is not to the peer's subnet of {family}: {subnet:?}");
    }
    if let Some((key, _)) = state.forward {
        let subnet = peer.subnets.get(family);
        assert_eq!(subnet, Some(&key.prefix), "{from}: a forward of {} is not of the peer's subnet", key.prefix);
    }
    if let Some((key, mac)) = state.neighbour {
        for (_, route) in &state.routes {
            let leads_there = route.link != Some(key.link) || route.gateway == Some(key.addr);
            assert!(leads_there, "{from}: the route's next hop {:?} is not the neighbour {}", route.gateway, key.addr);
        }
        let forwarded = state.fdb.is_none_or(|(fdb, _)| fdb.link != key.link || fdb.mac == mac);
        assert!(forwarded, "{from}: the neighbour's address {mac} is not that of the forwarding entry");
    }
}

fn check_entries(from: &str, scope: &Scope, base: &State, wanted: &State) {
    for (key, dst) in &wanted.fdb {
        let what = format!("forwarding entry of {} to {dst}", key.mac);
        check_on_device(from, &what, key.link, base);
        assert_eq!(key.nth, 0, "{from}: a wanted forwarding entry is the first of its address: {what}");
    }
    for (key, forward) in &wanted.forwards {
        let what = format!("forward of {} to {forward}", key.prefix);
        check_on_device(from, &what, key.link, base);
        let carried = base.links.get(&key.link).is_some_and(|link| matches!(link.kind, LinkKind::Tun(_)));
        assert!(carried, "{from}: {what} must be on a device that a data plane carries");
        assert!(scope.is_in_network(&key.prefix), "{from}: {what} is outside the network");
    }
    for key in wanted.neighbours.keys() {
        let what = format!("neighbour {}", key.addr);
        check_on_device(from, &what, key.link, base);
        check_address(from, &what, key.link, key.addr, scope);
    }
}

fn check_on_device(from: &str, what: &str, link: LinkId, base: &State) {
    let there = matches!(link, LinkId::Own(_)) && base.links.contains_key(&link);
    assert!(there, "{from}: {what} must be on a device that base() wants, not on {link:?}");
}

/// On an external device, the networks identify the overlay's objects.
fn check_address(from: &str, what: &str, link: LinkId, addr: std::net::IpAddr, scope: &Scope) {
    let device = slot(link).and_then(|slot| scope.devices.get(slot));
    let external = device.is_some_and(|device| matches!(device.kind, LinkKind::External(_)));
    let inside = scope.networks.get(Family::of(addr)).is_some_and(|network| network.contains(addr));
    assert!(
        inside || !external,
        "{from}: {what} on an external device is outside the network: it would not be removed"
    );
}

fn check_route(from: &str, prefix: Prefix, route: &Route, scope: &Scope, base: &State, local: &LocalNode) {
    assert!(scope.is_in_network(&prefix), "{from}: a route to {prefix} is outside the network");
    assert!(
        scope.has_slot(route.slot(), prefix.family()),
        "{from}: the route to {prefix} is in a slot that is not named"
    );
    assert!(route.kind != RouteKind::Foreign, "{from}: the route to {prefix} is of a kind that is only ever seen");
    let protocol = route.protocol;
    assert!(route.has_own_protocol(), "{from}: the route to {prefix} must have a protocol of ours, not {protocol}");
    let gateway = route.gateway.is_none_or(|gateway| Family::of(gateway) == prefix.family());
    assert!(gateway, "{from}: the next hop of the route to {prefix} is of the other family");
    let exists = match route.link {
        None => route.kind == RouteKind::Blackhole,
        Some(LinkId::Uplink) => scope.uplink.is_some(),
        Some(LinkId::Own(_)) => route.link.is_some_and(|link| base.links.contains_key(&link)),
        Some(LinkId::Other(index)) => local.context.host.links.contains_key(&index),
    };
    assert!(exists, "{from}: the route to {prefix} leads through a link that there is none of: {:?}", route.link);
}

/// Pods must not send larger packets than a device accepts.
fn check_mtu(base: &State, local: &LocalNode, mtu: Option<u32>) {
    let pods = mtu.unwrap_or(local.context.uplink.mtu.0);
    for link in base.links.values() {
        assert!(pods <= link.mtu, "mtu: {pods} for pods is more than the {} of {}", link.mtu, link.name);
    }
    let slots: BTreeSet<_> = base.links.keys().collect();
    assert!(slots.is_empty() || pods > 0, "mtu: must not be 0");
}

fn slot(id: LinkId) -> Option<usize> {
    match id {
        LinkId::Own(slot) => Some(slot.into()),
        LinkId::Uplink | LinkId::Other(_) => None,
    }
}
