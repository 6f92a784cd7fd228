//! What other programs do to a node without the agent: every act of `docs/kernel-facts.md`, and a few more.

use flannel_core::net::{Dual, Family, MacAddr, Prefix};

use crate::lab::Carrier;
use crate::{Address, Error, Link, Node, Route, UNDERLAY_LINK};

/// The port of flannel's udp backend.
const UDP_PORT: u16 = 8285;

/// An act of sabotage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// The overlay devices go down and up.
    OverlayDownUp,
    /// The overlay devices get another MAC address while up.
    OverlayMac,
    /// The overlay devices get another MTU.
    OverlayMtu,
    /// The overlay devices lose all addresses but link-local ones.
    OverlayAddresses,
    /// The overlay devices get another name.
    OverlayRenamed,
    /// The overlay devices go to the default group.
    OverlayUngrouped,
    /// The overlay devices are moved to a foreign group.
    OverlayRegrouped,
    /// The overlay devices lose their alias.
    OverlayAliasRemoved,
    /// The overlay devices lose group and alias, the only marks of their owner.
    OverlayUnmarked,
    /// The overlay devices are deleted.
    OverlayDeleted,
    /// The link to the switch goes down and up.
    UnderlayDownUp,
    /// The link to the switch loses its addresses and gets them back.
    UnderlayAddresses,
    /// The connected routes of the link to the switch are deleted, and added with a metric, as when NetworkManager
    /// takes over a link.
    UnderlayConnected,
    /// The link to the switch is renamed, and renamed back.
    UnderlayRenamed,
    /// The link to the switch loses its carrier and regains it.
    UnderlayCarrier,
    /// The link to the switch is deleted and created again: same name, addresses and default route, another index.
    UnderlayDeleted,
    /// The main table is flushed; the node's own connected and default routes are restored.
    RoutesFlushed,
    /// The overlay devices' permanent neighbours are flushed.
    NeighboursFlushed,
    /// The overlay devices' ARP is turned off and on.
    ArpOffOn,
    /// The overlay devices' FDB entries are flushed.
    FdbFlushed,
    /// One route to a peer is deleted.
    RouteDeleted,
    /// One permanent neighbour is deleted.
    NeighbourDeleted,
    /// One FDB entry is deleted.
    FdbDeleted,
    /// The UDP sockets of the data plane are destroyed (`ss --kill`).
    SocketsDestroyed,
    /// The overlay devices are deleted and the main table is flushed.
    Everything,
}

/// The kind of overlay that is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// Routes through VXLAN devices.
    Vxlan,
    /// Routes through the underlay; no device.
    HostGw,
    /// A route into a TUN device.
    Udp,
}

/// The overlay on a node, as far as an act needs it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overlay {
    /// The overlay's devices; none for host-gw.
    pub devices: Vec<String>,
    /// The pod networks.
    pub networks: Dual<Prefix>,
}

impl Act {
    const EVERY: [Self; 25] = [
        Self::OverlayDownUp,
        Self::OverlayMac,
        Self::OverlayMtu,
        Self::OverlayAddresses,
        Self::OverlayRenamed,
        Self::OverlayUngrouped,
        Self::OverlayRegrouped,
        Self::OverlayAliasRemoved,
        Self::OverlayUnmarked,
        Self::OverlayDeleted,
        Self::UnderlayDownUp,
        Self::UnderlayAddresses,
        Self::UnderlayConnected,
        Self::UnderlayRenamed,
        Self::UnderlayCarrier,
        Self::UnderlayDeleted,
        Self::RoutesFlushed,
        Self::NeighboursFlushed,
        Self::ArpOffOn,
        Self::FdbFlushed,
        Self::RouteDeleted,
        Self::NeighbourDeleted,
        Self::FdbDeleted,
        Self::SocketsDestroyed,
        Self::Everything,
    ];

    /// Returns the acts that damage this kind of overlay.
    pub fn all(plane: Plane) -> impl Iterator<Item = Self> {
        Self::EVERY.into_iter().filter(move |act| match plane {
            Plane::Vxlan => *act != Self::SocketsDestroyed,
            Plane::HostGw => *act != Self::SocketsDestroyed && !act.needs_device(),
            Plane::Udp => !act.needs_ethernet(),
        })
    }

    /// Whether it affects an overlay device.
    fn needs_device(self) -> bool {
        match self {
            Self::OverlayDownUp
            | Self::OverlayMac
            | Self::OverlayMtu
            | Self::OverlayAddresses
            | Self::OverlayRenamed
            | Self::OverlayUngrouped
            | Self::OverlayRegrouped
            | Self::OverlayAliasRemoved
            | Self::OverlayUnmarked
            | Self::OverlayDeleted
            | Self::NeighboursFlushed
            | Self::ArpOffOn
            | Self::FdbFlushed
            | Self::NeighbourDeleted
            | Self::FdbDeleted
            | Self::Everything => true,
            Self::UnderlayDownUp
            | Self::UnderlayAddresses
            | Self::UnderlayConnected
            | Self::UnderlayRenamed
            | Self::UnderlayCarrier
            | Self::UnderlayDeleted
            | Self::RoutesFlushed
            | Self::RouteDeleted
            | Self::SocketsDestroyed => false,
        }
    }

    /// Whether it affects a next hop, or something that a device without MAC addresses does not have.
    fn needs_ethernet(self) -> bool {
        matches!(
            self,
            Self::OverlayMac
                | Self::ArpOffOn
                | Self::NeighboursFlushed
                | Self::FdbFlushed
                | Self::RouteDeleted
                | Self::NeighbourDeleted
                | Self::FdbDeleted
        )
    }

    /// Returns a short name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::OverlayDownUp => "device down, up",
            Self::OverlayMac => "device MAC changed",
            Self::OverlayMtu => "device MTU changed",
            Self::OverlayAddresses => "device addresses removed",
            Self::OverlayRenamed => "device renamed",
            Self::OverlayUngrouped => "device group 0",
            Self::OverlayRegrouped => "device group changed",
            Self::OverlayAliasRemoved => "device alias removed",
            Self::OverlayUnmarked => "device group 0, alias removed",
            Self::OverlayDeleted => "device deleted",
            Self::UnderlayDownUp => "underlay down, up",
            Self::UnderlayAddresses => "underlay address removed, re-added",
            Self::UnderlayConnected => "connected routes deleted, re-added with a metric",
            Self::UnderlayRenamed => "underlay renamed, renamed back",
            Self::UnderlayCarrier => "underlay carrier lost, back",
            Self::UnderlayDeleted => "underlay deleted, made anew",
            Self::RoutesFlushed => "ip route flush table main",
            Self::NeighboursFlushed => "ip neigh flush nud permanent",
            Self::ArpOffOn => "arp off, on",
            Self::FdbFlushed => "bridge fdb flush",
            Self::RouteDeleted => "one route deleted",
            Self::NeighbourDeleted => "one neighbour deleted",
            Self::FdbDeleted => "one FDB entry deleted",
            Self::SocketsDestroyed => "sockets destroyed",
            Self::Everything => "device deleted and routes flushed",
        }
    }

    /// Performs the act. Whatever it takes from the underlay is restored on return, so that the time to heal runs from
    /// then.
    ///
    /// # Errors
    /// If there is nothing to damage, or the kernel's error. The underlay may be damaged then
    /// ([`Node::restore_underlay`]).
    pub fn apply(self, node: &Node, overlay: &Overlay) -> Result<(), Error> {
        self.strike(node, overlay)?;
        self.restore(node)
    }

    /// Performs the act without restoring anything; an act that turns something off and on does both.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn strike(self, node: &Node, overlay: &Overlay) -> Result<(), Error> {
        let ns = &node.ns;
        if self.needs_device() && overlay.devices.is_empty() {
            return Err(Error::new(format!("{}: this overlay has no device", self.name())));
        }
        match self {
            Self::OverlayDownUp => overlay.each(|dev| {
                ns.set_down(dev)?;
                ns.set_up(dev)
            }),
            Self::OverlayMac => overlay.each(|dev| ns.set_mac(dev, other_mac(&ns.link(dev)?))),
            Self::OverlayMtu => overlay.each(|dev| ns.set_mtu(dev, ns.link(dev)?.mtu - 20)),
            Self::OverlayAddresses => overlay.each(|dev| {
                let on_device = |address: &Address| address.dev == dev && !address.is_link_local();
                ns.addresses()?
                    .iter()
                    .filter(|address| on_device(address))
                    .try_for_each(|address| ns.delete_address(dev, address.addr, address.len))
            }),
            Self::OverlayRenamed => overlay.each(|dev| ns.set_link(dev, &format!("name {}", renamed(dev)))),
            Self::OverlayUngrouped => overlay.each(|dev| ns.set_link(dev, "group 0")),
            Self::OverlayRegrouped => overlay.each(|dev| ns.set_link(dev, "group 7")),
            Self::OverlayAliasRemoved => overlay.each(|dev| ns.set_alias(dev, "")),
            Self::OverlayUnmarked => overlay.each(|dev| {
                ns.set_link(dev, "group 0")?;
                ns.set_alias(dev, "")
            }),
            Self::OverlayDeleted => overlay.each(|dev| ns.delete_link(dev)),
            Self::UnderlayDownUp => ns.set_down(UNDERLAY_LINK),
            Self::UnderlayAddresses => {
                node.underlay_addresses().try_for_each(|(addr, len)| ns.delete_address(UNDERLAY_LINK, addr, len))
            }
            Self::UnderlayConnected => connected_routes(node)?.iter().try_for_each(|route| ns.delete_route(route)),
            Self::UnderlayRenamed => {
                // Only kernels from 6.2 on rename a link that is up; this works with all kernels.
                ns.set_down(UNDERLAY_LINK)?;
                ns.set_link(UNDERLAY_LINK, &format!("name {}", renamed(UNDERLAY_LINK)))?;
                ns.set_up(&renamed(UNDERLAY_LINK))
            }
            Self::UnderlayCarrier => {
                let (switch, port) = node.switch_port();
                switch.set_down(port)?;
                node.await_carrier(Carrier::Lost)
            }
            Self::UnderlayDeleted => ns.delete_link(UNDERLAY_LINK),
            Self::RoutesFlushed => flush_routes(node),
            Self::NeighboursFlushed => overlay.each(|dev| ns.flush_permanent_neighbours(dev)),
            Self::ArpOffOn => overlay.each(|dev| {
                ns.set_link(dev, "arp off")?;
                ns.set_link(dev, "arp on")
            }),
            Self::FdbFlushed => overlay.each(|dev| ns.flush_fdb(dev)),
            Self::RouteDeleted => delete_route(node, overlay),
            Self::NeighbourDeleted => {
                let neighbours = ns.neighbours()?;
                overlay.each(|dev| match neighbours.iter().find(|it| it.dev == dev && it.mac.is_some()) {
                    Some(neighbour) => ns.delete_neighbour(neighbour),
                    None => Err(Error::new(format!("{dev} has no neighbour"))),
                })
            }
            Self::FdbDeleted => {
                let entries = ns.fdb()?;
                overlay.each(|dev| match entries.iter().find(|it| it.dev == dev && it.dst.is_some()) {
                    Some(entry) => ns.delete_fdb(entry),
                    None => Err(Error::new(format!("{dev} has no FDB entry"))),
                })
            }
            Self::SocketsDestroyed => ns.destroy_udp_sockets(UDP_PORT),
            Self::Everything => {
                overlay.each(|dev| ns.delete_link(dev))?;
                flush_routes(node)
            }
        }
    }

    /// Restores what [`strike`](Self::strike) took from the underlay. Idempotent; most acts need nothing.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn restore(self, node: &Node) -> Result<(), Error> {
        let ns = &node.ns;
        if self == Self::UnderlayRenamed && ns.links()?.iter().any(|link| link.name == renamed(UNDERLAY_LINK)) {
            ns.set_down(&renamed(UNDERLAY_LINK))?;
            ns.set_link(&renamed(UNDERLAY_LINK), &format!("name {UNDERLAY_LINK}"))?;
        }
        match self {
            Self::UnderlayDownUp
            | Self::UnderlayAddresses
            | Self::UnderlayRenamed
            | Self::UnderlayCarrier
            | Self::UnderlayDeleted => node.restore_underlay(),
            Self::UnderlayConnected => node.underlay_addresses().try_for_each(|(addr, len)| {
                let prefix = Prefix::masked(addr, len).map_err(|error| Error::new(error.to_string()))?;
                ns.replace_route(&crate::lab::connected_route(prefix, addr).metric(100))
            }),
            _ => Ok(()),
        }
    }
}

impl Overlay {
    fn each(&self, act: impl FnMut(&str) -> Result<(), Error>) -> Result<(), Error> {
        self.devices.iter().map(String::as_str).try_for_each(act)
    }

    /// Whether a route is the overlay's route to a peer, whichever agent created it: canaries have other protocols or
    /// metrics.
    fn owns(&self, route: &Route) -> bool {
        let network = self.networks.get(route.to.family());
        let metric = if route.to.family() == Family::V4 { 0 } else { 1024 };
        network.is_some_and(|network| network.covers(&route.to))
            && (route.table, route.metric) == (Route::MAIN, metric)
            && route.via.is_some()
            && (route.protocol == Route::BOOT || (200..232).contains(&route.protocol))
    }
}

fn delete_route(node: &Node, overlay: &Overlay) -> Result<(), Error> {
    let mut deleted = 0;
    for family in Family::BOTH {
        if let Some(route) = node.ns.routes(family)?.iter().find(|route| overlay.owns(route)) {
            node.ns.delete_route(route)?;
            deleted += 1;
        }
    }
    if deleted == 0 { Err(Error::new(format!("{} has no route to a peer", node.name))) } else { Ok(()) }
}

/// Flushes the main table. The kernel's routes for addresses and the default routes are restored: a program or person
/// that flushes the table would have to do the same to keep the node reachable.
fn flush_routes(node: &Node) -> Result<(), Error> {
    let ns = &node.ns;
    let mut own = Vec::new();
    for family in Family::BOTH {
        let routes = ns.routes(family)?.into_iter().filter(|route| route.table == Route::MAIN);
        own.extend(routes.filter(|route| route.protocol == Route::KERNEL && route.dev.is_some()));
    }
    ns.flush_main_routes()?;
    for route in own {
        ns.replace_route(&route)?;
    }
    node.restore_underlay()
}

/// Returns the routes that the kernel created for the addresses of the link to the switch.
fn connected_routes(node: &Node) -> Result<Vec<Route>, Error> {
    let mut found = Vec::new();
    for family in Family::BOTH {
        let routes = node.ns.routes(family)?.into_iter().filter(|route| route.table == Route::MAIN);
        let of_address = |route: &Route| node.underlay_addresses().any(|(addr, _)| route.to.contains(addr));
        let connected = |route: &Route| route.dev.as_deref() == Some(UNDERLAY_LINK) && route.via.is_none();
        found.extend(routes.filter(|route| connected(route) && of_address(route)));
    }
    Ok(found)
}

fn other_mac(link: &Link) -> MacAddr {
    let MacAddr(mut bytes) = link.mac.unwrap_or(MacAddr([0; 6])).locally_administered();
    bytes[5] ^= 0xff;
    MacAddr(bytes)
}

fn renamed(name: &str) -> String {
    format!("x{}", &name[..name.len().min(14)])
}
