use std::net::SocketAddr;

use flannel_core::backend::{BackendError, LocalNode, Skip};
use flannel_core::kernel::{Forward, LinkKind, Tun};
use flannel_core::lease::Json;
use flannel_core::net::Dual;
use flannel_core::testing::backend_contract::{self, Made};
use flannel_core::testing::samples::{self, lease, node_address, node_subnet};

use super::*;

fn udp(families: &[Family], settings: &str) -> Result<(Udp, LocalNode), BackendError> {
    let context = samples::context(samples::config(families, settings));
    let backend = Udp::new(&context.config)?;
    let attrs = backend.advertise(&context)?;
    Ok((backend, samples::local(context, attrs)))
}

fn made(families: &[Family]) -> (Udp, LocalNode) {
    udp(families, r#"{"Type":"udp"}"#).unwrap()
}

#[test]
fn the_backend_contract_holds() {
    backend_contract::all(&Made::new(r#"{"Type":"udp"}"#, Udp::new));
}

#[test]
fn the_lease_is_flannels_and_says_the_port_of_ipv6() {
    let json = |families: &[Family]| made(families).1.lease.attrs.to_json();
    assert_eq!(json(&[Family::V4]), r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
    let both = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendV6Data":{"Port":8285}}"#;
    assert_eq!(json(&Family::BOTH), both);
}

#[test]
fn the_device_is_of_all_families_and_each_network_is_routed_into_it() {
    let (backend, local) = made(&Family::BOTH);
    let state = backend.base(&local);
    let (id, link) = state.links.first_key_value().unwrap();
    assert_eq!((link.name.as_str(), link.mtu, link.mac), ("flannel0", 1452, None));
    let LinkKind::Tun(Tun { tunnel: Some(tunnel), multi_queue: false, .. }) = &link.kind else {
        panic!("{:?}", link.kind)
    };
    assert_eq!((tunnel.port, tunnel.queues.get(), tunnel.socket_buffer), (8285, 1, None));
    let own = |value: fn(Family, u8) -> _| Dual { v4: Some(value(Family::V4, 1)), v6: Some(value(Family::V6, 1)) };
    assert_eq!(tunnel.local, own(node_address));
    assert_eq!(tunnel.subnets, local.lease.subnets);
    let addresses: Vec<_> = state.addresses.keys().map(|key| (key.addr, key.len)).collect();
    let bases = local.lease.subnets.map(|_, subnet| subnet.addr());
    assert_eq!(addresses, [(bases.v4.unwrap(), 32), (bases.v6.unwrap(), 128)]);
    for (_, network) in local.context.config.networks.iter() {
        let (_, route) = state.routes_to(network.prefix).next().unwrap();
        assert_eq!((route.link, route.gateway, route.slot()), (Some(*id), None, wanted::SLOT));
    }
    assert_eq!(backend.mtu(&local.context), Some(Mtu(1452)));
    assert_eq!(made(&[Family::V4]).0.mtu(&made(&[Family::V4]).1.context), Some(Mtu(1472)));
}

#[test]
fn a_peer_is_forwarded_to_at_its_public_address() {
    let (backend, local) = made(&Family::BOTH);
    let mut peer = lease(2, &Family::BOTH, "");
    for family in Family::BOTH {
        let state = backend.peer(&local, &peer, family).unwrap();
        let (key, forward) = state.forward.unwrap();
        assert_eq!(key.prefix, node_subnet(family, 2));
        assert_eq!(forward, Forward::to(SocketAddr::new(node_address(family, 2), 8285)));
        assert!(state.routes.is_empty());
    }
    peer.attrs.backend_data.v6 = Some(wire::encode(9000));
    let port = |family| backend.peer(&local, &peer, family).unwrap().forward.unwrap().1.endpoint.port();
    assert_eq!((port(Family::V4), port(Family::V6)), (8285, 9000));
    let of_go = lease(3, &[Family::V4], "");
    assert_eq!(backend.peer(&local, &of_go, Family::V6), Err(Skip::NoAddress(Family::V6)));
}

#[test]
fn a_peer_whose_port_does_not_parse_is_skipped() {
    let (backend, local) = made(&Family::BOTH);
    let mut peer = lease(2, &Family::BOTH, "");
    for (data, problem) in [
        (r#"{"Port":0}"#, "BackendV6Data: Port: 0 is not a UDP port"),
        (r#"{"Port":70000}"#, "BackendV6Data: Port: 70000 is not a UDP port"),
        (r#"{"Port":"8285"}"#, "BackendV6Data: Port: "),
        (r#"[8285]"#, "BackendV6Data: "),
    ] {
        peer.attrs.backend_data.v6 = Some(Json::parse(data).unwrap());
        let Err(Skip::BadData(found)) = backend.peer(&local, &peer, Family::V6) else { panic!("{data}") };
        assert!(found.starts_with(problem), "{data}: {found}");
        assert_eq!(backend.hardware_address(&peer.attrs, Family::V6), Err(Skip::BadData(found)));
        // IPv4 has no data, and the peer keeps it.
        assert!(backend.peer(&local, &peer, Family::V4).is_ok());
        assert_eq!(backend.hardware_address(&peer.attrs, Family::V4), Ok(None));
    }
    peer.attrs.backend_data.v6 = Some(Json::parse("{}").unwrap());
    let (_, forward) = backend.peer(&local, &peer, Family::V6).unwrap().forward.unwrap();
    assert_eq!(forward.endpoint.port(), backend.config().port);
}

#[test]
fn settings_are_read_and_unknown_keys_ignored() {
    let settings = r#"{"Type":"udp","Port":9000,"Queues":4,"SocketBuffer":1048576,"Proxy":{"any":1}}"#;
    let (backend, local) = udp(&[Family::V4], settings).unwrap();
    let config = backend.config();
    assert_eq!((config.port, config.queues.get(), config.socket_buffer), (9000, 4, Some(1_048_576)));
    let device = &backend.devices(&local)[0];
    assert!(matches!(&device.kind, LinkKind::Tun(tun) if tun.multi_queue), "{device:?}");
    for (settings, path) in [
        (r#"{"Type":"udp","Port":0}"#, "Backend.Port: 0 is not a UDP port"),
        (r#"{"Type":"udp","Port":65536}"#, "Backend.Port"),
        (r#"{"Type":"udp","Port":"8285"}"#, "Backend.Port"),
        (r#"{"Type":"udp","Queues":0}"#, "Backend.Queues: 0 is out of range"),
        (r#"{"Type":"udp","Queues":17}"#, "Backend.Queues"),
        (r#"{"Type":"udp","Queues":256}"#, "Backend.Queues"),
        (r#"{"Type":"udp","SocketBuffer":1}"#, "Backend.SocketBuffer: 1 is out of range"),
    ] {
        let error = udp(&[Family::V4], settings).unwrap_err().to_string();
        assert!(error.contains(path), "{settings}: {error}");
    }
}

#[test]
fn an_uplink_that_is_too_narrow_or_lacks_an_address_is_refused_with_its_remedy() {
    let (backend, mut local) = made(&Family::BOTH);
    local.context.uplink.mtu = Mtu(1280 + 47);
    let error = backend.advertise(&local.context).unwrap_err();
    assert!(error.to_string().contains("1328"), "{error}");
    local.context.uplink.mtu = Mtu(1280 + 48);
    assert!(backend.advertise(&local.context).is_ok());
    local.context.uplink.addrs.v6 = None;
    let error = backend.advertise(&local.context).unwrap_err();
    assert!(matches!(error, BackendError::Host { .. }) && error.to_string().contains("no IPv6 address"), "{error}");
}
