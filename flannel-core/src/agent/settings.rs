//! The settings of an agent: they do not change while it runs.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::agent::renewal::KnownBy;
use crate::kernel::{OverlayName, RouteSlot};
use crate::net::Dual;
use crate::subnet::{NodeIdentity, ThisNode};
use crate::uplink::Select;

/// What to do when the lease is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LossPolicy {
    /// Take a lease again, the same subnet if it is still free; the data plane stays up meanwhile.
    #[default]
    Reacquire,
    /// Keep the data plane as it is and do nothing; the embedder decides.
    Keep,
    /// End [`Overlay::run`](crate::overlay::Overlay::run) with
    /// [`OverlayError::LeaseLost`](crate::overlay::OverlayError::LeaseLost).
    Stop,
}

/// What the end of a run does to the kernel. Whoever ends it decides. A run that ends by itself, be it by an error, a policy
/// or a panic, keeps everything, since nobody has decided that the node is to leave: pods go on as they are, and the next run
/// takes over, or [`Overlay::remove`](crate::overlay::Overlay::remove) cleans up. There is one exception: a first run on a node
/// that shows that the kernel cannot be used gives back the lease that it took for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Teardown {
    /// Leaves everything up: traffic goes on, and the next run takes over. For a restart or an upgrade.
    Keep,
    /// Removes everything of ours, releases the lease and deletes `subnet.env`. For a node that leaves.
    Remove,
}

/// What to do when there is no uplink at start: the agent may be up before the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum MissingUplink {
    /// End [`Overlay::run`](crate::overlay::Overlay::run) with
    /// [`OverlayError::Uplink`](crate::overlay::OverlayError::Uplink).
    #[default]
    Fail,
    /// Look again, at most 5 s apart, and show in the status what is wrong. A selection that no host can fit is still
    /// an error.
    Wait,
}

/// Where `subnet.env` is written, and what it says of masquerading.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubnetEnvFile {
    /// The file. Its directory is made if needed.
    pub path: PathBuf,
    /// Who masquerades what leaves the network (`FLANNEL_IPMASQ`).
    pub masquerade: Masquerade,
}

impl SubnetEnvFile {
    /// The file at this path.
    pub fn new(path: impl Into<PathBuf>, masquerade: Masquerade) -> Self {
        Self { path: path.into(), masquerade }
    }
}

/// Who masquerades what leaves the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masquerade {
    /// The agent's side: `FLANNEL_IPMASQ=true`, so that the CNI plug-in does not.
    Agent,
    /// Not the agent: `FLANNEL_IPMASQ=false`.
    Plugin,
}

/// What to do when the store comes to hold another configuration than the agent goes by: other networks, another backend,
/// other settings of it, or another packet filter. Pools do not count. The store is asked each time that it speaks again. In
/// any case no lease is taken of other networks, nor, as far as the store says, of another backend or other settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ConfigPolicy {
    /// Go on with the configuration in force until the agent is started again.
    Keep,
    /// End with [`OverlayError::Reconfigured`](crate::overlay::OverlayError::Reconfigured) where the first answer of the store
    /// is another configuration than the agent started with, as after a start from a state file; later go on. So a change
    /// reaches all nodes when an operator starts them again, and not with the next loss of contact.
    #[default]
    KeepOnceConfirmed,
    /// End with [`OverlayError::Reconfigured`](crate::overlay::OverlayError::Reconfigured).
    Stop,
}

/// The settings of an agent, with who its node is.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) name: OverlayName,
    /// The node's name in the store, once the store was asked; `None` where it knows the node by its public address.
    pub(crate) node: Option<NodeIdentity>,
    pub(crate) uplink: Select,
    pub(crate) missing_uplink: MissingUplink,
    /// Addresses to publish, from the builder.
    pub(crate) public: Dual<IpAddr>,
    /// The same from the store.
    pub(crate) store_public: Dual<IpAddr>,
    pub(crate) store_addresses: Vec<IpAddr>,
    pub(crate) slots: Vec<RouteSlot>,
    pub(crate) on_loss: LossPolicy,
    pub(crate) on_reconfiguration: ConfigPolicy,
    pub(crate) audit_every: Duration,
    pub(crate) subnet_env: Option<SubnetEnvFile>,
}

impl Settings {
    /// The defaults of [`Builder`](crate::overlay::Builder).
    pub(crate) fn new() -> Self {
        Self {
            name: OverlayName::default(),
            node: None,
            uplink: Select::default(),
            missing_uplink: MissingUplink::default(),
            public: Dual::default(),
            store_public: Dual::default(),
            store_addresses: Vec::new(),
            slots: Vec::new(),
            on_loss: LossPolicy::default(),
            on_reconfiguration: ConfigPolicy::default(),
            audit_every: Duration::from_secs(30),
            subnet_env: None,
        }
    }

    /// What identifies the node to the store.
    pub(crate) fn known_by(&self) -> KnownBy {
        match self.node {
            Some(_) => KnownBy::Name,
            None => KnownBy::Address,
        }
    }

    /// The same, for the node that the store knows as `node`.
    pub(crate) fn for_node(&self, node: ThisNode) -> Self {
        let ThisNode { name, public } = node;
        Self { node: name, store_public: public, ..self.clone() }
    }

    /// The addresses that somebody set for this node to publish.
    pub(crate) fn public_override(&self) -> Dual<IpAddr> {
        let (first, second) = (self.public, self.store_public);
        Dual { v4: first.v4.or(second.v4), v6: first.v6.or(second.v6) }
    }
}
