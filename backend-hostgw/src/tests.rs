use flannel_core::net::Dual;
use flannel_core::testing::samples;

use super::*;

const V4: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"host-gw"}}"#;
const DUAL: &str =
    r#"{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00:5::/32","Backend":{"Type":"host-gw"}}"#;

fn node(config: &str) -> (HostGw, Local) {
    let situation = samples::situation(config).unwrap();
    let host_gw = HostGw::new(&situation.config).unwrap();
    let attrs = host_gw.advertise(&situation).unwrap();
    (host_gw, samples::local(situation, attrs))
}

fn peer(local: &Local, n: u16) -> Peer {
    let families = local.lease.subnets.map(|_, _| ());
    samples::lease(n, LeaseAttrs { public_ip: samples::public(n, &families), ..local.lease.attrs.clone() })
}

#[test]
fn a_node_publishes_its_address_and_no_data() {
    let (_, local) = node(V4);
    assert_eq!(local.lease.attrs.to_json(), r#"{"PublicIP":"192.168.0.1","PublicIPv6":null,"BackendType":"host-gw"}"#);
}

#[test]
fn a_peer_on_the_link_gets_a_plain_route_in_each_family_and_nothing_else() {
    let (host_gw, local) = node(DUAL);
    let peer = peer(&local, 7);
    for family in Family::BOTH {
        let (subnet, public) = (*peer.subnets.get(family).unwrap(), *peer.attrs.public_ip.get(family).unwrap());
        let route = Route::direct(subnet, public, LinkId::Uplink);
        let state = host_gw.peer(&local, &peer, family).unwrap();
        assert_eq!(state, PeerState { route: Some((subnet, route)), ..PeerState::default() });
    }
    assert!(host_gw.base(&local).is_empty());
}

#[test]
fn a_peer_on_another_link_of_ours_is_reached_through_that_link() {
    let (host_gw, mut local) = node(V4);
    let mut host = (*local.situation.host).clone();
    host.on_link.push(flannel_core::kernel::HostRoute {
        prefix: "198.51.100.0/24".parse().unwrap(),
        link: Some(9),
        gateway: None,
        metric: 0,
    });
    local.situation.host = std::sync::Arc::new(host);
    let mut peer = peer(&local, 7);
    peer.attrs.public_ip.v4 = Some("198.51.100.7".parse().unwrap());
    let (_, route) = host_gw.peer(&local, &peer, Family::V4).unwrap().route.unwrap();
    assert_eq!(route.link, Some(LinkId::Other(9)));
}

#[test]
fn a_peer_behind_a_gateway_is_skipped_with_the_remedy() {
    let (host_gw, local) = node(V4);
    let mut peer = peer(&local, 7);
    peer.attrs.public_ip.v4 = Some("203.0.113.9".parse().unwrap());
    let skip = host_gw.peer(&local, &peer, Family::V4).unwrap_err();
    assert!(matches!(skip, Skip::NotOnLink { .. }));
    assert!(skip.to_string().contains("vxlan"), "{skip}");
}

#[test]
fn a_public_address_that_is_not_the_uplinks_is_refused_with_the_remedy() {
    let mut situation = samples::situation(V4).unwrap();
    situation.public = Dual { v4: Some("203.0.113.1".parse().unwrap()), v6: None };
    let host_gw = HostGw::new(&situation.config).unwrap();
    let error = host_gw.advertise(&situation).unwrap_err().to_string();
    assert!(error.contains("203.0.113.1") && error.contains("vxlan"), "{error}");
}
