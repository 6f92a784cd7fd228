//! A simulated network: a switch, nodes on it, and a pod behind each node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::net::{Dual, Family, MacAddr, Mtu, Prefix};

use crate::{Error, Namespace, Route};

/// The name of a node's link to the switch.
pub const UNDERLAY_LINK: &str = "eth0";
/// The name of a node's bridge for its pods.
const POD_BRIDGE: &str = "cni0";
const SWITCH_LINK: &str = "br0";
const V4_LEN: u8 = 16;
const V6_LEN: u8 = 64;
/// A kernel worker announces carrier changes, each at most once a second.
const SETTLE: Duration = Duration::from_secs(10);

/// The IP families of an underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl Families {
    /// Whether it includes this family.
    pub fn has(self, family: Family) -> bool {
        match self {
            Self::V4 => family == Family::V4,
            Self::V6 => family == Family::V6,
            Self::Dual => true,
        }
    }

    fn pick(self, v4: Ipv4Addr, v6: Ipv6Addr) -> Dual<IpAddr> {
        Dual { v4: self.has(Family::V4).then_some(v4.into()), v6: self.has(Family::V6).then_some(v6.into()) }
    }
}

/// A switch and the nodes on it. Dropping it ends them all, except for what is still held elsewhere.
#[derive(Debug)]
pub struct Underlay {
    switch: Namespace,
    nodes: Vec<Node>,
    families: Families,
    mtu: Mtu,
}

impl Underlay {
    /// Creates `count` nodes with an MTU of 1500.
    ///
    /// Node n (from 1) has 10.89.0.0/16 + 10 + n and fd00:89::/64 + 10 + n on [`UNDERLAY_LINK`], and a default route
    /// through the switch, which is + 1. It forwards packets, and its IPv6 addresses can be used at once.
    ///
    /// # Errors
    /// If namespaces are not allowed (see [`crate::userns::enter`]), or the kernel lacks a family.
    pub fn new(count: usize, families: Families) -> Result<Self, Error> {
        Self::with_mtu(count, families, Mtu(1500))
    }

    /// Like [`new`](Self::new), with another MTU.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_mtu(count: usize, families: Families, mtu: Mtu) -> Result<Self, Error> {
        let switch = Namespace::new("switch")?;
        prepare(&switch, families)?;
        switch.add_bridge(SWITCH_LINK)?;
        // A bridge without a fixed MAC address uses the lowest of its ports, and changes it with the ports.
        switch.set_mac(SWITCH_LINK, mac(0x5e, 0))?;
        switch.set_mtu(SWITCH_LINK, mtu.0)?;
        switch.set_up(SWITCH_LINK)?;
        let gateways = address(families, 1);
        for (_, gateway) in gateways.iter() {
            switch.add_address(SWITCH_LINK, *gateway, length(*gateway))?;
        }
        let nodes = (1..=count).map(|nth| Node::new(nth as u32, families, mtu, &switch)).collect::<Result<_, _>>()?;
        Ok(Self { switch, nodes, families, mtu })
    }

    /// Returns the nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Adds a node, the one after the last.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn add_node(&mut self) -> Result<&Node, Error> {
        let nth = self.nodes.len() + 1;
        self.nodes.push(Node::new(nth as u32, self.families, self.mtu, &self.switch)?);
        Ok(&self.nodes[nth - 1])
    }

    /// Puts a new node, with the same addresses, in the place of the node of this number, from 1.
    ///
    /// # Panics
    /// If there is no such node.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn replace_node(&mut self, nth: usize) -> Result<&Node, Error> {
        let former = &self.nodes[nth - 1];
        self.switch.delete_link(&former.port)?;
        self.nodes[nth - 1] = Node::new(nth as u32, self.families, self.mtu, &self.switch)?;
        Ok(&self.nodes[nth - 1])
    }

    /// Returns the namespace of the switch: an outside host that every node reaches by its default route.
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }
}

/// A machine of the underlay.
#[derive(Debug)]
pub struct Node {
    /// The node's name, such as `node1`.
    pub name: String,
    /// The node's host namespace.
    pub ns: Namespace,
    /// The node's addresses on the underlay.
    pub addrs: Dual<IpAddr>,
    families: Families,
    gateways: Dual<IpAddr>,
    mac: MacAddr,
    mtu: Mtu,
    switch: Namespace,
    port: String,
}

impl Node {
    fn new(nth: u32, families: Families, mtu: Mtu, switch: &Namespace) -> Result<Self, Error> {
        let name = format!("node{nth}");
        let ns = Namespace::new(&name)?;
        prepare(&ns, families)?;
        let forwarding: &[(&str, &str)] = match families {
            Families::V4 => &FORWARDING[..1],
            Families::V6 => &FORWARDING[1..],
            Families::Dual => &FORWARDING,
        };
        ns.set_sysctls(forwarding)?;
        let node = Self {
            port: format!("port{nth}"),
            addrs: address(families, 10 + nth),
            gateways: address(families, 1),
            mac: mac(0x10, nth),
            switch: switch.clone(),
            name,
            ns,
            families,
            mtu,
        };
        node.restore_underlay()?;
        Ok(node)
    }

    /// Returns the node's IPv4 address on the underlay.
    ///
    /// # Errors
    /// If the underlay has no IPv4.
    pub fn v4(&self) -> Result<IpAddr, Error> {
        self.addr(Family::V4)
    }

    /// Returns the node's IPv6 address on the underlay.
    ///
    /// # Errors
    /// If the underlay has no IPv6.
    pub fn v6(&self) -> Result<IpAddr, Error> {
        self.addr(Family::V6)
    }

    /// Returns the node's address of a family on the underlay.
    ///
    /// # Errors
    /// If the underlay does not have that family.
    pub fn addr(&self, family: Family) -> Result<IpAddr, Error> {
        self.addrs.get(family).copied().ok_or_else(|| Error::new(format!("{} has no {family} address", self.name)))
    }

    /// Returns the node's addresses on the underlay, each with its prefix length in bits.
    pub(crate) fn underlay_addresses(&self) -> impl Iterator<Item = (IpAddr, u8)> {
        self.addrs.iter().map(|(_, addr)| (*addr, length(*addr))).collect::<Vec<_>>().into_iter()
    }

    /// Returns the other end of the link to the switch: its namespace and name.
    pub(crate) fn switch_port(&self) -> (&Namespace, &str) {
        (&self.switch, &self.port)
    }

    /// Restores the node's link to the switch: the link, its state, addresses, connected and default routes.
    /// Idempotent; waits for the carrier.
    ///
    /// # Errors
    /// The kernel's error, or if there is no carrier after some seconds.
    pub fn restore_underlay(&self) -> Result<(), Error> {
        let (switch, port) = self.switch_port();
        if !self.ns.links()?.iter().any(|link| link.name == UNDERLAY_LINK) {
            self.ns.add_veth(UNDERLAY_LINK, switch, port)?;
            self.ns.set_mac(UNDERLAY_LINK, self.mac)?;
            self.ns.set_mtu(UNDERLAY_LINK, self.mtu.0)?;
            switch.set_mtu(port, self.mtu.0)?;
            switch.set_link(port, &format!("master {SWITCH_LINK}"))?;
        }
        switch.set_up(port)?;
        self.ns.set_up(UNDERLAY_LINK)?;
        self.await_carrier(Carrier::Up)?;
        for (addr, len) in self.underlay_addresses() {
            unless_there(self.ns.add_address(UNDERLAY_LINK, addr, len))?;
            let connected = Prefix::masked(addr, len).map_err(|error| Error::new(error.to_string()))?;
            unless_there(self.ns.add_route(&connected_route(connected, addr)))?;
        }
        for (family, gateway) in self.gateways.iter() {
            let default = default_prefix(family)?;
            unless_there(self.ns.add_route(&Route::to(default).via(*gateway).dev(UNDERLAY_LINK)))?;
        }
        Ok(())
    }

    /// Waits until the link to the switch has or has lost its carrier, at both ends.
    pub(crate) fn await_carrier(&self, carrier: Carrier) -> Result<(), Error> {
        let wanted = carrier == Carrier::Up;
        wait_until(&format!("{}: carrier {carrier:?}", self.name), SETTLE, || {
            let ours = self.ns.link(UNDERLAY_LINK)?;
            let theirs = self.switch.link(&self.port)?;
            let settled = !wanted || (ours.state == "UP" && theirs.state == "UP");
            Ok(ours.has_carrier() == wanted && settled)
        })?;
        Ok(())
    }

    /// Attaches a pod, as a CNI plug-in does once there is a lease: a bridge with the subnet's first address, and a pod
    /// with the second and a default route through the bridge. Replaces an existing bridge.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn attach_pod(&self, net: &PodNet) -> Result<Pod, Error> {
        self.detach_pods()?;
        let ns = Namespace::new(&format!("{}-pod", self.name))?;
        prepare(&ns, self.families)?;
        self.ns.add_bridge(POD_BRIDGE)?;
        self.ns.set_mac(POD_BRIDGE, mac(0xc0, 1))?;
        self.ns.add_veth("veth0", &ns, "eth0")?;
        self.ns.set_mtu("veth0", net.mtu.0)?;
        ns.set_mtu("eth0", net.mtu.0)?;
        self.ns.set_link("veth0", &format!("master {POD_BRIDGE}"))?;
        self.ns.set_up("veth0")?;
        self.ns.set_up(POD_BRIDGE)?;
        ns.set_up("eth0")?;
        let mut addrs = Dual::default();
        for (family, subnet) in net.subnets.iter() {
            let (gateway, addr) = (nth(subnet, 1), nth(subnet, 2));
            self.ns.add_address(POD_BRIDGE, gateway, subnet.len())?;
            ns.add_address("eth0", addr, subnet.len())?;
            ns.add_route(&Route::to(default_prefix(family)?).via(gateway).dev("eth0"))?;
            *addrs.slot(family) = Some(addr);
        }
        wait_until(&format!("{}: carrier of the pod", self.name), SETTLE, || {
            Ok(ns.link("eth0")?.state == "UP" && self.ns.link(POD_BRIDGE)?.state == "UP")
        })?;
        Ok(Pod { ns, addrs })
    }

    /// Removes the pods' bridge and link, if there are any.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn detach_pods(&self) -> Result<(), Error> {
        for link in self.ns.links()? {
            if link.name == POD_BRIDGE || link.name == "veth0" {
                self.ns.delete_link(&link.name)?;
            }
        }
        Ok(())
    }
}

/// The settings that pods get from a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodNet {
    /// The node's subnets.
    pub subnets: Dual<Prefix>,
    /// The MTU of a pod's link.
    pub mtu: Mtu,
}

/// A pod: a namespace behind a node, which ends when this is dropped.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The pod's namespace.
    pub ns: Namespace,
    /// The pod's addresses.
    pub addrs: Dual<IpAddr>,
}

impl Pod {
    /// Returns the pod's address of a family.
    ///
    /// # Errors
    /// If the pod has none.
    pub fn addr(&self, family: Family) -> Result<IpAddr, Error> {
        self.addrs.get(family).copied().ok_or_else(|| Error::new(format!("the pod has no {family} address")))
    }
}

/// Whether a link has a carrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    Up,
    Lost,
}

/// Polls `condition` until it holds.
///
/// # Errors
/// If it does not hold within `patience`; the text contains `what` was waited for. An error of the condition ends the
/// wait.
pub fn wait_until(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> Result<bool, Error>,
) -> Result<Duration, Error> {
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > patience {
            return Err(Error::new(format!("{what}: not within {patience:?}")));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(start.elapsed())
}

const FORWARDING: [(&str, &str); 2] = [("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")];

/// Sets what a new namespace may inherit from the host and what would change a test's outcome.
fn prepare(ns: &Namespace, families: Families) -> Result<(), Error> {
    ns.set_sysctls(&[("net/ipv4/conf/all/rp_filter", "0"), ("net/ipv4/conf/default/rp_filter", "0")])?;
    if !families.has(Family::V6) {
        return Ok(());
    }
    ns.set_sysctls(&[
        ("net/ipv6/conf/all/disable_ipv6", "0"),
        ("net/ipv6/conf/default/disable_ipv6", "0"),
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/all/accept_ra", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
    ])
}

fn address(families: Families, host: u32) -> Dual<IpAddr> {
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 89, 0, 0)) + host);
    families.pick(v4, Ipv6Addr::from(u128::from(Ipv6Addr::new(0xfd00, 0x89, 0, 0, 0, 0, 0, 0)) + u128::from(host)))
}

fn length(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => V4_LEN,
        IpAddr::V6(_) => V6_LEN,
    }
}

fn mac(kind: u8, nth: u32) -> MacAddr {
    let [_, _, high, low] = nth.to_be_bytes();
    MacAddr([0x02, 0x89, kind, 0, high, low])
}

fn nth(subnet: &Prefix, host: u8) -> IpAddr {
    match subnet.addr() {
        IpAddr::V4(addr) => Ipv4Addr::from(u32::from(addr).wrapping_add(host.into())).into(),
        IpAddr::V6(addr) => Ipv6Addr::from(u128::from(addr).wrapping_add(host.into())).into(),
    }
}

fn default_prefix(family: Family) -> Result<Prefix, Error> {
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    Prefix::new(any, 0).map_err(|error| Error::new(error.to_string()))
}

/// Returns the route that the kernel creates with an address.
pub(crate) fn connected_route(prefix: Prefix, addr: IpAddr) -> Route {
    let route = Route::to(prefix).dev(UNDERLAY_LINK).protocol(Route::KERNEL);
    match addr {
        IpAddr::V4(_) => route.scope(Route::LINK).source(addr),
        IpAddr::V6(_) => route.metric(256),
    }
}

fn unless_there(done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(error) if error.is(nix::Error::EEXIST) => Ok(()),
        done => done,
    }
}
