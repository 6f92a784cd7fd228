//! The wanted state of the kernel and of the data plane.

use std::net::SocketAddr;

use flannel_core::backend::{BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{
    AddressKey, Device, Forward, ForwardKey, Link, LinkId, LinkKind, LinkName, PeerState, Route, RouteKey, RouteSlot,
    State, Tun, Tunnel,
};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Dual, Family, Mtu};

use crate::config::Config;
use crate::wire;

/// The routing table and metric of the network's routes. Metric 8285, not 0: Go flannel adds its route with metric 0, which
/// takes precedence. With metric 0 its add would fail with `EEXIST`, which Go flannel treats as success.
pub(crate) const SLOT: RouteSlot = RouteSlot::new(RouteSlot::MAIN.table, 8285);

/// The only device, for both families.
const DEVICE: LinkId = LinkId::Own(0);

/// The bytes that UDP adds to a packet: the outer IP and UDP headers.
const fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 28,
        Family::V6 => 48,
    }
}

/// The smallest MTU that a family works with: the size that every IPv4 host must accept (RFC 791), and the IPv6 minimum
/// (RFC 8200).
const fn least_mtu(family: Family) -> u32 {
    match family {
        Family::V4 => 576,
        Family::V6 => 1280,
    }
}

/// Returns the attributes that a node publishes: its addresses, and the port for IPv6, which flannel's udp backend
/// lacks.
pub(crate) fn advertise(config: &Config, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
    let mut attrs = LeaseAttrs::default();
    for family in context.config.networks.families() {
        let name = &context.uplink.name;
        let missing = |what: &str| BackendError::Host {
            what: format!("{what} {family} address"),
            remedy: format!("give {name} one, or turn {family} off in the network config"),
        };
        if context.uplink.addrs.get(family).is_none() {
            return Err(missing(&format!("{name} has no")));
        }
        let public = context.public.get(family).copied().ok_or_else(|| missing("there is no public"))?;
        *attrs.public_ip.slot(family) = Some(public);
        if family == Family::V6 {
            attrs.backend_data.v6 = Some(wire::encode(config.port));
        }
        let least = least_mtu(family) + most_overhead(context);
        if context.uplink.mtu.0 < least {
            return Err(BackendError::Host {
                what: format!("an MTU of {} is too low for {family}, which needs {least}", context.uplink.mtu),
                remedy: format!("raise the MTU of {name} or select another interface"),
            });
        }
    }
    Ok(attrs)
}

fn most_overhead(context: &NodeContext) -> u32 {
    context.config.networks.families().map(overhead).max().unwrap_or(0)
}

/// Returns the MTU of the device and of pods. There is one device, so the larger overhead counts.
pub(crate) fn mtu(context: &NodeContext) -> Mtu {
    Mtu(context.uplink.mtu.0.saturating_sub(most_overhead(context)))
}

fn link(name: &LinkName, config: &Config, local: &LocalNode) -> Link {
    let context = &local.context;
    // Packets to the subnets of a disabled family have no path.
    let in_use = |family| context.config.networks.get(family).is_some();
    let mut tunnel = Tunnel::new(config.port, Dual::default(), Dual::default());
    for family in Family::BOTH.into_iter().filter(|family| in_use(*family)) {
        *tunnel.local.slot(family) = context.uplink.addrs.get(family).copied();
        *tunnel.subnets.slot(family) = local.lease.subnets.get(family).copied();
    }
    (tunnel.queues, tunnel.socket_buffer) = (config.queues, config.socket_buffer);
    Link::new(name.clone(), LinkKind::Tun(Tun::carried(tunnel)), mtu(context).0)
}

pub(crate) fn devices(name: &LinkName, config: &Config) -> Vec<Device> {
    vec![Device::new(name.clone(), LinkKind::Tun(Tun::new(config.queues.get() > 1)))]
}

/// Returns the device, its addresses, and a route for each network into the device. A packet to an unassigned subnet is
/// answered with an ICMP error instead of leaving by the default route.
pub(crate) fn base(name: &LinkName, config: &Config, local: &LocalNode) -> State {
    let mut state = State::default();
    state.links.insert(DEVICE, link(name, config, local));
    for (family, network) in local.context.config.networks.iter() {
        let Some(subnet) = local.lease.subnets.get(family) else { continue };
        let key = AddressKey { link: DEVICE, addr: subnet.addr(), len: family.bits() };
        state.addresses.insert(key, ());
        let key = RouteKey { prefix: network.prefix, nth: 0 };
        state.routes.insert(key, Route::into_device(network.prefix, DEVICE).in_slot(SLOT));
    }
    state
}

pub(crate) fn peer(config: &Config, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
    let (Some(_), Some(subnet), Some(addr)) =
        (local.context.config.networks.get(family), peer.subnets.get(family), peer.attrs.public_ip.get(family))
    else {
        return Err(Skip::NoAddress(family));
    };
    let key = ForwardKey { link: DEVICE, prefix: *subnet };
    let port = wire::port(&peer.attrs, family)?.unwrap_or(config.port);
    Ok(PeerState::default().with_forward(key, Forward::to(SocketAddr::new(*addr, port))))
}
