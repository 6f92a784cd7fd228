//! The trait for data planes: what a node publishes, and which kernel state it needs.

pub mod alloc;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::config::{ConfigError, NetworkConfig};
use crate::kernel::{Device, HostFacts, LinkName, LinkNames, OverlayName, PeerState, RouteSlot, Scope, State};
use crate::lease::{Lease, LeaseAttrs};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix};
use crate::subnet::NodeIdentity;
use crate::text::Plain;

/// The interface that carries the overlay's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Uplink {
    /// The interface index.
    pub index: u32,
    /// The interface name.
    pub name: LinkName,
    /// The MTU.
    pub mtu: Mtu,
    /// The interface's own address in each family in use.
    pub addrs: Dual<IpAddr>,
}

impl Uplink {
    /// Creates an uplink from an interface's index, name, MTU and own address in each family in use.
    pub fn new(index: u32, name: LinkName, mtu: Mtu, addrs: Dual<IpAddr>) -> Self {
        Self { index, name, mtu, addrs }
    }
}

/// A node and its host, as they are before it has a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeContext {
    /// The overlay's name.
    pub overlay: OverlayName,
    /// The network. Its families are those in use.
    pub config: Arc<NetworkConfig>,
    /// This node's identity in the store.
    pub node: NodeIdentity,
    /// The selected uplink.
    pub uplink: Uplink,
    /// The addresses published for peers to send to: `uplink.addrs` unless overridden.
    pub public: Dual<IpAddr>,
    /// The host's last snapshot, including the overlay's own devices.
    pub host: Arc<HostFacts>,
    /// The lease of the last run, if the store still has it.
    pub previous: Option<Arc<Lease>>,
    /// MAC addresses in older records. Other nodes would reject this node's record if it used one of them.
    pub taken: BTreeSet<MacAddr>,
}

impl NodeContext {
    /// Returns the networks of the families in use.
    pub fn networks(&self) -> Dual<Prefix> {
        self.config.networks.map(|_, network| network.prefix)
    }
}

/// A node with a lease: all inputs of the wanted kernel state except the peers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalNode {
    /// The node and its host.
    pub context: NodeContext,
    /// The node's lease, with the attributes it publishes.
    pub lease: Arc<Lease>,
}

impl LocalNode {
    /// Returns the part of the kernel that a backend may change, with `slots` as further slots for the overlay's routes
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
            names: LinkNames::default(),
        }
    }
}

/// Another node's accepted lease.
pub type Peer = Lease;

/// Why a backend cannot run here. Final until the configuration or the host changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A setting in its `Backend` object is invalid; the error names the JSON path.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The backend was registered with [`Builder::backend`](crate::overlay::Builder::backend) under a name other than
    /// its own.
    #[error("the backend registered for type {kind:?} is called {name:?}: register it under its own name")]
    Misnamed {
        /// The name it was registered under.
        kind: String,
        /// What [`Backend::name`] returns.
        name: &'static str,
    },
    /// The host does not support it as configured.
    #[error("{what}: {remedy}")]
    Host {
        /// The obstacle.
        what: String,
        /// What to do.
        remedy: String,
    },
}

/// Why a peer is not programmed. Shown in the status; the peer's next record may correct it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[non_exhaustive]
pub enum Skip {
    /// The peer's backend data does not parse.
    #[error("backend data: {}", Plain(.0))]
    BadData(String),
    /// The peer publishes no address or subnet of this family.
    #[error("publishes no {0} address or subnet")]
    NoAddress(Family),
    /// The peer is not on a link of this host, which this backend requires.
    #[error("{addr} is not on-link: {remedy}")]
    NotOnLink {
        /// The peer's public address.
        addr: IpAddr,
        /// What to do.
        remedy: &'static str,
    },
    /// Something the backend depends on is missing, such as a device that another program creates.
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
    /// Returns the reason for a `field` of the lease, such as `BackendData`, in which `error` was found.
    pub fn bad_data(field: &str, error: &ConfigError) -> Self {
        let problem = &error.problem;
        Self::BadData(match error.path.strip_prefix("$.") {
            Some(key) => format!("{field}: {key}: {problem}"),
            None => format!("{field}: {problem}"),
        })
    }

    /// Returns the kind as one word, as status pages show it. Stable.
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

/// A data plane: a deterministic function from its arguments to the wanted kernel state.
///
/// It has no I/O, clock or state of its own. One part of the result belongs to the node itself
/// ([`base`](Backend::base)), and one part to each peer ([`peer`](Backend::peer)); their keys are disjoint.
/// [`testing::backend_contract`](crate::testing::backend_contract) checks an implementation.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Backend: Send + Sync + 'static {
    /// Returns the backend's name in the configuration's `Backend.Type`. It is registered under the same name with
    /// [`Builder::backend`](crate::overlay::Builder::backend).
    fn name(&self) -> &'static str;

    /// Returns the `BackendType` of its leases: empty for udp and alloc (docs/compatibility.md, "Lease attributes").
    /// Peers of another type are quarantined.
    fn wire_type(&self) -> &'static str;

    /// Returns whether the backend ever needs kernel state. If not, a process without the privilege to change the
    /// kernel may run it.
    fn writes(&self) -> bool;

    /// Returns the route tables and metrics that the backend uses in addition to [`RouteSlot::MAIN`], on any node.
    /// Every audit reads each of these tables completely.
    fn slots(&self) -> Vec<RouteSlot>;

    /// Returns the devices the backend uses, in the order of [`LinkId::Own`](crate::kernel::LinkId::Own). A backend may
    /// only request objects on these devices and routes in the network.
    fn devices(&self, local: &LocalNode) -> Vec<Device>;

    /// Returns the MTU for pods, or `None` for the uplink's.
    fn mtu(&self, context: &NodeContext) -> Option<Mtu>;

    /// Returns the attributes to publish. They must not contain a MAC address in [`NodeContext::taken`].
    ///
    /// # Errors
    /// [`BackendError`] when the backend cannot run on this host as configured. Final until one of the two changes.
    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError>;

    /// Returns the MAC address of a peer with these attributes, if the backend uses MAC addresses. No two peers may
    /// share one.
    ///
    /// # Errors
    /// [`Skip::BadData`] when the attributes do not parse.
    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip>;

    /// Returns the wanted devices and addresses. Total and deterministic. The agent sets the group and alias of the
    /// devices, and ignores the values returned here.
    fn base(&self, local: &LocalNode) -> State;

    /// Returns the kernel state for one peer in one family. Returns a [`Skip`] if the network does not have this
    /// family.
    ///
    /// # Errors
    /// [`Skip`] says why the peer gets no kernel state.
    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip>;
}
