//! `-ip-blackhole-route`: packets to addresses of the own subnet that no pod has are dropped here, instead of going out
//! by the default route (contract 10.4).

use flannel_core::backend::{Backend, BackendError, Local, Peer, Situation, Skip};
use flannel_core::kernel::Scope;
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};
use flannel_core::state::{PeerState, Route, RouteKey, RouteKind, State};

/// Whether the own subnet gets such a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routes {
    None,
    Blackhole,
}

/// A backend, with blackhole routes for the own subnets if asked for. Where a bridge has the subnet already, its route
/// is a conflict, shown and left alone, and nothing is needed.
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

    fn scope(&self, local: &Local) -> Scope {
        self.inner.scope(local)
    }

    fn mtu(&self, situation: &Situation) -> Option<Mtu> {
        self.inner.mtu(situation)
    }

    fn advertise(&self, situation: &Situation) -> Result<LeaseAttrs, BackendError> {
        self.inner.advertise(situation)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        self.inner.hardware_address(attrs, family)
    }

    fn base(&self, local: &Local) -> State {
        let mut state = self.inner.base(local);
        if self.routes == Routes::Blackhole {
            state.routes.extend(local.lease.subnets.iter().map(|(_, subnet)| {
                let route = Route {
                    kind: RouteKind::Blackhole,
                    gateway: None,
                    link: None,
                    onlink: false,
                    protocol: Route::protocol_for(subnet),
                };
                (RouteKey { prefix: *subnet, nth: 0 }, route)
            }));
        }
        state
    }

    fn peer(&self, local: &Local, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        self.inner.peer(local, peer, family)
    }
}
