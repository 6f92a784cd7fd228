//! Dumps to state.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::codec::{Batch, address, link, neighbour, route};
use super::wire::Wire;
use crate::kernel::{KernelError, Scope, SeenLink};
use crate::net::{Family, is_link_local};
use crate::state::{AddressKey, FdbKey, Link, LinkId, LinkKind, NeighbourKey, Route, RouteKey, State};

/// What was seen, and which interface each id stands for.
pub(crate) struct Seen {
    pub(crate) state: State,
    /// How many IPv4 routes are among it.
    pub(crate) routes: usize,
    pub(crate) indices: BTreeMap<LinkId, u32>,
}

/// Most routes of others in the territory that are kept: as many as peers are supported, with room to spare. What is
/// beyond is not seen, so never deleted, and a create finds out.
const MOST_FOREIGN: usize = 131_072;

/// Reads all that `scope` takes in. Deletions come from entries actually seen, so what changes between two dumps may
/// cost a redundant write and never a wrong delete (kernel-facts 14).
pub(crate) fn observe(wire: &mut Wire, batch: &mut Batch, scope: &Scope) -> Result<Seen, KernelError> {
    let links = read_links(wire, batch)?;
    let ids = scope.identify(&links);
    let own: Vec<(u32, LinkId)> =
        ids.iter().filter(|(_, id)| matches!(id, LinkId::Own(_))).map(|(index, id)| (*index, *id)).collect();
    let mut state = State { links: named_links(links, &ids, scope), ..State::default() };
    let mut addresses = Vec::new();
    let mut fdb = Vec::new();
    let mut neighbours = Vec::new();
    for (index, id) in own {
        for family in Family::BOTH {
            address::dump(batch, family, index);
            addresses.extend(wire.dump(batch, "reading addresses", |message| {
                Ok(address::decode(message.payload)?
                    .filter(|seen| seen.link == index && Family::of(seen.addr) == family && !is_automatic(seen.addr))
                    .map(|seen| (AddressKey { link: id, addr: seen.addr, len: seen.len }, ())))
            })?);
        }
        neighbour::dump_fdb(batch, index);
        fdb.extend(wire.dump(batch, "reading forwarding entries", |message| {
            Ok(neighbour::decode(message.payload)?.filter(|entry| entry.index == index).and_then(|entry| {
                let (mac, dst) = entry.as_fdb()?;
                Some((FdbKey { link: id, mac, nth: 0 }, dst))
            }))
        })?);
        neighbour::dump(batch, index);
        neighbours.extend(wire.dump(batch, "reading neighbours", |message| {
            Ok(neighbour::decode(message.payload)?.filter(|entry| entry.index == index).and_then(|entry| {
                let (addr, mac) = entry.as_neighbour()?;
                Some((NeighbourKey { link: id, addr }, mac))
            }))
        })?);
    }
    let mut routes = Vec::new();
    for family in scope.networks.families() {
        route::dump(batch, family);
        let (found, _) = wire.fold(batch, "reading routes", |(found, foreign): &mut (Vec<_>, usize), message| {
            // A kernel without IPv6 answers for all families it has.
            let seen = route::decode(message.payload)?.filter(|seen| seen.prefix.family() == family);
            let Some(seen) = seen.filter(|seen| seen.in_territory(scope)) else { return Ok(()) };
            if !seen.has_own_protocol() {
                *foreign += 1;
            }
            if seen.has_own_protocol() || *foreign <= MOST_FOREIGN {
                found.push((RouteKey { prefix: seen.prefix, nth: 0 }, route_of(&seen, &ids)));
            }
            Ok(())
        })?;
        routes.extend(found);
    }
    // Stable sorts keep the order of the dump within a key. A map collected from sorted entries has full nodes; one
    // that grows by insertion in ascending order is half empty (kernel-facts 25).
    fdb.sort_by_key(|(key, _)| *key);
    count_equal(&mut fdb, |a, b| a == b, |key, nth| key.nth = nth);
    routes.sort_by_key(|(key, _)| *key);
    count_equal(&mut routes, |a, b| a == b, |key, nth| key.nth = nth);
    state.addresses = addresses.into_iter().collect();
    state.fdb = fdb.into_iter().collect();
    state.neighbours = neighbours.into_iter().collect();
    state.routes = routes.into_iter().collect();
    let indices = ids.into_iter().map(|(index, id)| (id, index)).collect();
    let routes = state.routes.keys().filter(|key| key.prefix.family() == Family::V4).count();
    Ok(Seen { state, routes, indices })
}

fn route_of(seen: &route::SeenRoute, ids: &BTreeMap<u32, LinkId>) -> Route {
    Route {
        kind: seen.kind,
        gateway: seen.gateway,
        link: seen.index.map(|index| ids.get(&index).copied().unwrap_or(LinkId::Other(index))),
        onlink: seen.onlink,
        protocol: seen.protocol,
    }
}

/// All links, in the order of the dump.
pub(crate) fn read_links(wire: &mut Wire, batch: &mut Batch) -> Result<Vec<SeenLink>, KernelError> {
    link::dump(batch);
    wire.dump(batch, "reading links", |message| link::decode(message.payload))
}

fn named_links(links: Vec<SeenLink>, ids: &BTreeMap<u32, LinkId>, scope: &Scope) -> BTreeMap<LinkId, Link> {
    links
        .into_iter()
        .filter_map(|seen| {
            let id = ids.get(&seen.index).filter(|id| **id != LinkId::Uplink)?;
            let mut link = seen.link;
            if let LinkKind::Vxlan(vxlan) = &mut link.kind {
                vxlan.lower = vxlan.lower.map(|lower| match lower {
                    LinkId::Other(index) if Some(index) == scope.uplink => LinkId::Uplink,
                    lower => lower,
                });
            }
            Some((*id, link))
        })
        .collect()
}

/// Numbers the entries of one key.
fn count_equal<K: Copy, V>(entries: &mut [(K, V)], equal: impl Fn(&K, &K) -> bool, number: impl Fn(&mut K, u16)) {
    let Some(mut first) = entries.first().map(|(key, _)| *key) else { return };
    let mut nth = 0u16;
    for (key, _) in entries.iter_mut().skip(1) {
        if equal(&first, key) {
            nth = nth.saturating_add(1);
            number(key, nth);
        } else {
            first = *key;
            nth = 0;
        }
    }
}

/// Whether the kernel gives every device such an address by itself.
pub(crate) fn is_automatic(addr: IpAddr) -> bool {
    addr.is_ipv6() && is_link_local(addr)
}
