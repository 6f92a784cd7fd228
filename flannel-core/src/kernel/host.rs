//! What an overlay has to know of the host it runs on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::link_kind::LinkKind;
use super::objects::{Link, LinkName};
use super::routes::Routes;
use super::scope::SeenLink;
use crate::net::{Family, MacAddr, Prefix, is_automatic};

/// What an overlay needs to know of the host it runs on. Of links and addresses no more than
/// [`HostFacts::MOST_LINKS`] and [`HostFacts::MOST_ADDRESSES`] are kept, of the addresses of a link no more than
/// [`HostFacts::MOST_OF_A_LINK`], of routes and next hops no more than [`HostFacts::MOST`] of each kind: the first of the
/// dump.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HostFacts {
    /// The links, by interface index.
    pub links: BTreeMap<u32, HostLink>,
    /// The addresses, in the kernel's order within a link.
    pub addresses: Vec<HostAddress>,
    /// How many links, addresses and routes are not kept because there are too many, but for those that
    /// [`MOST_OF_PODS`](Self::MOST_OF_PODS) and [`MOST_BESIDE_LINK_LOCAL`](Self::MOST_BESIDE_LINK_LOCAL) are about.
    /// A route counts too where not all of its next hops are kept.
    pub left_out: usize,
    /// Default routes of the main table, in the order of the dump.
    pub defaults: Vec<HostRoute>,
    /// Routes of the main table without a gateway, and those with one that lie inside such a route. Ours are left
    /// out.
    pub on_link: Routes,
    /// The main table's other routes with a gateway, as far as they lead to an address that was asked for: a router's
    /// table would not fit. Ours and other overlays' are left out.
    pub far: Routes,
    /// Next hops in use by routes that are not ours.
    pub next_hops: BTreeSet<NextHop>,
}

/// A gateway in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NextHop {
    /// Its address.
    pub addr: IpAddr,
    /// Through which interface, where the route says.
    pub link: Option<u32>,
}

/// A link of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostLink {
    /// Its name.
    pub name: LinkName,
    /// What it is.
    pub kind: LinkKind,
    /// Its MAC address.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is up and has a carrier (`IFF_LOWER_UP`): without, it carries no packet.
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
    /// Length of its prefix, in bits.
    pub len: u8,
    /// Set by an administrator rather than learnt with a lifetime (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// A privacy address (`IFA_F_TEMPORARY`).
    pub temporary: bool,
    /// Not to be used for new connections (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
}

/// A route of the host, not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct HostRoute {
    /// Destination.
    pub prefix: Prefix,
    /// Output interface; `None` when the route has several next hops.
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
    /// One that an administrator set, to stay.
    pub fn new(link: u32, addr: IpAddr, len: u8) -> Self {
        Self { link, addr, len, permanent: true, temporary: false, deprecated: false }
    }
}

impl HostRoute {
    /// One of metric 0.
    pub fn new(prefix: Prefix, link: Option<u32>, gateway: Option<IpAddr>) -> Self {
        Self { prefix, link, gateway, metric: 0 }
    }
}

impl HostFacts {
    /// Most default routes, routes without a gateway, routes inside those, and next hops.
    pub const MOST: usize = 65_536;
    /// Most links.
    pub const MOST_LINKS: usize = 8_192;
    /// Most addresses: one of each family for each link.
    pub const MOST_ADDRESSES: usize = 2 * Self::MOST_LINKS;
    /// Most addresses of one family on one link: a service proxy may hold each service's address on one device.
    pub const MOST_OF_A_LINK: usize = 4_096;
    /// Once there are so many addresses, IPv6 link-local ones are not kept: each pod has one. An uplink that has no other
    /// is then not found.
    pub const MOST_BESIDE_LINK_LOCAL: usize = Self::MOST_ADDRESSES - Self::MOST_OF_A_LINK;
    /// Once there are so many links, veth devices without an address of their own, which pods have, are not kept. An uplink
    /// that is such a device is then not found.
    pub const MOST_OF_PODS: usize = 1_024;

    /// Takes in an address, if there is room. Those of a link and family are given one after the other, as a kernel lists
    /// them. All that read a kernel use this, so that they agree.
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

    /// The links that have an address of their own, for [`keep_link`](Self::keep_link).
    pub fn addressed(&self) -> BTreeSet<u32> {
        self.addresses.iter().filter(|address| !is_automatic(address.addr)).map(|address| address.link).collect()
    }

    /// Takes in a link, if there is room. `addressed` are those that have an address. All that read a kernel use this, so
    /// that they agree.
    pub fn keep_link(&mut self, index: u32, link: HostLink, addressed: &BTreeSet<u32>) {
        let is_pods = link.kind.is_veth() && !addressed.contains(&index);
        if self.links.len() < if is_pods { Self::MOST_OF_PODS } else { Self::MOST_LINKS } {
            self.links.insert(index, link);
        } else {
            self.left_out += usize::from(!is_pods);
        }
    }

    /// The interface through which `addr` is reached without a gateway, if it is (docs/compatibility.md, "Direct
    /// routing").
    pub fn on_link(&self, addr: IpAddr) -> Option<u32> {
        let best = self.on_link.to(addr)?;
        match best.gateway {
            None => best.link,
            Some(_) => None,
        }
    }

    /// The route of the main table that packets to `addr` take, as far as prefixes and metrics tell. `addr` has to be
    /// one that [`Kernel::host_facts`](crate::kernel::Kernel::host_facts) was asked for.
    pub fn route_to(&self, addr: IpAddr) -> Option<&HostRoute> {
        let defaults = self.defaults.iter().filter(|route| route.prefix.contains(addr));
        let fits = self.on_link.to(addr).into_iter().chain(self.far.to(addr)).chain(defaults);
        fits.min_by_key(|route| (std::cmp::Reverse(route.prefix.len()), route.metric))
    }

    /// Whether `addr` is in the prefix of an address of the host, whatever routes there are.
    pub fn is_connected(&self, addr: IpAddr) -> bool {
        self.connected(Family::of(addr)).any(|prefix| prefix.contains(addr))
    }

    /// The prefixes the host is connected to: those of its addresses. A route without a gateway alone connects nobody;
    /// anybody may have written it.
    pub fn connected(&self, family: Family) -> impl Iterator<Item = Prefix> + '_ {
        let prefixes = self.addresses.iter().filter_map(|address| Prefix::masked(address.addr, address.len).ok());
        prefixes.filter(move |prefix| prefix.family() == family)
    }
}
