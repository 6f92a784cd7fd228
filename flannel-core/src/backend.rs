//! The seam to the data plane: what a node publishes, and what kernel state it wants.

pub mod alloc;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::config::{ConfigError, NetworkConfig};
use crate::kernel::{Device, HostFacts, LinkName, OverlayName, PeerState, RouteSlot, Scope, State};
use crate::lease::{Lease, LeaseAttrs};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix};
use crate::subnet::NodeIdentity;
use crate::text::Plain;

/// The interface that carries the overlay's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Uplink {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: LinkName,
    /// MTU.
    pub mtu: Mtu,
    /// Its own address of each family in use.
    pub addrs: Dual<IpAddr>,
}

impl Uplink {
    /// The interface of this index, with its own address of each family in use.
    pub fn new(index: u32, name: LinkName, mtu: Mtu, addrs: Dual<IpAddr>) -> Self {
        Self { index, name, mtu, addrs }
    }
}

/// What a node knows of itself and its host before it has a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeContext {
    /// The overlay's name.
    pub overlay: OverlayName,
    /// The network. Its families are those in use.
    pub config: Arc<NetworkConfig>,
    /// Who we are to the store.
    pub node: NodeIdentity,
    /// The interface chosen.
    pub uplink: Uplink,
    /// What peers are told to send to: `uplink.addrs` unless overridden.
    pub public: Dual<IpAddr>,
    /// The host as last read, own devices included.
    pub host: Arc<HostFacts>,
    /// The lease of the last run, if the store still had it.
    pub previous: Option<Arc<Lease>>,
    /// MAC addresses that older records have: other nodes would refuse a record of ours with one of them.
    pub taken: BTreeSet<MacAddr>,
}

impl NodeContext {
    /// The networks of the families in use.
    pub fn networks(&self) -> Dual<Prefix> {
        self.config.networks.map(|_, network| network.prefix)
    }
}

/// A node with a lease: everything the wanted state of its kernel depends on, but for the peers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalNode {
    /// Who and where.
    pub context: NodeContext,
    /// What it holds and publishes.
    pub lease: Arc<Lease>,
}

impl LocalNode {
    /// The part of the kernel that a backend may touch, with the overlay's routes in further slots
    /// ([`Builder::route_slots`](crate::overlay::Builder::route_slots)).
    pub fn scope(&self, backend: &dyn Backend, slots: &[RouteSlot]) -> Scope {
        let mut slots = [slots, &backend.slots()].concat();
        slots.sort_unstable();
        slots.dedup();
        let context = &self.context;
        Scope {
            overlay: context.overlay.clone(),
            networks: context.networks(),
            former: Vec::new(),
            devices: backend.devices(self),
            slots,
            uplink: Some(context.uplink.index),
        }
    }
}

/// Another node's accepted lease.
pub type Peer = Lease;

/// Why a backend cannot run here. Final until configuration or host change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A setting of its `Backend` object is wrong; the error names the JSON path.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It was registered with [`Builder::backend`](crate::overlay::Builder::backend) under another name than its own.
    #[error("the backend registered for type {kind:?} is called {name:?}: register it under its own name")]
    Misnamed {
        /// The name it was registered under.
        kind: String,
        /// What [`Backend::name`] returns.
        name: &'static str,
    },
    /// The host does not allow it.
    #[error("{what}: {remedy}")]
    Host {
        /// What is in the way.
        what: String,
        /// What to do.
        remedy: String,
    },
}

/// Why a peer is not programmed. Shown in the status; the peer's own next record may mend it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[non_exhaustive]
pub enum Skip {
    /// What the backend needs to know of it does not parse.
    #[error("backend data: {}", Plain(.0))]
    BadData(String),
    /// It publishes nothing for this family.
    #[error("publishes no {0} address or subnet")]
    NoAddress(Family),
    /// It is not on a link of ours, and this backend needs that.
    #[error("{addr} is not on-link: {remedy}")]
    NotOnLink {
        /// Its public address.
        addr: IpAddr,
        /// What to do.
        remedy: &'static str,
    },
    /// Something that the backend depends on is not there yet, as a device that another program makes.
    #[error("{what}: {remedy}")]
    NotReady {
        /// What is missing.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The backend programs no peers at all.
    #[error("the {0} backend programs no peers")]
    Unprogrammed(&'static str),
}

impl Skip {
    /// Returns its kind in one word, as status pages name it. Stable.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::BadData(..) => "bad_data",
            Self::NoAddress(..) => "no_address",
            Self::NotOnLink { .. } => "not_on_link",
            Self::NotReady { .. } => "not_ready",
            Self::Unprogrammed(..) => "unprogrammed",
        }
    }
}

/// A data plane: a deterministic function from what is known to the kernel state it wants.
///
/// No I/O, no clock, no memory. One part of the result is the node's own ([`base`](Backend::base)), one is each peer's
/// ([`peer`](Backend::peer)); their keys are disjoint.
/// [`testing::backend_contract`](crate::testing::backend_contract) checks an implementation.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Backend: Send + Sync + 'static {
    /// Its name in the configuration's `Backend.Type`, which is also the name it is registered under with
    /// [`Builder::backend`](crate::overlay::Builder::backend).
    fn name(&self) -> &'static str;

    /// What stands in `BackendType` of a lease: empty for udp and alloc (docs/compatibility.md, "Lease attributes").
    /// Peers of another type are quarantined.
    fn wire_type(&self) -> &'static str;

    /// Whether it ever wants anything of the kernel. Where it does not, a process without the privilege to write may run
    /// it.
    fn writes(&self) -> bool;

    /// The tables and metrics of routes that it wants beside [`RouteSlot::MAIN`], whatever the node is. Every audit reads each
    /// of these tables whole.
    fn slots(&self) -> Vec<RouteSlot>;

    /// The devices it uses, in the order of [`LinkId::Own`](crate::kernel::LinkId::Own). A backend may want objects on
    /// these devices and routes in the network, and nothing else.
    fn devices(&self, local: &LocalNode) -> Vec<Device>;

    /// The MTU for pods; `None`: the uplink's.
    fn mtu(&self, context: &NodeContext) -> Option<Mtu>;

    /// What to publish. A MAC address in it is none of [`NodeContext::taken`].
    ///
    /// # Errors
    /// [`BackendError`] when it cannot run on this host as configured. Final until one of the two changes.
    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError>;

    /// The MAC address that a peer of these attributes answers to, if the backend uses any: no two peers may
    /// share one.
    ///
    /// # Errors
    /// [`Skip::BadData`] when the attributes do not parse.
    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip>;

    /// Devices and addresses: total and deterministic. The agent puts the overlay's mark on the devices: their group and
    /// alias are not looked at.
    fn base(&self, local: &LocalNode) -> State;

    /// What one peer needs in one family, or why it gets nothing. It is a [`Skip`] where the network has no such family.
    ///
    /// # Errors
    /// [`Skip`] names the reason.
    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip>;
}
