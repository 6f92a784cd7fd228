//! Reads the state of the host.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::codec::{Batch, address, link, route};
use super::wire::Wire;
use crate::kernel::{HostFacts, HostRoute, KernelError, NextHop, RouteSlot, Routes};
use crate::net::{Family, Prefix};

/// The most routes with a gateway that are set aside until all connected prefixes are known. If there are more, the
/// table is read again.
const ASIDE: usize = 1_024;

/// Reads links, addresses and the main table of both families. Of the routes beyond the host's links, only those to
/// `reach` are kept.
pub(crate) fn host_facts(wire: &mut Wire, batch: &mut Batch, reach: &[IpAddr]) -> Result<HostFacts, KernelError> {
    let mut facts = HostFacts::default();
    for family in Family::BOTH {
        address::dump(batch, family, 0);
        facts = wire.fold(
            batch,
            "reading addresses",
            || facts.clone(),
            |facts, message| {
                let seen = address::decode(message.payload)?.filter(|seen| Family::of(seen.addr) == family);
                seen.into_iter().for_each(|seen| facts.keep_address(seen));
                Ok(())
            },
        )?;
    }
    let addressed = facts.addressed();
    link::dump(batch);
    facts = wire.fold(
        batch,
        "reading links",
        || facts.clone(),
        |facts, message| {
            if let Some(seen) = link::decode(message.payload)? {
                facts.keep_link(seen.index, seen.into(), &addressed);
            }
            Ok(())
        },
    )?;
    for family in Family::BOTH {
        let table = read_table(wire, batch, family, Table::take)?;
        facts.defaults.extend(table.defaults);
        facts.next_hops.extend(table.next_hops);
        facts.on_link.extend(table.on_link);
        facts.left_out += table.left_out;
        let gateways = match table.aside {
            Aside::All(routes) => {
                let mut gateways = Gateways::default();
                routes.iter().for_each(|route| gateways.take(&facts.on_link, reach, route));
                gateways
            }
            // Only routes inside the now known prefixes, or to `reach`, are kept.
            Aside::TooMany => read_table(wire, batch, family, |gateways: &mut Gateways, seen| {
                Gateway::of(seen).iter().for_each(|route| gateways.take(&facts.on_link, reach, route));
            })?,
        };
        facts.on_link.extend(gateways.inside);
        facts.far.extend(gateways.far);
        facts.left_out += gateways.left_out;
    }
    Ok(facts)
}

/// Reads the main table of one family, without routes managed by overlays.
fn read_table<T: Default>(
    wire: &mut Wire,
    batch: &mut Batch,
    family: Family,
    mut take: impl FnMut(&mut T, &route::SeenRoute),
) -> Result<T, KernelError> {
    route::dump(batch, family, RouteSlot::MAIN.table);
    wire.fold(batch, "reading routes", T::default, |kept, message| {
        // Most routes of a large cluster; they are not decoded.
        if route::has_own_protocol(message.payload) {
            return Ok(());
        }
        // A kernel without IPv6 answers with all families it has.
        let seen = route::decode(message.payload)?.filter(|seen| seen.prefix.family() == family);
        if let Some(seen) = seen.filter(route::SeenRoute::in_main_table) {
            take(kept, &seen);
        }
        Ok(())
    })
}

/// The kept routes of one family while they are read: those that always matter, and those that may.
#[derive(Debug, Default)]
struct Table {
    defaults: Vec<HostRoute>,
    on_link: Routes,
    next_hops: BTreeSet<NextHop>,
    aside: Aside,
    /// How many routes are not kept, or not with all their next hops.
    left_out: usize,
}

/// Routes with a gateway, as long as there are few.
#[derive(Debug)]
enum Aside {
    All(Vec<Gateway>),
    TooMany,
}

impl Default for Aside {
    fn default() -> Self {
        Self::All(Vec::new())
    }
}

/// A route with a gateway.
#[derive(Debug, Clone, Copy)]
struct Gateway {
    route: HostRoute,
    /// Whether it is an overlay's route, which leads to no other destination.
    overlay: bool,
}

/// Routes with a gateway that matter.
#[derive(Debug, Default)]
struct Gateways {
    /// Routes to addresses inside a connected prefix.
    inside: Routes,
    /// Routes to a requested address.
    far: Routes,
    /// How many of both are not kept.
    left_out: usize,
}

impl Table {
    fn take(&mut self, seen: &route::SeenRoute) {
        let mut kept = true;
        if !leads_to_itself(seen) {
            let gateway = seen.gateway.map(|addr| NextHop { addr, link: None });
            let hops = gateway.into_iter().chain(seen.hops.iter().copied());
            for hop in hops.map(|hop| NextHop { link: hop.link.or(seen.index), ..hop }) {
                if self.next_hops.len() < HostFacts::MOST {
                    self.next_hops.insert(hop);
                } else {
                    kept &= self.next_hops.contains(&hop);
                }
            }
        }
        match plain(seen) {
            Some(found) if found.prefix.len() == 0 && self.defaults.len() < HostFacts::MOST => {
                self.defaults.push(found);
            }
            Some(found) if found.prefix.len() == 0 => kept = false,
            Some(found) if found.gateway.is_none() => kept &= keep(&mut self.on_link, found),
            Some(_) => match &mut self.aside {
                Aside::All(routes) if routes.len() < ASIDE => routes.extend(Gateway::of(seen)),
                aside => *aside = Aside::TooMany,
            },
            None => {}
        }
        self.left_out += usize::from(!kept);
    }
}

impl Gateway {
    fn of(seen: &route::SeenRoute) -> Option<Self> {
        let route = plain(seen).filter(|route| route.prefix.len() > 0 && route.gateway.is_some())?;
        Some(Self { route, overlay: leads_to_itself(seen) })
    }
}

impl Gateways {
    fn take(&mut self, on_link: &Routes, reach: &[IpAddr], Gateway { route, overlay }: &Gateway) {
        let contains = |prefix: &Prefix| reach.iter().any(|addr| prefix.contains(*addr));
        let kept = if on_link.covers(&route.prefix) {
            keep(&mut self.inside, *route)
        } else {
            *overlay || !contains(&route.prefix) || keep(&mut self.far, *route)
        };
        self.left_out += usize::from(!kept);
    }
}

/// Adds a route if there is room. Returns false if there is none.
fn keep(routes: &mut Routes, route: HostRoute) -> bool {
    let has_room = routes.len() < HostFacts::MOST;
    if has_room {
        routes.insert(route);
    }
    has_room
}

/// Returns a route that is selected by the destination alone.
fn plain(seen: &route::SeenRoute) -> Option<HostRoute> {
    (seen.forwards && seen.tos == 0).then(|| HostRoute {
        prefix: seen.prefix,
        link: seen.index,
        gateway: seen.gateway.or(seen.hops.first().map(|hop| hop.addr)),
        metric: seen.slot.rank(seen.prefix.family()),
    })
}

/// Returns whether the next hop is inside the route's own prefix: this is a route of an overlay, also of Go flannel.
/// Only the route's own destination is reached through such a next hop.
fn leads_to_itself(seen: &route::SeenRoute) -> bool {
    seen.onlink && seen.prefix.len() > 0 && seen.gateway.is_some_and(|gateway| seen.prefix.contains(gateway))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{HostAddress, Link, LinkKind, LinkName, RouteKind};

    fn seen(n: u32, gateway: Option<IpAddr>) -> route::SeenRoute {
        route::SeenRoute {
            prefix: Prefix::host(std::net::Ipv4Addr::from(n).into()),
            slot: RouteSlot::MAIN,
            tos: 0,
            protocol: 186,
            forwards: true,
            kind: RouteKind::Unicast,
            gateway,
            index: Some(2),
            onlink: false,
            source: None,
            hops: Vec::new(),
        }
    }

    #[test]
    fn what_is_kept_of_links_and_addresses_is_bounded_and_those_of_pods_take_no_others_place() {
        let address = |n: u32, addr: IpAddr| HostAddress::new(n, addr, 32);
        let name = LinkName::new("x").unwrap();
        let link = |kind: &str| Link::new(name.clone(), LinkKind::Other(kind.into()), 1500).into();
        const PODS: u32 = 50_000;
        let mut facts = HostFacts::default();
        (0..PODS).for_each(|n| facts.keep_address(address(n, "fe80::1".parse().unwrap())));
        facts.keep_address(address(PODS + 1, "192.0.2.1".parse().unwrap()));
        let addressed = facts.addressed();
        (0..=PODS + 1).for_each(|n| facts.keep_link(n, link("veth"), &addressed));
        facts.keep_link(PODS + 2, link("dummy"), &addressed);
        let kept = (facts.addresses.len(), facts.links.len());
        assert_eq!(kept, (HostFacts::MOST_BESIDE_LINK_LOCAL + 1, HostFacts::MOST_OF_PODS + 2));
        assert!(facts.links.contains_key(&(PODS + 1)) && facts.links.contains_key(&(PODS + 2)) && facts.left_out == 0);
        for n in 0..PODS {
            facts.keep_address(address(n, std::net::Ipv4Addr::from(n).into()));
            facts.keep_link(PODS + 3 + n, link("dummy"), &addressed);
        }
        assert_eq!((facts.addresses.len(), facts.links.len()), (HostFacts::MOST_ADDRESSES, HostFacts::MOST_LINKS));
        let room = HostFacts::MOST_ADDRESSES + HostFacts::MOST_LINKS - kept.0 - kept.1;
        assert_eq!(facts.left_out, 2 * PODS as usize - room);
    }

    #[test]
    fn the_addresses_of_one_link_take_no_others_place() {
        let address = |link: u32, addr: IpAddr| HostAddress::new(link, addr, 32);
        let mut facts = HostFacts::default();
        // A service proxy has the address of each service on one device, in both families.
        (0..10_000).for_each(|n| facts.keep_address(address(1, std::net::Ipv4Addr::from(n).into())));
        let others = [address(2, "192.0.2.1".parse().unwrap()), address(2, "2001:db8::1".parse().unwrap())];
        facts.keep_address(others[0].clone());
        (0..10_000).for_each(|n| facts.keep_address(address(1, std::net::Ipv6Addr::from(n).into())));
        facts.keep_address(others[1].clone());
        facts.keep_address(address(2, "fe80::1".parse().unwrap()));
        assert!(others.iter().all(|other| facts.addresses.contains(other)));
        assert_eq!(facts.addresses.len(), 2 * HostFacts::MOST_OF_A_LINK + 3);
        assert_eq!(facts.left_out, 2 * (10_000 - HostFacts::MOST_OF_A_LINK));
    }

    #[test]
    fn what_is_kept_of_a_table_is_bounded_whatever_is_in_it() {
        const ROUTES: u32 = 500_000;
        let hop = |n: u32| Some(std::net::Ipv4Addr::from(n).into());
        let mut table = Table::default();
        for n in 1..ROUTES {
            table.take(&seen(n, hop(0xc000_0000 + n)));
            table.take(&seen(n, None));
            table.take(&route::SeenRoute {
                prefix: "0.0.0.0/0".parse().unwrap(),
                slot: RouteSlot { metric: n, ..RouteSlot::MAIN },
                ..seen(0, hop(n))
            });
        }
        assert!(matches!(table.aside, Aside::TooMany));
        let kept = [table.defaults.len(), table.on_link.len(), table.next_hops.len()];
        assert_eq!(kept, [HostFacts::MOST; 3]);
        // One route per next hop, one default route per further next hop, until there is room for neither, and one
        // route without a gateway.
        assert!(table.left_out >= 3 * (ROUTES as usize - 1 - HostFacts::MOST), "{}", table.left_out);
        let mut gateways = Gateways::default();
        let on_link: Routes =
            plain(&route::SeenRoute { prefix: "0.0.0.0/1".parse().unwrap(), ..seen(0, None) }).into_iter().collect();
        for n in 1..ROUTES {
            Gateway::of(&seen(n, hop(7))).iter().for_each(|route| gateways.take(&on_link, &[], route));
        }
        assert_eq!((gateways.inside.len(), gateways.far.len()), (HostFacts::MOST, 0));
        assert_eq!(gateways.left_out, ROUTES as usize - 1 - HostFacts::MOST);
    }
}
