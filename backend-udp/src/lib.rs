//! UDP backend of flannelkit, compatible with flannel (docs/compatibility.md, "udp").
//!
//! For hosts whose kernel has no VXLAN, and for links that pass only UDP. This process carries each packet from a TUN
//! device to the peer that has the destination's subnet; the packet is the whole payload of one UDP datagram. [`Udp`]
//! computes the wanted state, and [`UdpDataPlane`] carries the packets:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use flannel_backend_udp::{Udp, UdpDataPlane};
//! use flannel_core::netlink::NetlinkKernel;
//! use flannel_core::overlay::Overlay;
//! # fn assemble(store: Arc<dyn flannel_core::subnet::SubnetManager>) -> Result<(), Box<dyn std::error::Error>> {
//! let plane = UdpDataPlane::new();
//! let observer = plane.observer();
//! let kernel = NetlinkKernel::new()?.with_data_plane(plane)?;
//! let overlay = Overlay::builder().backend(Udp::TYPE, |config| Udp::new(config)).build(store, Arc::new(kernel))?;
//! // While it runs:
//! for device in observer.devices() {
//!     println!("{}: {} packets sent", device.name, device.counters.sent.packets);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Traffic is neither encrypted nor authenticated, as in flannel. A received packet is accepted only if it comes from a
//! peer's endpoint, its source is inside that peer's subnet or is the address of that endpoint, and its destination is
//! inside this node's subnet. Dropped packets are counted by [`Reason`](path::Reason).

mod config;
#[cfg(all(target_os = "linux", feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(target_os = "linux")]
pub mod path;
#[cfg(target_os = "linux")]
mod plane;
#[cfg(all(target_os = "linux", feature = "serde"))]
pub mod serialize;
#[cfg(test)]
mod tests;
mod wanted;
mod wire;

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{Device, LinkName, PeerState, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};

pub use config::Config;
#[cfg(target_os = "linux")]
pub use plane::{CarriedDevice, Observer, UdpDataPlane};

/// The UDP backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Udp {
    config: Config,
    device: LinkName,
}

impl Udp {
    /// The backend's name in the configuration. Leases do not contain it.
    pub const TYPE: &'static str = "udp";
    /// The default device name, the same as in flannel.
    const DEVICE: &'static str = "flannel0";

    /// Reads the backend's settings from the configuration. Does not check `Type`, and ignores unknown keys.
    ///
    /// # Errors
    /// [`BackendError::Config`] names the key of an invalid setting. Retrying with the same configuration fails again.
    pub fn new(network: &NetworkConfig) -> Result<Self, BackendError> {
        let device = LinkName::new(Self::DEVICE).map_err(|error| BackendError::Host {
            what: error.to_string(),
            remedy: "give the device another name".to_owned(),
        })?;
        Ok(Self { config: Config::read(network)?, device })
    }

    /// Sets a device name other than `flannel0`. Each overlay of a host needs its own device.
    pub fn with_device(self, device: LinkName) -> Self {
        Self { device, ..self }
    }

    /// Returns the device's name.
    pub fn device(&self) -> &LinkName {
        &self.device
    }

    /// Returns the settings in effect.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl Backend for Udp {
    fn name(&self) -> &'static str {
        Self::TYPE
    }

    fn wire_type(&self) -> &'static str {
        ""
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        vec![wanted::SLOT]
    }

    fn devices(&self, _: &LocalNode) -> Vec<Device> {
        wanted::devices(&self.device, &self.config)
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        Some(wanted::mtu(context))
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        wanted::advertise(&self.config, context)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        wire::port(attrs, family).map(|_| None)
    }

    fn base(&self, local: &LocalNode) -> State {
        wanted::base(&self.device, &self.config, local)
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        wanted::peer(&self.config, local, peer, family)
    }
}
