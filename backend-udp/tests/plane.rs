//! The data plane as the agent's kernel calls it.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::net::{Ipv4Addr, SocketAddr};

use flannel_backend_udp::UdpDataPlane;
use flannel_core::kernel::{DataPlane, Forward, KernelError, LinkName, PublicKey, Tunnel};
use flannel_core::net::{Dual, Prefix};
use testkit::Namespace;

const DEVICE: &str = "flannel0";

fn name() -> LinkName {
    LinkName::new(DEVICE).unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn tunnel(port: u16) -> Tunnel {
    let local = Dual { v4: Some(Ipv4Addr::LOCALHOST.into()), v6: None };
    Tunnel::new(port, local, Dual { v4: Some(prefix("10.244.1.0/24")), v6: None })
}

fn namespace() -> Namespace {
    let ns = Namespace::new("plane").unwrap();
    ns.set_up("lo").unwrap();
    ns
}

fn errno(error: &KernelError) -> i32 {
    let KernelError::Refused { errno, .. } = error else { panic!("{error}") };
    *errno
}

/// Creates a device with one forward and drops its data plane. Returns the device's index.
fn left_behind(ns: &Namespace) -> u32 {
    ns.run(|| {
        let mut plane = UdpDataPlane::new();
        let index = plane.open(&name(), None, &tunnel(8285)).unwrap();
        plane.keep(index).unwrap();
        index
    })
    .unwrap()
}

#[test]
fn an_observer_keeps_neither_device_nor_port() {
    let ns = namespace();
    let (index, observer) = ns
        .run(|| {
            let mut plane = UdpDataPlane::new();
            let observer = plane.observer();
            let index = plane.open(&name(), None, &tunnel(8285)).unwrap();
            plane.keep(index).unwrap();
            let forward = Forward::to(SocketAddr::from(([192, 0, 2, 2], 8285)));
            plane.write(index, &[(prefix("10.244.2.0/24"), Some(forward))]).unwrap();
            let seen = observer.devices();
            assert_eq!((seen.len(), seen[0].forwards, seen[0].name.as_str()), (1, 1, DEVICE));
            assert_eq!(plane.forwards(index), [(prefix("10.244.2.0/24"), forward)]);
            (index, observer)
        })
        .unwrap();
    assert!(observer.devices().is_empty());
    // Both can be opened again at once.
    ns.run(|| {
        let mut next = UdpDataPlane::new();
        assert_eq!(next.held(index), None);
        assert_eq!(next.open(&name(), Some(index), &tunnel(8285)).unwrap(), index);
        assert_eq!(next.held(index), Some(tunnel(8285)));
        assert!(next.forwards(index).is_empty());
    })
    .unwrap();
}

#[test]
fn a_port_that_is_taken_is_told_before_a_device_is_made() {
    let ns = namespace();
    let last = ns.links().unwrap().iter().map(|link| link.index).max().unwrap();
    let error = ns
        .run(|| {
            let _other = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 8285)).unwrap();
            UdpDataPlane::new().open(&name(), None, &tunnel(8285)).unwrap_err()
        })
        .unwrap();
    assert_eq!(errno(&error), nix::errno::Errno::EADDRINUSE as i32);
    assert!(error.to_string().contains("ss -ulpn sport = :8285"), "{error}");
    // No device was created and deleted.
    ns.add_bridge("probe").unwrap();
    assert_eq!(ns.index_of("probe").unwrap(), last + 1);
}

#[test]
fn a_device_is_opened_by_its_index_whatever_it_is_called() {
    let ns = namespace();
    let index = left_behind(&ns);
    ns.set_link(DEVICE, "name other0").unwrap();
    ns.run(|| {
        let mut plane = UdpDataPlane::new();
        assert_eq!(plane.open(&name(), Some(index), &tunnel(8285)).unwrap(), index);
        let error = plane.open(&name(), Some(index + 100), &tunnel(8286)).unwrap_err();
        assert_eq!(errno(&error), nix::errno::Errno::ENODEV as i32);
        assert_eq!(plane.held(index), Some(tunnel(8285)));
    })
    .unwrap();
}

#[test]
fn another_port_and_another_number_of_queues_keep_the_forwards() {
    let ns = namespace();
    ns.run(|| {
        let mut plane = UdpDataPlane::new();
        let mut several = tunnel(8285);
        several.queues = 2.try_into().unwrap();
        let index = plane.open(&name(), None, &several).unwrap();
        plane.keep(index).unwrap();
        let forward = Forward::to(SocketAddr::from(([192, 0, 2, 2], 8285)));
        plane.write(index, &[(prefix("10.244.2.0/24"), Some(forward))]).unwrap();
        for (port, queues) in [(9000, 2), (9000, 3), (8285, 3)] {
            let mut changed = tunnel(port);
            changed.queues = queues.try_into().unwrap();
            assert_eq!(plane.open(&name(), Some(index), &changed).unwrap(), index);
            assert_eq!(plane.held(index), Some(changed));
            assert_eq!(plane.forwards(index).len(), 1);
        }
        let mut secret = forward;
        secret.key = Some(PublicKey([7; 32]));
        let error = plane.write(index, &[(prefix("10.244.3.0/24"), Some(secret))]).unwrap_err();
        assert_eq!(errno(&error), nix::errno::Errno::EOPNOTSUPP as i32);
        assert_eq!(plane.forwards(index).len(), 1, "none of the changes was made");
        plane.close(index);
        assert_eq!(errno(&plane.write(index, &[]).unwrap_err()), nix::errno::Errno::ENODEV as i32);
    })
    .unwrap();
}
