//! Two nodes with a link between them, and a packet path on each.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod detour;

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use flannel_core::net::{Dual, Family, Prefix};
use testkit::Namespace;

use super::api::{OpenMode, Path, Settings, Table, Tun};

/// The time limit for every wait.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const MEBIBYTE: usize = 1 << 20;
pub(crate) const PORT: u16 = 8285;
/// The name of a node's link to the other.
pub(crate) const LINK: &str = "eth0";
/// The name of a node's TUN.
pub(crate) const TUN: &str = "flannel0";

/// The kind of link between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// It passes super-packets whole, as between two machines on one host.
    Whole,
    /// It carries packets of 1500 bytes, like a wire; the receiver merges them.
    Wire,
}

/// How the nodes are created.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) link: Link,
    /// The family of the endpoints.
    pub(crate) underlay: Family,
    pub(crate) queues: usize,
}

impl Shape {
    pub(crate) const PLAIN: Self = Self { link: Link::Whole, underlay: Family::V4, queues: 1 };
    pub(crate) const WIRE: Self = Self { link: Link::Wire, ..Self::PLAIN };
}

/// One of two nodes.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) ns: Namespace,
}

impl Node {
    /// Returns the node's endpoint.
    pub(crate) fn endpoint(&self, underlay: Family) -> SocketAddr {
        SocketAddr::new(underlay_address(self.number, underlay), PORT)
    }

    /// Returns the node's address in the overlay.
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, 5, self.number, 0).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 5, 0, self.number.into(), 0, 0, 0, 1).into(),
        }
    }

    pub(crate) fn own(&self) -> Dual<Prefix> {
        let prefix = |family, len| Prefix::masked(self.address(family), len).ok();
        Dual { v4: prefix(Family::V4, 24), v6: prefix(Family::V6, 64) }
    }

    /// Creates the device and starts the path.
    pub(crate) fn start(&self, shape: Shape, peer: &Self) -> Path {
        let path = self.start_on(shape, peer, || Tun::open(TUN, OpenMode::Create, shape.queues).unwrap());
        path.set_sockets(only(self.endpoint(shape.underlay))).unwrap();
        path
    }

    /// Starts a path on a device without sockets.
    pub(crate) fn start_on(&self, shape: Shape, peer: &Self, open: impl FnOnce() -> Tun + Send) -> Path {
        let endpoint = peer.endpoint(shape.underlay);
        let peers: Vec<_> = peer.own().iter().map(|(_, subnet)| (*subnet, Some(endpoint))).collect();
        let table = Table::new(self.own()).with(&peers);
        let path = self.ns.run(|| Path::start(open(), Settings::default(), table).unwrap()).unwrap();
        let mtu = if shape.underlay == Family::V4 { 1472 } else { 1452 };
        self.ns.set_mtu(TUN, mtu).unwrap();
        self.ns.add_address(TUN, self.address(Family::V4), 32).unwrap();
        self.ns.add_address(TUN, self.address(Family::V6), 128).unwrap();
        self.ns.set_up(TUN).unwrap();
        self.ns.ip(&format!("route add 10.5.0.0/16 dev {TUN}")).unwrap();
        self.ns.ip(&format!("-6 route add fd00:5::/32 dev {TUN}")).unwrap();
        path
    }

    /// Returns how many packets the node's link has sent.
    pub(crate) fn link_packets(&self) -> u64 {
        self.packets(LINK, "tx")
    }

    /// Returns how many packets the kernel has received from a device.
    pub(crate) fn packets_from(&self, device: &str) -> u64 {
        self.packets(device, "rx")
    }

    fn packets(&self, device: &str, direction: &str) -> u64 {
        let shown = self.ns.ip(&format!("-s -json link show dev {device}")).unwrap();
        let counted = shown.split(&format!("\"{direction}\":")).nth(1).unwrap();
        let counted = counted.split("\"packets\":").nth(1).unwrap();
        counted.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    }
}

/// Returns a socket of one family.
pub(crate) fn only(local: SocketAddr) -> Dual<SocketAddr> {
    let mut sockets = Dual::default();
    *sockets.slot(Family::of(local.ip())) = Some(local);
    sockets
}

pub(crate) fn underlay_address(number: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, number).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into(),
    }
}

/// Creates two nodes with a link, without paths.
pub(crate) fn nodes(link: Link) -> [Node; 2] {
    let [one, two] = [1, 2].map(|number| Node { number, ns: Namespace::new(&format!("node{number}")).unwrap() });
    one.ns.add_veth(LINK, &two.ns, LINK).unwrap();
    for node in [&one, &two] {
        node.ns
            .set_sysctls(&[("net/ipv6/conf/all/accept_dad", "0"), ("net/ipv6/conf/default/accept_dad", "0")])
            .unwrap();
        if link == Link::Wire {
            let features = [
                ("tx-tcp-segmentation", false),
                ("tx-tcp6-segmentation", false),
                ("tx-tcp-ecn-segmentation", false),
                ("tx-tcp-mangleid-segmentation", false),
                ("tx-udp-segmentation", false),
                ("tx-udp_tnl-segmentation", false),
                ("tx-udp_tnl-csum-segmentation", false),
                ("rx-gro", true),
            ];
            node.ns.set_features(LINK, &features).unwrap();
        }
        node.ns.add_address(LINK, underlay_address(node.number, Family::V4), 24).unwrap();
        node.ns.add_address(LINK, underlay_address(node.number, Family::V6), 64).unwrap();
    }
    for node in [&one, &two] {
        node.ns.set_up(LINK).unwrap();
    }
    for (node, peer) in [(&one, 2), (&two, 1)] {
        let there = underlay_address(peer, Family::V6);
        testkit::probe::until_reply(&node.ns, there, PATIENCE).unwrap();
    }
    [one, two]
}

/// Creates two nodes with paths between them.
pub(crate) fn overlay(shape: Shape) -> ([Node; 2], [Path; 2]) {
    let nodes = nodes(shape.link);
    let paths = [nodes[0].start(shape, &nodes[1]), nodes[1].start(shape, &nodes[0])];
    (nodes, paths)
}

/// Pseudo-random bytes.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2) + 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            let noise = self.next().to_ne_bytes();
            word.copy_from_slice(&noise[..word.len()]);
        }
    }
}

/// Sends this many bytes over TCP, and runs `underway` meanwhile. Returns whether the same bytes arrived.
pub(crate) fn transfer(from: &Node, to: &Node, family: Family, bytes: usize, underway: impl FnOnce()) {
    let address = to.address(family);
    let listener = to.ns.run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let mut stream = from.ns.run(|| TcpStream::connect_timeout(&target, PATIENCE).unwrap()).unwrap();
    let (mut inbox, _) = listener.accept().unwrap();
    inbox.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let received = std::thread::spawn(move || {
        let (mut hash, mut count, mut buffer) = (DefaultHasher::new(), 0, vec![0; 1 << 18]);
        loop {
            match inbox.read(&mut buffer).unwrap() {
                0 => return (hash.finish(), count),
                len => {
                    hash.write(&buffer[..len]);
                    count += len;
                }
            }
        }
    });
    let sending = std::thread::spawn(move || {
        let (mut hash, mut left, mut noise) = (DefaultHasher::new(), bytes, Noise::new(7));
        let mut buffer = vec![0; 1 << 18];
        while left > 0 {
            let len = left.min(buffer.len());
            noise.fill(&mut buffer[..len]);
            hash.write(&buffer[..len]);
            stream.write_all(&buffer[..len]).unwrap();
            left -= len;
        }
        hash.finish()
    });
    underway();
    assert_eq!((sending.join().unwrap(), bytes), received.join().unwrap());
}

/// Opens a UDP socket in a node's namespace.
pub(crate) fn udp(node: &Node, local: SocketAddr) -> UdpSocket {
    let socket = node.ns.run(|| UdpSocket::bind(local).unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}
