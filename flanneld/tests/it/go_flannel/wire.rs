//! What goes over the wire between a node of ours and one of Go flannel's, packet by packet, read by a library that is
//! neither's.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use etherparse::icmpv4::DestUnreachableHeader;
use etherparse::{Icmpv4Type, NetHeaders, PacketHeaders, PayloadSlice, TransportHeader};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
    sockopt::{RcvBufForce, ReceiveTimeout},
};
use nix::sys::time::{TimeVal, TimeValLike};
use testkit::probe::throughput;
use testkit::{Families, Namespace, UNDERLAY_LINK};

use super::cluster::{Cluster, Filter, Network, Plane, Program, Store};

/// How many packets each way are read.
const PACKETS: usize = 50_000;
/// The longest IP packet on the underlay.
const MTU: usize = 1500;
const PORT: u16 = 8285;
/// What pods set, less one hop of the node they are on, less one of the tunnel's end that sends.
const TTL: u8 = 62;

/// What Go flannel sent, a packet of each kind: the backend's own tests read them without it. To record them anew, set
/// the variable `RECORD_GOLDEN` and run this test.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../backend-udp/tests/golden/go-flannel.txt");
/// The kinds of packets that are recorded.
const KINDS: [&str; 9] = [
    "fragment-first",
    "fragment-last",
    "icmp-echo",
    "icmp-error",
    "tcp-full",
    "tcp-short",
    "tcp-syn",
    "udp",
    // Not on the wire: to its own TUN, where there is no peer.
    "unreachable",
];
/// In the network, and in nobody's subnet.
const NOWHERE: Ipv4Addr = Ipv4Addr::new(10, 244, 255, 254);

/// One packet of the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    from: Ipv4Addr,
    ttl: u8,
    kind: Option<&'static str>,
}

#[test]
fn every_packet_between_both_programs_over_udp_is_as_flannel_has_it() {
    let network = Network { store: Store::Etcd, plane: Plane::Udp, families: Families::V4, filter: Filter::Nftables };
    let cluster = Cluster::connected(network, [Program::Ours, Program::Go]);
    // Checksums and segments are made before a packet is seen, as a plain network card's are.
    for nth in [1, 2] {
        let off = ["tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-udp-segmentation", "tx-generic-segmentation"];
        cluster.site.ns(nth).set_features(UNDERLAY_LINK, &off.map(|name| (name, false))).unwrap();
    }
    let (ours, go) = (cluster.pod_addr(1), cluster.pod_addr(2));
    let capture = Capture::open(cluster.site.ns(2));
    let (mut sent, mut received, mut golden) = (Vec::new(), Vec::new(), BTreeMap::new());
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            while sent.len() < PACKETS || received.len() < PACKETS {
                let Some(frame) = capture.next() else { panic!("{} {} packets", sent.len(), received.len()) };
                if is_unreachable(&frame) {
                    golden.entry("unreachable").or_insert(frame);
                    continue;
                }
                let Some((seen, packet)) = check(&frame) else { continue };
                if seen.from == ours {
                    sent.push(seen)
                } else if seen.from == go {
                    received.push(seen);
                    if let Some(kind) = seen.kind {
                        golden.entry(kind).or_insert(packet);
                    }
                }
            }
        });
        while !reading.is_finished() {
            // What is rare first, and Go flannel's: enough packets may come of one stream.
            cluster.all_reach_all();
            for (from, to) in [(2, 1), (1, 2)] {
                cluster.datagrams(from, to);
                cluster.throughput(from, to, Duration::from_millis(500));
            }
        }
    });
    for seen in sent.iter().chain(&received) {
        assert_eq!(seen.ttl, TTL, "{seen:?}");
    }
    assert_eq!(golden.keys().copied().collect::<Vec<_>>(), KINDS, "packets of each kind from Go flannel");
    if std::env::var_os("RECORD_GOLDEN").is_some() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let lines: Vec<_> = golden.iter().map(|(kind, packet)| format!("{kind} {}\n", hex(packet))).collect();
        std::fs::write(GOLDEN, lines.concat()).unwrap();
    }
}

/// A checksum of UDP as it is sent, where 0 would mean that there is none (RFC 768), and of TCP as the kernel sends it if
/// it adds up to 0 (`CSUM_MANGLED_0`).
fn never_zero(checksum: u16) -> u16 {
    if checksum == 0 { u16::MAX } else { checksum }
}

/// Checks a frame if it is the tunnel's. Panics at what is not as it has to be.
fn check(frame: &[u8]) -> Option<(Seen, Vec<u8>)> {
    let outer = PacketHeaders::from_ethernet_slice(frame).ok()?;
    let (Some(NetHeaders::Ipv4(ip, _)), Some(TransportHeader::Udp(udp)), PayloadSlice::Udp(payload)) =
        (&outer.net, &outer.transport, &outer.payload)
    else {
        return None;
    };
    if udp.destination_port != PORT {
        return None;
    }
    let show = || format!("{ip:?} {udp:?} {:02x?}", &payload[..payload.len().min(60)]);
    assert_eq!(udp.source_port, PORT, "{}", show());
    assert!(usize::from(ip.total_len) <= MTU, "{}", show());
    assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{}", show());
    let checksum = udp.calc_checksum_ipv4(ip, payload).unwrap();
    assert_eq!(udp.checksum, never_zero(checksum), "{}", show());

    let inner = PacketHeaders::from_ip_slice(payload).unwrap_or_else(|error| panic!("{error}: {}", show()));
    let Some(NetHeaders::Ipv4(ip, _)) = &inner.net else { panic!("{}", show()) };
    assert_eq!(usize::from(ip.total_len), payload.len(), "{}", show());
    assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{}", show());
    let kind = match (&inner.transport, &inner.payload) {
        (Some(TransportHeader::Tcp(tcp)), PayloadSlice::Tcp(data)) => {
            let checksum = tcp.calc_checksum_ipv4(ip, data).unwrap();
            assert_eq!(never_zero(tcp.checksum), never_zero(checksum), "{}", show());
            match data.len() {
                0 => tcp.syn.then_some("tcp-syn"),
                _ if payload.len() == MTU - 28 => Some("tcp-full"),
                _ => Some("tcp-short"),
            }
        }
        (Some(TransportHeader::Udp(udp)), PayloadSlice::Udp(data)) => {
            assert_eq!(udp.checksum, never_zero(udp.calc_checksum_ipv4(ip, data).unwrap()), "{}", show());
            Some("udp")
        }
        (Some(TransportHeader::Icmpv4(icmp)), _) => match icmp.icmp_type {
            Icmpv4Type::EchoRequest(_) => Some("icmp-echo"),
            Icmpv4Type::DestinationUnreachable(_) => Some("icmp-error"),
            _ => None,
        },
        _ if !ip.is_fragmenting_payload() => None,
        _ if ip.fragment_offset.value() == 0 => Some("fragment-first"),
        _ if ip.more_fragments => None,
        _ => Some("fragment-last"),
    };
    Some((Seen { from: ip.source.into(), ttl: ip.time_to_live, kind }, payload.to_vec()))
}

/// Whether it is what Go flannel writes to its TUN, which has no link header, where there is no peer.
fn is_unreachable(frame: &[u8]) -> bool {
    let wanted = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Network);
    // A frame that begins with the address of a station does not begin with this: it would be a group's.
    let is_packet = frame.first() == Some(&0x45);
    let transport = PacketHeaders::from_ip_slice(frame).ok().and_then(|packet| packet.transport);
    is_packet && matches!(transport, Some(TransportHeader::Icmpv4(icmp)) if icmp.icmp_type == wanted)
}

/// All frames of all of a node's devices, both ways.
struct Capture(OwnedFd);

impl Capture {
    fn open(ns: &Namespace) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let open = || socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll);
        let socket = ns.run(open).unwrap().unwrap();
        // What is lost here is not looked at.
        setsockopt(&socket, RcvBufForce, &(64 << 20)).unwrap();
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
        Self(socket)
    }

    fn next(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 16];
        let len = recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty()).ok()?;
        frame.truncate(len);
        Some(frame)
    }
}

impl Cluster {
    fn pod_addr(&self, nth: usize) -> Ipv4Addr {
        match self.pods[&nth].addrs.v4 {
            Some(IpAddr::V4(addr)) => addr,
            other => panic!("{other:?}"),
        }
    }

    /// Datagrams of one packet and of several, which nobody has to get, and one that nobody can.
    fn datagrams(&self, from: usize, to: usize) {
        let (here, there) = (&self.pods[&from], self.pod_addr(to));
        let socket = here.ns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        for len in [100, 4000] {
            socket.send_to(&vec![7; len], (there, 9)).unwrap();
        }
        socket.send_to(&[7; 100], (NOWHERE, 9)).unwrap();
    }

    fn throughput(&self, from: usize, to: usize, time: Duration) {
        let (here, there) = (&self.pods[&from], &self.pods[&to]);
        throughput(&here.ns, &there.ns, there.addrs.v4.unwrap(), time).unwrap();
    }
}
