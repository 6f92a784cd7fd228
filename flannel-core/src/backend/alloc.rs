//! alloc: acquires a lease and programs nothing (docs/compatibility.md, "alloc"). For hosts whose routes another
//! program manages.
//!
//! ```no_run
//! # use flannel_core::backend::alloc::Alloc;
//! # use flannel_core::overlay::Overlay;
//! let builder = Overlay::builder().backend(Alloc::TYPE, |_| Ok(Alloc));
//! ```

use crate::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use crate::kernel::{Device, PeerState, RouteSlot, State};
use crate::lease::LeaseAttrs;
use crate::net::{Family, MacAddr, Mtu};

/// The backend. It has no settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Alloc;

impl Alloc {
    /// The name in the configuration. Leases do not contain it.
    pub const TYPE: &'static str = "alloc";

    /// The keys of the `Backend` object besides `Type`: there are none.
    pub const KEYS: [&str; 0] = [];
}

impl Backend for Alloc {
    fn name(&self) -> &'static str {
        Self::TYPE
    }

    fn wire_type(&self) -> &'static str {
        ""
    }

    fn writes(&self) -> bool {
        false
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, _local: &LocalNode) -> Vec<Device> {
        Vec::new()
    }

    /// Uses the uplink's MTU: packets are not encapsulated.
    fn mtu(&self, _situation: &NodeContext) -> Option<Mtu> {
        None
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        Ok(LeaseAttrs { public_ip: context.public, ..LeaseAttrs::default() })
    }

    fn hardware_address(&self, _attrs: &LeaseAttrs, _family: Family) -> Result<Option<MacAddr>, Skip> {
        Ok(None)
    }

    fn base(&self, _local: &LocalNode) -> State {
        State::default()
    }

    fn peer(&self, _local: &LocalNode, _peer: &Peer, _family: Family) -> Result<PeerState, Skip> {
        Err(Skip::Unprogrammed(Self::TYPE))
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::net::Dual;
    use crate::testing::backend_contract::{self, Made};
    use crate::testing::samples;

    #[test]
    fn the_backend_contract_holds() {
        backend_contract::all(&Made::new(r#"{"Type":"alloc"}"#, |_| Ok(Alloc)));
    }

    #[test]
    fn a_lease_is_published_and_nothing_is_programmed() {
        let families = [Family::V4];
        let context = samples::context(samples::config(&families, r#"{"Type":"alloc"}"#));
        let backend = Alloc;
        let attrs = backend.advertise(&context).unwrap();
        assert_eq!(attrs.to_json(), r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
        assert_eq!((&*attrs.backend_type, backend.mtu(&context)), (backend.wire_type(), None));
        assert_eq!(attrs.backend_data, Dual::default());
        let local = samples::local(context, attrs);
        assert!(backend.base(&local).is_empty() && backend.devices(&local).is_empty());
        let peer = samples::lease(2, &families, "");
        assert_eq!(backend.peer(&local, &peer, Family::V4), Err(Skip::Unprogrammed("alloc")));
    }
}
