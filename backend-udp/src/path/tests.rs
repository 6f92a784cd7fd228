//! Tests of private state, and without offloads that this kernel supports.

#[path = "../../tests/lab/mod.rs"]
mod lab;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::channel;

use flannel_core::net::{Dual, Family};
use testkit::Namespace;

use super::offload::Offload;
use super::{Counters, Notify, OpenMode, Path, Settings, TRIES, Table, Tun, retry};
use crate::path as api;
use lab::{Link, PATIENCE, PORT, Shape, TUN, nodes, only, transfer};

const BYTES: usize = 8 << 20;

/// Returns the counters of a node without these offloads and of a node with them. They are read after the threads have
/// ended: before that, a packet may be counted as read and not yet as sent.
fn without(offloads: &[Offload], link: Link) -> [Counters; 2] {
    let shape = Shape { link, ..Shape::PLAIN };
    let [one, two] = nodes(link);
    let poor = one.start_on(shape, &two, || Tun::open_without(TUN, OpenMode::Create, 1, offloads).unwrap());
    for of_socket in offloads.iter().filter(|what| matches!(what, Offload::UdpSegment | Offload::UdpGro)) {
        poor.shared.degrade(*of_socket, "a test");
    }
    poor.set_sockets(only(one.endpoint(Family::V4))).unwrap();
    let rich = two.start(shape, &one);
    for family in Family::BOTH {
        transfer(&one, &two, family, BYTES, || {});
        transfer(&two, &one, family, BYTES, || {});
    }
    assert_eq!(poor.shared.offloads.list().iter().map(|degraded| degraded.what).collect::<Vec<_>>(), offloads);
    [poor, rich].map(|path| {
        let watch = path.watch();
        drop(path);
        watch.counters()
    })
}

#[test]
fn what_is_in_use_is_tried_again_and_other_errors_are_returned() {
    let open = |results: &[Result<(), bool>]| {
        let mut left = results.iter();
        (retry(|| *left.next().unwrap(), |is_in_use| *is_in_use), left.count())
    };
    assert_eq!(open(&[Err(true), Err(true), Ok(()), Ok(())]), (Ok(()), 1));
    assert_eq!(open(&[Err(true), Err(false), Ok(())]), (Err(false), 1));
    assert_eq!(open(&[Err(true); TRIES]), (Err(true), 0));
}

#[test]
fn a_socket_that_was_lost_in_sending_is_closed_and_reported() {
    let ns = Namespace::new("lost").unwrap();
    ns.set_up("lo").unwrap();
    let (sender, lost) = channel();
    let settings = Settings::default().with_notify(Notify::call(Arc::new(move || sender.send(()).unwrap())));
    let open = || Tun::open(TUN, OpenMode::Create, 1).unwrap();
    let path = ns.run(|| Path::start(open(), settings, Table::new(Dual::default())).unwrap()).unwrap();
    let (v4, v6) = (SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)), SocketAddr::from((Ipv6Addr::LOCALHOST, PORT)));
    path.set_sockets(Dual { v4: Some(v4), v6: Some(v6) }).unwrap();
    path.shared.lose(path.shared.bound().sockets.v4.as_ref().unwrap());
    lost.recv_timeout(PATIENCE).unwrap();
    assert_eq!(path.sockets(), only(v6));
    path.set_sockets(only(v4)).unwrap();
    assert_eq!(path.sockets(), only(v4));
}

#[test]
fn without_packet_headers_of_the_tun_everything_goes_one_by_one() {
    let [poor, rich] = without(&[Offload::VnetHeader], Link::Whole);
    // The difference is what the node itself sends to multicast groups.
    assert_eq!(poor.sent.tun, poor.sent.packets + poor.all_dropped());
    assert_eq!(poor.received.tun, poor.received.packets);
    assert!(rich.received.tun * 2 < rich.received.packets, "{rich:?}");
}

#[test]
fn without_segmentation_at_the_tun_everything_goes_one_by_one() {
    let [poor, _] = without(&[Offload::TunUdp, Offload::TunTcp], Link::Wire);
    // The difference is what the node itself sends to multicast groups.
    assert_eq!(poor.sent.tun, poor.sent.packets + poor.all_dropped());
    assert_eq!(poor.received.tun, poor.received.packets);
}

#[test]
fn without_udp_segmentation_at_the_tun_tcp_still_goes_in_super_packets() {
    let [poor, _] = without(&[Offload::TunUdp], Link::Whole);
    assert!(poor.received.tun * 2 < poor.received.packets && poor.sent.tun * 2 < poor.sent.packets, "{poor:?}");
}

#[test]
fn without_udp_segmentation_of_the_socket_datagrams_are_sent_one_by_one() {
    let [poor, _] = without(&[Offload::UdpSegment], Link::Whole);
    assert_eq!(poor.sent.udp, poor.sent.packets);
    assert!(poor.received.tun * 2 < poor.received.packets, "{poor:?}");
}

#[test]
fn without_receive_offload_of_the_socket_datagrams_are_received_one_by_one() {
    for link in [Link::Whole, Link::Wire] {
        let [poor, rich] = without(&[Offload::UdpGro], link);
        assert_eq!(poor.received.udp, poor.received.packets);
        assert!(rich.received.udp * 2 < rich.received.packets, "{rich:?}");
    }
}
