//! The trait for lease stores: etcd, Kubernetes, files, memory.

mod config_file;
mod want;

use std::net::IpAddr;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::allocation::ChooseError;
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent};
use crate::net::Dual;
use crate::text::Plain;

pub use config_file::with_config_file;
pub use want::{OwnLeases, Want};

/// A node's identity in the store: its public IP in etcd, the node's name in Kubernetes and the file store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeIdentity(String);

/// The node identity is empty, too long or not printable. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node identity {0:?} must be 1 to 253 characters out of letters, digits, '.', '-', '_' and ':'")]
pub struct NodeIdentityError(String);

impl NodeIdentity {
    /// Validates `text`, because it becomes a file name, part of a key or a Kubernetes name.
    ///
    /// # Errors
    /// [`NodeIdentityError`] when the text is not valid. Final for this input.
    pub fn new(text: &str) -> Result<Self, NodeIdentityError> {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if text.is_empty() || text.len() > 253 || text.starts_with('.') || !text.chars().all(ok) {
            return Err(NodeIdentityError(text.chars().take(64).collect()));
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the identity of a node in a store that identifies nodes by public address (etcd).
    pub fn of_address(addr: IpAddr) -> Self {
        Self(addr.to_string())
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for NodeIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a store identifies this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ThisNode {
    /// The node's name, if the store identifies nodes by name (Kubernetes, files). `None` if it identifies them by the
    /// address they publish, IPv4 if there is one (etcd). Then the address is the identity, and other evidence has to
    /// show which node a lease under that address belongs to.
    pub name: Option<NodeIdentity>,
    /// Addresses that an operator set in the store for this node to publish, for the families that are set. Addresses
    /// given to [`Builder::public`](crate::overlay::Builder::public) take precedence.
    pub public: Dual<IpAddr>,
}

impl ThisNode {
    /// Creates the identity of a node that the store identifies by this name.
    pub fn named(name: NodeIdentity) -> Self {
        Self { name: Some(name), ..Self::default() }
    }

    /// Creates the identity of a node that the store identifies by the address it publishes.
    pub fn by_address() -> Self {
        Self::default()
    }

    /// Sets the addresses to publish.
    #[must_use]
    pub fn publishing(self, public: Dual<IpAddr>) -> Self {
        Self { public, ..self }
    }
}

/// Why a store call failed. The kind determines the agent's reaction (docs/design.md, "Errors and retries").
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubnetError {
    /// The store cannot be reached or did not answer. Retry with back-off; the outcome of a write is unknown.
    #[error("lease store unavailable while {doing}")]
    Unavailable {
        /// The operation that failed.
        doing: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store denied access. Retry with back-off: an operator has to act.
    #[error("lease store denied {doing}")]
    Denied {
        /// The operation that failed.
        doing: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store lacks the requested object: a network configuration, the node, its subnets. Retry with back-off, or
    /// once [`SubnetManager::changed`] returns: an operator or another program has to write it.
    #[error("{}: {}", Plain(.at), Plain(.reason))]
    Unconfigured {
        /// The missing object: a key or a file.
        at: String,
        /// How to write it.
        reason: String,
    },
    /// The store contains an invalid value; `at` names the place. Fatal at start; later, the last valid value stays in
    /// force.
    #[error("{}: {}", Plain(.at), Plain(.reason))]
    Invalid {
        /// The place: a key, a file, a JSON path.
        at: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The store's network or backend differs from the one that the agent was started with. The agent acquires no
    /// lease, because it would then serve two networks. Retry with back-off: an operator has to restart the agent or to
    /// restore the former configuration.
    #[error(
        "the network configuration changed since this agent started: restart it; \
         until then it keeps devices and routes, and acquires no lease"
    )]
    Reconfigured,
    /// No subnet in the pool is free. Retry at most once a second.
    #[error("no free subnet: {}", Plain(.0))]
    Exhausted(String),
    /// The node no longer has the lease: its record is gone or belongs to another node. Acquire again.
    #[error("lease lost: {}", Plain(.0))]
    Lost(String),
    /// The store does not support the request. Final; the message says what to choose instead.
    #[error("not supported by this store: {}", Plain(.0))]
    Unsupported(String),
}

impl SubnetError {
    /// Returns whether the error is an answer: the store is reachable and grants access, but does not have, or does not
    /// grant, what was asked for. While a store answers, contact with it is live
    /// ([`Contact::Live`](crate::overlay::Contact::Live)), whatever the answer.
    pub fn is_answer(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Denied { .. } => false,
            Self::Unconfigured { .. }
            | Self::Invalid { .. }
            | Self::Reconfigured
            | Self::Exhausted(_)
            | Self::Lost(_)
            | Self::Unsupported(_) => true,
        }
    }
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
/// Every write is fenced by the value that was read, so a node that was away never overwrites the new owner of its
/// subnet. [`testing::store_contract`](crate::testing::store_contract) checks an implementation.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait SubnetManager: Send + Sync + 'static {
    /// Returns how the store identifies this node. Each run of an agent calls this once, before anything else. The name
    /// stays in force for that run; [`watch`](Self::watch) reports changed addresses.
    ///
    /// # Errors
    /// [`SubnetError::Unavailable`], [`SubnetError::Denied`] and [`SubnetError::Unconfigured`] are worth a retry;
    /// [`SubnetError::Invalid`] and [`SubnetError::Unsupported`] are final.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    async fn this_node(&self) -> Result<ThisNode, SubnetError>;

    /// Returns the network's configuration.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] names the JSON path. [`SubnetError::Unconfigured`], [`SubnetError::Unavailable`] and
    /// [`SubnetError::Denied`] are worth a retry.
    ///
    /// # Cancel safety
    /// Reads only: may be dropped at any await.
    async fn network_config(&self) -> Result<NetworkConfig, SubnetError>;

    /// Returns the leases under this identity that fit the network, in the order of their keys. The agent keeps one of
    /// them, with its subnets and VTEP MAC address, across restarts.
    ///
    /// If the store identifies nodes by name, there is at most one: the last lease of this node. If it identifies nodes
    /// by published address, other nodes may publish the same one; the caller decides which leases are its own and
    /// passes that in [`Want::own`].
    ///
    /// # Errors
    /// As [`network_config`](Self::network_config).
    ///
    /// # Cancel safety
    /// Reads only.
    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError>;

    /// Acquires a lease for `node`: its own again ([`Want::own`]) if it has one that still fits the network, else
    /// `want.preferred` if free, else any free subnet chosen uniformly. Publishes `want.attrs`. Idempotent per node.
    /// Does not change records of other nodes, even under the same identity.
    ///
    /// # Errors
    /// [`SubnetError::Exhausted`] when the pool is full; [`SubnetError::Unconfigured`] when only the store can assign a
    /// subnet and has not done so yet (a Kubernetes podCIDR); others as above. A lost race is not an error: the store
    /// tries another subnet.
    ///
    /// # Cancel safety
    /// If dropped midway, the record may have been written; the next call adopts that record.
    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError>;

    /// Makes one fenced attempt to extend `lease`, and publishes `lease.attrs`. The agent decides when to call it.
    ///
    /// # Errors
    /// [`SubnetError::Lost`] when the record is gone, expired or belongs to another node; nothing was written.
    ///
    /// # Cancel safety
    /// If dropped midway, the outcome is unknown; call it again, or call [`previous`](Self::previous), to find out.
    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError>;

    /// Releases `lease`. If the lease no longer belongs to this node, returns success and changes nothing.
    ///
    /// # Errors
    /// [`SubnetError::Unavailable`] and [`SubnetError::Denied`]: the lease may still be held; retry.
    ///
    /// # Cancel safety
    /// As [`renew`](Self::renew).
    async fn release(&self, lease: Lease) -> Result<(), SubnetError>;

    /// Waits until the store may have the object that was missing when it last returned [`SubnetError::Unconfigured`]
    /// to this node. An agent waiting for its first lease then retries, at the latest when its back-off has passed. May
    /// return early. A store that cannot detect such changes never returns.
    ///
    /// # Cancel safety
    /// Reads only: may be dropped at any await.
    async fn changed(&self);

    /// Returns a stream of all records, including this node's own. The first event about records is
    /// [`LeaseEvent::Reset`]; another one follows after any gap. The stream never ends. An `Err` is an error to report:
    /// the stream recovers by itself, with back-off. The next event but [`LeaseEvent::ConfigChanged`], and
    /// [`LeaseEvent::Resumed`] if there is no other, shows that it has recovered.
    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>>;
}
