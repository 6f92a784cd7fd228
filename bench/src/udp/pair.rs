//! Two hosts on one link, each a network namespace, and what that link takes in one piece.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bench::Error;
use bench::peers::{LEN, public, subnet};
use testkit::{Namespace, probe};

/// The length of the underlay's prefix, in bits.
const UNDERLAY: u8 = 12;
/// The default route's next hop. Agents find the interface by that route; what no overlay carries must not arrive.
const NOBODY: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 254);
/// How long a first packet may take: until then Go's agents have to start.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the link between the hosts takes in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// Packets of 64 KiB, which nobody splits: two machines on one host, or a network card that does all.
    Off,
    /// Frames of 1500 bytes: the sender's kernel splits, and the receiver's merges.
    Wire,
}

impl Link {
    pub(crate) const ALL: [Self; 2] = [Self::Off, Self::Wire];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Wire => "wire",
        }
    }

    /// The features of a veth end that differ, and whether they are on.
    fn features(self) -> Vec<(&'static str, bool)> {
        const SPLITS: [&str; 7] = [
            "tx-tcp-segmentation",
            "tx-tcp-ecn-segmentation",
            "tx-tcp-mangleid-segmentation",
            "tx-tcp6-segmentation",
            "tx-udp-segmentation",
            "tx-udp_tnl-segmentation",
            "tx-udp_tnl-csum-segmentation",
        ];
        let whole = self == Self::Off;
        SPLITS.into_iter().map(|name| (name, whole)).chain([("rx-gro", !whole)]).collect()
    }
}

/// A host.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) ns: Namespace,
    /// Its number, which gives its addresses.
    n: u32,
    /// A pod on it, once there is an overlay.
    pod: Option<Namespace>,
}

impl Host {
    fn new(n: u32) -> Result<Self, Error> {
        let ns = Namespace::new(&format!("host{n}"))?;
        ns.set_sysctls(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
        ])?;
        Ok(Self { ns, n, pod: None })
    }

    /// Its address on the link.
    pub(crate) fn public(&self) -> Ipv4Addr {
        public(self.n)
    }

    /// Its address in the overlay.
    pub(crate) fn inner(&self) -> Ipv4Addr {
        subnet(self.n)
    }

    fn in_subnet(&self, nth: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(subnet(self.n)) + nth)
    }

    /// A pod as a CNI plug-in makes it: behind a bridge with the subnet's first address.
    fn attach_pod(&mut self, mtu: u32) -> Result<(), Error> {
        let pod = Namespace::new(&format!("pod{}", self.n))?;
        let (gateway, addr) = (self.in_subnet(1), self.in_subnet(2));
        self.ns.add_bridge("cni0")?;
        self.ns.add_veth("veth0", &pod, "eth0")?;
        self.ns.ip(&format!("link set veth0 mtu {mtu} master cni0 up"))?;
        self.ns.set_up("cni0")?;
        self.ns.add_address("cni0", gateway.into(), LEN)?;
        pod.ip(&format!("link set eth0 mtu {mtu} up"))?;
        pod.add_address("eth0", addr.into(), LEN)?;
        pod.ip(&format!("route add default via {gateway}"))?;
        self.pod = Some(pod);
        Ok(())
    }
}

/// The way of some traffic: from a namespace, to another one and an address there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way<'a> {
    pub(crate) from: &'a Namespace,
    pub(crate) to: &'a Namespace,
    pub(crate) addr: IpAddr,
}

/// Two hosts. Gone when dropped, but for what somebody still holds.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) hosts: [Host; 2],
}

impl Pair {
    pub(crate) fn new() -> Result<Self, Error> {
        let hosts = [Host::new(0)?, Host::new(1)?];
        let [one, two] = &hosts;
        one.ns.add_veth("eth0", &two.ns, "eth0")?;
        for host in &hosts {
            host.ns.set_up("eth0")?;
            host.ns.add_address("eth0", host.public().into(), UNDERLAY)?;
            host.ns.ip(&format!("route add default via {NOBODY}"))?;
        }
        Ok(Self { hosts })
    }

    /// A pod on each host.
    pub(crate) fn attach_pods(&mut self, mtu: u32) -> Result<(), Error> {
        self.hosts.iter_mut().try_for_each(|host| host.attach_pod(mtu))
    }

    pub(crate) fn set_link(&self, link: Link) -> Result<(), Error> {
        self.hosts.iter().try_for_each(|host| {
            host.ns.set_features("eth0", &link.features())?;
            Ok(())
        })
    }

    /// Beside the overlay.
    pub(crate) fn underlay(&self) -> Way<'_> {
        let [one, two] = &self.hosts;
        Way { from: &one.ns, to: &two.ns, addr: two.public().into() }
    }

    /// From host to host, in the overlay.
    pub(crate) fn overlay(&self) -> Way<'_> {
        let [one, two] = &self.hosts;
        Way { from: &one.ns, to: &two.ns, addr: two.inner().into() }
    }

    /// From pod to pod, where there are any.
    pub(crate) fn pods(&self) -> Option<Way<'_>> {
        let [one, two] = &self.hosts;
        Some(Way { from: one.pod.as_ref()?, to: two.pod.as_ref()?, addr: two.in_subnet(2).into() })
    }

    /// Bytes in each frame that the first host has sent, on average, since the numbers given; and the numbers now.
    pub(crate) fn frames(&self) -> Result<Frames, Error> {
        let [one, _] = &self.hosts;
        let text = one.ns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).ok_or("no eth0 in /proc/net/dev")?;
        // Eight numbers of what was received come first.
        let mut sent = line.split_whitespace().skip(8).map(str::parse);
        match (sent.next(), sent.next()) {
            (Some(bytes), Some(frames)) => Ok(Frames { bytes: bytes?, frames: frames? }),
            _ => Err("too few numbers in /proc/net/dev".into()),
        }
    }
}

/// What a host has sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frames {
    bytes: u64,
    frames: u64,
}

impl Frames {
    /// Bytes in each frame since `earlier`, on average.
    pub(crate) fn size_since(self, earlier: Self) -> f64 {
        (self.bytes - earlier.bytes) as f64 / (self.frames - earlier.frames).max(1) as f64
    }
}

impl Way<'_> {
    /// Waits until a packet comes back.
    pub(crate) fn until_open(&self) -> Result<(), Error> {
        probe::until_reply(self.from, self.addr, PATIENCE)?;
        Ok(())
    }
}
