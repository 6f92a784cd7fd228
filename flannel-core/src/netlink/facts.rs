//! What the host looks like.

use std::net::IpAddr;

use super::codec::{Batch, address, route};
use super::observe::read_links;
use super::wire::Wire;
use crate::kernel::{HostFacts, HostLink, HostRoute, KernelError, NextHop};
use crate::net::Family;

/// Reads links, addresses and the main table of both families, of far routes only those to `reach`.
pub(crate) fn host_facts(wire: &mut Wire, batch: &mut Batch, reach: &[IpAddr]) -> Result<HostFacts, KernelError> {
    let mut facts = HostFacts::default();
    for seen in read_links(wire, batch)? {
        let crate::state::Link { name, kind, mac, mtu, up, group, alias } = seen.link;
        facts.links.insert(seen.index, HostLink { name, kind, mac, mtu, up, group, alias });
    }
    let mut behind = Vec::new();
    for family in Family::BOTH {
        address::dump(batch, family, 0);
        facts.addresses.extend(wire.dump(batch, "reading addresses", |message| {
            Ok(address::decode(message.payload)?.filter(|seen| Family::of(seen.addr) == family))
        })?);
        route::dump(batch, family);
        let routes = wire.dump(batch, "reading routes", |message| {
            Ok(route::decode(message.payload)?.filter(|seen| seen.prefix.family() == family && is_strangers(seen)))
        })?;
        for seen in routes {
            let overlay = leads_to_itself(&seen);
            if !overlay {
                let gateway = seen.gateway.map(|addr| NextHop { addr, link: None });
                let hops = gateway.into_iter().chain(seen.hops.iter().copied());
                facts.next_hops.extend(hops.map(|hop| NextHop { link: hop.link.or(seen.index), ..hop }));
            }
            let plain = seen.forwards && seen.tos == 0;
            let route = HostRoute {
                prefix: seen.prefix,
                link: seen.index,
                gateway: seen.gateway.or(seen.hops.first().map(|hop| hop.addr)),
                metric: seen.metric,
            };
            match () {
                () if !plain => {}
                () if route.prefix.len() == 0 => facts.defaults.push(route),
                () if route.gateway.is_none() => facts.on_link.insert(route),
                () => behind.push((route, overlay)),
            }
        }
    }
    // A route with a gateway matters where it takes addresses out of a connected prefix.
    let (inside, outside): (Vec<_>, Vec<_>) =
        behind.into_iter().partition(|(route, _)| facts.on_link.covers(&route.prefix));
    facts.on_link.extend(inside.into_iter().map(|(route, _)| route));
    let wanted = |route: &HostRoute| reach.iter().any(|addr| route.prefix.contains(*addr));
    let far = outside.into_iter().filter(|(route, overlay)| !overlay && wanted(route));
    facts.far.extend(far.map(|(route, _)| route));
    Ok(facts)
}

/// Whether a route of the main table has a protocol that is not ours.
fn is_strangers(seen: &route::SeenRoute) -> bool {
    seen.in_main_table() && !seen.has_own_protocol()
}

/// Whether the next hop is one of the addresses it leads to: an overlay's route, as Go flannel leaves them too. Nothing
/// on the host is reached through such a next hop but the route's own destination.
fn leads_to_itself(seen: &route::SeenRoute) -> bool {
    seen.onlink && seen.prefix.len() > 0 && seen.gateway.is_some_and(|gateway| seen.prefix.contains(gateway))
}
