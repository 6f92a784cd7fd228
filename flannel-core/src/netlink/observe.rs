//! Converts dumps to state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::codec::{Batch, Message, address, link, neighbour, route};
use super::wire::Wire;
use crate::kernel::{
    AddressKey, FdbKey, KernelError, Link, LinkId, LinkKind, NeighbourKey, Route, RouteKey, RouteSlot, Scope, SeenLink,
    State,
};
use crate::net::{Family, MacAddr, Prefix, is_automatic};

/// The observed state, and the interface index of each ID.
pub(crate) struct Seen {
    pub(crate) state: State,
    /// The number of IPv4 routes in it.
    pub(crate) routes: usize,
    pub(crate) indices: BTreeMap<LinkId, u32>,
}

/// The most foreign routes in the territory that are kept, separately to prefixes with an overlay's route and to
/// others: the supported number of peers, with a margin. Beyond it, the routes of a prefix are not observed at all:
/// nothing there is deleted or replaced, and an exclusive create fails.
const MOST_FOREIGN: usize = 131_072;

/// Reads everything in `scope`; `expected` is the approximate number of peers. Only entries actually observed are
/// deleted, so a change between two dumps can cause a redundant write but never a wrong delete (docs/kernel-facts.md,
/// "Torn dumps").
///
/// A map collected from sorted entries has full nodes; one that grows by insertion in ascending order is half empty
/// (docs/kernel-facts.md, "Cost of dumps and memory"). Each table is converted to a map before the next one is read, so
/// that only one table at a time is in memory twice.
pub(crate) fn observe(wire: &mut Wire, batch: &mut Batch, scope: &Scope, expected: usize) -> Result<Seen, KernelError> {
    let links = read_links(wire, batch, |link| scope.concerns(link))?;
    let ids = scope.identify(&links);
    let links = named_links(links, &ids, scope);
    let mut reader = Reader { wire, batch, scope, expected, ids };
    let mut state = State { links, addresses: reader.addresses()?, ..State::default() };
    state.fdb = reader.fdb()?;
    state.neighbours = reader.neighbours()?;
    let routes = reader.routes()?;
    let seen = routes.iter().filter(|(key, _)| key.prefix.family() == Family::V4).count();
    state.routes = routes.into_iter().collect();
    let indices = reader.ids.into_iter().map(|(index, id)| (id, index)).collect();
    Ok(Seen { state, routes: seen, indices })
}

/// Reads one table after the other.
struct Reader<'a> {
    wire: &'a mut Wire,
    batch: &'a mut Batch,
    scope: &'a Scope,
    expected: usize,
    ids: BTreeMap<u32, LinkId>,
}

impl Reader<'_> {
    fn own(&self) -> Vec<(u32, LinkId)> {
        let own = self.ids.iter().filter(|(_, id)| matches!(id, LinkId::Own(_)));
        own.map(|(index, id)| (*index, *id)).collect()
    }

    fn addresses(&mut self) -> Result<BTreeMap<AddressKey, ()>, KernelError> {
        let mut addresses = BTreeMap::new();
        for (index, id) in self.own() {
            for family in Family::BOTH {
                address::dump(self.batch, family, index);
                addresses.extend(self.wire.dump(self.batch, "reading addresses", |message| {
                    Ok(address::decode(message.payload)?
                        .filter(|seen| {
                            seen.link == index && Family::of(seen.addr) == family && !is_automatic(seen.addr)
                        })
                        .map(|seen| (AddressKey { link: id, addr: seen.addr, len: seen.len }, ())))
                })?);
            }
        }
        Ok(addresses)
    }

    /// Reads the entries of one of a device's two tables.
    fn entries<T>(
        &mut self,
        index: u32,
        doing: &str,
        read: impl Fn(&neighbour::Entry) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let expected = self.expected;
        let take = |found: &mut Vec<T>, message: &Message<'_>| {
            let entry = neighbour::decode(message.payload)?.filter(|entry| entry.index == index);
            found.extend(entry.and_then(|entry| read(&entry)));
            Ok(())
        };
        self.wire.fold(self.batch, doing, || Vec::with_capacity(expected), take)
    }

    fn fdb(&mut self) -> Result<BTreeMap<FdbKey, IpAddr>, KernelError> {
        let mut fdb = Vec::new();
        for (link, id) in self.own() {
            neighbour::dump_fdb(self.batch, link);
            let found = self.entries(link, "reading forwarding entries", |entry| {
                let (mac, dst) = entry.as_fdb()?;
                Some((FdbKey { link: id, mac, nth: 0 }, dst))
            })?;
            append(&mut fdb, found);
        }
        // Stable sorts keep the order of the dump within a key.
        fdb.sort_by_key(|(key, _)| *key);
        count_equal(&mut fdb, |a, b| a == b, |key, nth| key.nth = nth);
        Ok(fdb.into_iter().collect())
    }

    fn neighbours(&mut self) -> Result<BTreeMap<NeighbourKey, MacAddr>, KernelError> {
        let mut neighbours = Vec::new();
        for (link, id) in self.own() {
            neighbour::dump(self.batch, link);
            let found = self.entries(link, "reading neighbours", |entry| {
                let (addr, mac) = entry.as_neighbour()?;
                Some((NeighbourKey { link: id, addr }, mac))
            })?;
            append(&mut neighbours, found);
        }
        Ok(neighbours.into_iter().collect())
    }

    /// Reads the routes in the territory, sorted.
    fn routes(&mut self) -> Result<Vec<(RouteKey, Route)>, KernelError> {
        let mut routes = Vec::new();
        let of_each_table = |family| tables(self.scope).into_iter().map(move |table| (family, table));
        for (family, table) in self.scope.families().flat_map(of_each_table) {
            route::dump(self.batch, family, table);
            let (expected, scope, ids) = (self.expected, self.scope, &self.ids);
            let take = |found: &mut Found, message: &Message<'_>| {
                // A kernel without IPv6 answers with all families it has.
                let seen = route::decode(message.payload)?.filter(|seen| seen.prefix.family() == family);
                seen.iter().filter(|seen| seen.in_territory(scope)).for_each(|seen| found.take(seen, ids));
                Ok(())
            };
            let start = || Found { routes: Vec::with_capacity(expected), ..Found::default() };
            let found = self.wire.fold(self.batch, "reading routes", start, take)?;
            append(&mut routes, found.finish());
        }
        routes.sort_by_key(|(key, _)| *key);
        count_equal(&mut routes, |a, b| a == b, |key, nth| key.nth = nth);
        Ok(routes)
    }
}

/// Appends without copying if `all` is empty.
fn append<T>(all: &mut Vec<T>, mut found: Vec<T>) {
    if all.is_empty() {
        *all = found;
    } else {
        all.append(&mut found);
    }
}

/// Routes in the territory, while they are read. The kernel lists the routes to one prefix together, so they are kept
/// or left out together: the first of them determines whether the overlay's route may be replaced.
#[derive(Debug, Default)]
struct Found {
    routes: Vec<(RouteKey, Route)>,
    /// The current prefix, and where its routes start.
    prefix: Option<Prefix>,
    start: usize,
    /// Whether the current prefix alone has too many routes.
    crowded: bool,
    /// How many foreign routes are kept to prefixes with an overlay's route, and to other prefixes.
    beside_ours: usize,
    elsewhere: usize,
}

impl Found {
    fn take(&mut self, seen: &route::SeenRoute, ids: &BTreeMap<u32, LinkId>) {
        if self.prefix != Some(seen.prefix) {
            self.close();
            self.prefix = Some(seen.prefix);
        }
        if self.crowded {
            return;
        }
        let route = Route {
            kind: seen.kind,
            gateway: seen.gateway,
            link: seen.index.map(|index| ids.get(&index).copied().unwrap_or(LinkId::Other(index))),
            onlink: seen.onlink,
            protocol: seen.protocol,
            extra: None,
        };
        let route = route.in_slot(seen.slot).with_source(seen.source);
        self.routes.push((RouteKey { prefix: seen.prefix, nth: 0 }, route));
        if self.routes.len() - self.start > MOST_FOREIGN {
            self.routes.truncate(self.start);
            self.crowded = true;
        }
    }

    /// Keeps or drops the routes of the current prefix.
    fn close(&mut self) {
        let routes = self.routes.get(self.start..).unwrap_or_default();
        let foreign = routes.iter().filter(|(_, route)| !route.has_own_protocol()).count();
        let kept = if foreign < routes.len() { &mut self.beside_ours } else { &mut self.elsewhere };
        if *kept + foreign <= MOST_FOREIGN {
            *kept += foreign;
        } else {
            self.routes.truncate(self.start);
        }
        (self.start, self.crowded) = (self.routes.len(), false);
    }

    fn finish(mut self) -> Vec<(RouteKey, Route)> {
        self.close();
        self.routes
    }
}

/// Reads the links that `matters` accepts, in the order of the dump.
pub(crate) fn read_links(
    wire: &mut Wire,
    batch: &mut Batch,
    matters: impl Fn(&SeenLink) -> bool,
) -> Result<Vec<SeenLink>, KernelError> {
    link::dump(batch);
    wire.dump(batch, "reading links", |message| Ok(link::decode(message.payload)?.filter(&matters)))
}

/// Returns the tables in which routes are read.
fn tables(scope: &Scope) -> BTreeSet<u32> {
    let others = scope.slots.iter().map(|slot| slot.table).filter(|table| *table != 0);
    others.chain([RouteSlot::MAIN.table]).collect()
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

/// Numbers the entries with equal keys.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{RouteKind, RouteSlot};

    fn seen(n: u32, protocol: u8) -> route::SeenRoute {
        route::SeenRoute {
            prefix: Prefix::host(std::net::Ipv4Addr::from(n).into()),
            slot: RouteSlot::MAIN,
            tos: 0,
            protocol,
            forwards: true,
            kind: RouteKind::Unicast,
            gateway: None,
            index: Some(n % 3),
            onlink: false,
            source: None,
            hops: Vec::new(),
        }
    }

    /// Returns which of these routes are kept, by number, and whether they are an overlay's.
    fn kept(routes: impl Iterator<Item = (u32, u8)>) -> Vec<(u32, bool)> {
        let mut found = Found::default();
        routes.for_each(|(n, protocol)| found.take(&seen(n, protocol), &BTreeMap::new()));
        let number = |key: &RouteKey| match key.prefix.addr() {
            IpAddr::V4(addr) => u32::from(addr),
            IpAddr::V6(_) => u32::MAX,
        };
        found.finish().iter().map(|(key, route)| (number(key), route.has_own_protocol())).collect()
    }

    const OWN: u8 = Route::FIRST_PROTOCOL;
    const FOREIGN: u8 = Route::BOOT;

    #[test]
    fn of_others_routes_in_the_territory_so_many_are_kept_and_of_ours_all() {
        let routes = (0..200_000).map(|n| (n, if n % 2 == 0 { OWN } else { FOREIGN }));
        let more = (200_000..300_000).map(|n| (n, FOREIGN));
        let kept = kept(routes.chain(more));
        let ours = kept.iter().filter(|(_, own)| *own).count();
        assert_eq!((ours, kept.len()), (100_000, 100_000 + MOST_FOREIGN));
    }

    #[test]
    fn the_routes_of_one_key_are_kept_or_left_out_together() {
        let most = MOST_FOREIGN as u32;
        let flood = || (0..most).map(|n| (n, FOREIGN));
        let tail = |routes: &[(u32, u8)]| kept(flood().chain(routes.iter().copied()))[MOST_FOREIGN..].to_vec();
        // In either order, a foreign route beside the overlay's is observed.
        assert_eq!(tail(&[(most, FOREIGN), (most, OWN)]), [(most, false), (most, true)]);
        assert_eq!(tail(&[(most, OWN), (most, FOREIGN)]), [(most, true), (most, false)]);
        assert_eq!(tail(&[(most, FOREIGN), (most, FOREIGN), (most + 1, OWN)]), [(most + 1, true)]);
        // A key with too many routes is not observed at all: an exclusive create fails.
        for first in [OWN, FOREIGN] {
            let one = std::iter::once((0, first)).chain((0..=most).map(|_| (0, FOREIGN)));
            assert_eq!(kept(one.chain([(0, OWN), (1, OWN)])), [(1, true)]);
        }
    }
}
