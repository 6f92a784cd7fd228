//! Traffic through packet paths on the real kernel: over a link that passes super-packets whole, and over one that does
//! not.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod lab;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::{Path, Reason};
use flannel_backend_udp::path as api;
use flannel_core::net::{Dual, Family};
use lab::detour::Detour;
use lab::{LINK, Link, MEBIBYTE, Noise, PATIENCE, PORT, Shape, TUN, only, overlay, transfer, udp, underlay_address};
use nix::sys::socket::{setsockopt, sockopt};
use testkit::{Namespace, cases, probe, wait_until};

cases! {
    fn tcp_arrives_as_it_was_sent_where_super_packets_pass() = tcp_arrives(Shape::PLAIN);
    fn tcp_arrives_as_it_was_sent_over_a_wire() = tcp_arrives(Shape::WIRE);
    fn tcp_arrives_as_it_was_sent_over_ipv6() = tcp_arrives(Shape { underlay: Family::V6, ..Shape::PLAIN });
    fn tcp_arrives_as_it_was_sent_over_ipv6_on_a_wire() = tcp_arrives(Shape { underlay: Family::V6, ..Shape::WIRE });
    fn tcp_arrives_as_it_was_sent_with_several_queues() = tcp_arrives(Shape { queues: 3, ..Shape::PLAIN });
    fn datagrams_of_every_size_arrive_where_super_packets_pass() = datagrams_arrive(Shape::PLAIN);
    fn datagrams_of_every_size_arrive_over_a_wire() = datagrams_arrive(Shape::WIRE);
    fn datagrams_of_every_size_arrive_over_ipv6() = datagrams_arrive(Shape { underlay: Family::V6, ..Shape::PLAIN });
}

/// In both directions and both families at once.
fn tcp_arrives(shape: Shape) {
    let (nodes, paths) = overlay(shape);
    let [one, two] = &nodes;
    std::thread::scope(|scope| {
        for (from, to, family) in
            [(one, two, Family::V4), (two, one, Family::V4), (one, two, Family::V6), (two, one, Family::V6)]
        {
            scope.spawn(move || transfer(from, to, family, 32 * MEBIBYTE, || {}));
        }
    });
    for path in &paths {
        let counters = path.counters();
        assert!(path.is_healthy());
        assert_eq!(path.watch().limitations(), []);
        assert!(counters.sent.packets > 3 * counters.sent.tun, "super-packets are read: {counters:?}");
        assert!(counters.sent.packets > 3 * counters.sent.udp, "and sent in runs: {counters:?}");
        assert!(counters.received.packets > 3 * counters.received.udp, "and received in runs: {counters:?}");
        assert!(counters.received.packets > 3 * counters.received.tun, "and written as super-packets: {counters:?}");
        assert_eq!(counters.unbatched, 0);
    }
    // Some 50 000 packets, unless super-packets pass whole.
    assert_eq!(one.link_packets() > 45_000, shape.link == Link::Wire);
    no_wrong_checksums(&nodes.each_ref().map(|node| &node.ns));
}

fn no_wrong_checksums(all: &[&Namespace]) {
    for ns in all {
        let snmp = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap()).unwrap();
        for protocol in ["Tcp:", "Udp:", "Icmp:"] {
            let mut lines = snmp.lines().filter(|line| line.starts_with(protocol)).map(str::split_whitespace);
            let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
            let wrong = names.zip(values).find(|(name, _)| *name == "InCsumErrors").unwrap();
            assert_eq!(wrong.1, "0", "{protocol} {}", ns.name());
        }
        let snmp6 = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap()).unwrap();
        let wrong = snmp6.lines().find(|line| line.starts_with("Udp6InCsumErrors")).unwrap();
        assert_eq!(wrong.split_whitespace().nth(1), Some("0"), "{}", ns.name());
    }
}

/// Single, fragmented, in runs, and pings.
fn datagrams_arrive(shape: Shape) {
    let (nodes, _paths) = overlay(shape);
    let [one, two] = &nodes;
    for family in Family::BOTH {
        let (from, to) = (udp(one, (one.address(family), 0).into()), udp(two, (two.address(family), 0).into()));
        let (source, target) = (from.local_addr().unwrap(), to.local_addr().unwrap());
        let mut noise = Noise::new(3);
        let mut buffer = vec![0; 1 << 16];
        for size in (0..1500).chain([2000, 2899, 3000, 4000, 9000, 30_000, 65_000]) {
            let mut sent = vec![0; size];
            noise.fill(&mut sent);
            from.send_to(&sent, target).unwrap();
            assert_eq!(to.recv_from(&mut buffer).unwrap(), (size, source));
            assert_eq!(buffer[..size], sent);
            to.send_to(&sent, source).unwrap();
            assert_eq!(from.recv_from(&mut buffer).unwrap(), (size, target));
            assert_eq!(buffer[..size], sent);
        }
        // Each run is one super-packet to the TUN.
        for (size, len) in [(1, 60), (7, 100), (100, 6400), (1000, 30_500), (1400, 60_000), (1404, 1405)] {
            setsockopt(&from, sockopt::UdpGsoSegment, &size).unwrap();
            let mut sent = vec![0; len];
            noise.fill(&mut sent);
            from.send_to(&sent, target).unwrap();
            for datagram in sent.chunks(size as usize) {
                assert_eq!(to.recv_from(&mut buffer).unwrap(), (datagram.len(), source));
                assert_eq!(&buffer[..datagram.len()], datagram);
            }
        }
        probe::ping(&one.ns, two.address(family), PATIENCE).unwrap();
    }
    no_wrong_checksums(&[&one.ns, &two.ns]);
}

#[test]
fn a_path_that_carries_less_than_the_device_has_its_datagrams_fragmented() {
    for link in [Link::Whole, Link::Wire] {
        let (nodes, paths) = overlay(Shape { link, ..Shape::PLAIN });
        let [one, two] = &nodes;
        transfer(one, two, Family::V4, MEBIBYTE, || {});
        assert_eq!(paths[0].counters().unbatched, 0);
        for node in &nodes {
            node.ns.set_mtu(LINK, 1400).unwrap();
        }
        transfer(one, two, Family::V4, 16 * MEBIBYTE, || {});
        transfer(two, one, Family::V6, 16 * MEBIBYTE, || {});
        for path in &paths {
            assert!(path.counters().unbatched > 1000, "{:?}", path.counters());
            let narrow = path.watch().limitations();
            // No offload is turned off: smaller datagrams and other peers still go in runs.
            assert!(!narrow.is_empty() && narrow.iter().all(|it| it.what.starts_with("path to ")), "{narrow:?}");
        }
    }
}

#[test]
fn over_a_path_that_loses_repeats_and_reorders_all_that_arrives_is_what_was_sent() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    for ((path, peer), endpoint) in paths.iter().zip([&nodes[1], &nodes[0]]).zip(Detour::endpoints()) {
        let changes: Vec<_> = peer.own().iter().map(|(_, subnet)| (*subnet, Some(endpoint))).collect();
        path.change(&changes);
    }
    let detour = Detour::start(&nodes);
    let [one, two] = &nodes;
    transfer(one, two, Family::V4, 8 * MEBIBYTE, || {});
    transfer(two, one, Family::V6, 8 * MEBIBYTE, || {});
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    for done in &detour.done {
        assert!([&done.lost, &done.twice, &done.swapped].into_iter().all(|counter| count(counter) > 50), "{done:?}");
    }

    let (from, to) = (udp(one, (one.address(Family::V4), 0).into()), udp(two, (two.address(Family::V4), 0).into()));
    let target = to.local_addr().unwrap();
    let payload = |number: u32| {
        let mut payload = vec![0; 4 + number as usize % 1200];
        Noise::new(number.into()).fill(&mut payload[4..]);
        payload[..4].copy_from_slice(&number.to_be_bytes());
        payload
    };
    to.set_nonblocking(true).unwrap();
    let [done, _] = &detour.done;
    let (lost, twice) = (count(&done.lost), count(&done.twice));
    let (mut received, mut sent, mut buffer) = (0, 0, vec![0; 2000]);
    for _ in 0..100 {
        let before = paths[0].counters().sent.packets;
        for _ in 0..50 {
            from.send_to(&payload(sent), target).unwrap();
            sent += 1;
        }
        wait_until("they are sent", PATIENCE, || Ok(paths[0].counters().sent.packets >= before + 50)).unwrap();
        wait_until("they arrive", PATIENCE, || {
            while let Ok((len, _)) = to.recv_from(&mut buffer) {
                let number = u32::from_be_bytes(buffer[..4].try_into().unwrap());
                assert!(number < sent && buffer[..len] == payload(number), "{number}");
                received += 1;
            }
            Ok(received + count(&done.lost) - lost >= u64::from(sent))
        })
        .unwrap();
    }
    assert!(received <= u64::from(sent) + count(&done.twice) - twice, "{received} of {sent}: {done:?}");
    no_wrong_checksums(&[&one.ns, &two.ns]);
}

#[test]
fn a_destination_that_no_peer_has_is_answered_and_groups_are_not() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, _] = &nodes;
    for (family, nowhere) in [(Family::V4, "10.5.77.1"), (Family::V6, "fd00:5:0:77::1")] {
        let socket = udp(one, (one.address(family), 0).into());
        // Without this option the kernel does not report errors that may be temporary.
        match family {
            Family::V4 => setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap(),
            Family::V6 => setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap(),
        }
        socket.connect((nowhere, 9)).unwrap();
        wait_until("the answer", PATIENCE, || Ok(socket.send(b"x").is_err())).unwrap();
    }
    // A packet is counted after its answer has arrived.
    wait_until("they are counted", PATIENCE, || {
        let counters = paths[0].counters();
        Ok(counters.answered >= 2 && counters.dropped(Reason::NoPeer) >= counters.answered)
    })
    .unwrap();
}

#[test]
fn sockets_are_replaced_under_traffic() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    let subnets: Vec<_> = two.own().iter().map(|(_, subnet)| *subnet).collect();
    transfer(one, two, Family::V4, 64 * MEBIBYTE, || {
        for port in PORT + 1..PORT + 20 {
            let moved = SocketAddr::new(underlay_address(2, Family::V4), port);
            paths[1].set_sockets(only(moved)).unwrap();
            let changes: Vec<_> = subnets.iter().map(|subnet| (*subnet, Some(moved))).collect();
            paths[0].change(&changes);
            assert_eq!(paths[1].sockets(), only(moved));
            // Closing them twice changes nothing.
            paths[1].set_sockets(only(moved)).unwrap();
            paths[1].set_sockets(Dual::default()).unwrap();
            paths[1].set_sockets(only(moved)).unwrap();
        }
    });
    let last = paths[1].sockets();
    let foreign = Dual { v4: Some(SocketAddr::from(([192, 0, 2, 99], PORT))), v6: None };
    assert!(paths[1].set_sockets(foreign).unwrap_err().to_string().contains("no address of this node"));
    let _holder = udp(two, (underlay_address(2, Family::V4), 99).into());
    let taken = only(SocketAddr::new(underlay_address(2, Family::V4), 99));
    assert!(paths[1].set_sockets(taken).unwrap_err().to_string().contains("in use"));
    assert_eq!(paths[1].sockets(), last, "what fails changes nothing");
    transfer(one, two, Family::V4, MEBIBYTE, || {});
    // To the other family, and to no sockets.
    paths[0].set_sockets(only(one.endpoint(Family::V6))).unwrap();
    paths[1].set_sockets(only(two.endpoint(Family::V6))).unwrap();
    for (path, peer) in [(&paths[0], two), (&paths[1], one)] {
        let changes: Vec<_> = peer.own().iter().map(|(_, subnet)| (*subnet, Some(peer.endpoint(Family::V6)))).collect();
        path.change(&changes);
        path.set_own(path.table().own());
    }
    for node in [one, two] {
        node.ns.set_mtu(TUN, 1452).unwrap();
    }
    transfer(one, two, Family::V4, MEBIBYTE, || {});
    paths[0].set_sockets(Dual::default()).unwrap();
    assert!(probe::ping(&one.ns, two.address(Family::V4), Duration::from_millis(50)).is_err());
    wait_until("it is dropped", PATIENCE, || Ok(paths[0].counters().dropped(Reason::NoSocket) > 0)).unwrap();
}

#[test]
fn a_change_of_the_table_counts_from_the_next_packet_on() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    let there = two.address(Family::V4);
    probe::ping(&one.ns, there, PATIENCE).unwrap();
    let subnet = two.own().v4.unwrap();
    let endpoint = paths[0].table().lookup(there);
    // A change back must not be earlier than the packet, so this waits until it is counted.
    let lost = |path: &Path, reason: Reason, round: u64| {
        assert!(probe::ping(&one.ns, there, Duration::from_millis(5)).is_err());
        wait_until("it is dropped", PATIENCE, || Ok(path.counters().dropped(reason) == round)).unwrap();
    };
    for round in 1..=20 {
        paths[0].change(&[(subnet, None)]);
        lost(&paths[0], Reason::NoPeer, round);
        paths[0].change(&[(subnet, endpoint)]);
        probe::ping(&one.ns, there, PATIENCE).unwrap();
        paths[1].set_own(Dual::default());
        lost(&paths[1], Reason::WrongDestination, round);
        paths[1].set_own(two.own());
    }
}
