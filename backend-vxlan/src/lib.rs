//! VXLAN: peers' packets travel in UDP between VTEPs, with every forwarding decision programmed in advance (contract
//! 8.2).
//!
//! For each peer and family the kernel gets a permanent neighbour, a forwarding entry and an `onlink` route through
//! `flannel.<VNI>` (`flannel-v6.<VNI>`); nothing is learnt and nothing is flooded. With `DirectRouting`, a peer on the
//! same link gets a plain route instead.
//!
//! ```no_run
//! # use flannel_core::overlay::{Identity, Overlay};
//! # use flannel_core::subnet::NodeIdentity;
//! let builder = Overlay::builder(Identity::Named(NodeIdentity::new("node-a")?))
//!     .backend("vxlan", flannel_backend_vxlan::Vxlan::new);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod wanted;
mod wire;

use flannel_core::backend::{Backend, BackendError, Local, Peer, Situation, Skip};
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::Scope;
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Dual, Family, MacAddr, Mtu};
use flannel_core::state::{PeerState, State};

pub use config::Config;

/// The backend. Made from the network's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    config: Config,
    families: Dual<()>,
}

impl Vxlan {
    /// Reads the `Backend` object of `network`.
    ///
    /// # Errors
    /// [`BackendError::Config`] names the JSON path. Final for this configuration.
    pub fn new(network: &NetworkConfig) -> Result<Self, BackendError> {
        let families = network.networks.map(|_, _| ());
        Ok(Self { config: Config::read(&network.backend, &families)?, families })
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl Backend for Vxlan {
    fn name(&self) -> &'static str {
        "vxlan"
    }

    fn wire_type(&self) -> &'static str {
        "vxlan"
    }

    fn scope(&self, local: &Local) -> Scope {
        wanted::scope(self, local)
    }

    /// The uplink's − 50 in IPv4, − 70 as soon as IPv6 is on: pods have one MTU for both families. (Go flannel says
    /// − 50 then, which the IPv6 device cannot carry: contract 14.17.)
    fn mtu(&self, situation: &Situation) -> Option<Mtu> {
        self.families.families().map(|family| self.device_mtu(situation, family)).min()
    }

    fn advertise(&self, situation: &Situation) -> Result<LeaseAttrs, BackendError> {
        let mut attrs = LeaseAttrs { backend_type: self.wire_type().into(), ..LeaseAttrs::default() };
        for family in self.families.families() {
            let Some(public) = situation.public.get(family) else {
                return Err(BackendError::Host {
                    what: format!("uplink {} has no {family} address to publish", situation.uplink.name),
                    remedy: format!("give it one, name a public {family} address, or switch {family} off"),
                });
            };
            *attrs.public_ip.slot(family) = Some(*public);
            let mac = wanted::own_mac(self, situation, family);
            *attrs.backend_data.slot(family) = Some(wire::encode(self.config.vni, mac));
        }
        self.check_mtu(situation)?;
        Ok(attrs)
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        if self.families.get(family).is_none() {
            return Ok(None);
        }
        wire::mac_of(attrs, family).map(Some)
    }

    fn base(&self, local: &Local) -> State {
        wanted::base(self, local)
    }

    fn peer(&self, local: &Local, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        wanted::peer(self, local, peer, family)
    }
}

impl Vxlan {
    /// What the outer headers take: Ethernet 14, VXLAN 8, UDP 8, and IPv4 20 or IPv6 40 (kernel-facts 17).
    fn overhead(family: Family) -> u32 {
        match family {
            Family::V4 => 50,
            Family::V6 => 70,
        }
    }

    /// A larger setting than the uplink's MTU is cut to it, as the kernel does.
    fn device_mtu(&self, situation: &Situation, family: Family) -> Mtu {
        let uplink = situation.uplink.mtu;
        let outer = self.config.mtu.unwrap_or(uplink).min(uplink);
        Mtu(outer.0.saturating_sub(Self::overhead(family)))
    }

    /// IPv6 needs 1280 bytes (RFC 8200, section 5), IPv4 hosts 576 (RFC 1122, section 3.3.2).
    fn check_mtu(&self, situation: &Situation) -> Result<(), BackendError> {
        for family in self.families.families() {
            let least = match family {
                Family::V4 => 576,
                Family::V6 => 1280,
            };
            let Mtu(mtu) = self.device_mtu(situation, family);
            if mtu < least {
                return Err(BackendError::Host {
                    what: format!("{family} pods would have an MTU of {mtu} bytes, {least} is the least"),
                    remedy: format!(
                        "raise the MTU of {} or $.Backend.MTU to at least {}",
                        situation.uplink.name,
                        least + Self::overhead(family)
                    ),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
