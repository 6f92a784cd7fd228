//! VXLAN backend of flannelkit, compatible with flannel (docs/compatibility.md, "Device").
//!
//! Each enabled family has a device of its own, `flannel.<VNI>` and `flannel-v6.<VNI>`. What a peer needs on it is its
//! VTEP's MAC address as a permanent neighbour, the way to that VTEP as a forwarding entry, and a route to its
//! subnet; or with `DirectRouting`, where the peer is on one of our links, that route alone.

mod config;
mod wanted;
mod wire;

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{Device, PeerState, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};

pub use config::Config;

/// The backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    config: Config,
}

impl Vxlan {
    /// The name, in the configuration and in leases.
    pub const TYPE: &'static str = "vxlan";

    /// Reads the backend's part of the configuration. `Type` is not looked at.
    ///
    /// # Errors
    /// [`BackendError::Config`] names the key. Final for this configuration.
    pub fn new(network: &NetworkConfig) -> Result<Self, BackendError> {
        Ok(Self { config: Config::read(network)? })
    }

    /// The settings in force.
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
