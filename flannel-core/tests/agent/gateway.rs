//! A small backend whose peers are gateways: on the node's own links their subnets are routed to them as they are.

use flannel_core::backend::{Backend, BackendError, Local, Peer, Situation, Skip};
use flannel_core::kernel::{LinkId, PeerState, Route, Scope, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};

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
}

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

    fn scope(&self, local: &Local) -> Scope {
        let scope = Tunnel.scope(local);
        match self {
            Self::OrNothing => Scope { devices: Vec::new(), ..scope },
            Self::OrTunnel => scope,
        }
    }

    fn mtu(&self, situation: &Situation) -> Option<Mtu> {
        match self {
            Self::OrNothing => None,
            Self::OrTunnel => Tunnel.mtu(situation),
        }
    }

    fn advertise(&self, situation: &Situation) -> Result<LeaseAttrs, BackendError> {
        Tunnel.advertise(situation)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        Tunnel.hardware_address(attrs, family)
    }

    fn base(&self, local: &Local) -> State {
        match self {
            Self::OrNothing => State::default(),
            Self::OrTunnel => Tunnel.base(local),
        }
    }

    fn peer(&self, local: &Local, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let nothing = || Skip::NoAddress(family);
        let subnet = *peer.subnets.get(family).ok_or_else(nothing)?;
        let addr = *peer.attrs.public_ip.get(family).ok_or_else(nothing)?;
        let situation = &local.situation;
        let link = match situation.host.on_link(addr) {
            Some(index) if index == situation.uplink.index => LinkId::Uplink,
            Some(index) => LinkId::Other(index),
            None if *self == Self::OrTunnel => return Tunnel.peer(local, peer, family),
            None => return Err(Skip::NotOnLink { addr, remedy: "put it on a link" }),
        };
        Ok(PeerState { route: Some((subnet, Route::direct(subnet, addr, link))), ..PeerState::default() })
    }
}

/// The gateway of [`Gateway::OrNothing`], which publishes nothing but its address, as host-gw does.
pub(crate) fn bare() -> Altered<Gateway> {
    Altered {
        advertise: |gateway, situation| {
            let backend_type = gateway.wire_type().into();
            Ok(LeaseAttrs { public_ip: situation.public, backend_type, ..LeaseAttrs::default() })
        },
        hardware_address: |_, _, _| Ok(None),
        ..Altered::of(Gateway::OrNothing)
    }
}
