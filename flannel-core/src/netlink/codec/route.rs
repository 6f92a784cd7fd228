//! Routes.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use nix::libc::{RTM_DELROUTE, RTM_GETROUTE, RTM_NEWROUTE};

use super::address::af;
use super::{Batch, Unreadable, addr_of, each_attribute, prefix_of, u32_of};
use crate::kernel::{NextHop, Route, RouteKind, RouteSlot, Scope};
use crate::net::{Family, Prefix};

/// Requests one family's routes of a table. If the table does not exist, the kernel answers `ENOENT`.
pub(crate) fn dump(batch: &mut Batch, family: Family, table: u32) {
    let mut message = RouteMessage::default();
    message.header.address_family = af(family);
    message.header.table = u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes = vec![RouteAttribute::Table(table)];
    batch.push(RTM_GETROUTE, NLM_F_DUMP, &message);
}

/// How routes are spread over the buckets of the kernel's next-hop table, because each insertion scans its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spread {
    /// By protocol number: up to some ten thousand routes (docs/kernel-facts.md, "Route insertion").
    Protocols,
    /// Also by the scope of IPv4 routes (docs/kernel-facts.md, "Route scopes"), which `ip route` shows.
    Scopes,
}

/// A route to write.
#[derive(Debug)]
pub(crate) struct NewRoute<'a> {
    pub(crate) prefix: Prefix,
    pub(crate) route: &'a Route,
    pub(crate) index: Option<u32>,
    pub(crate) spread: Spread,
}

impl NewRoute<'_> {
    fn body(&self) -> RouteMessage {
        let Self { prefix, route, index, spread } = *self;
        let mut message = body(prefix, route, index);
        if spread == Spread::Scopes && prefix.family() == Family::V4 {
            message.header.scope = RouteScope::from(Route::scope_for(&prefix));
        }
        message
    }
}

/// Creates a route; refused if there is a route with its key.
pub(crate) fn create(batch: &mut Batch, new: &NewRoute<'_>) {
    batch.push(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &new.body());
}

/// Replaces the first route with its key.
pub(crate) fn replace(batch: &mut Batch, new: &NewRoute<'_>) {
    batch.push(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &new.body());
}

/// Deletes exactly this route: protocol, type, gateway and device have to match.
pub(crate) fn delete(batch: &mut Batch, prefix: Prefix, route: &Route, index: Option<u32>) {
    let mut message = body(prefix, route, index);
    // Matches any scope, because a `Route` does not contain the scope.
    message.header.scope = RouteScope::NoWhere;
    // Otherwise, without a metric, the kernel deletes the first route that matches (docs/kernel-facts.md, "Route keys
    // are not unique").
    if route.slot().metric == 0 && prefix.family() == Family::V6 {
        message.attributes.push(RouteAttribute::Priority(RouteSlot::METRIC_V6));
    }
    batch.push(RTM_DELROUTE, 0, &message);
}

fn body(prefix: Prefix, route: &Route, index: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: af(prefix.family()),
        destination_prefix_length: prefix.len(),
        source_prefix_length: 0,
        tos: 0,
        // Tables beyond the field's range are only in an attribute.
        table: u8::try_from(route.slot().table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC),
        protocol: RouteProtocol::from(route.protocol),
        scope: RouteScope::Universe,
        kind: match route.kind {
            RouteKind::Blackhole => RouteType::BlackHole,
            RouteKind::Unicast | RouteKind::Foreign => RouteType::Unicast,
        },
        flags: if route.onlink { RouteFlags::Onlink } else { RouteFlags::empty() },
    };
    let mut attributes = Vec::with_capacity(3);
    attributes.push(RouteAttribute::Destination(prefix.addr().into()));
    attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    attributes.extend(index.map(RouteAttribute::Oif));
    if message.header.table == RouteHeader::RT_TABLE_UNSPEC {
        attributes.push(RouteAttribute::Table(route.slot().table));
    }
    attributes.extend(Some(route.slot().metric).filter(|metric| *metric != 0).map(RouteAttribute::Priority));
    attributes.extend(route.source().map(|source| RouteAttribute::PrefSource(source.into())));
    message.attributes = attributes;
    message
}

/// A decoded route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SeenRoute {
    pub(crate) prefix: Prefix,
    pub(crate) slot: RouteSlot,
    pub(crate) tos: u8,
    pub(crate) protocol: u8,
    /// Whether its type is `RTN_UNICAST`, even if it is foreign for other reasons.
    pub(crate) forwards: bool,
    pub(crate) kind: RouteKind,
    pub(crate) gateway: Option<IpAddr>,
    /// The interface index; `None` for a blackhole (IPv6 shows `lo`) or several next hops.
    pub(crate) index: Option<u32>,
    pub(crate) onlink: bool,
    pub(crate) source: Option<IpAddr>,
    /// Further gateways: those of several next hops, or one of the other family.
    pub(crate) hops: Vec<NextHop>,
}

impl SeenRoute {
    /// Returns whether the overlay reads and writes routes with this key.
    pub(crate) fn in_territory(&self, scope: &Scope) -> bool {
        self.tos == 0 && scope.has_slot(self.slot, self.prefix.family()) && scope.covers(&self.prefix)
    }

    /// Returns whether an overlay of this library wrote it.
    pub(crate) fn has_own_protocol(&self) -> bool {
        Route::is_own_protocol(self.protocol)
    }

    pub(crate) fn in_main_table(&self) -> bool {
        self.slot.is_in_main_table()
    }
}

// include/uapi/linux/rtnetlink.h
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_NH_ID: u16 = 30;
const BODY_LEN: usize = 12;
const RTNEXTHOP_LEN: usize = 8;

/// Returns whether an overlay of this library wrote the route of a message.
pub(crate) fn has_own_protocol(payload: &[u8]) -> bool {
    RouteHeader::parse(payload).is_ok_and(|header| Route::is_own_protocol(header.protocol.into()))
}

/// Decodes `RTM_NEWROUTE` or `RTM_DELROUTE`; `None` for a family that is not IP and for cached routes.
pub(crate) fn decode(payload: &[u8]) -> Result<Option<SeenRoute>, Unreadable> {
    const WHAT: &str = "route message";
    let header = RouteHeader::parse(payload).map_err(|_| Unreadable::new(WHAT))?;
    let family = match header.address_family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return Ok(None),
    };
    if header.flags.contains(RouteFlags::Cloned) {
        return Ok(None);
    }
    let unspecified = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    let of_family = |value: &[u8]| match addr_of(value)? {
        addr if Family::of(addr) == family => Ok(addr),
        _ => Err(Unreadable::new(WHAT)),
    };
    let mut dst = unspecified;
    let mut foreign = header.source_prefix_length != 0;
    let mut seen = SeenRoute {
        prefix: Prefix::host(unspecified),
        slot: RouteSlot { table: u32::from(header.table), metric: 0 },
        tos: header.tos,
        protocol: header.protocol.into(),
        forwards: header.kind == RouteType::Unicast,
        kind: RouteKind::Foreign,
        gateway: None,
        index: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
        source: None,
        hops: Vec::new(),
    };
    each_attribute(payload.get(BODY_LEN..).unwrap_or(&[]), WHAT, |kind, value| {
        match kind {
            RTA_DST => dst = of_family(value)?,
            RTA_GATEWAY => seen.gateway = Some(of_family(value)?),
            RTA_OIF => seen.index = Some(u32_of(value)?),
            RTA_PRIORITY => seen.slot.metric = u32_of(value)?,
            RTA_TABLE => seen.slot.table = u32_of(value)?,
            RTA_PREFSRC => seen.source = Some(of_family(value)?),
            RTA_SRC | RTA_ENCAP | RTA_ENCAP_TYPE | RTA_NH_ID => foreign = true,
            RTA_VIA => {
                foreign = true;
                seen.hops.push(NextHop { addr: via(value)?, link: None });
            }
            RTA_MULTIPATH => {
                foreign = true;
                next_hops(value, &mut seen.hops)?;
            }
            _ => {}
        }
        Ok(())
    })?;
    seen.prefix = prefix_of(dst, header.destination_prefix_length)?;
    seen.kind = match header.kind {
        _ if foreign => RouteKind::Foreign,
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        _ => RouteKind::Foreign,
    };
    if seen.kind == RouteKind::Blackhole {
        seen.index = None;
    }
    // The kernel's value for no metric (docs/kernel-facts.md, "Values that read back differently").
    seen.slot = seen.slot.normalized(family);
    Ok(Some(seen))
}

/// Decodes a `struct rtvia`: family, address.
fn via(value: &[u8]) -> Result<IpAddr, Unreadable> {
    addr_of(value.get(2..).unwrap_or(&[]))
}

/// Decodes a list of `struct rtnexthop`, each with attributes.
fn next_hops(mut value: &[u8], hops: &mut Vec<NextHop>) -> Result<(), Unreadable> {
    const WHAT: &str = "next hop";
    while let [low, high, ..] = value {
        let len = usize::from(u16::from_ne_bytes([*low, *high]));
        let hop = value.get(..len).filter(|hop| hop.len() >= RTNEXTHOP_LEN).ok_or(Unreadable::new(WHAT))?;
        // `rtnh_ifindex` is the last field of the header.
        let link = u32_of(&hop[RTNEXTHOP_LEN - 4..RTNEXTHOP_LEN])?;
        let link = Some(link).filter(|index| *index > 0);
        each_attribute(&hop[RTNEXTHOP_LEN..], WHAT, |kind, value| {
            match kind {
                RTA_GATEWAY => hops.push(NextHop { addr: addr_of(value)?, link }),
                RTA_VIA => hops.push(NextHop { addr: via(value)?, link }),
                _ => {}
            }
            Ok(())
        })?;
        value = value.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::LinkId;
    use crate::netlink::codec::messages;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_route_reads_back(
            addr: IpAddr, len in 0u8..=32, gateway: Option<[u8; 4]>, index: u32, onlink: bool, protocol: u8,
            blackhole: bool, many: bool, table in 1u32..600, metric in prop_oneof![Just(0u32), Just(1024), any::<u32>()],
            source: Option<u8>,
        ) {
            let slot = RouteSlot { table, metric };
            let prefix = Prefix::masked(addr, len).unwrap();
            let gateway = gateway.map(|v4| match prefix.family() {
                Family::V4 => IpAddr::from(v4),
                Family::V6 => std::net::Ipv4Addr::from(v4).to_ipv6_mapped().into(),
            });
            let kind = if blackhole { RouteKind::Blackhole } else { RouteKind::Unicast };
            let source = source.map(|last| match prefix.family() {
                Family::V4 => IpAddr::from([192, 0, 2, last]),
                Family::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last.into()]),
            });
            let route = Route { kind, gateway, link: Some(LinkId::Other(index)), onlink, protocol, extra: None };
            let route = route.in_slot(slot).with_source(source);
            let mut batch = Batch::default();
            let spread = if many { Spread::Scopes } else { Spread::Protocols };
            create(&mut batch, &NewRoute { prefix, route: &route, index: Some(index), spread });
            let message = messages(batch.bytes()).next().unwrap().unwrap();
            let seen = decode(message.payload).unwrap().unwrap();
            prop_assert_eq!((seen.prefix, seen.kind, seen.gateway), (prefix, kind, gateway));
            prop_assert_eq!((seen.onlink, seen.protocol), (onlink, protocol));
            prop_assert_eq!((seen.slot, seen.source), (slot.normalized(prefix.family()), source));
            prop_assert_eq!(seen.index, (!blackhole).then_some(index));
        }
    }

    #[test]
    fn a_route_is_the_message_that_flannel_sends_but_for_its_protocol() {
        let prefix: Prefix = "10.5.35.0/24".parse().unwrap();
        let route = Route { protocol: Route::BOOT, ..Route::overlay(prefix, prefix.addr(), LinkId::Own(0)) };
        let mut batch = Batch::default();
        replace(&mut batch, &NewRoute { prefix, route: &route, index: Some(7), spread: Spread::Protocols });
        let golden = [
            52, 0, 0, 0, 24, 0, 0x01, 0x05, 0, 0, 0, 0, 0, 0, 0, 0, // NEWROUTE, REQUEST|REPLACE|CREATE
            2, 24, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0, // inet /24, main, boot, universe, unicast, onlink
            8, 0, 1, 0, 10, 5, 35, 0, // RTA_DST
            8, 0, 5, 0, 10, 5, 35, 0, // RTA_GATEWAY
            8, 0, 4, 0, 7, 0, 0, 0, // RTA_OIF
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(batch.bytes(), golden);
        }
    }
}
