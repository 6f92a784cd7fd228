//! The planner: computes the writes that turn the observed state into the wanted state.
//!
//! [`plan`] is pure. Its order is safe at every step: there is never a route whose next hop lacks a neighbour, or whose
//! neighbour's MAC address lacks an FDB entry. It writes only objects in its arguments, and never a foreign object
//! (docs/design.md, "Ownership").

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::kernel::{
    AddressKey, Claims, Device, FdbKey, Forward, ForwardKey, Link, LinkId, LinkKind, LinkName, LinkPart, NeighbourKey,
    Object, Op, PeerState, Route, Scope, State, describe_link, is_carried_here, is_go_flannels, is_made_here,
    owns_address, owns_link, owns_neighbour,
};
use crate::net::{MacAddr, Prefix};
use crate::text::Plain;

#[cfg(test)]
mod properties;
mod routes;
#[cfg(test)]
mod tests;

/// A foreign object in the place of one of this overlay. It is not changed. Beyond [`Plan::MOST_TOLD`] conflicts of a
/// plan, the texts are empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The object of this overlay that cannot be written, or is ignored.
    pub object: Object,
    /// The foreign object found.
    pub found: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Plain(&self.found), Plain(&self.remedy))
    }
}

/// Writes in order, and the conflicts that prevent others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The writes, in an order that is safe to interrupt at any point.
    pub ops: Vec<Op>,
    /// The foreign objects in the way.
    pub conflicts: Vec<Conflict>,
}

impl Plan {
    /// The most conflicts with a text: another program may have a route for every peer.
    pub const MOST_TOLD: usize = 1000;

    /// Returns whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// Returns the writes that turn `seen` into `wanted`.
///
/// With whole states it is an audit: observed objects of this overlay that are not wanted are deleted. With only the
/// keys that one changed peer touches, it is a lease round.
pub fn plan(wanted: &State, seen: &State, scope: &Scope, claims: &Claims<'_>) -> Plan {
    plan_owned(wanted.clone(), seen, scope, claims)
}

/// Same as [`plan`]. Frees each table of `wanted` once its writes are planned, because at a start both are large.
pub(crate) fn plan_owned(mut wanted: State, seen: &State, scope: &Scope, claims: &Claims<'_>) -> Plan {
    let mut planner = Planner::new(scope, seen, claims);
    planner.keep_inside(&mut wanted);
    // At a start there are this many writes. Growing the vector would leave freed allocations behind.
    planner
        .ops
        .puts
        .reserve_exact(wanted.fdb.len() + wanted.neighbours.len() + wanted.forwards.len() + wanted.routes.len());
    planner.links(&wanted, seen);
    planner.addresses(&wanted, seen);
    planner.fdb(&std::mem::take(&mut wanted.fdb), seen);
    planner.neighbours(&std::mem::take(&mut wanted.neighbours), seen);
    planner.forwards(&std::mem::take(&mut wanted.forwards), seen);
    planner.routes(std::mem::take(&mut wanted.routes), seen);
    planner.finish()
}

/// Returns whether the devices in `seen` are as wanted and none of them is foreign, so that the objects on them count.
pub(crate) fn links_settled(wanted: &State, seen: &State, scope: &Scope) -> bool {
    let mut planner = Planner::new(scope, seen, &|_| None);
    planner.links(wanted, seen);
    planner.blocked.is_empty() && planner.finish() == Plan::default()
}

/// Removes everything that `peer` needs from `seen`, if all of it is there and as wanted. While [`links_settled`], a
/// plan without both is the same as with them.
pub(crate) fn take_settled(peer: &PeerState, seen: &mut State) -> bool {
    // Whether all wanted routes to the prefix are there, and no others.
    let are_alone = |prefix: &Prefix| {
        let wants =
            || peer.routes.iter().filter(|(other, _)| other == prefix).map(|(_, want)| want.clone().normalized(prefix));
        let there = seen.routes_to(*prefix);
        let is_there = |want: Route| there.clone().any(|(_, route)| route.same(&want));
        wants().count() == there.clone().count() && wants().all(is_there)
    };
    let settled = peer.fdb.is_none_or(|(key, dst)| seen.fdb.get(&key) == Some(&dst))
        && peer.neighbour.is_none_or(|(key, mac)| seen.neighbours.get(&key) == Some(&mac))
        && peer.forward.is_none_or(|(key, forward)| seen.forwards.get(&key) == Some(&forward))
        && peer.routes.iter().all(|(prefix, _)| are_alone(prefix));
    if settled {
        peer.fdb.map(|(key, _)| seen.fdb.remove(&key));
        peer.neighbour.map(|(key, _)| seen.neighbours.remove(&key));
        peer.forward.map(|(key, _)| seen.forwards.remove(&key));
        for (key, _) in peer.keyed_routes() {
            seen.routes.remove(&key);
        }
    }
    settled
}

struct Planner<'a> {
    scope: &'a Scope,
    /// The seen links.
    seen_links: &'a BTreeMap<LinkId, Link>,
    claims: &'a Claims<'a>,
    /// Devices whose name or place a foreign device has: nothing on them belongs to this overlay.
    blocked: BTreeSet<LinkId>,
    /// Devices that are created or deleted before their children are written: observed objects on them are ignored.
    fresh: BTreeSet<LinkId>,
    /// Devices whose MAC address changes: the kernel then deletes their neighbours, including permanent ones.
    readdressed: BTreeSet<LinkId>,
    /// Devices of this overlay that are deleted last.
    leaving: BTreeSet<LinkId>,
    /// MAC addresses that had no FDB entry, in order, on devices that keep their children.
    unforwarded: Vec<(LinkId, MacAddr)>,
    /// Devices of this overlay that keep the name wanted for another, because a foreign device has their own name.
    stuck: Vec<(LinkId, LinkName)>,
    ops: Ops,
    conflicts: Vec<Conflict>,
}

/// The stages of a plan, in order.
#[derive(Default)]
struct Ops {
    route_clears: Vec<Op>,
    link_clears: Vec<Op>,
    links: Vec<Op>,
    link_creates: Vec<Op>,
    address_clears: Vec<Op>,
    addresses: Vec<Op>,
    address_swaps: Vec<Op>,
    /// FDB entries, then neighbours, then forwards, then routes: the largest part, so it is never copied.
    puts: Vec<Op>,
    route_deletes: Vec<Op>,
    forward_deletes: Vec<Op>,
    neighbour_deletes: Vec<Op>,
    fdb_deletes: Vec<Op>,
    address_deletes: Vec<Op>,
    link_deletes: Vec<Op>,
}

impl<'a> Planner<'a> {
    fn new(scope: &'a Scope, seen: &'a State, claims: &'a Claims<'a>) -> Self {
        Self {
            scope,
            seen_links: &seen.links,
            claims,
            blocked: BTreeSet::new(),
            fresh: BTreeSet::new(),
            readdressed: BTreeSet::new(),
            leaving: BTreeSet::new(),
            unforwarded: Vec::new(),
            stuck: Vec::new(),
            ops: Ops::default(),
            conflicts: Vec::new(),
        }
    }

    /// Removes objects outside the scope. They are never observed, so they would be written again and again.
    fn keep_inside(&mut self, wanted: &mut State) {
        let scope = self.scope;
        let is_ours = |id: LinkId| matches!(id, LinkId::Own(slot) if usize::from(slot) < scope.devices.len());
        let is_device = |id: LinkId, link: &Link| match id {
            LinkId::Own(slot) => {
                let is_it = |device: &Device| device.kind.is_same_device(&link.kind);
                scope.devices.get(usize::from(slot)).is_some_and(is_it) && !link.kind.is_external_vxlan()
            }
            LinkId::Uplink | LinkId::Other(_) => false,
        };
        // A route may use any link, except a device of this overlay that does not exist.
        let leads_astray = |link: Option<LinkId>| link.is_some_and(|id| matches!(id, LinkId::Own(_)) && !is_ours(id));
        let inside = |prefix: &Prefix, route: &Route| {
            scope.is_in_network(prefix) && scope.has_slot(route.slot(), prefix.family()) && !leads_astray(route.link)
        };
        let forwards_inside = |key: &ForwardKey| is_ours(key.link) && scope.is_in_network(&key.prefix);
        let mut outside = Vec::new();
        outside.extend(take_if(&mut wanted.links, |id, link| !is_device(*id, link)).map(Object::Link));
        outside.extend(take_if(&mut wanted.addresses, |key, ()| !is_ours(key.link)).map(Object::Address));
        outside.extend(take_if(&mut wanted.fdb, |key, _| !is_ours(key.link)).map(Object::Fdb));
        outside.extend(take_if(&mut wanted.neighbours, |key, _| !is_ours(key.link)).map(Object::Neighbour));
        outside.extend(take_if(&mut wanted.forwards, |key, _| !forwards_inside(key)).map(Object::Forward));
        let routes = take_if(&mut wanted.routes, |key, route| !inside(&key.prefix, route));
        outside.extend(routes.map(|key| Object::Route(key.prefix)));
        self.conflicts.extend(outside.into_iter().map(|object| Conflict {
            object,
            found: "outside the scope of the overlay".to_owned(),
            remedy: "correct the backend: devices() has to name each device, a route has to be in the network, and in a slot \
                     that the overlay was built with"
                .to_owned(),
        }));
    }

    fn links(&mut self, wanted: &State, seen: &State) {
        for (id, want) in &wanted.links {
            if !want.kind.is_made_here() {
                self.external_link(*id, want, seen);
                continue;
            }
            match (seen.links.get(id), self.foreign_in_place(*id, want, seen)) {
                (Some(have), foreign) => self.existing_link(*id, have, foreign, wanted, seen),
                (None, Some(foreign)) => self.block(*id, foreign),
                (None, None) => self.create_link(*id, want),
            }
        }
        for (holder, name) in std::mem::take(&mut self.stuck) {
            let Some((id, _)) = wanted.links.iter().find(|(id, want)| **id != holder && want.name == name) else {
                continue;
            };
            let Some(have) = seen.links.get(&holder) else { continue };
            let of_it = |op: &Op| op.object() == Object::Link(*id);
            self.ops.link_clears.retain(|op| !of_it(op));
            self.ops.link_creates.retain(|op| !of_it(op));
            self.fresh.remove(id);
            self.block(*id, have);
        }
        for (id, have) in &seen.links {
            if wanted.links.contains_key(id) {
                continue;
            }
            if !self.owns_link(have) {
                // A foreign device with the overlay's device name: objects on it are foreign too.
                if matches!(id, LinkId::Own(_)) {
                    self.blocked.insert(*id);
                }
                continue;
            }
            if !is_made_here(&have.kind, self.scope) {
                continue;
            }
            let in_the_way = wanted.links.values().any(|want| in_place(want, have));
            let stage = if in_the_way { &mut self.ops.link_clears } else { &mut self.ops.link_deletes };
            stage.push(Op::DeleteLink { id: *id, link: Box::new(have.clone()) });
            if in_the_way {
                self.fresh.insert(*id);
            } else {
                self.leaving.insert(*id);
            }
        }
    }

    fn existing_link(&mut self, id: LinkId, have: &Link, foreign: Option<&Link>, wanted: &State, seen: &State) {
        let Some(want) = wanted.links.get(&id) else { return };
        let compatible = want.kind.is_compatible(&have.kind);
        if !self.owns_link(have) && !is_go_flannels(want, have) && !is_carried_here(want, have) {
            return self.block(id, have);
        }
        match foreign {
            Some(foreign) if !compatible => return self.block(id, foreign),
            None if !compatible || self.name_is_taken(id, want, wanted, seen) => {
                self.ops.link_clears.push(Op::DeleteLink { id, link: Box::new(have.clone()) });
                return self.create_link(id, want);
            }
            _ => {}
        }
        let mut to = Link { kind: want.kind.updated(&have.kind), ..want.clone() };
        to.mac = want.mac.or(have.mac);
        if let Some(foreign) = foreign {
            self.conflicts.push(Conflict {
                object: Object::Link(id),
                found: describe_link(foreign),
                remedy: format!(
                    "our device is called {} until the other is renamed or deleted; traffic goes on",
                    have.name
                ),
            });
            to.name = have.name.clone();
            self.stuck.push((id, have.name.clone()));
        }
        if to.mac != have.mac {
            self.readdressed.insert(id);
        }
        let mut from = have.clone();
        for part in LinkPart::ALL {
            let mut next = from.clone();
            part.copy(&to, &mut next);
            if next != from {
                let op = Op::UpdateLink { id, part, from: Box::new(from), to: Box::new(next.clone()) };
                self.ops.links.push(op);
            }
            from = next;
        }
    }

    /// Handles a device that another program creates: it is not changed, and objects on it wait until it exists.
    fn external_link(&mut self, id: LinkId, want: &Link, seen: &State) {
        if seen.links.get(&id).is_some_and(|have| self.owns_link(have)) {
            return;
        }
        self.blocked.insert(id);
        let under_its_name = seen.links.values().find(|link| link.name == want.name);
        self.conflicts.push(Conflict {
            object: Object::Link(id),
            found: under_its_name.map_or_else(|| "no such device".to_owned(), describe_link),
            remedy: format!(
                "the program that makes it has to mark it for this overlay: ip link set dev {} group {:#x}",
                want.name,
                self.scope.overlay.mark()
            ),
        });
    }

    /// Returns a foreign device that occupies the name or the place that `want` needs.
    fn foreign_in_place<'s>(&self, id: LinkId, want: &Link, seen: &'s State) -> Option<&'s Link> {
        let mut others = seen.links.iter().filter(|(other, _)| **other != id).map(|(_, link)| link);
        others.find(|link| in_place(want, link) && !self.owns_link(link))
    }

    /// Returns whether another wanted device of this overlay has the name and will not be deleted first. Two devices
    /// with swapped names cannot both be renamed, so the first is created anew.
    fn name_is_taken(&self, id: LinkId, want: &Link, wanted: &State, seen: &State) -> bool {
        seen.links.iter().any(|(other, link)| {
            *other != id && link.name == want.name && wanted.links.contains_key(other) && !self.fresh.contains(other)
        })
    }

    fn create_link(&mut self, id: LinkId, want: &Link) {
        self.fresh.insert(id);
        self.ops.link_creates.push(Op::CreateLink { id, link: Box::new(want.clone()) });
    }

    fn block(&mut self, id: LinkId, foreign: &Link) {
        self.blocked.insert(id);
        self.conflicts.push(Conflict {
            object: Object::Link(id),
            found: describe_link(foreign),
            remedy: format!(
                "not managed by this overlay: rename it or delete it (ip link delete {}), or choose another {}",
                foreign.name,
                match foreign.kind {
                    LinkKind::Vxlan(_) => "VNI",
                    LinkKind::Tun(_) | LinkKind::External(_) | LinkKind::Other(_) => "name for ours",
                }
            ),
        });
    }

    fn owns_link(&self, link: &Link) -> bool {
        owns_link(link, self.scope)
    }

    /// Returns whether `link` is a device of this overlay whose observed children still exist when their writes are
    /// planned.
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
            if !self.keeps_children(key.link) || !owns_address(key, self.scope) || wanted.addresses.contains_key(key) {
                continue;
            }
            // IPv6 allows an address only once per device, whatever its length: the wrong one has to be deleted first.
            let same = |other: &AddressKey| (other.link, other.addr) == (key.link, key.addr);
            let in_the_way = key.addr.is_ipv6() && wanted.addresses.keys().any(same);
            // If a device keeps an address, the wrong address and its connected route are deleted before routes of this
            // overlay are created, which may need that destination. If it keeps none, its IPv4 routes disappear with
            // the last address.
            let swapped = wanted.addresses.keys().any(|other| other.link == key.link);
            let stage = match (in_the_way, swapped) {
                (true, _) => &mut self.ops.address_clears,
                (false, true) => &mut self.ops.address_swaps,
                (false, false) => &mut self.ops.address_deletes,
            };
            stage.push(Op::DeleteAddress(*key));
        }
    }

    fn fdb(&mut self, wanted: &BTreeMap<FdbKey, IpAddr>, seen: &State) {
        for (key, dst) in wanted {
            let there = self.keeps_children(key.link) && seen.fdb.get(key) == Some(dst);
            if !there && !self.blocked.contains(&key.link) {
                self.ops.puts.push(Op::PutFdb { key: *key, dst: *dst });
                if self.keeps_children(key.link) && !seen.fdb.contains_key(key) {
                    self.unforwarded.push((key.link, key.mac));
                }
            }
        }
        for (key, dst) in &seen.fdb {
            if self.keeps_children(key.link) && !wanted.contains_key(key) {
                self.ops.fdb_deletes.push(Op::DeleteFdb { key: *key, dst: *dst });
            }
        }
    }

    fn neighbours(&mut self, wanted: &BTreeMap<NeighbourKey, MacAddr>, seen: &State) {
        for (key, mac) in wanted {
            let there = self.keeps_children(key.link)
                && !self.readdressed.contains(&key.link)
                // Written again with its FDB entry, so that a refused entry keeps routes off this neighbour.
                && self.unforwarded.binary_search(&(key.link, *mac)).is_err()
                && seen.neighbours.get(key) == Some(mac);
            if !there && !self.blocked.contains(&key.link) {
                let was = seen.neighbours.get(key).filter(|_| self.keeps_children(key.link)).copied();
                self.ops.puts.push(Op::PutNeighbour { key: *key, mac: *mac, was });
            }
        }
        for (key, mac) in &seen.neighbours {
            let there = self.keeps_children(key.link) && !self.readdressed.contains(&key.link);
            if there && !wanted.contains_key(key) && owns_neighbour(key, self.scope) {
                self.ops.neighbour_deletes.push(Op::DeleteNeighbour { key: *key, mac: *mac });
            }
        }
    }

    fn forwards(&mut self, wanted: &BTreeMap<ForwardKey, Forward>, seen: &State) {
        for (key, forward) in wanted {
            let there = self.keeps_children(key.link) && seen.forwards.get(key) == Some(forward);
            if !there && !self.blocked.contains(&key.link) {
                self.ops.puts.push(Op::PutForward { key: *key, forward: Box::new(*forward) });
            }
        }
        for (key, forward) in &seen.forwards {
            if self.keeps_children(key.link) && !wanted.contains_key(key) {
                self.ops.forward_deletes.push(Op::DeleteForward { key: *key, forward: Box::new(*forward) });
            }
        }
    }

    fn finish(self) -> Plan {
        let stages = self.ops;
        let before = [
            stages.route_clears,
            stages.link_clears,
            stages.links,
            stages.link_creates,
            stages.address_clears,
            stages.addresses,
            stages.address_swaps,
        ];
        let after = [
            stages.route_deletes,
            stages.forward_deletes,
            stages.neighbour_deletes,
            stages.fdb_deletes,
            stages.address_deletes,
            stages.link_deletes,
        ];
        let mut ops = stages.puts;
        ops.splice(..0, before.into_iter().flatten());
        // Move and free one stage after the other, so that the plan is never in memory twice.
        for stage in after {
            ops.reserve_exact(stage.len());
            ops.extend(stage);
        }
        Plan { ops, conflicts: self.conflicts }
    }
}

/// Removes the entries of a table for which `wrong` returns true, and returns their keys. If there are none, costs only
/// one check per entry.
fn take_if<K: Ord + Copy, V>(table: &mut BTreeMap<K, V>, wrong: impl Fn(&K, &V) -> bool) -> impl Iterator<Item = K> {
    let keys: Vec<K> = table.iter().filter(|(key, value)| wrong(key, value)).map(|(key, _)| *key).collect();
    for key in &keys {
        table.remove(key);
    }
    keys.into_iter()
}

/// Returns whether `have` occupies what `want` needs: its name, or its place among devices of its kind.
fn in_place(want: &Link, have: &Link) -> bool {
    want.kind.excludes(&have.kind) || want.name == have.name
}
