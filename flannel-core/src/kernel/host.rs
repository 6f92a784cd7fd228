//! The links, addresses and routes of the host that an overlay needs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::link_kind::LinkKind;
use super::objects::{Link, LinkName};
use super::routes::Routes;
use super::scope::SeenLink;
use crate::net::{Family, MacAddr, Prefix, is_automatic};

/// The links, addresses and routes of the host. Their number is limited: links to [`HostFacts::MOST_LINKS`], addresses
/// to [`HostFacts::MOST_ADDRESSES`] and per link and family to [`HostFacts::MOST_OF_A_LINK`], routes and next hops to
/// [`HostFacts::MOST`] of each kind. The first ones of the dump are kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HostFacts {
    /// The links, by interface index.
    pub links: BTreeMap<u32, HostLink>,
    /// The addresses; those of one link are in the kernel's order.
    pub addresses: Vec<HostAddress>,
    /// How many links, addresses and routes were left out because there are too many, except those covered by
    /// [`MOST_OF_PODS`](Self::MOST_OF_PODS) and [`MOST_BESIDE_LINK_LOCAL`](Self::MOST_BESIDE_LINK_LOCAL). A route
    /// counts too if some of its next hops were left out.
    pub left_out: usize,
    /// Default routes of the main table, in the order of the dump.
    pub defaults: Vec<HostRoute>,
    /// Routes of the main table without a gateway, and those with one that lie inside such a route. Routes of this
    /// library are left out.
    pub on_link: Routes,
    /// The main table's other routes with a gateway that lead to a requested address; a full router table would not
    /// fit. Routes of this library's overlays are left out.
    pub far: Routes,
    /// Next hops of routes that are not this library's.
    pub next_hops: BTreeSet<NextHop>,
}

/// A gateway that routes use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NextHop {
    /// Its address.
    pub addr: IpAddr,
    /// The interface index, if the route names one.
    pub link: Option<u32>,
}

/// A link of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostLink {
    /// Its name.
    pub name: LinkName,
    /// Its kind.
    pub kind: LinkKind,
    /// Its MAC address.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is up and has a carrier (`IFF_LOWER_UP`). Without a carrier it transmits no packets.
    pub carrier: bool,
    /// Its link group.
    pub group: u32,
    /// Its alias.
    pub alias: Option<Box<str>>,
}

/// An address of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostAddress {
    /// Interface index.
    pub link: u32,
    /// The address.
    pub addr: IpAddr,
    /// The prefix length, in bits.
    pub len: u8,
    /// Set by an administrator, rather than learnt with a lifetime (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// A privacy address (`IFA_F_TEMPORARY`).
    pub temporary: bool,
    /// Not to be used for new connections, or at all because another host has it (`IFA_F_DEPRECATED`,
    /// `IFA_F_DADFAILED`).
    pub deprecated: bool,
}

/// A route of the host that is not this library's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct HostRoute {
    /// Destination.
    pub prefix: Prefix,
    /// The output interface; `None` if the route has several next hops.
    pub link: Option<u32>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Metric.
    pub metric: u32,
}

impl From<Link> for HostLink {
    fn from(link: Link) -> Self {
        let Link { name, kind, mac, mtu, up, group, alias } = link;
        Self { name, kind, mac, mtu, up, carrier: up, group, alias }
    }
}

impl From<SeenLink> for HostLink {
    fn from(SeenLink { link, carrier, .. }: SeenLink) -> Self {
        Self { carrier, ..link.into() }
    }
}

impl HostAddress {
    /// Creates a permanent address, as an administrator sets it.
    pub fn new(link: u32, addr: IpAddr, len: u8) -> Self {
        Self { link, addr, len, permanent: true, temporary: false, deprecated: false }
    }
}

impl HostRoute {
    /// Creates a route of metric 0.
    pub fn new(prefix: Prefix, link: Option<u32>, gateway: Option<IpAddr>) -> Self {
        Self { prefix, link, gateway, metric: 0 }
    }
}

impl HostFacts {
    /// The maximum number of default routes, of routes without a gateway and those inside them, and of next hops.
    pub const MOST: usize = 65_536;
    /// The maximum number of links.
    pub const MOST_LINKS: usize = 8_192;
    /// The maximum number of addresses: one of each family for each link.
    pub const MOST_ADDRESSES: usize = 2 * Self::MOST_LINKS;
    /// The maximum number of addresses of one family on one link: a service proxy may keep the address of every service
    /// on one device.
    pub const MOST_OF_A_LINK: usize = 4_096;
    /// Once there are this many addresses, IPv6 link-local ones are not kept: each pod has one. An uplink without
    /// another address is then not found.
    pub const MOST_BESIDE_LINK_LOCAL: usize = Self::MOST_ADDRESSES - Self::MOST_OF_A_LINK;
    /// Once there are this many links, veth devices without an address of their own, as pods have, are not kept. If the
    /// uplink is such a device, it is then not found.
    pub const MOST_OF_PODS: usize = 1_024;

    /// Adds an address, if there is room. The addresses of a link and family have to be added one after the other, as a
    /// kernel lists them. Shared by all code that reads a kernel, so that it behaves alike.
    pub fn keep_address(&mut self, address: HostAddress) {
        let is_pods = is_automatic(address.addr);
        let is_beside =
            |other: &HostAddress| other.link == address.link && other.addr.is_ipv4() == address.addr.is_ipv4();
        let first = self.addresses.len().checked_sub(Self::MOST_OF_A_LINK);
        let is_full = first.and_then(|first| self.addresses.get(first)).is_some_and(is_beside);
        let most = if is_pods { Self::MOST_BESIDE_LINK_LOCAL } else { Self::MOST_ADDRESSES };
        if self.addresses.len() < most && !is_full {
            self.addresses.push(address);
        } else {
            self.left_out += usize::from(!is_pods);
        }
    }

    /// Returns the links that have an address of their own, for [`keep_link`](Self::keep_link).
    pub fn addressed(&self) -> BTreeSet<u32> {
        self.addresses.iter().filter(|address| !is_automatic(address.addr)).map(|address| address.link).collect()
    }

    /// Adds a link, if there is room. `addressed` are the links that have an address. Shared by all code that reads a
    /// kernel, so that it behaves alike.
    pub fn keep_link(&mut self, index: u32, link: HostLink, addressed: &BTreeSet<u32>) {
        let is_pods = link.kind.is_veth() && !addressed.contains(&index);
        if self.links.len() < if is_pods { Self::MOST_OF_PODS } else { Self::MOST_LINKS } {
            self.links.insert(index, link);
        } else {
            self.left_out += usize::from(!is_pods);
        }
    }

    /// Returns the interface through which `addr` is reached without a gateway, if there is one (docs/compatibility.md,
    /// "Direct routing").
    pub fn on_link(&self, addr: IpAddr) -> Option<u32> {
        let best = self.on_link.to(addr)?;
        match best.gateway {
            None => best.link,
            Some(_) => None,
        }
    }

    /// Returns the main table's route for packets to `addr`, by prefixes and metrics. `addr` has to be one that was
    /// passed to [`Kernel::host_facts`](crate::kernel::Kernel::host_facts).
    pub fn route_to(&self, addr: IpAddr) -> Option<&HostRoute> {
        let defaults = self.defaults.iter().filter(|route| route.prefix.contains(addr));
        let fits = self.on_link.to(addr).into_iter().chain(self.far.to(addr)).chain(defaults);
        fits.min_by_key(|route| (std::cmp::Reverse(route.prefix.len()), route.metric))
    }

    /// Returns whether `addr` is in the prefix of an address of the host, whatever routes there are.
    pub fn is_connected(&self, addr: IpAddr) -> bool {
        self.connected(Family::of(addr)).any(|prefix| prefix.contains(addr))
    }

    /// Returns the prefixes that the host is connected to: those of its addresses. A route without a gateway is not
    /// enough, since any program may have written it.
    pub fn connected(&self, family: Family) -> impl Iterator<Item = Prefix> + '_ {
        let prefixes = self.addresses.iter().filter_map(|address| Prefix::masked(address.addr, address.len).ok());
        prefixes.filter(move |prefix| prefix.family() == family)
    }
}
