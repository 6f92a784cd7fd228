//! Reads the fake's tables for the [`Kernel`](crate::kernel::Kernel) trait.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::kernel::{
    AddressKey, FdbKey, ForwardKey, HostFacts, HostRoute, Link, LinkId, LinkKind, NeighbourKey, NextHop, Route,
    RouteKey, RouteKind, Scope, SeenLink, State, Vxlan,
};

use super::Nud;
use super::tables::{Entry, MAIN, Tables};

impl Tables {
    pub(super) fn identify(&self, scope: &Scope) -> BTreeMap<u32, LinkId> {
        let seen: Vec<_> = self.links.iter().map(|(index, link)| self.seen(*index, link)).collect();
        scope.identify(&seen)
    }

    fn seen(&self, index: u32, link: &Link) -> SeenLink {
        SeenLink { index, link: link.clone(), carrier: link.up && !self.without_carrier.contains(&index) }
    }

    pub(super) fn observe(&self, scope: &Scope, ids: &BTreeMap<u32, LinkId>) -> State {
        let id = |index: u32| ids.get(&index).copied().unwrap_or(LinkId::Other(index));
        let own = |index: &u32| ids.get(index).copied().filter(|id| matches!(id, LinkId::Own(_)));
        let mut state = State::default();
        for (index, link_id) in ids {
            let Some(link) = self.links.get(index) else { continue };
            let mut link = link.clone();
            if let LinkKind::Vxlan(Vxlan { lower: Some(lower), .. }) = &mut link.kind
                && let LinkId::Other(index) = *lower
            {
                *lower = id(index);
            }
            state.links.insert(*link_id, link);
        }
        for address in &self.addresses {
            if let Some(link) = own(&address.link) {
                state.addresses.insert(AddressKey { link, addr: address.addr, len: address.len }, ());
            }
        }
        for ((index, mac), entries) in &self.fdb {
            let Some(link) = own(index) else { continue };
            let permanent = entries.iter().filter(|(_, nud)| *nud == Nud::Permanent);
            for (nth, (dst, _)) in (0..).zip(permanent) {
                state.fdb.insert(FdbKey { link, mac: *mac, nth }, *dst);
            }
        }
        for ((index, addr), (mac, nud)) in &self.neighbours {
            if let (Some(link), Nud::Permanent) = (own(index), nud) {
                state.neighbours.insert(NeighbourKey { link, addr: *addr }, *mac);
            }
        }
        for ((index, prefix), forward) in &self.forwards {
            if let Some(link) = own(index) {
                state.forwards.insert(ForwardKey { link, prefix: *prefix }, *forward);
            }
        }
        for (slot, entries) in &self.routes {
            let told = slot.as_told();
            if !scope.has_slot(told, slot.prefix.family()) || !scope.covers(&slot.prefix) {
                continue;
            }
            for entry in entries {
                let Entry { kind, gateway, link, onlink, protocol, source, .. } = *entry;
                let link = link.map(id);
                let route = if entry.is_multipath() {
                    let (kind, gateway, link) = (RouteKind::Foreign, None, None);
                    Route { kind, gateway, link, onlink: false, protocol, extra: None }
                } else {
                    Route { kind, gateway, link, onlink, protocol, extra: None }
                };
                let route = route.in_slot(told).with_source(source);
                let nth = u16::try_from(state.routes_to(slot.prefix).count()).unwrap_or(u16::MAX);
                state.routes.insert(RouteKey { prefix: slot.prefix, nth }, route);
            }
        }
        state
    }

    pub(super) fn host_facts(&self, reach: &[IpAddr]) -> HostFacts {
        let mut facts = HostFacts::default();
        self.addresses.iter().for_each(|address| facts.keep_address(address.clone()));
        let addressed = facts.addressed();
        for (index, link) in &self.links {
            facts.keep_link(*index, self.seen(*index, link).into(), &addressed);
        }
        let mut behind = Vec::new();
        for (slot, entries) in self.routes.iter().filter(|(slot, _)| slot.table == MAIN) {
            for entry in entries {
                let ours = (Route::FIRST_PROTOCOL..Route::FIRST_PROTOCOL + Route::PROTOCOLS).contains(&entry.protocol);
                if ours || entry.kind == RouteKind::Blackhole {
                    continue;
                }
                let siblings = entry.siblings.iter().map(|sibling| (sibling.gateway, sibling.link));
                let hops = [(entry.gateway, entry.link)].into_iter().chain(siblings);
                facts.next_hops.extend(hops.filter_map(|(addr, link)| Some(NextHop { addr: addr?, link })));
                let link = entry.link.filter(|_| !entry.is_multipath());
                let gateway = entry.gateway.filter(|_| !entry.is_multipath());
                let route = HostRoute { prefix: slot.prefix, link, gateway, metric: slot.metric };
                if slot.prefix.len() == 0 {
                    facts.defaults.push(route);
                } else if entry.gateway.is_none() {
                    facts.on_link.insert(route);
                } else {
                    behind.push(route);
                }
            }
        }
        let (inside, far): (Vec<_>, Vec<_>) = behind.into_iter().partition(|route| facts.on_link.covers(&route.prefix));
        facts.on_link.extend(inside);
        facts.far.extend(far.into_iter().filter(|route| reach.iter().any(|addr| route.prefix.contains(*addr))));
        facts
    }
}
