//! A small backend whose peers are gateways: on the node's own links their subnets are routed to them as they are.

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{Device, LinkId, PeerState, Route, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Dual, Family, MacAddr, Mtu};

use crate::altered::Altered;
use crate::tunnel::Tunnel;

/// What becomes of peers that are on none of the node's links. Its name and what it publishes are the tunnel's, so
/// that the same records fit both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gateway {
    /// They are skipped, as by host-gw.
    OrNothing,
    /// They are reached through the tunnel, as with VXLAN's `DirectRouting`.
    OrTunnel,
    /// All are reached through the tunnel, by a route in [`ASIDE`] as well.
    TunnelTwice,
}

/// Where rules of a host would lead some of its packets.
pub(crate) const ASIDE: RouteSlot = RouteSlot::new(100, 7);

impl Backend for Gateway {
    fn name(&self) -> &'static str {
        Tunnel.name()
    }

    fn wire_type(&self) -> &'static str {
        Tunnel.wire_type()
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, local: &LocalNode) -> Vec<Device> {
        match self {
            Self::OrNothing => Vec::new(),
            Self::OrTunnel | Self::TunnelTwice => Tunnel.devices(local),
        }
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        match self {
            Self::OrNothing => None,
            Self::OrTunnel | Self::TunnelTwice => Tunnel.mtu(context),
        }
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        Tunnel.advertise(context)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        Tunnel.hardware_address(attrs, family)
    }

    fn base(&self, local: &LocalNode) -> State {
        match self {
            Self::OrNothing => State::default(),
            Self::OrTunnel | Self::TunnelTwice => Tunnel.base(local),
        }
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        if *self == Self::TunnelTwice {
            let mut state = Tunnel.peer(local, peer, family)?;
            state.routes.extend(state.routes.clone().into_iter().map(|(prefix, route)| (prefix, route.in_slot(ASIDE))));
            return Ok(state);
        }
        let nothing = || Skip::NoAddress(family);
        local.context.config.networks.get(family).ok_or_else(nothing)?;
        let subnet = *peer.subnets.get(family).ok_or_else(nothing)?;
        let addr = *peer.attrs.public_ip.get(family).ok_or_else(nothing)?;
        let context = &local.context;
        let link = match context.host.on_link(addr) {
            Some(index) if index == context.uplink.index => LinkId::Uplink,
            Some(index) => LinkId::Other(index),
            None if *self == Self::OrTunnel => return Tunnel.peer(local, peer, family),
            None => return Err(Skip::NotOnLink { addr, remedy: "put it on a link" }),
        };
        Ok(PeerState::default().with_route(subnet, Route::direct(subnet, addr, link)))
    }
}

/// The gateway of [`Gateway::OrNothing`], which publishes nothing but its address, as host-gw does.
pub(crate) fn bare() -> Altered<Gateway> {
    Altered {
        advertise: |gateway, context| {
            Ok(LeaseAttrs::new(context.public).with_backend(gateway.wire_type(), Dual::default()))
        },
        hardware_address: |_, _, _| Ok(None),
        ..Altered::of(Gateway::OrNothing)
    }
}
