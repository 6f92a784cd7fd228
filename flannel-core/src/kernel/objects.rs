//! Kernel state: the same types describe wanted and seen state.
//!
//! Objects are keyed as in the kernel and kept in canonical form, so that they are compared with `==`. Keys and values
//! refer to links by a small [`LinkId`]; only [`Link`] has the name.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::data_plane::{Forward, ForwardKey, Limitation};
use super::link_kind::LinkKind;
use crate::net::{Family, MacAddr, Prefix};
use crate::text::Plain;

/// Identifies a link for an overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkId {
    /// A device of the overlay: its index in [`Scope::devices`](crate::kernel::Scope::devices).
    Own(u8),
    /// The interface that carries the overlay's packets.
    Uplink,
    /// Any other link, by interface index.
    Other(u32),
}

/// The name of a network interface: 1 to 15 bytes without `/`, `:`, white space or control characters, and not `.` or
/// `..` (compare `dev_valid_name`, net/core/dev.c).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkName(Box<str>);

/// The text is not a valid interface name. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be an interface name: 1 to 15 bytes, no '/', ':' or white space, not '.' or '..'")]
pub struct LinkNameError(String);

impl LinkName {
    /// Validates `text` as a name.
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

    /// Returns the name as text.
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
    /// Its kind.
    pub kind: LinkKind,
    /// Its MAC address, if the kind has one.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its link group (`IFLA_GROUP`): the overlay's [mark](crate::kernel::OverlayName::mark) on the overlay's devices.
    pub group: u32,
    /// Its alias (`IFLA_IFALIAS`): `flannelkit:<overlay>` on the overlay's devices.
    pub alias: Option<Box<str>>,
}

impl Link {
    /// Creates a device that is up, without a MAC address, group or alias.
    pub fn new(name: LinkName, kind: LinkKind, mtu: u32) -> Self {
        Self { name, kind, mac: None, mtu, up: true, group: 0, alias: None }
    }
}

/// An address on one of the overlay's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressKey {
    /// The device.
    pub link: LinkId,
    /// The address.
    pub addr: IpAddr,
    /// The prefix length, in bits.
    pub len: u8,
}

/// A VXLAN FDB entry on one of the overlay's devices. The kernel keeps several destinations only for the all-zero
/// address and for multicast addresses; `nth` tells these apart. The destination is the value and not part of the key:
/// moving an entry replaces it under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FdbKey {
    /// The device.
    pub link: LinkId,
    /// The MAC address of the inner destination.
    pub mac: MacAddr,
    /// 0, except for further destinations of one MAC address in a dump.
    pub nth: u16,
}

/// A permanent neighbour on one of the overlay's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeighbourKey {
    /// The device.
    pub link: LinkId,
    /// Its IP address.
    pub addr: IpAddr,
}

/// One of the routes to a prefix, without TOS. There may be several, even in one table and with one metric
/// (docs/kernel-facts.md, "Route keys are not unique"). Seen state keeps all of them, in the order of the dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Destination.
    pub prefix: Prefix,
    /// The index among the routes to one prefix: 0 for the first that is wanted or was seen.
    pub nth: u16,
}

/// A route, without its destination.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Route {
    /// What the route does with packets.
    pub kind: RouteKind,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The output interface.
    pub link: Option<LinkId>,
    /// Whether the kernel treats the next hop as on-link whatever the addresses are (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// `rtm_protocol`. See [`Route::protocol_for`].
    pub protocol: u8,
    /// Attributes that few routes have; `None` if they have their defaults. Boxed to keep other routes small.
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

/// The position of a route among those to its prefix: the kernel uses the first route of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct RouteSlot {
    /// The routing table. Never 0.
    pub table: u32,
    /// The metric (`RTA_PRIORITY`); the lowest one in a table is used. 0 is the kernel's default, which for IPv6 is
    /// 1024.
    pub metric: u32,
}

impl RouteSlot {
    /// Creates a slot of this table and metric.
    pub const fn new(table: u32, metric: u32) -> Self {
        Self { table, metric }
    }

    /// The main table (`RT_TABLE_MAIN`), with the kernel's default metric.
    pub const MAIN: Self = Self { table: 254, metric: 0 };
    /// The metric of an IPv6 route that is added without one (`IP6_RT_PRIO_USER`).
    pub(crate) const METRIC_V6: u32 = 1024;

    /// The slot as the kernel reports it.
    pub(crate) fn normalized(self, family: Family) -> Self {
        match family {
            Family::V6 if self.metric == Self::METRIC_V6 => Self { metric: 0, ..self },
            _ => self,
        }
    }

    /// The metric that the kernel compares with other routes of the table.
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

/// What a route does with packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RouteKind {
    /// Forwards them to one next hop.
    Unicast,
    /// Drops them.
    Blackhole,
    /// Anything that a route of this library never is: several next hops, an encapsulation, another type.
    Foreign,
}

impl Route {
    /// The first protocol number of this library; no number from here on is registered (docs/kernel-facts.md, "Route
    /// insertion").
    pub const FIRST_PROTOCOL: u8 = 200;
    /// How many protocol numbers from there on this library uses.
    pub const PROTOCOLS: u8 = 32;
    /// The number of scopes that many IPv4 routes of this library are spread over: from 0 on, far below `link`, which
    /// has a meaning (docs/kernel-facts.md, "Route scopes").
    pub const SCOPES: u8 = 64;
    /// `RTPROT_BOOT`: the protocol of Go flannel and of `ip route add`.
    pub const BOOT: u8 = 3;

    /// Creates a route through an overlay device. The next hop is reachable only by its permanent neighbour.
    pub fn overlay(prefix: Prefix, gateway: IpAddr, device: LinkId) -> Self {
        Self { onlink: true, ..Self::direct(prefix, gateway, device) }
    }

    /// Creates a route through a next hop that is on the link.
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

    /// Creates a route into a device that needs no next hop, such as a TUN device.
    pub fn into_device(prefix: Prefix, device: LinkId) -> Self {
        let protocol = Self::protocol_for(&prefix);
        Self { kind: RouteKind::Unicast, gateway: None, link: Some(device), onlink: false, protocol, extra: None }
    }

    /// Creates a route that drops packets.
    pub fn blackhole(prefix: Prefix) -> Self {
        let protocol = Self::protocol_for(&prefix);
        Self { kind: RouteKind::Blackhole, gateway: None, link: None, onlink: false, protocol, extra: None }
    }

    /// Returns the table and metric.
    pub fn slot(&self) -> RouteSlot {
        self.extra().slot
    }

    /// Returns the source address of packets that the host itself sends over this route (`RTA_PREFSRC`), which has to
    /// be an address of the host. `None`: the kernel chooses.
    pub fn source(&self) -> Option<IpAddr> {
        self.extra().source
    }

    /// Returns the route with another table or metric.
    pub fn in_slot(self, slot: RouteSlot) -> Self {
        let extra = Extra { slot, ..self.extra() };
        self.with(extra)
    }

    /// Returns the route with this source address, or without one.
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

    /// Returns the protocol number that this library writes a route to `prefix` with. 32 numbers spread the routes over
    /// the kernel's next-hop hash, so that inserting them takes linear time (docs/kernel-facts.md, "Route insertion").
    pub fn protocol_for(prefix: &Prefix) -> u8 {
        Self::FIRST_PROTOCOL + (spread(prefix) >> 59) as u8 % Self::PROTOCOLS
    }

    /// Returns the scope that this library writes an IPv4 route to `prefix` with when there are many. It has no effect
    /// on forwarding, so a [`Route`] does not contain it: routes that differ only in scope are equal.
    pub fn scope_for(prefix: &Prefix) -> u8 {
        (spread(prefix) >> 53) as u8 % Self::SCOPES
    }

    /// Returns whether the protocol is one of this library's.
    pub fn has_own_protocol(&self) -> bool {
        Self::is_own_protocol(self.protocol)
    }

    pub(crate) fn is_own_protocol(protocol: u8) -> bool {
        (Self::FIRST_PROTOCOL..Self::FIRST_PROTOCOL + Self::PROTOCOLS).contains(&protocol)
    }

    /// Returns whether two routes are equal to the reconciler: all protocol numbers of this library are equivalent.
    pub fn same(&self, other: &Self) -> bool {
        let protocol = self.protocol == other.protocol || (self.has_own_protocol() && other.has_own_protocol());
        let place = |route: &Self| (route.kind, route.gateway, route.link, route.onlink);
        protocol && place(self) == place(other) && self.extra == other.extra
    }
}

/// Fibonacci hashing: neighbouring subnets differ in few low bits; the product's top bits differ in many.
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

/// The kernel state of one overlay, wanted or seen.
///
/// Seen state includes foreign objects on keys inside the overlay's scope, so that a conflict is told from an absence;
/// [`crate::plan`] decides which objects are the overlay's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct State {
    /// Devices.
    pub links: BTreeMap<LinkId, Link>,
    /// Addresses on the overlay's devices.
    pub addresses: BTreeMap<AddressKey, ()>,
    /// FDB entries on the overlay's devices, with the outer destination.
    pub fdb: BTreeMap<FdbKey, IpAddr>,
    /// Permanent neighbours on the overlay's devices.
    pub neighbours: BTreeMap<NeighbourKey, MacAddr>,
    /// Forwards of data planes.
    pub forwards: BTreeMap<ForwardKey, Forward>,
    /// Routes.
    pub routes: BTreeMap<RouteKey, Route>,
    /// What makes data planes slower than they could be. These are not objects: they are never wanted or written.
    pub limitations: BTreeMap<LinkId, Vec<Limitation>>,
}

impl State {
    /// Returns the number of objects.
    pub fn len(&self) -> usize {
        let on_links = self.addresses.len() + self.fdb.len() + self.neighbours.len() + self.forwards.len();
        self.links.len() + on_links + self.routes.len()
    }

    /// Returns whether there are no objects.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the routes to one destination, in the order of the dump.
    pub fn routes_to(&self, prefix: Prefix) -> impl Iterator<Item = (&RouteKey, &Route)> + Clone {
        self.routes.range(RouteKey { prefix, nth: 0 }..=RouteKey { prefix, nth: u16::MAX })
    }

    /// Adds the objects of one peer.
    pub fn add(&mut self, peer: &PeerState) {
        self.fdb.extend(peer.fdb);
        self.neighbours.extend(peer.neighbour);
        self.forwards.extend(peer.forward);
        self.routes.extend(peer.keyed_routes());
    }
}

/// The kernel objects of one peer, in one address family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PeerState {
    /// The FDB entry: where frames to its VTEP are sent.
    pub fdb: Option<(FdbKey, IpAddr)>,
    /// The MAC address of its next hop.
    pub neighbour: Option<(NeighbourKey, MacAddr)>,
    /// The forward: where a data plane sends packets to its subnet.
    pub forward: Option<(ForwardKey, Forward)>,
    /// The routes to its subnet. If there are several, they have to differ in table or metric.
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

    /// Sets the FDB entry.
    pub fn with_fdb(self, key: FdbKey, dst: IpAddr) -> Self {
        Self { fdb: Some((key, dst)), ..self }
    }

    /// The routes with their keys in a [`State`].
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
