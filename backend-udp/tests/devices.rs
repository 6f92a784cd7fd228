//! Creation and removal of devices and paths.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod lab;

use std::sync::mpsc;
use std::time::Duration;

use api::{OpenMode, Path, Reason, Settings, Table, Tun, TunError};
use flannel_backend_udp::path as api;
use flannel_core::net::{Dual, Family};
use lab::{MEBIBYTE, PATIENCE, Shape, TUN, only, overlay, transfer, udp};
use testkit::{Namespace, probe, wait_until};

/// Opens a device that was closed just now.
///
/// A child that another test forks holds all descriptors of this process until it executes its program, so a device can
/// outlive its last owner for a moment.
fn open_when_free(ns: &Namespace, queues: usize) -> Tun {
    let mut opened = None;
    wait_until("the device is free", PATIENCE, || {
        let result = ns.run(|| Tun::open(TUN, OpenMode::Attach, queues))?;
        if !matches!(result, Err(TunError::Busy { .. })) {
            opened = Some(result.unwrap());
        }
        Ok(opened.is_some())
    })
    .unwrap();
    opened.unwrap()
}

/// Waits until the device is gone: see [`open_when_free`].
fn wait_until_gone(ns: &Namespace) {
    wait_until("the device is gone", PATIENCE, || Ok(ns.links()?.iter().all(|link| link.name != TUN))).unwrap();
}

#[test]
fn a_path_ends_when_it_is_dropped_also_under_traffic() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    let to = udp(two, (two.address(Family::V4), 0).into());
    let target = to.local_addr().unwrap();
    let flood = udp(one, (one.address(Family::V4), 0).into());
    let (done, is_done) = mpsc::channel();
    std::thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        scope.spawn(move || {
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                let _ = flood.send_to(&[7; 1000], target);
            }
        });
        wait_until("traffic", PATIENCE, || Ok(paths[1].counters().received.packets > 1000)).unwrap();
        scope.spawn(move || {
            drop(paths);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(PATIENCE).expect("the threads end");
        drop(stop);
    });
    for node in &nodes {
        wait_until_gone(&node.ns);
    }
}

#[test]
fn a_device_that_is_deleted_is_told_and_nothing_spins() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    transfer(one, two, Family::V4, MEBIBYTE, || {});
    one.ns.delete_link(TUN).unwrap();
    wait_until("it is told", PATIENCE, || Ok(!paths[0].is_healthy())).unwrap();
    let peer = udp(two, (two.address(Family::V4), 0).into());
    let calls = |path: &Path| path.counters().sent.calls + path.counters().received.calls;
    let before = calls(&paths[0]);
    for _ in 0..1000 {
        peer.send_to(b"x", (one.address(Family::V4), 9)).unwrap();
    }
    // A TUN queues 500 of them.
    wait_until("they are sent", PATIENCE, || Ok(paths[1].counters().sent.packets >= 400)).unwrap();
    assert!(calls(&paths[0]) - before < 100, "{} calls", calls(&paths[0]) - before);
    assert!(paths[1].is_healthy());
    // Sockets can still be closed.
    paths[0].set_sockets(Dual::default()).unwrap();
}

#[test]
fn a_device_that_is_down_loses_packets_and_goes_on() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    transfer(one, two, Family::V4, MEBIBYTE, || {});
    two.ns.set_down(TUN).unwrap();
    wait_until("drops", PATIENCE, || {
        let _ = probe::ping(&one.ns, two.address(Family::V4), Duration::from_millis(5));
        Ok(paths[1].counters().dropped(Reason::TunRefused) > 0)
    })
    .unwrap();
    assert!(paths[1].is_healthy());
    two.ns.set_up(TUN).unwrap();
    two.ns.ip(&format!("route add 10.5.0.0/16 dev {TUN}")).unwrap();
    transfer(one, two, Family::V4, MEBIBYTE, || {});
}

#[test]
fn a_device_is_created_kept_and_found_again() {
    let ns = Namespace::new("tun").unwrap();
    let open = |name: &str, mode, queues| ns.run(|| Tun::open(name, mode, queues)).unwrap();
    let exists = |name: &str| ns.links().unwrap().iter().any(|link| link.name == name);
    assert!(matches!(open(TUN, OpenMode::Attach, 1), Err(TunError::Missing { .. })));
    let tun = open("flannel%d", OpenMode::Create, 1).unwrap();
    assert_eq!((tun.name(), tun.index()), (TUN, ns.index_of(TUN).unwrap()));
    assert!(matches!(open(TUN, OpenMode::Create, 1), Err(TunError::Exists { .. })));
    assert!(matches!(open(TUN, OpenMode::Attach, 1), Err(TunError::Busy { .. })));
    drop(tun);
    wait_until_gone(&ns);
    for (queues, others) in [(1, 2), (2, 1)] {
        let tun = open(TUN, OpenMode::Create, queues).unwrap();
        tun.keep().unwrap();
        let index = tun.index();
        drop(tun);
        assert!(exists(TUN));
        let mismatch = open(TUN, OpenMode::Attach, others).unwrap_err();
        assert!(matches!(mismatch, TunError::Mismatch { .. }), "{mismatch}");
        let tun = open_when_free(&ns, queues);
        assert_eq!(tun.index(), index);
        drop(tun);
        ns.ip(&format!("link delete dev {TUN}")).unwrap();
    }
    ns.add_bridge("other0").unwrap();
    assert!(matches!(open("other0", OpenMode::Attach, 1), Err(TunError::Mismatch { .. })));
    for name in ["", "a/b", "a b", "sixteen_letters_", ".", ".."] {
        assert!(matches!(open(name, OpenMode::Create, 1), Err(TunError::Name(_))), "{name}");
    }
    assert!(matches!(open(TUN, OpenMode::Create, 0), Err(TunError::Queues(0))));
    assert!(matches!(open(TUN, OpenMode::Create, 17), Err(TunError::Queues(17))));
}

#[test]
fn a_device_that_another_program_used_differently_is_taken_over() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    let before = paths[0].tun().index();
    paths[0].tun().keep().unwrap();
    let table = paths[0].table();
    let [path, _other] = paths;
    drop(path);
    let tun = open_when_free(&one.ns, 1);
    let path = one.ns.run(|| Path::start(tun, Settings::default(), Table::clone(&table)).unwrap()).unwrap();
    path.set_sockets(only(one.endpoint(Family::V4))).unwrap();
    assert_eq!(path.tun().index(), before);
    transfer(one, two, Family::V4, 4 * MEBIBYTE, || {});
}
