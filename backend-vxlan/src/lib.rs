//! VXLAN backend of flannelkit, compatible with flannel (docs/compatibility.md, "Device").
//!
//! Each address family in use has its own device, `flannel.<VNI>` or `flannel-v6.<VNI>`. A peer needs three entries on
//! it: a permanent neighbour with the MAC address of the peer's VTEP, an FDB entry from that MAC address to the peer's
//! public address, and a route to the peer's subnet with the VTEP as next hop. With `DirectRouting`, a peer on one of
//! this node's own links needs only a route to its subnet.
//!
//! [`Vxlan`] is a pure function of configuration and lease. It opens no socket; the agent of `flannel-core` writes to
//! the kernel. The meaning of a configuration can therefore be inspected without root:
//!
//! ```
//! use flannel_backend_vxlan::Vxlan;
//! use flannel_core::config::{Allocation, NetworkConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let network = br#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789}}"#;
//! let vxlan = Vxlan::new(&NetworkConfig::parse(network, Allocation::Pool)?)?;
//! assert_eq!(vxlan.config().vni.value(), 7);
//! # Ok(())
//! # }
//! ```
//!
//! The crate `flannelkit` exports this crate under its feature `vxlan`; its first page has a complete program. Tests
//! run an overlay with this backend on `flannel_core::testing::FakeKernel`.
//!
//! Traffic is not encrypted. A host that can send to the port from a peer's address can send into the overlay;
//! [`VxlanGuard`](flannel_core::firewall::VxlanGuard) blocks all other senders.

mod config;
mod wanted;
mod wire;

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{Device, PeerState, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};

pub use config::Config;

/// The VXLAN backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    config: Config,
}

impl Vxlan {
    /// The backend's name in the configuration and in leases.
    pub const TYPE: &'static str = "vxlan";

    /// Reads the backend's settings from the configuration. Does not check `Type`.
    ///
    /// # Errors
    /// [`BackendError::Config`] names the key of an invalid setting. Retrying with the same configuration fails again.
    pub fn new(network: &NetworkConfig) -> Result<Self, BackendError> {
        Ok(Self { config: Config::read(network)? })
    }

    /// Sets the UDP port if the configuration has none. Otherwise the kernel decides the port of a new device, and an
    /// existing device keeps its port.
    #[must_use]
    pub fn with_default_port(mut self, port: u16) -> Self {
        self.config.port.get_or_insert(port);
        self
    }

    /// Returns the settings in effect.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl Backend for Vxlan {
    fn name(&self) -> &'static str {
        Self::TYPE
    }

    fn wire_type(&self) -> &'static str {
        Self::TYPE
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, local: &LocalNode) -> Vec<Device> {
        wanted::devices(&self.config, local)
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        Some(wanted::pod_mtu(&self.config, context))
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        wanted::advertise(&self.config, context)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        wire::decode(attrs, family).map(Some)
    }

    fn base(&self, local: &LocalNode) -> State {
        wanted::base(&self.config, local)
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        wanted::peer(&self.config, local, peer, family)
    }
}

#[cfg(test)]
mod tests;
