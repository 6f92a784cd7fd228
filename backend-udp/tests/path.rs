//! Traffic through packet paths on the real kernel: over a link that carries super-packets whole, and over one that does
//! not.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod lab;

use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::Duration;

use api::{Buffers, OpenMode, Path, Reason, Settings, Table, Tun, TunError};
use flannel_backend_udp::path as api;
use flannel_core::net::{Dual, Family};
use lab::{LINK, Link, Noise, PATIENCE, PORT, Shape, TUN, nodes, only, overlay, transfer, udp, underlay_address};
use nix::sys::socket::{setsockopt, sockopt};
use testkit::{Namespace, cases, probe, wait_until};

const MEBIBYTE: usize = 1 << 20;

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

/// Both ways and in both families at once.
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
        assert_eq!(path.degraded(), []);
        assert!(counters.sent.packets > 3 * counters.sent.tun, "super-packets are read: {counters:?}");
        assert!(counters.sent.packets > 3 * counters.sent.udp, "and sent in runs: {counters:?}");
        assert!(counters.received.packets > 3 * counters.received.udp, "and received in runs: {counters:?}");
        assert!(counters.received.packets > 3 * counters.received.tun, "and written as super-packets: {counters:?}");
        assert_eq!(counters.unbatched, 0);
    }
    // Some 50 000 packets, unless they pass in one piece.
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

/// Single ones, ones that are fragmented, runs, and pings.
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
fn nobody_but_a_known_peer_with_its_own_addresses_is_let_in() {
    let [node, peer] = nodes(Link::Whole);
    let path = node.start(Shape::PLAIN, &peer);
    let to = node.endpoint(Family::V4);
    let peer_socket = udp(&peer, peer.endpoint(Family::V4));
    let stranger = udp(&peer, (underlay_address(2, Family::V4), PORT + 1).into());
    let good = ipv4([10, 5, 2, 7], [10, 5, 1, 7], 64, 100);
    let changed = |change: fn(&mut Vec<u8>)| {
        let mut packet = good.clone();
        change(&mut packet);
        packet
    };
    let v6_of_others = {
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
        packet.extend([0xfd; 40]);
        packet
    };
    let all = [
        (&stranger, good.clone(), Reason::UnknownSender),
        (&peer_socket, Vec::new(), Reason::Malformed),
        (&peer_socket, good[..19].to_vec(), Reason::Malformed),
        (&peer_socket, good[..99].to_vec(), Reason::Malformed),
        (&peer_socket, changed(|packet| packet[0] = 0x55), Reason::Malformed),
        (&peer_socket, changed(|packet| packet[0] = 0x44), Reason::Malformed),
        (&peer_socket, vec![0x60; 39], Reason::Malformed),
        (&peer_socket, ipv4([10, 5, 3, 7], [10, 5, 1, 7], 64, 100), Reason::WrongSource),
        (&peer_socket, ipv4([10, 5, 1, 8], [10, 5, 1, 7], 64, 100), Reason::WrongSource),
        (&peer_socket, ipv4([192, 0, 2, 2], [10, 5, 1, 7], 64, 100), Reason::WrongSource),
        (&peer_socket, v6_of_others, Reason::WrongSource),
        (&peer_socket, ipv4([10, 5, 2, 7], [10, 5, 2, 8], 64, 100), Reason::WrongDestination),
        (&peer_socket, ipv4([10, 5, 2, 7], [192, 0, 2, 1], 64, 100), Reason::WrongDestination),
        (&peer_socket, ipv4([10, 5, 2, 7], [224, 0, 0, 1], 64, 100), Reason::WrongDestination),
        (&peer_socket, ipv4([10, 5, 2, 7], [10, 5, 1, 7], 1, 100), Reason::Expired),
        (&peer_socket, ipv4([10, 5, 2, 7], [10, 5, 1, 7], 0, 100), Reason::Expired),
    ];
    // No more at a time than the socket holds.
    for round in 1..=(100_000_u64 / (50 * all.len() as u64) + 1) {
        for (socket, packet, _) in &all {
            (0..50).for_each(|_| assert_eq!(socket.send_to(packet, to).unwrap(), packet.len()));
        }
        let expected = round * 50 * all.len() as u64;
        wait_until("all are counted", PATIENCE, || Ok(all_dropped(&path) >= expected)).unwrap();
    }
    let (counters, dropped) = (path.counters(), all_dropped(&path));
    assert!(dropped > 100_000);
    assert_eq!((counters.received.packets, counters.received.tun), (0, 0));
    for reason in Reason::ALL {
        let kinds = all.iter().filter(|(_, _, of)| *of == reason).count() as u64;
        let own_announcements = reason == Reason::SentToGroup;
        assert!(own_announcements || counters.dropped(reason) == dropped / all.len() as u64 * kinds, "{reason:?}");
    }
    // What is right is let in.
    peer_socket.send_to(&good, to).unwrap();
    wait_until("it is let in", PATIENCE, || Ok(path.counters().received.packets == 1)).unwrap();
}

#[test]
fn noise_from_a_peer_harms_nothing() {
    let [node, peer] = nodes(Link::Whole);
    let path = node.start(Shape::PLAIN, &peer);
    let socket = udp(&peer, peer.endpoint(Family::V4));
    let mut noise = Noise::new(5);
    for round in 1..=200 {
        for _ in 0..100 {
            let mut packet = ipv4([10, 5, 2, 7], [10, 5, 1, 0], 64, 40 + noise.next() as usize % 1400);
            let body = noise.next() as usize % 20;
            noise.fill(&mut packet[20..20 + body]);
            // Protocols, lengths and places of fragments that need not be true.
            (0..noise.next() % 4).for_each(|_| packet[noise.next() as usize % 40] = noise.next() as u8);
            socket.send_to(&packet, node.endpoint(Family::V4)).unwrap();
        }
        let all = |path: &Path| all_dropped(path) + path.counters().received.packets;
        wait_until("all are counted", PATIENCE, || Ok(all(&path) >= round * 100)).unwrap();
    }
    assert!(path.is_healthy());
    assert_eq!(path.degraded(), []);
}

/// But for what the node itself sends to groups, as it does in IPv6.
fn all_dropped(path: &Path) -> u64 {
    path.counters().all_dropped() - path.counters().dropped(Reason::SentToGroup)
}

/// A packet of UDP without a right checksum of that.
fn ipv4(source: [u8; 4], destination: [u8; 4], ttl: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len];
    packet[..10].copy_from_slice(&[0x45, 0, (len >> 8) as u8, len as u8, 0, 0, 0, 0, ttl, 17]);
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&destination);
    let sum: u32 = packet[..20].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum + (sum >> 16)) as u16).to_be_bytes());
    packet
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
            assert_eq!(path.degraded(), [], "smaller ones and other peers still go in runs");
        }
    }
}

#[test]
fn a_destination_that_no_peer_has_is_answered_and_groups_are_not() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, _] = &nodes;
    for (family, nowhere) in [(Family::V4, "10.5.77.1"), (Family::V6, "fd00:5:0:77::1")] {
        let socket = udp(one, (one.address(family), 0).into());
        // Without, the kernel keeps to itself what may pass.
        match family {
            Family::V4 => setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap(),
            Family::V6 => setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap(),
        }
        socket.connect((nowhere, 9)).unwrap();
        wait_until("the answer", PATIENCE, || Ok(socket.send(b"x").is_err())).unwrap();
    }
    let answered = paths[0].counters().answered;
    assert!(answered >= 2);
    assert!(paths[0].counters().dropped(Reason::NoPeer) >= answered);
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
            // Twice the same is nothing.
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
    // To the other family, and to none.
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
    assert!(paths[0].counters().dropped(Reason::NoSocket) > 0);
}

#[test]
fn a_change_of_the_table_counts_from_the_next_packet_on() {
    let (nodes, paths) = overlay(Shape::PLAIN);
    let [one, two] = &nodes;
    let there = two.address(Family::V4);
    probe::ping(&one.ns, there, PATIENCE).unwrap();
    let subnet = two.own().v4.unwrap();
    let endpoint = paths[0].table().get(subnet);
    for round in 1..=20 {
        paths[0].change(&[(subnet, None)]);
        assert!(probe::ping(&one.ns, there, Duration::from_millis(5)).is_err());
        assert_eq!(paths[0].counters().dropped(Reason::NoPeer), round);
        paths[0].change(&[(subnet, endpoint)]);
        probe::ping(&one.ns, there, PATIENCE).unwrap();
        paths[1].set_own(Dual::default());
        assert!(probe::ping(&one.ns, there, Duration::from_millis(5)).is_err());
        paths[1].set_own(two.own());
        assert_eq!(paths[1].counters().dropped(Reason::WrongDestination), round);
    }
}

#[test]
fn what_a_socket_has_no_room_for_is_counted() {
    let [node, peer] = nodes(Link::Whole);
    let table = Table::new(node.own());
    let settings = Settings { buffers: Buffers { receive: 4096, send: 4096 } };
    let path = node.ns.run(|| Path::start(Tun::open(TUN, OpenMode::Create, 1).unwrap(), settings, table).unwrap());
    let path = path.unwrap();
    let local = node.endpoint(Family::V4);
    path.set_sockets(only(local)).unwrap();
    let stranger = udp(&peer, (underlay_address(2, Family::V4), 0).into());
    wait_until("losses", PATIENCE, || {
        (0..1000).for_each(|_| drop(stranger.send_to(&[7; 1400], local)));
        Ok(path.counters().overflowed > 0)
    })
    .unwrap();
    let lost = path.counters().overflowed;
    path.set_sockets(Dual::default()).unwrap();
    assert!(path.counters().overflowed >= lost, "also those of sockets that were given up");
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
        assert!(node.ns.links().unwrap().iter().all(|link| link.name != TUN), "the device went with it");
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
    // A TUN holds 500 of them.
    wait_until("they are sent", PATIENCE, || Ok(paths[1].counters().sent.packets >= 400)).unwrap();
    assert!(calls(&paths[0]) - before < 100, "{} calls", calls(&paths[0]) - before);
    assert!(paths[1].is_healthy());
    // Sockets can still be given up.
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
fn a_device_is_made_kept_found_again_and_let_go() {
    let ns = Namespace::new("tun").unwrap();
    let open = |name: &str, mode, queues| ns.run(|| Tun::open(name, mode, queues)).unwrap();
    let exists = |name: &str| ns.links().unwrap().iter().any(|link| link.name == name);
    assert!(matches!(open(TUN, OpenMode::Attach, 1), Err(TunError::Missing { .. })));
    let tun = open("flannel%d", OpenMode::Create, 1).unwrap();
    assert_eq!((tun.name(), tun.index()), (TUN, ns.index_of(TUN).unwrap()));
    assert!(matches!(open(TUN, OpenMode::Create, 1), Err(TunError::Exists { .. })));
    assert!(matches!(open(TUN, OpenMode::Attach, 1), Err(TunError::Busy { .. })));
    drop(tun);
    assert!(!exists(TUN));
    for (queues, others) in [(1, 2), (2, 1)] {
        let tun = open(TUN, OpenMode::CreateOrAttach, queues).unwrap();
        tun.keep().unwrap();
        let index = tun.index();
        drop(tun);
        assert!(exists(TUN));
        let mismatch = open(TUN, OpenMode::CreateOrAttach, others).unwrap_err();
        assert!(matches!(mismatch, TunError::Mismatch { .. }), "{mismatch}");
        let tun = open(TUN, OpenMode::Attach, queues).unwrap();
        assert_eq!(tun.index(), index);
        tun.let_go().unwrap();
        drop(tun);
        assert!(!exists(TUN));
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
    let path = one.ns.run(|| {
        let tun = Tun::open(TUN, OpenMode::Attach, 1).unwrap();
        Path::start(tun, Settings::default(), Table::clone(&table)).unwrap()
    });
    let path = path.unwrap();
    path.set_sockets(only(one.endpoint(Family::V4))).unwrap();
    assert_eq!(path.tun().index(), before);
    transfer(one, two, Family::V4, 4 * MEBIBYTE, || {});
    path.tun().let_go().unwrap();
}
