//! host-gw: peers on the same link are each other's gateways; nothing is encapsulated (contract 8.3).
//!
//! For each peer and family the kernel gets one route, `<subnet> via <public address> dev <interface>`. A peer that is
//! not on a link of this node cannot be reached this way: it is skipped, with the reason in the status.
//!
//! ```no_run
//! # use flannel_core::overlay::{Identity, Overlay};
//! # use flannel_core::subnet::NodeIdentity;
//! let builder = Overlay::builder(Identity::Named(NodeIdentity::new("node-a")?))
//!     .backend("host-gw", flannel_backend_hostgw::HostGw::new);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use flannel_core::backend::{Backend, BackendError, Local, Peer, Situation, Skip};
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::Scope;
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Family, MacAddr, Mtu};
use flannel_core::state::{LinkId, PeerState, Route, State};

/// The backend. It has no settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostGw(());

impl HostGw {
    /// Made from the network's configuration, of which it needs nothing.
    ///
    /// # Errors
    /// None; the signature is that of every backend.
    pub fn new(_network: &NetworkConfig) -> Result<Self, BackendError> {
        Ok(Self(()))
    }
}

impl Backend for HostGw {
    fn name(&self) -> &'static str {
        "host-gw"
    }

    fn wire_type(&self) -> &'static str {
        "host-gw"
    }

    fn scope(&self, local: &Local) -> Scope {
        let situation = &local.situation;
        Scope {
            overlay: situation.overlay.clone(),
            networks: situation.networks(),
            devices: Vec::new(),
            uplink: Some(situation.uplink.index),
        }
    }

    /// The uplink's: nothing is added to a packet.
    fn mtu(&self, _situation: &Situation) -> Option<Mtu> {
        None
    }

    /// A public address that is not the uplink's is refused: peers would route to an address that does not answer on
    /// their link.
    fn advertise(&self, situation: &Situation) -> Result<LeaseAttrs, BackendError> {
        let mut attrs = LeaseAttrs { backend_type: self.wire_type().into(), ..LeaseAttrs::default() };
        for family in situation.networks().families() {
            let (public, own) = (situation.public.get(family), situation.uplink.addrs.get(family));
            match (public, own) {
                (Some(public), Some(own)) if public == own => *attrs.public_ip.slot(family) = Some(*public),
                (Some(public), _) => {
                    return Err(BackendError::Host {
                        what: format!(
                            "the public address {public} is not an address of {}: host-gw does not work through NAT",
                            situation.uplink.name
                        ),
                        remedy: "leave the public address unset, or use the vxlan backend".to_owned(),
                    });
                }
                (None, _) => {
                    return Err(BackendError::Host {
                        what: format!("uplink {} has no {family} address to publish", situation.uplink.name),
                        remedy: format!("give it one, or switch {family} off"),
                    });
                }
            }
        }
        Ok(attrs)
    }

    fn hardware_address(&self, _attrs: &LeaseAttrs, _family: Family) -> Result<Option<MacAddr>, Skip> {
        Ok(None)
    }

    /// Nothing: host-gw has no devices.
    fn base(&self, _local: &Local) -> State {
        State::default()
    }

    fn peer(&self, local: &Local, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let (Some(subnet), Some(public)) = (peer.subnets.get(family), peer.attrs.public_ip.get(family)) else {
            return Err(Skip::NoAddress(family));
        };
        let situation = &local.situation;
        let Some(index) = situation.host.on_link(*public) else {
            let remedy = "connect the nodes to one link, or use the vxlan backend";
            return Err(Skip::NotOnLink { addr: *public, remedy });
        };
        let link = if index == situation.uplink.index { LinkId::Uplink } else { LinkId::Other(index) };
        Ok(PeerState { route: Some((*subnet, Route::direct(*subnet, *public, link))), ..PeerState::default() })
    }
}

#[cfg(test)]
mod tests;
