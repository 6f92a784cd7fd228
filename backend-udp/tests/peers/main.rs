//! The wire format, and which senders are accepted.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod hostile;
#[path = "../lab/mod.rs"]
mod lab;

use std::net::SocketAddr;

use api::{Buffers, OpenMode, Path, Reason, Settings, Table, Tun};
use flannel_backend_udp::path as api;
use flannel_core::net::{Dual, Family};
use lab::{LINK, Link, Noise, PATIENCE, PORT, Shape, TUN, nodes, only, udp, underlay_address};
use nix::sys::socket::{setsockopt, sockopt};
use testkit::wait_until;

#[test]
fn on_the_wire_is_the_packet_itself_as_go_flannel_has_it() {
    let [node, peer] = nodes(Link::Whole);
    let path = node.start(Shape::PLAIN, &peer);
    let wire = udp(&peer, peer.endpoint(Family::V4));
    let from = udp(&node, (node.address(Family::V4), 0).into());
    setsockopt(&from, sockopt::UdpGsoSegment, &1000).unwrap();
    let sent: Vec<u8> = (0..2500).map(|nth| (nth % 251) as u8).collect();
    from.send_to(&sent, (peer.address(Family::V4), 9)).unwrap();
    let mut buffer = [0; 2000];
    for payload in sent.chunks(1000) {
        let (len, sender) = wire.recv_from(&mut buffer).unwrap();
        let packet = &buffer[..len];
        assert_eq!((len, sender), (28 + payload.len(), node.endpoint(Family::V4)));
        assert_eq!((packet[0], packet[8], packet[9]), (0x45, 63, 17));
        assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), len);
        assert_eq!(&packet[28..], payload);
        assert_eq!(sum(&packet[..20]), 0xffff);
        let pseudo = [&packet[12..20], &[0, 17], &packet[24..26]].concat();
        assert_eq!(sum(&[&pseudo, &packet[20..]].concat()), 0xffff);
    }
    // And back, without a UDP checksum, which is allowed.
    let source = from.local_addr().unwrap();
    let mut packet = ipv4([10, 5, 2, 7], [10, 5, 1, 0], 2, 33);
    packet[20..28].copy_from_slice(&[0, 9, 0, 0, 0, 13, 0, 0]);
    packet[22..24].copy_from_slice(&source.port().to_be_bytes());
    packet[28..].copy_from_slice(b"hello");
    wire.send_to(&packet, node.endpoint(Family::V4)).unwrap();
    let (len, sender) = from.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], sender), (b"hello".as_slice(), SocketAddr::from(([10, 5, 2, 7], 9))));
    assert!(path.is_healthy());
}

#[test]
fn peers_that_are_sent_to_in_turn_all_get_theirs_in_order() {
    // What fits into the socket buffers.
    const EACH: u32 = 30;
    let [node, others] = nodes(Link::Wire);
    let path = node.start(Shape::PLAIN, &others);
    let peers: Vec<_> = (10..30_u8)
        .map(|number| {
            let address = underlay_address(number, Family::V4);
            others.ns.add_address(LINK, address, 24).unwrap();
            udp(&others, (address, PORT).into())
        })
        .collect();
    let changes = (10..30_u8)
        .zip(&peers)
        .map(|(number, peer)| (format!("10.5.{number}.0/24").parse().unwrap(), Some(peer.local_addr().unwrap())));
    path.change(&changes.collect::<Vec<_>>());
    let from = udp(&node, (node.address(Family::V4), 0).into());
    for nth in 0..EACH {
        for number in 10..30 {
            let payload = [&nth.to_be_bytes()[..], &vec![number; usize::from(number) * 40]].concat();
            from.send_to(&payload, SocketAddr::from(([10, 5, number, 1], 9))).unwrap();
        }
        // No more than a TUN queues.
        let sent = u64::from(nth + 1) * 20;
        wait_until("they are sent", PATIENCE, || Ok(path.counters().sent.packets >= sent)).unwrap();
    }
    let mut buffer = [0; 2000];
    for (number, peer) in (10..30).zip(&peers) {
        for nth in 0..EACH {
            let len = peer.recv(&mut buffer).unwrap();
            assert_eq!((len, &buffer[28..32]), (32 + number * 40, nth.to_be_bytes().as_slice()));
        }
    }
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
            // Random protocols, lengths and fragment offsets.
            (0..noise.next() % 4).for_each(|_| packet[noise.next() as usize % 40] = noise.next() as u8);
            socket.send_to(&packet, node.endpoint(Family::V4)).unwrap();
        }
        let all = |path: &Path| all_dropped(path) + path.counters().received.packets;
        wait_until("all are counted", PATIENCE, || Ok(all(&path) >= round * 100)).unwrap();
    }
    assert!(path.is_healthy());
    assert_eq!(path.watch().limitations(), []);
}

#[test]
fn what_a_socket_has_no_room_for_is_counted() {
    let [node, peer] = nodes(Link::Whole);
    let table = Table::new(node.own());
    let settings = Settings::default().with_buffers(Buffers::new(4096, 4096));
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

/// Except for what the node itself sends to multicast groups, as with IPv6.
fn all_dropped(path: &Path) -> u64 {
    path.counters().all_dropped() - path.counters().dropped(Reason::SentToGroup)
}

/// Returns a UDP packet with a wrong UDP checksum.
fn ipv4(source: [u8; 4], destination: [u8; 4], ttl: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len];
    packet[..10].copy_from_slice(&[0x45, 0, (len >> 8) as u8, len as u8, 0, 0, 0, 0, ttl, 17]);
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&destination);
    let checksum = !sum(&packet[..20]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Returns the ones' complement sum.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}
