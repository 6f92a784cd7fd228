//! The rules of the fake: plain tables, no clock, no threads. Errors are the kernel's own error numbers.

mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::kernel::{
    EEXIST, Forward, Hint, HostAddress, Link, LinkId, LinkKind, LinkName, Route, RouteKind, RouteSlot, Vxlan,
};
use crate::net::{Family, MacAddr, Prefix, is_automatic};

use super::{FakeRoute, Nud, Placement};

use routes::Announce;

pub(super) const ENOENT: i32 = 2;
pub(super) const ESRCH: i32 = 3;
pub(super) const ENODEV: i32 = 19;
pub(super) const EINVAL: i32 = 22;
pub(super) const EOPNOTSUPP: i32 = 95;
pub(super) const EADDRNOTAVAIL: i32 = 99;
pub(super) const ENETDOWN: i32 = 100;
pub(super) const ENETUNREACH: i32 = 101;
pub(super) const EHOSTUNREACH: i32 = 113;

pub(super) const MAIN: u32 = 254;
const RTPROT_KERNEL: u8 = 2;
/// The metric of connected routes (`IP6_RT_PRIO_ADDRCONF`).
const CONNECTED_V6_METRIC: u32 = 256;

/// A notification to subscribers of the monitor groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    Link { index: u32, is_fact: bool },
    Address { index: u32, addr: IpAddr, is_there: bool },
    Neighbour(u32),
    Fdb(u32),
    Route { slot: Slot, link: Option<u32>, is_fact: bool },
}

/// The kernel's key of a route, without TOS, which the fake does not model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub(super) prefix: Prefix,
    pub(super) table: u32,
    pub(super) metric: u32,
}

impl Slot {
    pub(super) fn of_fake(route: &FakeRoute) -> Self {
        Self::new(route.prefix, route.table, route.metric)
    }

    pub(super) fn of(prefix: &Prefix, route: &Route) -> Self {
        Self::new(*prefix, route.slot().table, route.slot().metric)
    }

    pub(super) fn new(prefix: Prefix, table: u32, metric: u32) -> Self {
        Self { prefix, table, metric: default_metric(prefix.family(), metric) }
    }

    /// Returns table and metric as a dump shows them.
    pub(super) fn as_told(&self) -> RouteSlot {
        RouteSlot { table: self.table, metric: self.metric }.normalized(self.prefix.family())
    }
}

/// IPv6 metric 0 reads back as 1024 (docs/kernel-facts.md, "Values that read back differently").
fn default_metric(family: Family, metric: u32) -> u32 {
    match (family, metric) {
        (Family::V6, 0) => 1024,
        (_, metric) => metric,
    }
}

/// One route of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: RouteKind,
    pub(super) gateway: Option<IpAddr>,
    pub(super) link: Option<u32>,
    pub(super) onlink: bool,
    pub(super) protocol: u8,
    pub(super) source: Option<IpAddr>,
    /// Further next hops of an IPv6 multipath route (docs/kernel-facts.md, "Route keys are not unique").
    pub(super) siblings: Vec<Entry>,
}

impl Entry {
    pub(super) fn of(route: &FakeRoute) -> Self {
        let FakeRoute { kind, gateway, link, onlink, protocol, source, .. } = *route;
        Self { kind, gateway, link, onlink, protocol, source, siblings: Vec::new() }
    }

    pub(super) fn is_multipath(&self) -> bool {
        !self.siblings.is_empty()
    }

    /// Makes the next sibling the first; returns false if there is none.
    fn promote(&mut self) -> bool {
        if self.siblings.is_empty() {
            return false;
        }
        let next = self.siblings.remove(0);
        let siblings = std::mem::take(&mut self.siblings);
        *self = Self { siblings, ..next };
        true
    }

    /// Returns whether the kernel treats the two as one route. In IPv4 the source distinguishes routes.
    fn is_same_route(&self, other: &Self, family: Family) -> bool {
        self.is_same_hop(other) && (family == Family::V6 || self.source == other.source)
    }

    /// Returns whether a deletion of `asked` matches. A source counts only in IPv4, and only if it is given.
    fn is_asked_for(&self, asked: &Self, family: Family) -> bool {
        self.is_same_hop(asked)
            && (family == Family::V6 || asked.source.is_none_or(|source| self.source == Some(source)))
    }

    fn is_same_hop(&self, other: &Self) -> bool {
        (self.kind, self.gateway, self.link, self.protocol) == (other.kind, other.gateway, other.link, other.protocol)
    }

    /// `rt6_qualify_for_ecmp`: only routes with a gateway become siblings.
    fn can_have_siblings(&self) -> bool {
        self.kind != RouteKind::Blackhole && self.gateway.is_some()
    }
}

#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) last_index: u32,
    pub(super) links: BTreeMap<u32, Link>,
    /// Links that have lost their carrier.
    pub(super) without_carrier: BTreeSet<u32>,
    pub(super) addresses: Vec<HostAddress>,
    pub(super) neighbours: BTreeMap<(u32, IpAddr), (MacAddr, Nud)>,
    pub(super) fdb: BTreeMap<(u32, MacAddr), Vec<(IpAddr, Nud)>>,
    pub(super) forwards: BTreeMap<(u32, Prefix), Forward>,
    pub(super) routes: BTreeMap<Slot, Vec<Entry>>,
    /// Notices since they were last taken.
    pub(super) notices: Vec<Notice>,
}

type Outcome = Result<(), i32>;

// Notices.
impl Tables {
    pub(super) fn note_link(&mut self, index: u32) {
        let addresses = self.addresses.iter().filter(|address| address.link == index).map(|address| address.addr);
        let is_fact = self.links.get(&index).is_some_and(|link| Hint::tells_of(&link.kind, addresses));
        self.notices.push(Notice::Link { index, is_fact });
    }

    fn notice_of(&self, slot: Slot, entry: &Entry) -> Notice {
        let inside = |address: &HostAddress| {
            Prefix::masked(address.addr, address.len).is_ok_and(|connected| connected.covers(&slot.prefix))
        };
        let local = is_automatic(slot.prefix.addr()) || slot.prefix.addr().is_multicast();
        let forwards = entry.kind != RouteKind::Blackhole && !Route::is_own_protocol(entry.protocol) && !local;
        let near = || slot.prefix.len() == 0 || entry.gateway.is_none() || self.addresses.iter().any(inside);
        Notice::Route { slot, link: entry.link, is_fact: forwards && near() }
    }
}

// Links.
impl Tables {
    pub(super) fn named(&self, name: &str) -> Option<u32> {
        self.links.iter().find(|(_, link)| link.name.as_str() == name).map(|(index, _)| *index)
    }

    pub(super) fn add_link(&mut self, mut link: Link) -> Result<u32, i32> {
        if self.named(link.name.as_str()).is_some() {
            return Err(EEXIST);
        }
        if let LinkKind::Vxlan(vxlan) = &mut link.kind {
            vxlan.port.get_or_insert(Vxlan::DEFAULT_PORT);
            let limit = self.vxlan_limit(vxlan)?;
            // The kernel limits the MTU at creation, and only then (docs/kernel-facts.md, "MTU of a VXLAN device").
            link.mtu = limit.map_or(link.mtu, |limit| link.mtu.min(limit));
            let vxlan = &*vxlan;
            let taken = self.links.values().any(|other| match &other.kind {
                LinkKind::Vxlan(other) => other.excludes(vxlan),
                LinkKind::Tun(_) | LinkKind::External(_) | LinkKind::Other(_) => false,
            });
            if taken {
                return Err(EEXIST);
            }
        }
        self.last_index += 1;
        let index = self.last_index;
        if link.mac.is_none() && matches!(link.kind, LinkKind::Vxlan(_)) {
            let [a, b, c, d] = index.to_be_bytes();
            link.mac = Some(MacAddr([0x02, 0xff, a, b, c, d]));
        }
        self.links.insert(index, link);
        self.note_link(index);
        Ok(index)
    }

    /// Returns the largest MTU of a VXLAN device over its lower device.
    fn vxlan_limit(&self, vxlan: &Vxlan) -> Result<Option<u32>, i32> {
        let Some(lower) = vxlan.lower else { return Ok(None) };
        let LinkId::Other(lower) = lower else { return Err(ENODEV) };
        let lower = self.links.get(&lower).ok_or(ENODEV)?;
        let overhead = match vxlan.family().unwrap_or(Family::V4) {
            Family::V4 => 50,
            Family::V6 => 70,
        };
        Ok(Some(lower.mtu.saturating_sub(overhead)))
    }

    pub(super) fn delete_link(&mut self, index: u32) -> Outcome {
        self.note_link(index);
        self.links.remove(&index).ok_or(ENODEV)?;
        self.without_carrier.remove(&index);
        self.addresses.retain(|address| address.link != index);
        self.neighbours.retain(|(link, _), _| *link != index);
        self.fdb.retain(|(link, _), _| *link != index);
        self.forwards.retain(|(link, _), _| *link != index);
        self.drop_routes_through(index, Family::V4, Announce::No);
        self.drop_routes_through(index, Family::V6, Announce::Yes);
        let above = self.links.iter().filter_map(|(above, link)| match &link.kind {
            LinkKind::Vxlan(vxlan) if vxlan.lower == Some(LinkId::Other(index)) => Some(*above),
            _ => None,
        });
        for above in above.collect::<Vec<_>>() {
            self.delete_link(above)?;
        }
        Ok(())
    }

    fn link_mut(&mut self, index: u32) -> Result<&mut Link, i32> {
        self.note_link(index);
        self.links.get_mut(&index).ok_or(ENODEV)
    }

    pub(super) fn rename(&mut self, index: u32, name: &LinkName) -> Outcome {
        match self.named(name.as_str()) {
            Some(other) if other != index => return Err(EEXIST),
            _ => {}
        }
        self.link_mut(index)?.name = name.clone();
        Ok(())
    }

    pub(super) fn set_mac(&mut self, index: u32, mac: Option<MacAddr>) -> Outcome {
        let link = self.link_mut(index)?;
        if link.mac == mac {
            return Ok(());
        }
        link.mac = mac;
        // `NETDEV_CHANGEADDR` flushes permanent neighbours too.
        self.drop_neighbours(index, |_| true);
        Ok(())
    }

    pub(super) fn set_mtu(&mut self, index: u32, mtu: u32) -> Outcome {
        if let LinkKind::Vxlan(vxlan) = &self.links.get(&index).ok_or(ENODEV)?.kind
            && self.vxlan_limit(vxlan)?.is_some_and(|limit| mtu > limit)
        {
            return Err(EINVAL);
        }
        self.link_mut(index)?.mtu = mtu;
        Ok(())
    }

    pub(super) fn set_mark(&mut self, index: u32, group: u32, alias: Option<&str>) -> Outcome {
        let link = self.link_mut(index)?;
        link.group = group;
        link.alias = alias.map(Into::into);
        Ok(())
    }

    pub(super) fn set_learning(&mut self, index: u32, learning: bool) -> Outcome {
        match &mut self.link_mut(index)?.kind {
            LinkKind::Vxlan(vxlan) => vxlan.learning = learning,
            LinkKind::Tun(_) | LinkKind::External(_) | LinkKind::Other(_) => return Err(EOPNOTSUPP),
        }
        Ok(())
    }

    pub(super) fn set_remote(&mut self, index: u32, remote: Option<IpAddr>) -> Outcome {
        match &mut self.link_mut(index)?.kind {
            LinkKind::Vxlan(vxlan) => vxlan.remote = remote,
            LinkKind::Tun(_) | LinkKind::External(_) | LinkKind::Other(_) => return Err(EOPNOTSUPP),
        }
        Ok(())
    }

    pub(super) fn link_up(&mut self, index: u32) -> Outcome {
        self.link_mut(index)?.up = true;
        let own: Vec<_> = self.addresses.iter().filter(|address| address.link == index).cloned().collect();
        for address in own {
            self.connect(&address);
        }
        Ok(())
    }

    pub(super) fn link_down(&mut self, index: u32) -> Outcome {
        self.link_mut(index)?.up = false;
        // docs/kernel-facts.md, "Link down": IPv4 routes disappear without a notification.
        self.drop_routes_through(index, Family::V4, Announce::No);
        self.drop_routes_through(index, Family::V6, Announce::Yes);
        self.drop_neighbours(index, |_| true);
        let notices = &mut self.notices;
        self.addresses.retain(|address| {
            let keep = address.link != index || address.addr.is_ipv4();
            if !keep {
                notices.push(Notice::Address { index, addr: address.addr, is_there: false });
            }
            keep
        });
        Ok(())
    }

    pub(super) fn update_link(&mut self, index: u32, from: &Link, to: &Link) -> Outcome {
        if from.name != to.name {
            self.rename(index, &to.name)?;
        }
        if from.mtu != to.mtu {
            self.set_mtu(index, to.mtu)?;
        }
        if from.mac != to.mac {
            self.set_mac(index, to.mac)?;
        }
        if (from.group, &from.alias) != (to.group, &to.alias) {
            self.set_mark(index, to.group, to.alias.as_deref())?;
        }
        let link = self.link_mut(index)?;
        if let (LinkKind::Vxlan(have), LinkKind::Vxlan(want)) = (&mut link.kind, &to.kind) {
            (have.learning, have.remote) = (want.learning, want.remote);
        }
        if let (LinkKind::Tun(have), LinkKind::Tun(want)) = (&mut link.kind, &to.kind) {
            have.tunnel = want.tunnel;
        }
        match (from.up, to.up) {
            (false, true) => self.link_up(index),
            (true, false) => self.link_down(index),
            _ => Ok(()),
        }
    }
}

// Addresses, neighbours, FDB entries.
impl Tables {
    pub(super) fn add_address(&mut self, address: HostAddress) -> Outcome {
        if !self.links.contains_key(&address.link) {
            return Err(ENODEV);
        }
        // IPv4 distinguishes addresses by their mask as well.
        let taken = self.addresses.iter().any(|other| {
            let same = other.link == address.link && other.addr == address.addr;
            same && (other.len == address.len || address.addr.is_ipv6())
        });
        if taken {
            return Err(EEXIST);
        }
        self.connect(&address);
        self.notices.push(Notice::Address { index: address.link, addr: address.addr, is_there: true });
        // IPv6 lists the newest first (ipv6_link_dev_addr in net/ipv6/addrconf.c).
        let newer = |other: &HostAddress| other.link == address.link && other.addr.is_ipv6();
        let place = self.addresses.iter().position(newer).filter(|_| address.addr.is_ipv6());
        self.addresses.insert(place.unwrap_or(self.addresses.len()), address);
        Ok(())
    }

    pub(super) fn delete_address(&mut self, link: u32, addr: IpAddr, len: u8) -> Outcome {
        let is_it = |address: &HostAddress| (address.link, address.addr, address.len) == (link, addr, len);
        let place = self.addresses.iter().position(is_it).ok_or(EADDRNOTAVAIL)?;
        let address = self.addresses.remove(place);
        self.disconnect(&address);
        self.notices.push(Notice::Address { index: link, addr, is_there: false });
        if !self.addresses.iter().any(|other| other.addr == addr) {
            self.drop_source(addr);
        }
        let last = !self.addresses.iter().any(|other| other.link == link && other.addr.is_ipv4());
        if addr.is_ipv4() && last {
            // `fib_disable_ip`: docs/kernel-facts.md, "Loss of an address", no route notification.
            self.drop_routes_through(link, Family::V4, Announce::No);
            self.drop_neighbours(link, |addr| addr.is_ipv4());
        }
        Ok(())
    }

    /// Adds the connected route of an address on a link that is up.
    fn connect(&mut self, address: &HostAddress) {
        let Some((slot, entry)) = connected(address) else { return };
        let up = self.links.get(&address.link).is_some_and(|link| link.up);
        let there = self.routes.get(&slot).is_some_and(|entries| entries.contains(&entry));
        if up && !there {
            self.notices.push(self.notice_of(slot, &entry));
            self.routes.entry(slot).or_default().push(entry);
        }
    }

    fn disconnect(&mut self, address: &HostAddress) {
        let Some((slot, entry)) = connected(address) else { return };
        if let Some(entries) = self.routes.get_mut(&slot) {
            entries.retain(|other| *other != entry);
        }
        self.sweep(slot, &entry);
    }

    pub(super) fn put_neighbour(&mut self, link: u32, addr: IpAddr, mac: MacAddr, nud: Nud) -> Outcome {
        if !self.links.contains_key(&link) {
            return Err(ENODEV);
        }
        self.neighbours.insert((link, addr), (mac, nud));
        self.notices.push(Notice::Neighbour(link));
        Ok(())
    }

    pub(super) fn delete_neighbour(&mut self, link: u32, addr: IpAddr) -> Outcome {
        self.neighbours.remove(&(link, addr)).ok_or(ENOENT)?;
        self.notices.push(Notice::Neighbour(link));
        Ok(())
    }

    pub(super) fn drop_neighbours(&mut self, link: u32, lost: impl Fn(IpAddr) -> bool) {
        let notices = &mut self.notices;
        self.neighbours.retain(|(on, addr), _| {
            let keep = *on != link || !lost(*addr);
            if !keep {
                notices.push(Notice::Neighbour(link));
            }
            keep
        });
    }

    pub(super) fn put_fdb(&mut self, link: u32, mac: MacAddr, dst: IpAddr, nud: Nud) -> Outcome {
        self.check_vxlan(link)?;
        let entries = self.fdb.entry((link, mac)).or_default();
        if mac.is_zero() || mac.is_multicast() {
            // These have several destinations, so the kernel cannot replace one.
            if !entries.is_empty() {
                return Err(EOPNOTSUPP);
            }
        }
        *entries = vec![(dst, nud)];
        self.notices.push(Notice::Fdb(link));
        Ok(())
    }

    pub(super) fn append_fdb(&mut self, link: u32, mac: MacAddr, dst: IpAddr) -> Outcome {
        self.check_vxlan(link)?;
        if !mac.is_zero() && !mac.is_multicast() {
            return Err(EOPNOTSUPP);
        }
        self.fdb.entry((link, mac)).or_default().push((dst, Nud::Permanent));
        self.notices.push(Notice::Fdb(link));
        Ok(())
    }

    pub(super) fn put_forward(&mut self, link: u32, prefix: Prefix, forward: Forward) -> Outcome {
        self.check_carried(link)?;
        self.forwards.insert((link, prefix), forward);
        Ok(())
    }

    pub(super) fn delete_forward(&mut self, link: u32, prefix: Prefix) -> Outcome {
        self.check_carried(link)?;
        self.forwards.remove(&(link, prefix));
        Ok(())
    }

    /// The data plane loses its tunnel of a device, with the forwards: the device and its other objects stay.
    pub(super) fn drop_tunnel(&mut self, link: u32) -> Outcome {
        match &mut self.link_mut(link)?.kind {
            LinkKind::Tun(tun) => tun.tunnel = None,
            LinkKind::Vxlan(_) | LinkKind::External(_) | LinkKind::Other(_) => return Err(EOPNOTSUPP),
        }
        self.forwards.retain(|(on, _), _| *on != link);
        Ok(())
    }

    fn check_carried(&self, link: u32) -> Outcome {
        match &self.links.get(&link).ok_or(ENODEV)?.kind {
            LinkKind::Tun(tun) if tun.tunnel.is_some() => Ok(()),
            _ => Err(ENODEV),
        }
    }

    fn check_vxlan(&self, link: u32) -> Outcome {
        match self.links.get(&link).ok_or(ENODEV)?.kind {
            LinkKind::Vxlan(_) => Ok(()),
            LinkKind::Tun(_) | LinkKind::External(_) | LinkKind::Other(_) => Err(EOPNOTSUPP),
        }
    }

    pub(super) fn delete_fdb(&mut self, link: u32, mac: MacAddr, dst: IpAddr) -> Outcome {
        let entries = self.fdb.get_mut(&(link, mac)).ok_or(ENOENT)?;
        let place = entries.iter().position(|(other, _)| *other == dst).ok_or(ENOENT)?;
        entries.remove(place);
        if entries.is_empty() {
            self.fdb.remove(&(link, mac));
        }
        self.notices.push(Notice::Fdb(link));
        Ok(())
    }
}

fn connected(address: &HostAddress) -> Option<(Slot, Entry)> {
    let prefix = Prefix::masked(address.addr, address.len).ok()?;
    if prefix.len() == prefix.family().bits() {
        return None;
    }
    let metric = match prefix.family() {
        Family::V4 => 0,
        Family::V6 => CONNECTED_V6_METRIC,
    };
    // Its source, which is the address, is not stored.
    let entry = Entry {
        kind: RouteKind::Unicast,
        gateway: None,
        link: Some(address.link),
        onlink: false,
        protocol: RTPROT_KERNEL,
        source: None,
        siblings: Vec::new(),
    };
    Some((Slot { prefix, table: MAIN, metric }, entry))
}

// Routes.
