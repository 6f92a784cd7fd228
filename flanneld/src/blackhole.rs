//! `-ip-blackhole-route`: packets to addresses of the own subnet that no pod has are dropped, instead of leaving by the
//! default route (docs/compatibility.md, "Blackhole").

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{Device, PeerState, Route, RouteKey, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu, Prefix};

/// Whether the own subnet gets a blackhole route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routes {
    None,
    Blackhole,
}

/// A backend, with blackhole routes for the own subnets if requested. A subnet that another program routes, for example
/// to the pods' bridge, gets none, because it could take that route's packets: the planner gives way to a foreign route
/// of the same metric, and this type to one of another metric.
pub(crate) struct Blackhole<B> {
    inner: B,
    routes: Routes,
}

impl<B> Blackhole<B> {
    pub(crate) fn around(inner: B, routes: Routes) -> Self {
        Self { inner, routes }
    }
}

impl<B: Backend> Backend for Blackhole<B> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn wire_type(&self) -> &'static str {
        self.inner.wire_type()
    }

    fn writes(&self) -> bool {
        self.inner.writes() || self.routes == Routes::Blackhole
    }

    fn slots(&self) -> Vec<RouteSlot> {
        self.inner.slots()
    }

    fn devices(&self, local: &LocalNode) -> Vec<Device> {
        self.inner.devices(local)
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        self.inner.mtu(context)
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        self.inner.advertise(context)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        self.inner.hardware_address(attrs, family)
    }

    fn base(&self, local: &LocalNode) -> State {
        let mut state = self.inner.base(local);
        if self.routes == Routes::Blackhole {
            let host = &local.context.host;
            let routed = |subnet: &Prefix| host.on_link.to(subnet.addr()).is_some_and(|route| route.prefix == *subnet);
            let subnets = local.lease.subnets.iter().filter(|(_, subnet)| !routed(subnet));
            state.routes.extend(subnets.map(|(_, subnet)| {
                let route = Route::blackhole(*subnet);
                (RouteKey { prefix: *subnet, nth: 0 }, route)
            }));
        }
        state
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        self.inner.peer(local, peer, family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::backend::alloc::Alloc;

    #[test]
    fn a_backend_that_writes_nothing_needs_no_privilege_unless_a_route_is_asked_for() {
        assert!(!Blackhole::around(Alloc, Routes::None).writes());
        assert!(Blackhole::around(Alloc, Routes::Blackhole).writes());
    }
}
