//! Datagrams that must be dropped: every kind, a great many of each, with good ones in between.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use flannel_core::net::{Dual, Family};
use nix::sys::socket::{setsockopt, sockopt};
use testkit::wait_until;

use super::api::{Counters, OpenMode, Reason, Tun};
use super::lab::{LINK, Link, Node, PATIENCE, PORT, Shape, TUN, nodes, udp, underlay_address};
use super::{all_dropped, sum};

/// The least number of datagrams sent in total.
const ALL: u64 = 1_000_000;
/// How many of each kind are sent at a time. All kinds together have to fit into the socket buffers.
const COPIES: usize = 60;
/// The most datagrams that the kernel makes of one send (`UDP_MAX_SEGMENTS` of kernels before 6.11).
const RUN: usize = 64;
/// The length of most packets, in bytes: they share runs.
const LEN: usize = 100;
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// One node with a peer whose endpoint is IPv4, and one whose endpoint is IPv6. Datagrams arrive in runs, as from a
/// fast sender, so that good and bad ones are in the same run.
#[test]
fn nobody_but_a_known_peer_with_its_own_addresses_is_let_in() {
    let [node, second] = nodes(Link::Whole);
    let third = Node { number: 3, ns: second.ns.clone() };
    for number in [3, 4] {
        second.ns.add_address(LINK, underlay_address(number, Family::V4), 24).unwrap();
        second.ns.add_address(LINK, underlay_address(number, Family::V6), 64).unwrap();
    }
    // A peer's own address is not behind the device.
    for device in ["all", "default"] {
        node.ns.set_sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "0").unwrap();
    }
    let path = node.start_on(Shape::PLAIN, &second, || Tun::open(TUN, OpenMode::Create, 1).unwrap());
    let local = |family| Some(node.endpoint(family));
    path.set_sockets(Dual { v4: local(Family::V4), v6: local(Family::V6) }).unwrap();
    let of_third = third.own();
    let changes = of_third.iter().map(|(_, subnet)| (*subnet, Some(third.endpoint(Family::V6))));
    path.change(&changes.collect::<Vec<_>>());

    let sides = [Side::new(&second, Family::V4, &node, 3), Side::new(&third, Family::V6, &node, 2)];
    let hostile = sides.each_ref().map(Side::hostile);
    let kinds: Vec<_> = hostile.iter().flatten().collect();
    let (mut sent, mut good, mut under_way, mut round) = (0, 0, 0, 0);
    while sent < ALL {
        for (side, hostile) in sides.iter().zip(&hostile) {
            let mixed = side.good(round);
            good += mixed.iter().map(|good| good.packets.len() as u64).sum::<u64>();
            // All of them at once are more than the receiving socket of a slow machine has room for.
            side.send(hostile, &mixed, |datagrams| {
                under_way += datagrams;
                wait_until("all are counted", PATIENCE, || {
                    let Counters { received, overflowed, .. } = path.counters();
                    Ok(all_dropped(&path) + received.packets + overflowed >= under_way)
                })
                .unwrap();
            });
            assert_eq!(path.counters().overflowed, 0, "the receiving socket had no room in round {round}");
            side.receive(mixed);
        }
        round += 1;
        sent += (kinds.len() * COPIES) as u64;
        assert_eq!(under_way, sent + good);
    }

    let counters = path.counters();
    // Except for what the node itself sends to multicast groups, as with IPv6.
    for reason in Reason::ALL.into_iter().filter(|reason| *reason != Reason::SentToGroup) {
        let of_it = kinds.iter().filter(|kind| kind.reason == reason).count() as u64;
        assert_eq!(counters.dropped(reason), of_it * (sent / kinds.len() as u64), "{reason:?}");
    }
    assert_eq!((counters.received.packets, all_dropped(&path), counters.overflowed), (good, sent, 0));
    assert_eq!(counters.received.tun, node.packets_from(TUN), "the kernel has got nothing else from the device");
    sides.iter().for_each(Side::nothing_more);
}

/// A packet, and the reason why it is dropped.
struct Hostile {
    from: From,
    packet: Vec<u8>,
    reason: Reason,
}

/// The sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Peer,
    /// From the peer's address.
    OtherPort,
    /// From the peers' port.
    OtherAddress,
}

impl From {
    const ALL: [Self; 3] = [Self::Peer, Self::OtherPort, Self::OtherAddress];
}

/// A datagram of the overlay, in one or more packets.
struct Good {
    packets: Vec<Vec<u8>>,
    family: Family,
    payload: Vec<u8>,
}

/// A peer, and everything that is sent in its name.
struct Side {
    peer: u8,
    /// The number of another peer, whose endpoint has the other family.
    other: u8,
    /// The address that the peer sends from.
    outer: IpAddr,
    sockets: [UdpSocket; 3],
    to: SocketAddr,
    inboxes: Dual<UdpSocket>,
}

impl Side {
    fn new(peer: &Node, underlay: Family, node: &Node, other: u8) -> Self {
        let endpoint = peer.endpoint(underlay);
        let sockets = From::ALL.map(|from| match from {
            From::Peer => udp(peer, endpoint),
            From::OtherPort => udp(peer, SocketAddr::new(endpoint.ip(), PORT + 1)),
            From::OtherAddress => udp(peer, SocketAddr::new(underlay_address(4, underlay), PORT)),
        });
        let inbox = |family| Some(udp(node, (node.address(family), 0).into()));
        let inboxes = Dual { v4: inbox(Family::V4), v6: inbox(Family::V6) };
        Self { peer: peer.number, other, outer: endpoint.ip(), sockets, to: node.endpoint(underlay), inboxes }
    }

    /// Returns one packet of each kind.
    fn hostile(&self) -> Vec<Hostile> {
        let (own, own6, there, there6) = (v4(self.peer), v6(self.peer), v4(1), v6(1));
        let plain = |source, destination, ttl| Ipv4 { ttl, ..Ipv4::new(source, destination) }.packet(&[0; 80]);
        let plain6 = |source, destination, limit| ipv6(source, destination, limit, UDP, &[0; 60]);
        let (good, good6) = (plain(own, there, 64), plain6(own6, there6, 64));
        let changed = |packet: &[u8], at: usize, bytes: &[u8]| {
            let mut packet = packet.to_vec();
            packet[at..at + bytes.len()].copy_from_slice(bytes);
            packet
        };
        let mut all = Vec::new();
        let mut add = |from, reason, packets: Vec<Vec<u8>>| {
            all.extend(packets.into_iter().map(|packet| Hostile { from, packet, reason }));
        };
        for from in [From::OtherPort, From::OtherAddress] {
            add(from, Reason::UnknownSender, vec![good.clone(), good6.clone(), Vec::new(), vec![0x45]]);
        }
        let malformed = vec![
            // Not a packet, or only the beginning of one.
            Vec::new(),
            vec![0x45],
            good[..19].to_vec(),
            good[..LEN - 1].to_vec(),
            good6[..39].to_vec(),
            good6[..LEN - 1].to_vec(),
            // A total length greater than the packet, or less than the header.
            changed(&good, 2, &[0, 101]),
            changed(&good, 2, &[0xff, 0xff]),
            changed(&good, 2, &[0, 19]),
            changed(&good, 2, &[0, 0]),
            changed(&good6, 4, &[0, 61]),
            changed(&good6, 4, &[0xff, 0xff]),
            // Other versions, and a header that is too short or longer than the packet.
            changed(&good, 0, &[0x05]),
            changed(&good, 0, &[0x55]),
            changed(&good, 0, &[0xf5]),
            changed(&good, 0, &[0x44]),
            changed(&changed(&good, 0, &[0x4f]), 2, &[0, 59]),
        ];
        add(From::Peer, Reason::Malformed, malformed);

        // Sources: the other peer and this node, each in the overlay and in the underlay, invalid hosts, and a multicast
        // group.
        let [outer, outer_there]: [Ipv4Addr; 2] = [self.other, 1].map(|number| [192, 0, 2, number].into());
        let [outer6, outer_there6] =
            [self.other, 1].map(|number| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()));
        let sources = [v4(self.other), there, outer, outer_there, Ipv4Addr::LOCALHOST, [0; 4].into()];
        let sources6 =
            [v6(self.other), there6, outer6, outer_there6, Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED, group()];
        add(From::Peer, Reason::WrongSource, sources.map(|source| plain(source, there, 64)).to_vec());
        add(From::Peer, Reason::WrongSource, sources6.map(|source| plain6(source, there6, 64)).to_vec());
        add(From::Peer, Reason::WrongSource, shapes(v4(self.other), there, 64));
        add(From::Peer, Reason::WrongSource, shapes6(v6(self.other), there6, 64));

        let destinations = [own, v4(self.other), [192, 0, 2, 1].into(), [224, 0, 0, 1].into(), Ipv4Addr::BROADCAST];
        let destinations6 = [own6, v6(self.other), Ipv6Addr::LOCALHOST, group(), "fe80::1".parse().unwrap()];
        add(From::Peer, Reason::WrongDestination, destinations.map(|to| plain(own, to, 64)).to_vec());
        add(From::Peer, Reason::WrongDestination, destinations6.map(|to| plain6(own6, to, 64)).to_vec());
        add(From::Peer, Reason::WrongDestination, shapes(own, v4(self.other), 64));
        add(From::Peer, Reason::WrongDestination, shapes6(own6, v6(self.other), 64));

        for ttl in [0, 1] {
            add(From::Peer, Reason::Expired, vec![plain(own, there, ttl), plain6(own6, there6, ttl)]);
            add(From::Peer, Reason::Expired, shapes(own, there, ttl));
            add(From::Peer, Reason::Expired, shapes6(own6, there6, ttl));
        }
        all
    }

    /// Returns what has to arrive: plain packets, and ones with options, extension headers, fragments, bytes after their
    /// end, and the peer's own address as their source.
    fn good(&self, round: u16) -> Vec<Good> {
        let (own, own6) = (v4(self.peer), v6(self.peer));
        let mut all = Vec::new();
        let mut add = |source: IpAddr, len: usize, packets: &dyn Fn(&[u8]) -> Vec<Vec<u8>>| {
            let family = Family::of(source);
            // Each one is different.
            let mut payload = [&round.to_be_bytes()[..], &[self.peer, all.len() as u8]].concat();
            payload.resize(len - 8, 0x5a);
            let inbox = self.inboxes.get(family).unwrap().local_addr().unwrap();
            let packets = packets(&datagram(source, inbox, &payload));
            assert!(packets.iter().all(|packet| packet.len() == LEN));
            all.push(Good { packets, family, payload });
        };
        let to = || Ipv4 { id: round, ..Ipv4::new(own, v4(1)) };
        let to6 = |next, body: &[u8]| ipv6(own6, v6(1), 64, next, body);
        for _ in 0..3 {
            add(own.into(), 80, &|body| vec![to().packet(body)]);
            add(own6.into(), 60, &|body| vec![to6(UDP, body)]);
        }
        add(own.into(), 30, &|body| vec![[to().packet(body), vec![0xee; 50]].concat()]);
        add(own.into(), 72, &|body| vec![Ipv4 { options: &[1; 8], ..to() }.packet(body)]);
        add(own.into(), 160, &|body| {
            let (first, last) = body.split_at(80);
            vec![Ipv4 { fragment: 0x2000, ..to() }.packet(first), Ipv4 { fragment: 10, ..to() }.packet(last)]
        });
        add(own6.into(), 52, &|body| vec![to6(DESTINATION_OPTIONS, &extended(UDP, body))]);
        add(own6.into(), 100, &|body| {
            let part = |place: u16, body: &[u8]| {
                let [high, low] = place.to_be_bytes();
                let header = [&[UDP, 0, high, low, 0, 0][..], &round.to_be_bytes()].concat();
                to6(FRAGMENT, &[&header, body].concat())
            };
            // Only the last fragment may have any length.
            let (first, last) = body.split_at(48);
            vec![[part(1, first), vec![0xee; 4]].concat(), part(48, last)]
        });
        match self.outer {
            IpAddr::V4(outer) => add(self.outer, 80, &|body| vec![Ipv4 { source: outer, ..to() }.packet(body)]),
            IpAddr::V6(outer) => add(self.outer, 60, &|body| vec![ipv6(outer, v6(1), 64, UDP, body)]),
        }
        all
    }

    /// Sends all copies of all kinds: those of one length in runs, alternately from each socket. The good ones are
    /// spread over the runs of their length. After each socket, calls `sent` with the number of its
    /// datagrams.
    fn send(&self, hostile: &[Hostile], good: &[Good], mut sent: impl FnMut(u64)) {
        let mut lens: Vec<_> = hostile.iter().map(|hostile| hostile.packet.len()).collect();
        lens.sort_unstable();
        lens.dedup();
        for (from, socket) in From::ALL.into_iter().zip(&self.sockets) {
            let mut datagrams = 0;
            for len in &lens {
                let is_of = |hostile: &&Hostile| hostile.from == from && hostile.packet.len() == *len;
                let kinds: Vec<_> = hostile.iter().filter(is_of).map(|hostile| &hostile.packet).collect();
                let mut packets = kinds.repeat(COPIES);
                if from == From::Peer && *len == LEN {
                    let good: Vec<_> = good.iter().flat_map(|good| &good.packets).collect();
                    let apart = packets.len() / good.len() + 1;
                    good.into_iter().enumerate().for_each(|(nth, good)| packets.insert(nth * apart, good));
                }
                // Empty datagrams cannot form runs.
                let run = if *len == 0 { 1 } else { RUN };
                setsockopt(socket, sockopt::UdpGsoSegment, &(*len as i32)).unwrap();
                for run in packets.chunks(run) {
                    let run: Vec<u8> = run.iter().flat_map(|packet| packet.iter().copied()).collect();
                    assert_eq!(socket.send_to(&run, self.to).unwrap(), run.len());
                }
                datagrams += packets.len() as u64;
            }
            sent(datagrams);
        }
    }

    /// Receives these packets, and checks that nothing else arrives.
    fn receive(&self, good: Vec<Good>) {
        let (mut wanted, mut received) = (Vec::new(), Vec::new());
        let mut buffer = [0; 2000];
        for Good { family, payload, .. } in good {
            let len = self.inboxes.get(family).unwrap().recv(&mut buffer).unwrap();
            received.push((family, buffer[..len].to_vec()));
            wanted.push((family, payload));
        }
        wanted.sort();
        received.sort();
        assert_eq!(received, wanted);
    }

    fn nothing_more(&self) {
        for (_, inbox) in self.inboxes.iter() {
            inbox.set_nonblocking(true).unwrap();
            assert!(inbox.recv(&mut [0; 2000]).is_err());
        }
    }
}

/// Returns packets with options, and fragments.
fn shapes(source: Ipv4Addr, destination: Ipv4Addr, ttl: u8) -> Vec<Vec<u8>> {
    let plain = Ipv4 { ttl, ..Ipv4::new(source, destination) };
    vec![
        Ipv4 { options: &[1; 8], ..plain }.packet(&[0; 72]),
        Ipv4 { options: &[1; 40], ..plain }.packet(&[0; 40]),
        Ipv4 { fragment: 0x2000, ..plain }.packet(&[0; 80]),
        Ipv4 { fragment: 10, ..plain }.packet(&[0; 80]),
    ]
}

/// Returns packets with extension headers, including fragments.
fn shapes6(source: Ipv6Addr, destination: Ipv6Addr, limit: u8) -> Vec<Vec<u8>> {
    let ipv6 = |next, body: &[u8]| ipv6(source, destination, limit, next, body);
    vec![
        ipv6(HOP_BY_HOP, &extended(UDP, &[0; 52])),
        ipv6(DESTINATION_OPTIONS, &extended(UDP, &[0; 52])),
        ipv6(FRAGMENT, &[&[UDP, 0, 0, 1, 0, 0, 0, 9][..], &[0; 52]].concat()),
        ipv6(FRAGMENT, &[&[UDP, 0, 0, 48, 0, 0, 0, 9][..], &[0; 52]].concat()),
    ]
}

/// Returns an address of a node's subnet; for node 1 its own address.
fn v4(node: u8) -> Ipv4Addr {
    [10, 5, node, if node == 1 { 0 } else { 7 }].into()
}

fn v6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 5, 0, node.into(), 0, 0, 0, 1)
}

fn group() -> Ipv6Addr {
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)
}

/// The contents of an IPv4 header.
#[derive(Clone, Copy)]
struct Ipv4<'a> {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    ttl: u8,
    id: u16,
    /// The word with the fragment flags and offset.
    fragment: u16,
    options: &'a [u8],
}

impl Ipv4<'_> {
    fn new(source: Ipv4Addr, destination: Ipv4Addr) -> Self {
        Self { source, destination, ttl: 64, id: 0, fragment: 0, options: &[] }
    }

    /// Returns a UDP packet with this body.
    fn packet(&self, body: &[u8]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let [high, low] = ((header + body.len()) as u16).to_be_bytes();
        let mut packet = vec![0x40 | (header / 4) as u8, 0, high, low];
        packet.extend([self.id.to_be_bytes(), self.fragment.to_be_bytes()].concat());
        packet.extend([self.ttl, UDP, 0, 0]);
        packet.extend([self.source.octets(), self.destination.octets()].concat());
        packet.extend(self.options);
        let checksum = !sum(&packet);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        packet.extend(body);
        packet
    }
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, limit: u8, next: u8, body: &[u8]) -> Vec<u8> {
    let [high, low] = (body.len() as u16).to_be_bytes();
    let head = [0x60, 0, 0, 0, high, low, next, limit];
    [&head[..], &source.octets(), &destination.octets(), body].concat()
}

/// Puts a header of padding options before this.
fn extended(next: u8, body: &[u8]) -> Vec<u8> {
    [&[next, 0, 1, 4, 0, 0, 0, 0][..], body].concat()
}

/// Returns a UDP datagram without IP header, with the correct checksum.
fn datagram(source: IpAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let len = ((8 + payload.len()) as u16).to_be_bytes();
    let mut datagram = [&[0, 9][..], &to.port().to_be_bytes(), &len, &[0, 0], payload].concat();
    let pseudo = [&octets(source)[..], &octets(to.ip()), &[0, UDP], &len].concat();
    let checksum = match !sum(&[&pseudo[..], &datagram].concat()) {
        // Zero would mean that there is none, which IPv6 does not accept. The port decides whether it occurs.
        0 => 0xffff,
        checksum => checksum,
    };
    datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
    datagram
}
