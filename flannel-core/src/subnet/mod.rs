//! The seam to the lease store: etcd, Kubernetes, files, memory.

mod want;

use std::net::IpAddr;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::allocation::ChooseError;
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent};
use crate::net::Dual;
use crate::text::Plain;

pub use want::{OwnLeases, Want};

/// What the store knows a node by: its public IP in etcd, the node's name in Kubernetes and the file store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeIdentity(String);

/// A node identity is empty, too long or not printable. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node identity {0:?} must be 1 to 253 characters out of letters, digits, '.', '-', '_' and ':'")]
pub struct NodeIdentityError(String);

impl NodeIdentity {
    /// Checks and keeps `text`: it becomes a file name, a part of a key or a Kubernetes name.
    ///
    /// # Errors
    /// [`NodeIdentityError`]. Final for this input.
    pub fn new(text: &str) -> Result<Self, NodeIdentityError> {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if text.is_empty() || text.len() > 253 || text.starts_with('.') || !text.chars().all(ok) {
            return Err(NodeIdentityError(text.chars().take(64).collect()));
        }
        Ok(Self(text.to_owned()))
    }

    /// The identity of a node that the store knows by its public address: etcd.
    pub fn of_address(addr: IpAddr) -> Self {
        Self(addr.to_string())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for NodeIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who a node is to a store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ThisNode {
    /// Its name, where the store knows nodes by name (Kubernetes, files). `None` where it knows them by the address that
    /// they publish, IPv4 if there is one (etcd): then the address is the identity, and whose a lease under it is has to be
    /// told by other signs.
    pub name: Option<NodeIdentity>,
    /// Addresses that an operator set in the store for this node to publish, of the families that are set. Those given to
    /// [`Builder::public`](crate::overlay::Builder::public) come first.
    pub public: Dual<IpAddr>,
}

impl ThisNode {
    /// A node that the store knows by this name.
    pub fn named(name: NodeIdentity) -> Self {
        Self { name: Some(name), ..Self::default() }
    }

    /// A node that the store knows by the address that it publishes.
    pub fn by_address() -> Self {
        Self::default()
    }

    /// The same, with these addresses to publish.
    #[must_use]
    pub fn publishing(self, public: Dual<IpAddr>) -> Self {
        Self { public, ..self }
    }
}

/// Why a store call failed. The kind drives the agent's reaction (docs/design.md, "Errors and retries").
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubnetError {
    /// The store cannot be reached or did not answer. Retry with back-off; the outcome of a write is unknown.
    #[error("lease store unavailable while {doing}")]
    Unavailable {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store refuses us. Retry with back-off: an operator has to act.
    #[error("lease store denied {doing}")]
    Denied {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store lacks what was asked for: a network configuration, the node, its subnets. Retry with back-off, or once
    /// [`SubnetManager::changed`] returns: somebody else has to write it.
    #[error("{}: {}", Plain(.at), Plain(.reason))]
    Unconfigured {
        /// The place: a key, a file.
        at: String,
        /// How to write it.
        reason: String,
    },
    /// The store holds something that is not valid: `at` names the place. Fatal at start, later the last good
    /// value stays in force.
    #[error("{}: {}", Plain(.at), Plain(.reason))]
    Invalid {
        /// The place: a key, a file, a JSON path.
        at: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The store holds another network or backend than the agent was started with, so it takes no lease: it would be an
    /// agent of two networks. Retry with back-off: an operator has to restart the agent, or to write the former
    /// configuration again.
    #[error(
        "the network configuration changed since this agent started: restart it; \
         until then it keeps devices and routes, and takes no lease"
    )]
    Reconfigured,
    /// No subnet is free in the pool. Retry, at most once a second.
    #[error("no free subnet: {}", Plain(.0))]
    Exhausted(String),
    /// The lease is not ours any more: its record is gone or another node's. Acquire again.
    #[error("lease lost: {}", Plain(.0))]
    Lost(String),
    /// The store cannot do what was asked. Final; the text says what to choose instead.
    #[error("not supported by this store: {}", Plain(.0))]
    Unsupported(String),
}

impl From<ChooseError> for SubnetError {
    fn from(error: ChooseError) -> Self {
        match error {
            ChooseError::Exhausted(_) | ChooseError::TooMany => Self::Exhausted(error.to_string()),
            ChooseError::NoPool(_) => Self::Unsupported(error.to_string()),
        }
    }
}

/// A store of leases.
///
/// Every write is fenced by what was read, so a node that was away can never overwrite the new owner of its subnet.
/// [`testing::store_contract`](crate::testing::store_contract) proves an implementation.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait SubnetManager: Send + Sync + 'static {
    /// Who this node is to the store. Asked once by each run of an agent, before anything else. The name stays in force for
    /// that run; addresses that change are reported by [`watch`](Self::watch).
    ///
    /// # Errors
    /// [`SubnetError::Unavailable`], [`SubnetError::Denied`] and [`SubnetError::Unconfigured`] are to be retried;
    /// [`SubnetError::Invalid`] and [`SubnetError::Unsupported`] are final.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    async fn this_node(&self) -> Result<ThisNode, SubnetError>;

    /// The network's configuration.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] names the JSON path; [`SubnetError::Unconfigured`], [`SubnetError::Unavailable`] and
    /// [`SubnetError::Denied`] are to be retried.
    ///
    /// # Cancel safety
    /// Reads only: may be dropped at any await.
    async fn network_config(&self) -> Result<NetworkConfig, SubnetError>;

    /// The leases that the store has under this identity and that fit the network, in the order of their keys: one of
    /// them keeps subnet and VTEP MAC across restarts.
    ///
    /// Where nodes have names there is one at most, the one this node held last. Where nodes are known by the address they
    /// publish, others may publish the same one: whose each is the caller judges, and tells with [`Want::own`].
    ///
    /// # Errors
    /// As [`network_config`](Self::network_config).
    ///
    /// # Cancel safety
    /// Reads only.
    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError>;

    /// Takes a lease for `node`: its own again ([`Want::own`]) if it has one that still fits the network, else
    /// `want.preferred` if free, else any free subnet chosen uniformly. Idempotent per node; publishes `want.attrs`.
    /// Leaves records of other nodes as they are, also those under the same identity.
    ///
    /// # Errors
    /// [`SubnetError::Exhausted`] when the pool is full; [`SubnetError::Unconfigured`] where only the store can give a subnet
    /// and has not yet (a Kubernetes podCIDR); the others as above. A lost race is not an error: another
    /// subnet is tried.
    ///
    /// # Cancel safety
    /// Dropped midway it may have written the record; calling it again adopts that record.
    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError>;

    /// One fenced attempt to extend `lease`; the agent decides when. Publishes `lease.attrs`.
    ///
    /// # Errors
    /// [`SubnetError::Lost`] when the record is gone, expired or another node's: nothing was written.
    ///
    /// # Cancel safety
    /// Dropped midway the outcome is unknown; calling it again, or [`previous`](Self::previous), settles it.
    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError>;

    /// Gives `lease` back. A lease that is not ours any more is left alone: that is success.
    ///
    /// # Errors
    /// As [`network_config`](Self::network_config).
    ///
    /// # Cancel safety
    /// As [`renew`](Self::renew).
    async fn release(&self, lease: Lease) -> Result<(), SubnetError>;

    /// Waits until the store may have what it lacked when it last answered this node with [`SubnetError::Unconfigured`]: an
    /// agent that waits for its first lease asks again then, or when its back-off has passed. May return early; a store that
    /// cannot tell never returns.
    ///
    /// # Cancel safety
    /// Reads only: may be dropped at any await.
    async fn changed(&self);

    /// All records, the own one too. The first event is [`LeaseEvent::Reset`]; after any gap comes another. The
    /// stream never ends; an `Err` is trouble to show, not the end: the stream recovers by itself, with back-off, and
    /// says so with its next event, which is [`LeaseEvent::Resumed`] where there is nothing else to say.
    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>>;
}
