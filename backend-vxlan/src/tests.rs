use std::sync::Arc;

use flannel_core::kernel::{HostLink, OverlayName};
use flannel_core::state::{AddressKey, LinkId, LinkKind, LinkName, NeighbourKey, Route};
use flannel_core::testing::samples;

use flannel_core::net::Vni;

use super::*;

const V4: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
const DUAL: &str =
    r#"{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00:5::/32","Backend":{"Type":"vxlan"}}"#;

fn set_up(config: &str) -> (Vxlan, Situation) {
    let situation = samples::situation(config).unwrap();
    (Vxlan::new(&situation.config).unwrap(), situation)
}

fn node(config: &str) -> (Vxlan, Local) {
    let (vxlan, situation) = set_up(config);
    let attrs = vxlan.advertise(&situation).unwrap();
    (vxlan, samples::local(situation, attrs))
}

/// Node `n` as it would publish itself.
fn peer(vxlan: &Vxlan, local: &Local, n: u16) -> Peer {
    let mac = MacAddr([2, 0, 0, 1, n.to_be_bytes()[0], n.to_be_bytes()[1]]);
    let attrs = LeaseAttrs {
        public_ip: samples::public(n, &vxlan.families),
        backend_data: vxlan.families.map(|_, ()| wire::encode(vxlan.config.vni, mac)),
        ..local.lease.attrs.clone()
    };
    samples::lease(n, attrs)
}

#[test]
fn a_node_publishes_exactly_what_flannel_would() {
    let (_, local) = node(V4);
    let mac = wire::mac_of(&local.lease.attrs, Family::V4).unwrap();
    assert_eq!(
        local.lease.attrs.to_json(),
        format!(
            r#"{{"PublicIP":"192.168.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    );
    assert!(!mac.is_multicast() && mac.0[0] & 2 == 2, "{mac} is locally administered unicast");
}

#[test]
fn the_device_is_the_one_flannel_makes_marked_as_ours() {
    let (vxlan, local) = node(V4);
    let state = vxlan.base(&local);
    let link = &state.links[&LinkId::Own(0)];
    assert_eq!((link.name.as_str(), link.mtu, link.up), ("flannel.1", 1450, true));
    assert_eq!(link.group, OverlayName::default().mark());
    let LinkKind::Vxlan(kind) = &link.kind else { panic!("{link:?}") };
    assert_eq!((kind.vni, kind.port, kind.learning, kind.gbp), (Vni::ONE, None, false, false));
    assert_eq!((kind.local, kind.lower), (Some("192.168.0.1".parse().unwrap()), Some(LinkId::Uplink)));
    let key = AddressKey { link: LinkId::Own(0), addr: "10.5.0.0".parse().unwrap(), len: 32 };
    assert_eq!(state.addresses.keys().collect::<Vec<_>>(), [&key]);
}

#[test]
fn a_peer_gets_forwarding_entry_neighbour_and_onlink_route_in_each_family() {
    let (vxlan, local) = node(DUAL);
    let peer = peer(&vxlan, &local, 7);
    for (family, subnet, public, link) in [
        (Family::V4, "10.5.7.0/24", "192.168.0.8", LinkId::Own(0)),
        (Family::V6, "fd00:5:0:7::/64", "fd01::8", LinkId::Own(1)),
    ] {
        let state = vxlan.peer(&local, &peer, family).unwrap();
        let subnet: flannel_core::net::Prefix = subnet.parse().unwrap();
        assert_eq!(state.fdb.map(|(key, dst)| (key.link, dst)), Some((link, public.parse().unwrap())));
        assert_eq!(state.neighbour.map(|(key, _)| key), Some(NeighbourKey { link, addr: subnet.addr() }));
        assert_eq!(state.route, Some((subnet, Route::overlay(subnet, subnet.addr(), link))));
    }
}

#[test]
fn pods_get_70_bytes_less_as_soon_as_ipv6_is_on() {
    for (config, pods) in [(V4, 1450), (DUAL, 1430)] {
        let (vxlan, situation) = set_up(config);
        assert_eq!(vxlan.mtu(&situation), Some(Mtu(pods)));
    }
    let (vxlan, local) = node(DUAL);
    let links = vxlan.base(&local).links;
    assert_eq!(links.values().map(|link| link.mtu).collect::<Vec<_>>(), [1450, 1430]);
}

#[test]
fn an_mtu_setting_lowers_but_never_exceeds_the_uplinks() {
    for (mtu, pods) in [(1400, 1350), (9000, 1450)] {
        let (vxlan, situation) =
            set_up(&format!(r#"{{"Network":"10.0.0.0/8","Backend":{{"Type":"vxlan","MTU":{mtu}}}}}"#));
        assert_eq!(vxlan.mtu(&situation), Some(Mtu(pods)));
    }
    let (vxlan, mut situation) = set_up(DUAL);
    situation.uplink.mtu = Mtu(1300);
    let error = vxlan.advertise(&situation).unwrap_err().to_string();
    assert!(error.contains("1280") && error.contains("eth0"), "{error}");
}

#[test]
fn a_mac_is_kept_from_the_previous_lease_else_from_the_device_else_made() {
    let (vxlan, mut situation) = set_up(V4);
    let made = wanted::own_mac(&vxlan, &situation, Family::V4);
    assert_eq!(made, wanted::own_mac(&vxlan, &situation, Family::V4), "the same on every start");
    let device = MacAddr([2, 1, 1, 1, 1, 1]);
    let mut host = (*situation.host).clone();
    let LinkKind::Vxlan(kind) = vxlan.base(&node(V4).1).links[&LinkId::Own(0)].kind.clone() else { panic!() };
    let link = HostLink {
        name: LinkName::new("flannel.1").unwrap(),
        kind: LinkKind::Vxlan(kind),
        mac: Some(device),
        mtu: 1450,
        up: true,
        group: 0,
        alias: None,
    };
    host.links.insert(9, link);
    situation.host = Arc::new(host);
    assert_eq!(wanted::own_mac(&vxlan, &situation, Family::V4), device);
    let previous = MacAddr([2, 2, 2, 2, 2, 2]);
    let mut attrs = LeaseAttrs::default();
    attrs.backend_data.v4 = Some(wire::encode(Vni::ONE, previous));
    situation.previous = Some(Arc::new(samples::lease(0, attrs)));
    assert_eq!(wanted::own_mac(&vxlan, &situation, Family::V4), previous);
}

#[test]
fn nodes_and_networks_have_different_macs() {
    let (vxlan, situation) = set_up(DUAL);
    let mut other = situation.clone();
    other.node = flannel_core::subnet::NodeIdentity::new("node-1").unwrap();
    let macs: std::collections::BTreeSet<_> = [
        wanted::own_mac(&vxlan, &situation, Family::V4),
        wanted::own_mac(&vxlan, &situation, Family::V6),
        wanted::own_mac(&vxlan, &other, Family::V4),
    ]
    .into();
    assert_eq!(macs.len(), 3);
}

#[test]
fn direct_routing_needs_no_tunnel_on_the_link_and_keeps_it_elsewhere() {
    let (vxlan, local) = node(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","DirectRouting":true}}"#);
    let near = peer(&vxlan, &local, 7);
    let state = vxlan.peer(&local, &near, Family::V4).unwrap();
    let subnet = near.subnets.v4.unwrap();
    let route = Route::direct(subnet, near.attrs.public_ip.v4.unwrap(), LinkId::Uplink);
    assert_eq!(state, PeerState { route: Some((subnet, route)), ..PeerState::default() });
    let mut far = near;
    far.attrs.public_ip.v4 = Some("203.0.113.9".parse().unwrap());
    assert!(vxlan.peer(&local, &far, Family::V4).unwrap().fdb.is_some());
}

#[test]
fn peers_that_publish_nonsense_are_skipped_with_the_field_named() {
    let (vxlan, local) = node(V4);
    for (data, names) in [
        (None, "missing"),
        (Some("{}"), "VtepMAC"),
        (Some("7"), "BackendData"),
        (Some(r#"{"VtepMAC":"02:00:00:00:00:01:02:03"}"#), "VtepMAC"),
        (Some(r#"{"VtepMAC":5}"#), "VtepMAC"),
    ] {
        let mut peer = peer(&vxlan, &local, 3);
        peer.attrs.backend_data.v4 = data.map(|text| flannel_core::lease::Json::parse(text).unwrap());
        let error = vxlan.peer(&local, &peer, Family::V4).unwrap_err().to_string();
        assert!(error.contains(names), "{data:?}: {error}");
    }
}

#[test]
fn settings_out_of_range_name_their_path() {
    for (backend, path) in [
        (r#"{"Type":"vxlan","VNI":16777216}"#, "$.Backend.VNI"),
        (r#"{"Type":"vxlan","VNI":-1}"#, "$.Backend.VNI"),
        (r#"{"Type":"vxlan","VNI":16777215}"#, "$.Backend.VNI"),
        (r#"{"Type":"vxlan","Port":65536}"#, "$.Backend.Port"),
        (r#"{"Type":"vxlan","MTU":"big"}"#, "$.Backend.MTU"),
        (r#"{"Type":"vxlan","GBP":1}"#, "$.Backend.GBP"),
    ] {
        let config = format!(r#"{{"Network":"10.0.0.0/8","Backend":{backend}}}"#);
        let situation = samples::situation(&config).unwrap();
        let error = Vxlan::new(&situation.config).unwrap_err().to_string();
        assert!(error.contains(path), "{backend}: {error}");
    }
}

#[test]
fn peers_have_no_key_in_common() {
    let (vxlan, local) = node(DUAL);
    let mut state = State::default();
    for n in 1..200 {
        let peer = peer(&vxlan, &local, n);
        for family in Family::BOTH {
            state.add(&vxlan.peer(&local, &peer, family).unwrap());
        }
    }
    assert_eq!((state.fdb.len(), state.neighbours.len(), state.routes.len()), (398, 398, 398));
}
