//! How each kind of canary is found again, and which parts of it are compared.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::net::{Family, MacAddr};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::dump::{Sent, Stable, dump};
use crate::{Error, Namespace, Route};

/// One foreign object, by its identifying fields.
#[derive(Debug, Clone)]
pub(super) enum Canary {
    Link(String),
    Address(String, IpAddr),
    Route(Route),
    Neighbour(String, IpAddr),
    Fdb(String, MacAddr),
    Rule(Family, u32),
    Sysctl(String),
    Nft(String),
}

/// All objects of a namespace at one moment.
pub(super) struct Dumps {
    links: Vec<Sent>,
    addresses: Vec<Sent>,
    routes: Vec<Sent>,
    neighbours: Vec<Sent>,
    fdb: Vec<Sent>,
    rules: Vec<Sent>,
}

impl Dumps {
    pub(super) fn read(ns: &Namespace) -> Result<Self, Error> {
        let mut bridge = NeighbourMessage::default();
        bridge.header.family = AddressFamily::Bridge;
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let (mut route, mut rule) = (RouteMessage::default(), RuleMessage::default());
            (route.header.address_family, rule.header.family) = (family, family);
            routes.extend(dump(ns, Message::GetRoute(route))?);
            rules.extend(dump(ns, Message::GetRule(rule))?);
        }
        Ok(Self {
            links: dump(ns, Message::GetLink(LinkMessage::default()))?,
            addresses: dump(ns, Message::GetAddress(AddressMessage::default()))?,
            neighbours: dump(ns, Message::GetNeighbour(NeighbourMessage::default()))?,
            fdb: dump(ns, Message::GetNeighbour(bridge))?,
            routes,
            rules,
        })
    }

    /// Returns the canaries' routes in the order of the dump, as indices into `canaries`.
    pub(super) fn route_order(&self, canaries: &[Canary]) -> Vec<usize> {
        let place = |seen: &Sent| {
            canaries.iter().position(|canary| matches!(canary, Canary::Route(wanted) if self.is_route(wanted, seen)))
        };
        self.routes.iter().filter_map(place).collect()
    }

    /// Returns the link of this name, and its index.
    fn link(&self, name: &str) -> Option<(&Sent, u32)> {
        self.links.iter().find_map(|sent| match &sent.message {
            Message::NewLink(link) if link.attributes.contains(&LinkAttribute::IfName(name.to_owned())) => {
                Some((sent, link.header.index))
            }
            _ => None,
        })
    }

    /// Whether a route is this one. Flags are ignored because they change with the carrier.
    fn is_route(&self, wanted: &Route, seen: &Sent) -> bool {
        let Message::NewRoute(route) = &seen.message else { return false };
        let addr = |address: &RouteAddress| match address {
            RouteAddress::Inet(addr) => Some(IpAddr::from(*addr)),
            RouteAddress::Inet6(addr) => Some(IpAddr::from(*addr)),
            _ => None,
        };
        let unspecified = match route.header.address_family {
            AddressFamily::Inet => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            _ => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        let (mut to, mut via, mut dev) = (unspecified, None, None);
        let (mut table, mut metric) = (u32::from(route.header.table), 0);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(address) => to = addr(address).unwrap_or(to),
                RouteAttribute::Gateway(address) => via = addr(address),
                RouteAttribute::Oif(index) => dev = Some(*index),
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Priority(number) => metric = *number,
                _ => {}
            }
        }
        let through = wanted.dev.as_deref().map(|name| self.link(name).map_or(0, |(_, index)| index));
        let protocol = u8::from(route.header.protocol);
        (wanted.to.addr(), wanted.to.len(), wanted.table, wanted.metric, wanted.protocol, wanted.via, through)
            == (to, route.header.destination_prefix_length, table, metric, protocol, via, dev)
    }
}

// Statistics, packet counters in the address families' settings, and the number of carrier changes.
const LINK: Stable = Stable { fixed: 16, volatile: &[7, 23, 26, 35, 47, 48] };
/// A bridge also shows its timers in IFLA_LINKINFO (18).
const BRIDGE: Stable = Stable { fixed: 16, volatile: &[7, 18, 23, 26, 35, 47, 48] };
/// The creation time is included: an address that was removed and added again is not the same.
const ADDRESS: Stable = Stable { fixed: 8, volatile: &[] };
/// RTA_CACHEINFO counts uses.
const ROUTE: Stable = Stable { fixed: 12, volatile: &[12] };
/// NDA_CACHEINFO and NDA_PROBES.
const NEIGHBOUR: Stable = Stable { fixed: 12, volatile: &[3, 4] };
const RULE: Stable = Stable { fixed: 12, volatile: &[] };

impl Canary {
    /// Returns the kernel's data of it, without what changes by itself, or `None` if it is gone.
    pub(super) fn bytes(&self, dumps: &Dumps, ns: &Namespace) -> Result<Option<Vec<u8>>, Error> {
        let index = |dev: &String| dumps.link(dev).map(|(_, index)| index);
        let (found, stable) = match self {
            Self::Link(name) => {
                let found = dumps.link(name).map(|(sent, _)| sent);
                let is_bridge = |sent: &&Sent| matches!(&sent.message, Message::NewLink(link) if is_bridge(link));
                (found, if found.as_ref().is_some_and(is_bridge) { &BRIDGE } else { &LINK })
            }
            Self::Address(dev, addr) => {
                let is = |sent: &&Sent| match &sent.message {
                    Message::NewAddress(it) => {
                        let has = it.attributes.iter().any(|attribute| match attribute {
                            AddressAttribute::Address(found) | AddressAttribute::Local(found) => found == addr,
                            _ => false,
                        });
                        has && index(dev) == Some(it.header.index)
                    }
                    _ => false,
                };
                (dumps.addresses.iter().find(is), &ADDRESS)
            }
            Self::Route(route) => (dumps.routes.iter().find(|sent| dumps.is_route(route, sent)), &ROUTE),
            Self::Neighbour(dev, addr) => {
                let addr = match addr {
                    IpAddr::V4(addr) => NeighbourAddress::Inet(*addr),
                    IpAddr::V6(addr) => NeighbourAddress::Inet6(*addr),
                };
                let key = NeighbourAttribute::Destination(addr);
                (find_neighbour(&dumps.neighbours, index(dev), &key), &NEIGHBOUR)
            }
            Self::Fdb(dev, mac) => {
                let key = NeighbourAttribute::LinkLayerAddress(mac.0.to_vec());
                (find_neighbour(&dumps.fdb, index(dev), &key), &NEIGHBOUR)
            }
            Self::Rule(family, priority) => {
                let family = match family {
                    Family::V4 => AddressFamily::Inet,
                    Family::V6 => AddressFamily::Inet6,
                };
                let is = |sent: &&Sent| match &sent.message {
                    Message::NewRule(it) => {
                        it.header.family == family && it.attributes.contains(&RuleAttribute::Priority(*priority))
                    }
                    _ => false,
                };
                (dumps.rules.iter().find(is), &RULE)
            }
            Self::Sysctl(name) => return Ok(ns.sysctl(name).ok().map(String::into_bytes)),
            Self::Nft(table) => return nft_table(ns, table),
        };
        found.map(|sent| sent.bytes(stable)).transpose()
    }
}

fn is_bridge(link: &LinkMessage) -> bool {
    let kind = LinkInfo::Kind(InfoKind::Bridge);
    link.attributes.iter().any(|it| matches!(it, LinkAttribute::LinkInfo(infos) if infos.contains(&kind)))
}

/// Returns the neighbour or FDB entry of this key on a link.
fn find_neighbour<'a>(all: &'a [Sent], index: Option<u32>, key: &NeighbourAttribute) -> Option<&'a Sent> {
    all.iter().find(|sent| match &sent.message {
        Message::NewNeighbour(it) => index == Some(it.header.ifindex) && it.attributes.contains(key),
        _ => false,
    })
}

impl fmt::Display for Canary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "link {name}"),
            Self::Address(dev, addr) => write!(f, "address {addr} dev {dev}"),
            Self::Route(route) => write!(f, "route {route}"),
            Self::Neighbour(dev, addr) => write!(f, "neighbour {addr} dev {dev}"),
            Self::Fdb(dev, mac) => write!(f, "FDB entry {mac} dev {dev}"),
            Self::Rule(family, priority) => write!(f, "{family} rule {priority}"),
            Self::Sysctl(name) => write!(f, "sysctl {name}"),
            Self::Nft(table) => write!(f, "nft table {table}"),
        }
    }
}

/// Creates an nft table with a chain and a rule. Returns false if there is no `nft`.
pub(super) fn add_nft_table(ns: &Namespace, table: &str) -> Result<bool, Error> {
    let commands = format!(
        "add table inet {table}; add chain inet {table} c {{ type filter hook forward priority 42; }}; \
         add rule inet {table} c ip daddr 192.0.2.42 accept"
    );
    match ns.output("nft", &[&commands], "") {
        Err(error) if error.is(nix::Error::ENOENT) => Ok(false),
        Err(error) => Err(error),
        Ok(done) if done.status.success() => Ok(true),
        Ok(done) => Err(Error::new(format!("nft {commands}: {}", String::from_utf8_lossy(&done.stderr).trim()))),
    }
}

fn nft_table(ns: &Namespace, table: &str) -> Result<Option<Vec<u8>>, Error> {
    let listed = ns.output("nft", &["list", "table", "inet", table], "")?;
    Ok(listed.status.success().then_some(listed.stdout))
}
