//! The planner: what to write so that what was seen becomes what is wanted.
//!
//! [`plan`] is pure. Its order is safe at every step: no route exists whose next hop lacks a neighbour whose Ethernet
//! address lacks a forwarding entry. It names only objects of its arguments, and never a stranger's (design,
//! Ownership).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::kernel::Scope;
use crate::net::{MacAddr, Prefix};
use crate::state::{
    AddressKey, FdbKey, Link, LinkId, LinkKind, LinkName, NeighbourKey, Route, RouteKind, State, Vxlan,
};

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Deletes a device of ours, with all that is on it.
    DeleteLink {
        /// Its id.
        id: LinkId,
        /// As last seen.
        link: Box<Link>,
    },
    /// Creates a device, marked as ours in the same message; fails if there is one of the name.
    CreateLink {
        /// Its id.
        id: LinkId,
        /// As wanted.
        link: Box<Link>,
    },
    /// Changes name, Ethernet address, MTU, state, mark or learning of a device of ours.
    UpdateLink {
        /// Its id.
        id: LinkId,
        /// As last seen.
        from: Box<Link>,
        /// As wanted.
        to: Box<Link>,
    },
    /// Adds an address; fails if it is there.
    AddAddress(AddressKey),
    /// Writes a forwarding entry, whatever stood there.
    PutFdb {
        /// Where.
        key: FdbKey,
        /// Outer destination.
        dst: IpAddr,
    },
    /// Writes a permanent neighbour, whatever stood there.
    PutNeighbour {
        /// Where.
        key: NeighbourKey,
        /// Its Ethernet address.
        mac: MacAddr,
    },
    /// Creates a route; fails if its key holds any.
    CreateRoute {
        /// Destination.
        prefix: Prefix,
        /// As wanted.
        route: Route,
    },
    /// Replaces the one route of its key, which is ours, without a moment between.
    ReplaceRoute {
        /// Destination.
        prefix: Prefix,
        /// As last seen, and as wanted.
        change: Box<(Route, Route)>,
    },
    /// Deletes a route of ours, given in full.
    DeleteRoute {
        /// Destination.
        prefix: Prefix,
        /// As last seen.
        route: Route,
    },
    /// Deletes a permanent neighbour of ours.
    DeleteNeighbour {
        /// Where.
        key: NeighbourKey,
        /// As last seen.
        mac: MacAddr,
    },
    /// Deletes a forwarding entry of ours.
    DeleteFdb {
        /// Where.
        key: FdbKey,
        /// As last seen.
        dst: IpAddr,
    },
    /// Deletes an address of ours.
    DeleteAddress(AddressKey),
}

/// The name of an object, whatever its value: what refusals, conflicts and contests are counted by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A device.
    Link(LinkId),
    /// An address.
    Address(AddressKey),
    /// A forwarding entry.
    Fdb(FdbKey),
    /// A neighbour.
    Neighbour(NeighbourKey),
    /// The routes to a destination.
    Route(Prefix),
}

impl Op {
    /// What it writes.
    pub fn object(&self) -> Object {
        match self {
            Self::DeleteLink { id, .. } | Self::CreateLink { id, .. } | Self::UpdateLink { id, .. } => {
                Object::Link(*id)
            }
            Self::AddAddress(key) | Self::DeleteAddress(key) => Object::Address(*key),
            Self::PutFdb { key, .. } | Self::DeleteFdb { key, .. } => Object::Fdb(*key),
            Self::PutNeighbour { key, .. } | Self::DeleteNeighbour { key, .. } => Object::Neighbour(*key),
            Self::CreateRoute { prefix, .. } | Self::ReplaceRoute { prefix, .. } | Self::DeleteRoute { prefix, .. } => {
                Object::Route(*prefix)
            }
        }
    }

    /// Whether it takes something away.
    pub fn is_delete(&self) -> bool {
        match self {
            Self::DeleteLink { .. }
            | Self::DeleteRoute { .. }
            | Self::DeleteNeighbour { .. }
            | Self::DeleteFdb { .. }
            | Self::DeleteAddress(_) => true,
            Self::CreateLink { .. }
            | Self::UpdateLink { .. }
            | Self::AddAddress(_)
            | Self::PutFdb { .. }
            | Self::PutNeighbour { .. }
            | Self::CreateRoute { .. }
            | Self::ReplaceRoute { .. } => false,
        }
    }
}

/// A stranger's object where ours should be. It is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// Which object of ours cannot be, or does not count.
    pub object: Object,
    /// What stands there.
    pub found: String,
    /// What to do about it.
    pub remedy: String,
}

/// Writes, in order, and what stands in their way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The writes, in an order that is safe to stop at any point.
    pub ops: Vec<Op>,
    /// Strangers' objects in the way.
    pub conflicts: Vec<Conflict>,
}

impl Plan {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// Who may have left a `boot` route through a device that is not ours: the public address of the accepted peer that
/// holds exactly this subnet (design, Ownership (c)).
pub type Claims<'a> = dyn Fn(&Prefix) -> Option<IpAddr> + 'a;

/// The writes that turn `seen` into `wanted`.
///
/// Given whole states it is an audit: what was seen and is ours and is not wanted goes. Given only the keys that one
/// changed peer touches, it is a lease round.
pub fn plan(wanted: &State, seen: &State, scope: &Scope, claims: &Claims<'_>) -> Plan {
    let mut planner = Planner::new(scope, claims);
    planner.links(wanted, seen);
    planner.addresses(wanted, seen);
    planner.fdb(wanted, seen);
    planner.neighbours(wanted, seen);
    planner.routes(wanted, seen);
    planner.finish()
}

/// Whether a seen route is ours to change or delete.
pub fn owns_route(prefix: &Prefix, route: &Route, scope: &Scope, claims: &Claims<'_>) -> bool {
    if !scope.covers(prefix) {
        return false;
    }
    match route.kind {
        RouteKind::Foreign => return false,
        RouteKind::Blackhole => return route.has_own_protocol(),
        RouteKind::Unicast => {}
    }
    if route.has_own_protocol() {
        return true;
    }
    if route.protocol != Route::BOOT {
        return false;
    }
    // What Go flannel leaves.
    match (route.link, route.gateway) {
        (Some(LinkId::Own(_)), Some(gateway)) => route.onlink && gateway == prefix.addr(),
        (_, Some(gateway)) => claims(prefix) == Some(gateway),
        (_, None) => false,
    }
}

struct Planner<'a> {
    scope: &'a Scope,
    claims: &'a Claims<'a>,
    /// Devices that a stranger holds: nothing on them is ours.
    blocked: BTreeSet<LinkId>,
    /// Devices that will be new: what was seen on them is gone by then.
    fresh: BTreeSet<LinkId>,
    /// Devices whose Ethernet address changes: the kernel drops their neighbours, permanent ones too.
    readdressed: BTreeSet<LinkId>,
    ops: Ops,
    conflicts: Vec<Conflict>,
}

/// The stages of a plan, in order.
#[derive(Default)]
struct Ops {
    route_clears: Vec<Op>,
    link_clears: Vec<Op>,
    links: Vec<Op>,
    addresses: Vec<Op>,
    fdb: Vec<Op>,
    neighbours: Vec<Op>,
    routes: Vec<Op>,
    route_deletes: Vec<Op>,
    neighbour_deletes: Vec<Op>,
    fdb_deletes: Vec<Op>,
    address_deletes: Vec<Op>,
    link_deletes: Vec<Op>,
}

impl<'a> Planner<'a> {
    fn new(scope: &'a Scope, claims: &'a Claims<'a>) -> Self {
        Self {
            scope,
            claims,
            blocked: BTreeSet::new(),
            fresh: BTreeSet::new(),
            readdressed: BTreeSet::new(),
            ops: Ops::default(),
            conflicts: Vec::new(),
        }
    }

    fn links(&mut self, wanted: &State, seen: &State) {
        let by_name: BTreeMap<&LinkName, LinkId> = seen.links.iter().map(|(id, link)| (&link.name, *id)).collect();
        for (id, want) in &wanted.links {
            match seen.links.get(id) {
                Some(have) => self.existing_link(*id, want, have, by_name.get(&want.name).copied(), seen),
                None => match by_name.get(&want.name).and_then(|other| seen.links.get(other)) {
                    Some(stranger) if !self.owns_link(stranger) => self.block(*id, stranger),
                    _ => self.create_link(*id, want),
                },
            }
        }
        for (id, have) in &seen.links {
            if wanted.links.contains_key(id) || !self.owns_link(have) {
                continue;
            }
            let in_the_way = wanted.links.values().any(|want| want.name == have.name);
            let stage = if in_the_way { &mut self.ops.link_clears } else { &mut self.ops.link_deletes };
            stage.push(Op::DeleteLink { id: *id, link: Box::new(have.clone()) });
        }
    }

    fn existing_link(&mut self, id: LinkId, want: &Link, have: &Link, named: Option<LinkId>, seen: &State) {
        let compatible = compatible(&want.kind, &have.kind);
        // Exactly what Go flannel makes under our name is adopted; any other unmarked device is a stranger's.
        let adoptable = have.group == 0 && have.alias.is_none() && have.name == want.name && compatible;
        if !self.owns_link(have) && !adoptable {
            return self.block(id, have);
        }
        if !compatible {
            self.ops.link_clears.push(Op::DeleteLink { id, link: Box::new(have.clone()) });
            return self.create_link(id, want);
        }
        let mut to = Link { kind: merged_kind(&want.kind, &have.kind), ..want.clone() };
        to.mac = want.mac.or(have.mac);
        let stranger = named.filter(|other| *other != id).and_then(|other| seen.links.get(&other));
        if let Some(stranger) = stranger.filter(|stranger| !self.owns_link(stranger)) {
            self.conflicts.push(Conflict {
                object: Object::Link(id),
                found: describe_link(stranger),
                remedy: format!(
                    "our device is called {} until the other is renamed or deleted; traffic goes on",
                    have.name
                ),
            });
            to.name = have.name.clone();
        }
        if to == *have {
            return;
        }
        if to.mac != have.mac {
            self.readdressed.insert(id);
        }
        self.ops.links.push(Op::UpdateLink { id, from: Box::new(have.clone()), to: Box::new(to) });
    }

    fn create_link(&mut self, id: LinkId, want: &Link) {
        self.fresh.insert(id);
        self.ops.links.push(Op::CreateLink { id, link: Box::new(want.clone()) });
    }

    fn block(&mut self, id: LinkId, stranger: &Link) {
        self.blocked.insert(id);
        self.conflicts.push(Conflict {
            object: Object::Link(id),
            found: describe_link(stranger),
            remedy: format!(
                "not made by this overlay: rename it or delete it (ip link delete {}), or choose another VNI",
                stranger.name
            ),
        });
    }

    fn owns_link(&self, link: &Link) -> bool {
        self.scope.overlay.owns(link.group, link.alias.as_deref())
    }

    /// Whether `link` is a device of ours whose seen children are still there when it is their turn.
    fn keeps_children(&self, link: LinkId) -> bool {
        matches!(link, LinkId::Own(_)) && !self.blocked.contains(&link) && !self.fresh.contains(&link)
    }

    fn addresses(&mut self, wanted: &State, seen: &State) {
        for key in wanted.addresses.keys() {
            let there = self.keeps_children(key.link) && seen.addresses.contains_key(key);
            if !there && !self.blocked.contains(&key.link) {
                self.ops.addresses.push(Op::AddAddress(*key));
            }
        }
        for key in seen.addresses.keys() {
            if self.keeps_children(key.link) && !is_link_local(key.addr) && !wanted.addresses.contains_key(key) {
                self.ops.address_deletes.push(Op::DeleteAddress(*key));
            }
        }
    }

    fn fdb(&mut self, wanted: &State, seen: &State) {
        for (key, dst) in &wanted.fdb {
            let there = self.keeps_children(key.link) && seen.fdb.get(key) == Some(dst);
            if !there && !self.blocked.contains(&key.link) {
                self.ops.fdb.push(Op::PutFdb { key: *key, dst: *dst });
            }
        }
        for (key, dst) in &seen.fdb {
            if self.keeps_children(key.link) && !wanted.fdb.contains_key(key) {
                self.ops.fdb_deletes.push(Op::DeleteFdb { key: *key, dst: *dst });
            }
        }
    }

    fn neighbours(&mut self, wanted: &State, seen: &State) {
        for (key, mac) in &wanted.neighbours {
            let there = self.keeps_children(key.link)
                && !self.readdressed.contains(&key.link)
                && seen.neighbours.get(key) == Some(mac);
            if !there && !self.blocked.contains(&key.link) {
                self.ops.neighbours.push(Op::PutNeighbour { key: *key, mac: *mac });
            }
        }
        for (key, mac) in &seen.neighbours {
            let there = self.keeps_children(key.link) && !self.readdressed.contains(&key.link);
            if there && !wanted.neighbours.contains_key(key) {
                self.ops.neighbour_deletes.push(Op::DeleteNeighbour { key: *key, mac: *mac });
            }
        }
    }

    fn routes(&mut self, wanted: &State, seen: &State) {
        let mut seen = seen.routes.iter().peekable();
        let mut wanted = wanted.routes.iter().peekable();
        // Both are in the order of their keys: one walk over the two, a destination at a time.
        let mut have = Vec::new();
        loop {
            let next_seen = seen.peek().map(|(key, _)| key.prefix);
            let next_wanted = wanted.peek().map(|(key, _)| key.prefix);
            let Some(prefix) = [next_seen, next_wanted].into_iter().flatten().min() else { break };
            have.clear();
            while let Some((key, route)) = seen.next_if(|(key, _)| key.prefix == prefix) {
                debug_assert!(key.prefix == prefix);
                // What went down with its device does not count.
                if route.link.is_none_or(|link| !self.fresh.contains(&link)) {
                    have.push(*route);
                }
            }
            let want = wanted.next_if(|(key, _)| key.prefix == prefix).map(|(_, route)| *route);
            match want {
                Some(want) => self.wanted_route(prefix, want, &have),
                None => self.unwanted_routes(prefix, &have),
            }
        }
    }

    fn wanted_route(&mut self, prefix: Prefix, want: Route, have: &[Route]) {
        if want.link.is_some_and(|link| self.blocked.contains(&link)) {
            return;
        }
        if let Some(place) = have.iter().position(|route| route.same(&want)) {
            for (nth, route) in have.iter().enumerate() {
                match nth.cmp(&place) {
                    std::cmp::Ordering::Equal => {}
                    _ if self.owns_route(&prefix, route) => {
                        self.ops.route_deletes.push(Op::DeleteRoute { prefix, route: *route });
                    }
                    std::cmp::Ordering::Less => self.route_conflict(prefix, route),
                    // A stranger's route behind ours carries no traffic and harms nobody.
                    std::cmp::Ordering::Greater => {}
                }
            }
            return;
        }
        match have {
            [] => self.ops.routes.push(Op::CreateRoute { prefix, route: want }),
            [only] if self.owns_route(&prefix, only) => {
                self.ops.routes.push(Op::ReplaceRoute { prefix, change: Box::new((*only, want)) });
            }
            _ => {
                let (ours, strangers): (Vec<_>, Vec<_>) =
                    have.iter().copied().partition(|route| self.owns_route(&prefix, route));
                for route in ours {
                    self.ops.route_clears.push(Op::DeleteRoute { prefix, route });
                }
                match strangers.first() {
                    Some(stranger) => self.route_conflict(prefix, stranger),
                    None => self.ops.routes.push(Op::CreateRoute { prefix, route: want }),
                }
            }
        }
    }

    fn unwanted_routes(&mut self, prefix: Prefix, have: &[Route]) {
        for route in have {
            let blocked = route.link.is_some_and(|link| self.blocked.contains(&link));
            if !blocked && self.owns_route(&prefix, route) {
                self.ops.route_deletes.push(Op::DeleteRoute { prefix, route: *route });
            }
        }
    }

    fn route_conflict(&mut self, prefix: Prefix, stranger: &Route) {
        self.conflicts.push(Conflict {
            object: Object::Route(prefix),
            found: RouteText { prefix, route: *stranger, scope: self.scope }.to_string(),
            remedy: format!("not made by this overlay: delete it (ip route delete {prefix} ...) or move it elsewhere"),
        });
    }

    fn owns_route(&self, prefix: &Prefix, route: &Route) -> bool {
        owns_route(prefix, route, self.scope, self.claims)
    }

    fn finish(self) -> Plan {
        let stages = self.ops;
        let ops = [
            stages.route_clears,
            stages.link_clears,
            stages.links,
            stages.addresses,
            stages.fdb,
            stages.neighbours,
            stages.routes,
            stages.route_deletes,
            stages.neighbour_deletes,
            stages.fdb_deletes,
            stages.address_deletes,
            stages.link_deletes,
        ];
        let mut all = Vec::with_capacity(ops.iter().map(Vec::len).sum());
        for stage in ops {
            all.extend(stage);
        }
        Plan { ops: all, conflicts: self.conflicts }
    }
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

/// Whether a device can be made into the wanted one without being created anew. What one side leaves open matches
/// (contract 8.2, existing device).
fn compatible(want: &LinkKind, have: &LinkKind) -> bool {
    fn open<T: PartialEq>(want: Option<T>, have: Option<T>) -> bool {
        want.is_none() || have.is_none() || want == have
    }
    match (want, have) {
        (LinkKind::Vxlan(want), LinkKind::Vxlan(have)) => {
            want.vni == have.vni
                && open(want.port, have.port)
                && open(want.local, have.local)
                && open(want.lower, have.lower)
                && want.gbp == have.gbp
        }
        (want, have) => want == have,
    }
}

/// The kind a compatible device has once updated: what cannot change stays, learning can.
fn merged_kind(want: &LinkKind, have: &LinkKind) -> LinkKind {
    match (want, have) {
        (LinkKind::Vxlan(want), LinkKind::Vxlan(have)) => {
            LinkKind::Vxlan(Vxlan { learning: want.learning, ..have.clone() })
        }
        (_, have) => have.clone(),
    }
}

/// What later writes stand on, so that a refusal skips just them. Every [`Kernel`](crate::kernel::Kernel) uses this,
/// so that they agree.
#[derive(Debug, Default)]
pub struct Refusals {
    links: BTreeSet<LinkId>,
    addresses: BTreeSet<AddressKey>,
    macs: BTreeSet<(LinkId, MacAddr)>,
    hops: BTreeSet<(LinkId, IpAddr)>,
    kept_hops: BTreeSet<(LinkId, IpAddr)>,
    kept_macs: BTreeSet<(LinkId, MacAddr)>,
}

impl Refusals {
    /// Whether `op` stands on something refused. The caller then skips it and tells [`refused`](Self::refused) too.
    pub fn block(&self, op: &Op) -> bool {
        match op {
            Op::DeleteLink { .. } => false,
            Op::CreateLink { id, .. } | Op::UpdateLink { id, .. } => self.links.contains(id),
            Op::AddAddress(key) => self.links.contains(&key.link),
            Op::PutFdb { key, .. } => self.links.contains(&key.link),
            Op::PutNeighbour { key, mac } => self.links.contains(&key.link) || self.macs.contains(&(key.link, *mac)),
            Op::CreateRoute { route, .. } => self.blocks_route(route),
            Op::ReplaceRoute { change, .. } => self.blocks_route(&change.1),
            Op::DeleteRoute { .. } => false,
            Op::DeleteNeighbour { key, .. } => self.kept_hops.contains(&(key.link, key.addr)),
            Op::DeleteFdb { key, .. } => self.kept_macs.contains(&(key.link, key.mac)),
            // A new address that was refused leaves the old one as the last: the routes hang on it.
            Op::DeleteAddress(key) => self.addresses.iter().any(|refused| refused.link == key.link),
        }
    }

    fn blocks_route(&self, route: &Route) -> bool {
        let Some(link) = route.link else { return false };
        self.links.contains(&link) || route.gateway.is_some_and(|gateway| self.hops.contains(&(link, gateway)))
    }

    /// Notes that `op` was refused or skipped.
    pub fn refused(&mut self, op: &Op) {
        match op {
            Op::DeleteLink { id, .. } | Op::CreateLink { id, .. } | Op::UpdateLink { id, .. } => {
                self.links.insert(*id);
            }
            Op::AddAddress(key) => {
                self.addresses.insert(*key);
            }
            Op::PutFdb { key, .. } => {
                self.macs.insert((key.link, key.mac));
            }
            Op::PutNeighbour { key, mac } => {
                self.hops.insert((key.link, key.addr));
                self.kept_macs.insert((key.link, *mac));
            }
            Op::ReplaceRoute { change, .. } => self.keep_hop(&change.0),
            Op::DeleteRoute { route, .. } => self.keep_hop(route),
            Op::DeleteNeighbour { key, mac } => {
                self.kept_macs.insert((key.link, *mac));
            }
            Op::CreateRoute { .. } | Op::DeleteFdb { .. } | Op::DeleteAddress(_) => {}
        }
    }

    fn keep_hop(&mut self, route: &Route) {
        if let (Some(link), Some(gateway)) = (route.link, route.gateway) {
            self.kept_hops.insert((link, gateway));
        }
    }
}

// How people know these objects from iproute2.

fn describe_link(link: &Link) -> String {
    let kind = match &link.kind {
        LinkKind::Vxlan(vxlan) => format!("vxlan id {}", vxlan.vni),
        LinkKind::DataPlane => "tun".to_owned(),
        LinkKind::Other(kind) => kind.to_string(),
    };
    format!("link {} ({kind}, group {:#x})", link.name, link.group)
}

/// An operation as text, with the names a scope gives to links: what `plan` prints.
pub struct OpText<'a> {
    /// The operation.
    pub op: &'a Op,
    /// The names.
    pub scope: &'a Scope,
}

/// A link id as a name, as far as the scope knows it.
struct LinkText<'a>(LinkId, &'a Scope);

impl fmt::Display for LinkText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            LinkId::Own(slot) => match self.1.devices.get(usize::from(slot)) {
                Some(device) => device.name.fmt(f),
                None => write!(f, "own{slot}"),
            },
            LinkId::Uplink => match self.1.uplink {
                Some(index) => write!(f, "if{index}"),
                None => f.write_str("uplink"),
            },
            LinkId::Other(index) => write!(f, "if{index}"),
        }
    }
}

struct RouteText<'a> {
    prefix: Prefix,
    route: Route,
    scope: &'a Scope,
}

impl fmt::Display for RouteText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { kind, gateway, link, onlink, protocol } = self.route;
        match kind {
            RouteKind::Unicast => {}
            RouteKind::Blackhole => f.write_str("blackhole ")?,
            RouteKind::Foreign => f.write_str("(other) ")?,
        }
        write!(f, "{}", self.prefix)?;
        if let Some(gateway) = gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = link {
            write!(f, " dev {}", LinkText(link, self.scope))?;
        }
        match protocol {
            Route::BOOT => f.write_str(" proto boot")?,
            protocol => write!(f, " proto {protocol}")?,
        }
        if onlink { f.write_str(" onlink") } else { Ok(()) }
    }
}

impl fmt::Display for OpText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scope = self.scope;
        let name = |link| LinkText(link, scope);
        let address = |verb: &str, key: &AddressKey, f: &mut fmt::Formatter<'_>| {
            write!(f, "address {verb} {}/{} dev {}", key.addr, key.len, name(key.link))
        };
        match self.op {
            Op::DeleteLink { link, .. } => write!(f, "link delete {}", link.name),
            Op::CreateLink { link, .. } => write!(f, "link add {} mtu {}{}", link.name, link.mtu, KindText(link)),
            Op::UpdateLink { from, to, .. } => {
                write!(f, "link set {}", from.name)?;
                if from.name != to.name {
                    write!(f, " name {}", to.name)?;
                }
                if let (true, Some(mac)) = (from.mac != to.mac, to.mac) {
                    write!(f, " address {mac}")?;
                }
                if from.mtu != to.mtu {
                    write!(f, " mtu {}", to.mtu)?;
                }
                if from.group != to.group || from.alias != to.alias {
                    write!(f, " group {:#x} alias {}", to.group, to.alias.as_deref().unwrap_or("''"))?;
                }
                match (from.up, to.up) {
                    (false, true) => f.write_str(" up"),
                    (true, false) => f.write_str(" down"),
                    _ => Ok(()),
                }
            }
            Op::AddAddress(key) => address("add", key, f),
            Op::DeleteAddress(key) => address("delete", key, f),
            Op::PutFdb { key, dst } => write!(f, "fdb replace {} dev {} dst {dst}", key.mac, name(key.link)),
            Op::DeleteFdb { key, dst } => write!(f, "fdb delete {} dev {} dst {dst}", key.mac, name(key.link)),
            Op::PutNeighbour { key, mac } => {
                write!(f, "neigh replace {} lladdr {mac} dev {} nud permanent", key.addr, name(key.link))
            }
            Op::DeleteNeighbour { key, .. } => write!(f, "neigh delete {} dev {}", key.addr, name(key.link)),
            Op::CreateRoute { prefix, route } => {
                write!(f, "route add {}", RouteText { prefix: *prefix, route: *route, scope })
            }
            Op::ReplaceRoute { prefix, change } => {
                write!(f, "route replace {}", RouteText { prefix: *prefix, route: change.1, scope })
            }
            Op::DeleteRoute { prefix, route } => {
                write!(f, "route delete {}", RouteText { prefix: *prefix, route: *route, scope })
            }
        }
    }
}

struct KindText<'a>(&'a Link);

impl fmt::Display for KindText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(mac) = self.0.mac {
            write!(f, " address {mac}")?;
        }
        match &self.0.kind {
            LinkKind::Vxlan(vxlan) => {
                write!(f, " type vxlan id {}", vxlan.vni)?;
                if let Some(local) = vxlan.local {
                    write!(f, " local {local}")?;
                }
                if let Some(port) = vxlan.port {
                    write!(f, " dstport {port}")?;
                }
                f.write_str(if vxlan.learning { " learning" } else { " nolearning" })
            }
            LinkKind::DataPlane => f.write_str(" type tun"),
            LinkKind::Other(kind) => write!(f, " type {kind}"),
        }
    }
}
