//! The settings of an agent. While it runs, only the uplink selection and the addresses from the store change.

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
    /// Acquire a lease again, with the same subnet if it is still free; the data plane stays up meanwhile.
    #[default]
    Reacquire,
    /// Keep the data plane as it is and do nothing; the embedder decides.
    Keep,
    /// End [`Overlay::run`](crate::overlay::Overlay::run) with
    /// [`OverlayError::LeaseLost`](crate::overlay::OverlayError::LeaseLost).
    Stop,
}

/// What the end of a run does to the kernel, as the embedder decides.
///
/// A run that ends by itself, by an error, a policy or a panic, keeps everything: pods continue to work, and the next
/// run takes over, or [`Overlay::remove`](crate::overlay::Overlay::remove) cleans up. The one exception is a first run
/// on a node that finds that the kernel cannot be used: it releases the lease that it acquired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Teardown {
    /// Keeps everything: traffic continues, and the next run takes over. For a restart or an upgrade.
    Keep,
    /// Removes all of the overlay's objects, releases the lease and deletes `subnet.env`. For a node that leaves.
    Remove,
}

/// What to do when there is no uplink at start, for example because the agent starts before the network is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum MissingUplink {
    /// End [`Overlay::run`](crate::overlay::Overlay::run) with
    /// [`OverlayError::Uplink`](crate::overlay::OverlayError::Uplink).
    #[default]
    Fail,
    /// Retry, at most 5 s apart, and show the error in the status. A selection that no host can satisfy is still an
    /// error.
    Wait,
}

/// Where `subnet.env` is written, and its value for masquerading.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubnetEnvFile {
    /// The path of the file. Its directory is created if needed.
    pub path: PathBuf,
    /// Which component masquerades packets that leave the network (`FLANNEL_IPMASQ`).
    pub masquerade: Masquerade,
}

impl SubnetEnvFile {
    /// Creates the setting for a file at this path.
    pub fn new(path: impl Into<PathBuf>, masquerade: Masquerade) -> Self {
        Self { path: path.into(), masquerade }
    }
}

/// Which component masquerades packets that leave the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masquerade {
    /// The agent's side: `FLANNEL_IPMASQ=true`, so the CNI plug-in does not.
    Agent,
    /// The CNI plug-in: `FLANNEL_IPMASQ=false`.
    Plugin,
}

/// What to do when the configuration in the store differs from the one in force: other networks, another backend, other
/// backend settings, or another packet filter. A change of pools is ignored. The agent asks the store each time contact
/// is restored.
///
/// With any policy, the agent acquires no lease of other networks, nor, if the store gives its configuration, of
/// another backend or other backend settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ConfigPolicy {
    /// Keep the configuration in force until the agent is started again.
    Keep,
    /// End with [`OverlayError::Reconfigured`](crate::overlay::OverlayError::Reconfigured) if the first answer of the
    /// store differs from the configuration that the agent started with, as after a start from a state file; later keep
    /// it. So a change takes effect when an operator restarts the agents, and not at the next loss of contact.
    #[default]
    KeepOnceConfirmed,
    /// End with [`OverlayError::Reconfigured`](crate::overlay::OverlayError::Reconfigured).
    Stop,
}

/// The settings of an agent, with the identity of its node.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) name: OverlayName,
    /// The node's name in the store, once the store has answered; `None` if the store identifies the node by its public
    /// address.
    pub(crate) node: Option<NodeIdentity>,
    pub(crate) uplink: Select,
    pub(crate) missing_uplink: MissingUplink,
    /// Addresses to publish, from the builder.
    pub(crate) public: Dual<IpAddr>,
    /// Addresses to publish, from the store.
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

    /// Returns the settings with the identity and addresses of `node`.
    pub(crate) fn for_node(&self, node: ThisNode) -> Self {
        let ThisNode { name, public } = node;
        Self { node: name, store_public: public, ..self.clone() }
    }

    /// The addresses that were set for this node to publish.
    pub(crate) fn public_override(&self) -> Dual<IpAddr> {
        let (first, second) = (self.public, self.store_public);
        Dual { v4: first.v4.or(second.v4), v6: first.v6.or(second.v6) }
    }
}
