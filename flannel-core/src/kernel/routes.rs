//! Routes that are looked up by address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::HostRoute;
use crate::net::{Family, Prefix};

/// Routes that are looked up by address: for each destination the route with the lowest metric, the first one if
/// several are equal.
///
/// A lookup takes one step per prefix length in use, whatever the number of routes: every audit looks up each of up to
/// ten thousand peers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Routes {
    best: BTreeMap<Prefix, HostRoute>,
    lengths: BTreeSet<(Family, u8)>,
}

impl Routes {
    /// Inserts a route, unless a route to its destination has the same or a lower metric.
    pub fn insert(&mut self, route: HostRoute) {
        let prefix = route.prefix;
        self.lengths.insert((prefix.family(), prefix.len()));
        let best = self.best.entry(prefix).or_insert(route);
        if route.metric < best.metric {
            *best = route;
        }
    }

    /// Returns the number of destinations.
    pub fn len(&self) -> usize {
        self.best.len()
    }

    /// Returns whether there are no routes.
    pub fn is_empty(&self) -> bool {
        self.best.is_empty()
    }

    /// Returns the route to the longest prefix that contains `addr`.
    pub fn to(&self, addr: IpAddr) -> Option<&HostRoute> {
        self.covering(Prefix::host(addr)).next()
    }

    /// Returns whether one of the destinations covers `prefix`.
    pub fn covers(&self, prefix: &Prefix) -> bool {
        self.covering(*prefix).next().is_some()
    }

    /// Routes to prefixes that cover `prefix`, the longest first.
    fn covering(&self, prefix: Prefix) -> impl Iterator<Item = &HostRoute> {
        let lengths = self.lengths.range((prefix.family(), 0)..=(prefix.family(), prefix.len())).rev();
        let wider = lengths.filter_map(move |(_, len)| Prefix::masked(prefix.addr(), *len).ok());
        wider.filter_map(|wider| self.best.get(&wider))
    }
}

impl IntoIterator for Routes {
    type Item = HostRoute;
    type IntoIter = std::collections::btree_map::IntoValues<Prefix, HostRoute>;

    fn into_iter(self) -> Self::IntoIter {
        self.best.into_values()
    }
}

impl Extend<HostRoute> for Routes {
    fn extend<T: IntoIterator<Item = HostRoute>>(&mut self, routes: T) {
        routes.into_iter().for_each(|route| self.insert(route));
    }
}

impl FromIterator<HostRoute> for Routes {
    fn from_iter<T: IntoIterator<Item = HostRoute>>(routes: T) -> Self {
        let mut found = Self::default();
        found.extend(routes);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_route() -> impl Strategy<Value = HostRoute> {
        (any::<bool>(), 0u8..4, any::<u8>(), 0u32..3, 1u32..4).prop_map(|(v6, len, bits, metric, link)| {
            let addr: IpAddr = match v6 {
                true => [0xfd00, 0, 0, 0, 0, 0, 0, bits.into()].into(),
                false => [10, 0, 0, bits].into(),
            };
            let prefix = Prefix::masked(addr, Family::of(addr).bits() - len * 2).unwrap();
            HostRoute { prefix, link: Some(link), gateway: None, metric }
        })
    }

    proptest! {
        #[test]
        fn a_lookup_equals_a_walk_over_all(routes in proptest::collection::vec(any_route(), 0..60), bits: u8, v6: bool) {
            let addr: IpAddr = match v6 {
                true => [0xfd00, 0, 0, 0, 0, 0, 0, bits.into()].into(),
                false => [10, 0, 0, bits].into(),
            };
            let fits = routes.iter().filter(|route| route.prefix.contains(addr));
            let best = fits.min_by_key(|route| (std::cmp::Reverse(route.prefix.len()), route.metric));
            let found: Routes = routes.iter().copied().collect();
            prop_assert_eq!(found.to(addr), best);
            prop_assert_eq!(found.covers(&Prefix::host(addr)), best.is_some());
        }
    }

    #[test]
    fn a_lookup_among_many_routes_takes_as_many_steps_as_there_are_lengths() {
        let route = |n: u32, len| {
            let prefix = Prefix::masked(std::net::Ipv4Addr::from(0x0a00_0000 + (n << 8)).into(), len).unwrap();
            HostRoute::new(prefix, Some(n), None)
        };
        let routes: Routes = (0..100_000).map(|n| route(n, 24)).chain([route(0, 8)]).collect();
        assert_eq!(routes.lengths.len(), 2);
        assert_eq!(routes.to("10.0.7.1".parse().unwrap()).unwrap().link, Some(7));
    }
}
