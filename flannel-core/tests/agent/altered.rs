//! A backend that is another one but for some of its answers.

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{Device, PeerState, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Altered<B> {
    pub(crate) backend: B,
    pub(crate) slots: fn(&B) -> Vec<RouteSlot>,
    pub(crate) devices: fn(&B, &LocalNode) -> Vec<Device>,
    pub(crate) advertise: fn(&B, &NodeContext) -> Result<LeaseAttrs, BackendError>,
    pub(crate) hardware_address: fn(&B, &LeaseAttrs, Family) -> Result<Option<MacAddr>, Skip>,
    pub(crate) base: fn(&B, &LocalNode) -> State,
    pub(crate) peer: fn(&B, &LocalNode, &Peer, Family) -> Result<PeerState, Skip>,
}

impl<B: Backend> Altered<B> {
    /// Nothing is altered yet.
    pub(crate) fn of(backend: B) -> Self {
        Self {
            backend,
            slots: B::slots,
            devices: B::devices,
            advertise: B::advertise,
            hardware_address: B::hardware_address,
            base: B::base,
            peer: B::peer,
        }
    }
}

impl<B: Backend> Backend for Altered<B> {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn wire_type(&self) -> &'static str {
        self.backend.wire_type()
    }

    fn writes(&self) -> bool {
        self.backend.writes()
    }

    fn slots(&self) -> Vec<RouteSlot> {
        (self.slots)(&self.backend)
    }

    fn devices(&self, local: &LocalNode) -> Vec<Device> {
        (self.devices)(&self.backend, local)
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        self.backend.mtu(context)
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        (self.advertise)(&self.backend, context)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        (self.hardware_address)(&self.backend, attrs, family)
    }

    fn base(&self, local: &LocalNode) -> State {
        (self.base)(&self.backend, local)
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        (self.peer)(&self.backend, local, peer, family)
    }
}
