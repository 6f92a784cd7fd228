//! Kernel state: one type for what is wanted and for what was seen.
//!
//! Everything is keyed as the kernel keys it and held in canonical form, so that comparing is `==`. Links are named
//! by a small [`LinkId`] in keys and values; their text names stand in [`Link`] alone.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::data_plane::{Forward, ForwardKey, Limitation};
use super::link_kind::LinkKind;
use crate::net::{Family, MacAddr, Prefix};
use crate::text::Plain;

/// A link, as far as an overlay cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkId {
    /// A device of the overlay: its place in [`Scope::devices`](crate::kernel::Scope::devices).
    Own(u8),
    /// The interface that carries the overlay's packets.
    Uplink,
    /// Any other, by interface index.
    Other(u32),
}

/// The name of a network interface: 1 to 15 bytes, no `/` and no white space (`dev_valid_name`, net/core/dev.c).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkName(Box<str>);

/// Text cannot name an interface. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be an interface name: 1 to 15 bytes, no '/', ':' or white space, not '.' or '..'")]
pub struct LinkNameError(String);

impl LinkName {
    /// Checks and keeps `text`.
    ///
    /// # Errors
    /// [`LinkNameError`]. Final for this input.
    pub fn new(text: &str) -> Result<Self, LinkNameError> {
        let bad = text.is_empty()
            || text.len() > 15
            || text == "."
            || text == ".."
            || text.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
        if bad { Err(LinkNameError(text.chars().take(64).collect())) } else { Ok(Self(text.into())) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LinkName {
    type Err = LinkNameError;

    fn from_str(text: &str) -> Result<Self, LinkNameError> {
        Self::new(text)
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Plain(&self.0).fmt(f)
    }
}

impl fmt::Debug for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// Its name.
    pub name: LinkName,
    /// What it is.
    pub kind: LinkKind,
    /// Its MAC address, if the kind has one.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its link group (`IFLA_GROUP`): the overlay's [mark](crate::kernel::OverlayName::mark) on a device of ours.
    pub group: u32,
    /// Its alias (`IFLA_IFALIAS`): `flannelkit:<overlay>` on a device of ours.
    pub alias: Option<Box<str>>,
}

impl Link {
    /// A device that is up, without a MAC address, group or alias.
    pub fn new(name: LinkName, kind: LinkKind, mtu: u32) -> Self {
        Self { name, kind, mac: None, mtu, up: true, group: 0, alias: None }
    }
}

/// An address on a device of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressKey {
    /// The device.
    pub link: LinkId,
    /// The address.
    pub addr: IpAddr,
    /// Length of its prefix, in bits.
    pub len: u8,
}

/// A VXLAN forwarding entry on a device of ours. The kernel keeps several destinations only for the all-zero and for
/// multicast addresses, so destinations count in the key: moving one is a replace of the same address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FdbKey {
    /// The device.
    pub link: LinkId,
    /// Inner destination.
    pub mac: MacAddr,
    /// 0, but for further destinations of one address as seen in a dump.
    pub nth: u16,
}

/// A permanent neighbour on a device of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeighbourKey {
    /// The device.
    pub link: LinkId,
    /// Its IP address.
    pub addr: IpAddr,
}

/// One of the routes to a prefix, without TOS. There may be several, even in one table and with one metric (docs/kernel-facts.md, "Route keys are not unique"): all that were seen are kept, in the
/// order of the dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Destination.
    pub prefix: Prefix,
    /// Tells routes to one prefix apart: 0 for the first one that is wanted, or was seen.
    pub nth: u16,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Route {
    /// What it does.
    pub kind: RouteKind,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The output interface.
    pub link: Option<LinkId>,
    /// Whether the next hop is taken as on-link whatever the addresses say (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// `rtm_protocol`. See [`Route::protocol_for`].
    pub protocol: u8,
    /// Attributes that few routes have; `None` if they have their defaults. Boxed to keep the other routes small.
    pub(crate) extra: Option<Box<Extra>>,
}

/// Attributes that few routes have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Extra {
    slot: RouteSlot,
    source: Option<IpAddr>,
}

impl Extra {
    const DEFAULT: Self = Self { slot: RouteSlot::MAIN, source: None };
}

/// Where a route stands among those to its prefix: the kernel uses the first one of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct RouteSlot {
    /// The routing table. Never 0.
    pub table: u32,
    /// The metric (`RTA_PRIORITY`); of routes of one table the least is used. 0 is the kernel's default, which for IPv6 is
    /// 1024.
    pub metric: u32,
}

impl RouteSlot {
    /// This table and metric.
    pub const fn new(table: u32, metric: u32) -> Self {
        Self { table, metric }
    }

    /// The main table (`RT_TABLE_MAIN`), with the kernel's default metric.
    pub const MAIN: Self = Self { table: 254, metric: 0 };
    /// The metric that the kernel gives an IPv6 route without one (`IP6_RT_PRIO_USER`).
    pub(crate) const METRIC_V6: u32 = 1024;

    /// The slot as the kernel reports it.
    pub(crate) fn normalized(self, family: Family) -> Self {
        match family {
            Family::V6 if self.metric == Self::METRIC_V6 => Self { metric: 0, ..self },
            _ => self,
        }
    }

    /// The metric by which the kernel compares it with others of its table.
    #[cfg(all(target_os = "linux", feature = "netlink"))]
    pub(crate) fn rank(self, family: Family) -> u32 {
        match family {
            Family::V6 if self.metric == 0 => Self::METRIC_V6,
            _ => self.metric,
        }
    }

    pub(crate) fn is_in_main_table(&self) -> bool {
        self.table == Self::MAIN.table
    }
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RouteKind {
    /// Forwards to one next hop.
    Unicast,
    /// Drops.
    Blackhole,
    /// Anything that no route of ours is: several next hops, an encapsulation, another type.
    Foreign,
}

impl Route {
    /// The first protocol number of ours; nothing is registered from here on (docs/kernel-facts.md, "Route insertion").
    pub const FIRST_PROTOCOL: u8 = 200;
    /// How many numbers from there are ours.
    pub const PROTOCOLS: u8 = 32;
    /// How many scopes IPv4 routes of ours are spread over where there are many: from 0 on, far below `link`, which
    /// means something (docs/kernel-facts.md, "Route scopes").
    pub const SCOPES: u8 = 64;
    /// `RTPROT_BOOT`: what Go flannel and `ip route add` write.
    pub const BOOT: u8 = 3;

    /// A route of ours through an overlay device: the next hop is reachable by its permanent neighbour alone.
    pub fn overlay(prefix: Prefix, gateway: IpAddr, device: LinkId) -> Self {
        Self { onlink: true, ..Self::direct(prefix, gateway, device) }
    }

    /// A route of ours through a next hop that is on the link.
    pub fn direct(prefix: Prefix, gateway: IpAddr, link: LinkId) -> Self {
        Self {
            kind: RouteKind::Unicast,
            gateway: Some(gateway),
            link: Some(link),
            onlink: false,
            protocol: Self::protocol_for(&prefix),
            extra: None,
        }
    }

    /// A route of ours into a device that needs no next hop, such as a TUN.
    pub fn into_device(prefix: Prefix, device: LinkId) -> Self {
        let protocol = Self::protocol_for(&prefix);
        Self { kind: RouteKind::Unicast, gateway: None, link: Some(device), onlink: false, protocol, extra: None }
    }

    /// A route of ours that drops packets.
    pub fn blackhole(prefix: Prefix) -> Self {
        let protocol = Self::protocol_for(&prefix);
        Self { kind: RouteKind::Blackhole, gateway: None, link: None, onlink: false, protocol, extra: None }
    }

    /// Its table and metric.
    pub fn slot(&self) -> RouteSlot {
        self.extra().slot
    }

    /// The source address of packets that the host itself sends this way (`RTA_PREFSRC`), which has to be an address of
    /// the host. `None`: the kernel chooses.
    pub fn source(&self) -> Option<IpAddr> {
        self.extra().source
    }

    /// Moves the route to another table or metric.
    pub fn in_slot(self, slot: RouteSlot) -> Self {
        let extra = Extra { slot, ..self.extra() };
        self.with(extra)
    }

    /// Sets or removes the source address.
    pub fn with_source(self, source: Option<IpAddr>) -> Self {
        let extra = Extra { source, ..self.extra() };
        self.with(extra)
    }

    fn extra(&self) -> Extra {
        self.extra.as_deref().copied().unwrap_or(Extra::DEFAULT)
    }

    fn with(self, extra: Extra) -> Self {
        Self { extra: (extra != Extra::DEFAULT).then(|| Box::new(extra)), ..self }
    }

    /// The route to `prefix` as the kernel reports it.
    pub(crate) fn normalized(self, prefix: &Prefix) -> Self {
        let slot = self.slot().normalized(prefix.family());
        self.in_slot(slot)
    }

    /// The protocol number a route of ours to `prefix` is written with. Spreading ours over 32 numbers spreads them
    /// over the kernel's next-hop hash, which makes inserting them linear (docs/kernel-facts.md, "Route insertion").
    pub fn protocol_for(prefix: &Prefix) -> u8 {
        Self::FIRST_PROTOCOL + (spread(prefix) >> 59) as u8 % Self::PROTOCOLS
    }

    /// The scope an IPv4 route of ours to `prefix` is written with where there are many. It says nothing of where the
    /// route leads, so a [`Route`] does not have it: routes that differ in it are equal.
    pub fn scope_for(prefix: &Prefix) -> u8 {
        (spread(prefix) >> 53) as u8 % Self::SCOPES
    }

    /// Whether the protocol is one of ours.
    pub fn has_own_protocol(&self) -> bool {
        Self::is_own_protocol(self.protocol)
    }

    pub(crate) fn is_own_protocol(protocol: u8) -> bool {
        (Self::FIRST_PROTOCOL..Self::FIRST_PROTOCOL + Self::PROTOCOLS).contains(&protocol)
    }

    /// Equality as the reconciler has it: any protocol of ours is as good as any other.
    pub fn same(&self, other: &Self) -> bool {
        let protocol = self.protocol == other.protocol || (self.has_own_protocol() && other.has_own_protocol());
        let place = |route: &Self| (route.kind, route.gateway, route.link, route.onlink);
        protocol && place(self) == place(other) && self.extra == other.extra
    }
}

/// Fibonacci hashing: neighbouring subnets differ in few, low bits; the product's top bits do not.
fn spread(prefix: &Prefix) -> u64 {
    let bits = match prefix.addr() {
        IpAddr::V4(addr) => u64::from(u32::from(addr)),
        IpAddr::V6(addr) => {
            let value = u128::from(addr);
            (value >> 64) as u64 ^ (value as u64).rotate_left(31)
        }
    };
    bits.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Kernel state of one overlay: what is wanted, or what was seen.
///
/// Seen state also holds foreign objects on keys inside the overlay's scope, so that a conflict can be told from an
/// absence; [`crate::plan`] says which are ours.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct State {
    /// Devices.
    pub links: BTreeMap<LinkId, Link>,
    /// Addresses on our devices.
    pub addresses: BTreeMap<AddressKey, ()>,
    /// Forwarding entries on our devices: the outer destination.
    pub fdb: BTreeMap<FdbKey, IpAddr>,
    /// Permanent neighbours on our devices.
    pub neighbours: BTreeMap<NeighbourKey, MacAddr>,
    /// What data planes forward.
    pub forwards: BTreeMap<ForwardKey, Forward>,
    /// Routes.
    pub routes: BTreeMap<RouteKey, Route>,
    /// What makes data planes slower than they could be: no objects, so never wanted or written.
    pub limitations: BTreeMap<LinkId, Vec<Limitation>>,
}

impl State {
    /// How many objects there are.
    pub fn len(&self) -> usize {
        let on_links = self.addresses.len() + self.fdb.len() + self.neighbours.len() + self.forwards.len();
        self.links.len() + on_links + self.routes.len()
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The routes to one destination, in the order of the dump.
    pub fn routes_to(&self, prefix: Prefix) -> impl Iterator<Item = (&RouteKey, &Route)> + Clone {
        self.routes.range(RouteKey { prefix, nth: 0 }..=RouteKey { prefix, nth: u16::MAX })
    }

    /// Adds what one peer needs.
    pub fn add(&mut self, peer: &PeerState) {
        self.fdb.extend(peer.fdb);
        self.neighbours.extend(peer.neighbour);
        self.forwards.extend(peer.forward);
        self.routes.extend(peer.keyed_routes());
    }
}

/// What one peer needs of the kernel, in one family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PeerState {
    /// Where frames to its VTEP go.
    pub fdb: Option<(FdbKey, IpAddr)>,
    /// The MAC address of its next hop.
    pub neighbour: Option<(NeighbourKey, MacAddr)>,
    /// Where a data plane sends packets to its subnet.
    pub forward: Option<(ForwardKey, Forward)>,
    /// The routes to its subnet. Several have to differ in table or metric.
    pub routes: Vec<(Prefix, Route)>,
}

impl PeerState {
    /// Adds a route.
    pub fn with_route(mut self, prefix: Prefix, route: Route) -> Self {
        self.routes.push((prefix, route));
        self
    }

    /// Sets the neighbour.
    pub fn with_neighbour(self, key: NeighbourKey, mac: MacAddr) -> Self {
        Self { neighbour: Some((key, mac)), ..self }
    }

    /// Sets the forward.
    pub fn with_forward(self, key: ForwardKey, forward: Forward) -> Self {
        Self { forward: Some((key, forward)), ..self }
    }

    /// Sets the forwarding entry.
    pub fn with_fdb(self, key: FdbKey, dst: IpAddr) -> Self {
        Self { fdb: Some((key, dst)), ..self }
    }

    /// The routes with the keys they have in a [`State`].
    pub(crate) fn keyed_routes(&self) -> impl Iterator<Item = (RouteKey, Route)> + '_ {
        self.routes.iter().enumerate().map(|(place, (prefix, route))| {
            let same = self.routes.iter().take(place).filter(|(other, _)| other == prefix).count();
            (RouteKey { prefix: *prefix, nth: u16::try_from(same).unwrap_or(u16::MAX) }, route.clone())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The `n`-th of many neighbouring subnets.
    fn subnet(n: u32, len: u8) -> Prefix {
        Prefix::new(std::net::Ipv4Addr::from(0x0a00_0000 + (n << (32 - len))).into(), len).unwrap()
    }

    #[test]
    fn protocols_spread_over_neighbouring_subnets() {
        let mut buckets = [0u32; Route::PROTOCOLS as usize];
        for n in 0..8192 {
            buckets[usize::from(Route::protocol_for(&subnet(n, 24)) - Route::FIRST_PROTOCOL)] += 1;
        }
        let (least, most) = (buckets.iter().min().unwrap(), buckets.iter().max().unwrap());
        assert!(*least > 200 && *most < 320, "{buckets:?}");
    }

    #[test]
    fn protocols_and_scopes_together_spread_over_neighbouring_subnets() {
        for len in [24, 26] {
            let mut buckets = BTreeMap::<_, u32>::new();
            for n in 0..1 << 16 {
                let prefix = subnet(n, len);
                *buckets.entry((Route::protocol_for(&prefix), Route::scope_for(&prefix))).or_default() += 1;
            }
            assert_eq!(buckets.len(), usize::from(Route::PROTOCOLS) * usize::from(Route::SCOPES));
            assert!(buckets.values().all(|count| *count < 64), "at most twice the mean: {buckets:?}");
        }
    }

    #[test]
    fn comparison_takes_any_own_protocol_as_equal_and_no_other() {
        let prefix: Prefix = "10.5.1.0/24".parse().unwrap();
        let ours = Route::overlay(prefix, prefix.addr(), LinkId::Own(0));
        assert!(ours.same(&Route { protocol: 231, ..ours.clone() }));
        assert!(!ours.same(&Route { protocol: Route::BOOT, ..ours.clone() }));
        assert!(!ours.same(&Route { onlink: false, ..ours.clone() }));
        assert!(!ours.same(&ours.clone().in_slot(RouteSlot::new(254, 7))));
        assert!(ours.same(&ours.clone().with_source(Some(prefix.addr())).with_source(None)));
    }

    #[test]
    fn link_names_are_what_the_kernel_takes() {
        assert!(LinkName::new("flannel.1").is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes-xx", "a:b"] {
            assert!(LinkName::new(bad).is_err(), "{bad}");
        }
    }
}
