//! Kubernetes lease store of flannelkit, byte for byte compatible with flannel: nodes with Go flannel and with this
//! crate share one cluster.
//!
//! A node's subnets are its Node's podCIDRs, which kube-controller-manager assigns. The node publishes annotations of
//! its Node; all annotations of one change are in one patch of the Node's status:
//!
//! ```text
//! flannel.alpha.coreos.com/kube-subnet-manager   true
//! flannel.alpha.coreos.com/backend-type          vxlan
//! flannel.alpha.coreos.com/backend-data          {"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}
//! flannel.alpha.coreos.com/backend-v6-data       the same for IPv6
//! flannel.alpha.coreos.com/public-ip             192.168.64.3
//! flannel.alpha.coreos.com/public-ipv6           the same for IPv6
//! ```
//!
//! An operator can set `public-ip-overwrite` and `public-ipv6-overwrite` (published instead of the address that the
//! node uses), and `node-public-ip` and `node-public-ipv6` (the address that the node should use).
//!
//! Leases do not expire. A lease is fenced by its Node's uid: a Node that was deleted and created again is a different
//! one. All Nodes are listed once, from the API server's cache, and watched from then on. Of each Node only the name,
//! uid, podCIDRs and these annotations are kept. Everything is read as Kubernetes' protobuf, which costs server and
//! client less than JSON.
//!
//! Each request is sent once and has a deadline. If the server asks clients to wait (`Retry-After`), all calls wait: at
//! most a minute, and a random part of a fifth more.
//!
//! The program that links this crate chooses the Kubernetes version of the types in `k8s-openapi`, by a feature of that
//! crate.
//!
//! ```no_run
//! use flannel_subnet_kube::{Access, ConfigSource, KubeSubnets, NodeName, Options};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Access::in_cluster().client().await?;
//! let config = ConfigSource::File("/etc/kube-flannel/net-conf.json".into());
//! let store = KubeSubnets::new(client, Options::new(NodeName::from_env()?, config));
//! # Ok(())
//! # }
//! ```

mod annotations;
mod api;
mod check;
mod connect;
mod credentials;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod keys;
mod list_watch;
mod node;
mod nodes;
mod plug_in;
mod protobuf;
#[cfg(test)]
mod scripted;
mod store;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::hash_map::RandomState;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want, with_config_file};
use futures_util::stream::BoxStream;
use tokio::sync::OnceCell;

use api::Api;
use keys::Keys;
use store::Store;

pub use check::{Check, Subject, Verdict};
pub use connect::{Access, AccessError, Connection};
pub use error::KubeError;
pub use keys::{AnnotationPrefix, AnnotationPrefixError};

/// Identifies this node's Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeName {
    /// The Node of this name.
    Named(NodeIdentity),
    /// The Node that this Pod runs on.
    OfPod {
        /// The Pod's namespace.
        namespace: String,
        /// The Pod's name.
        pod: String,
    },
}

/// The environment does not identify the Node. Final until it is fixed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{problem}; set NODE_NAME to the node's name (in a Pod: from fieldRef spec.nodeName), or POD_NAME and POD_NAMESPACE"
)]
pub struct NodeNameError {
    problem: String,
}

impl NodeName {
    /// Reads the environment as flannel does: `NODE_NAME`, else the Pod `POD_NAME` in `POD_NAMESPACE`.
    ///
    /// # Errors
    /// [`NodeNameError`] if none of them is set, or the name is not valid. Final until that is fixed.
    pub fn from_env() -> Result<Self, NodeNameError> {
        Self::of(|name| std::env::var(name).ok())
    }

    /// Like [`from_env`](Self::from_env), with other variables than the process's.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self, NodeNameError> {
        let given = |name| variable(name).filter(|text| !text.is_empty());
        if let Some(name) = given("NODE_NAME") {
            let name = NodeIdentity::new(&name);
            return name.map(Self::Named).map_err(|error| NodeNameError { problem: format!("NODE_NAME: {error}") });
        }
        match (given("POD_NAMESPACE"), given("POD_NAME")) {
            (Some(namespace), Some(pod)) => Ok(Self::OfPod { namespace, pod }),
            _ => Err(NodeNameError { problem: "it is not known which node this is".to_owned() }),
        }
    }
}

/// The source of the network's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigSource {
    /// A file with flannel's JSON document, read again for each call that needs it; a renewal does not.
    File(PathBuf),
    /// This configuration.
    Fixed(NetworkConfig),
}

/// How long to wait for the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// The longest time from a request to the end of its answer, or to the next piece of a list. Default: 10 s. A list
    /// of all Nodes may take 30 s to begin, because a busy server queues it.
    pub request: Duration,
    /// The longest silence of a watch: then it is reopened where it was. Default: 45 s, so that with
    /// [`request`](Self::request) a silent server is detected within a minute.
    pub silence: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { request: Duration::from_secs(10), silence: Duration::from_secs(45) }
    }
}

impl Timeouts {
    /// Sets the limit for a request with its answer.
    #[must_use]
    pub fn with_request(self, request: Duration) -> Self {
        Self { request, ..self }
    }

    /// Sets the limit for the silence of a watch.
    #[must_use]
    pub fn with_silence(self, silence: Duration) -> Self {
        Self { silence, ..self }
    }
}

/// The options of a [`KubeSubnets`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Identifies this node's Node.
    pub node: NodeName,
    /// The source of the network's configuration.
    pub config: ConfigSource,
    /// The prefix of the annotations' names. Default: `flannel.alpha.coreos.com/`.
    pub prefix: AnnotationPrefix,
    /// How long to wait for the API server.
    pub timeouts: Timeouts,
    /// Addresses to publish if the Node has no annotation `node-public-ip` or `node-public-ipv6`. Default: none.
    pub public: Dual<IpAddr>,
    /// The API server's URL in errors ([`Connection::server`]). Default: empty; then errors do not name the server.
    pub server: String,
}

impl Options {
    /// Creates options with this node, this configuration, and defaults for the rest.
    pub fn new(node: NodeName, config: ConfigSource) -> Self {
        Self {
            node,
            config,
            prefix: AnnotationPrefix::default(),
            timeouts: Timeouts::default(),
            public: Dual::default(),
            server: String::new(),
        }
    }

    /// Sets the prefix of the annotations' names.
    #[must_use]
    pub fn with_prefix(self, prefix: AnnotationPrefix) -> Self {
        Self { prefix, ..self }
    }

    /// Sets the addresses to publish if the Node's annotations have none.
    #[must_use]
    pub fn with_public(self, public: Dual<IpAddr>) -> Self {
        Self { public, ..self }
    }

    /// Sets the server's URL in errors.
    #[must_use]
    pub fn with_server(self, server: String) -> Self {
        Self { server, ..self }
    }

    /// Sets the timeouts.
    #[must_use]
    pub fn with_timeouts(self, timeouts: Timeouts) -> Self {
        Self { timeouts, ..self }
    }
}

/// The kind of an Event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// For information.
    Normal,
    /// Something does not work.
    Warning,
}

impl EventKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// Leases in Kubernetes.
///
/// Clones share one client.
#[derive(Clone)]
pub struct KubeSubnets {
    store: Arc<Store>,
}

impl KubeSubnets {
    /// Creates a store with an existing client. The client needs no timeouts of its own, and should not repeat requests
    /// (`kube::Config::default_retry`), because the agent retries. A client that requests compressed answers reads a
    /// tenth of the bytes of a list. [`Access::connect`] creates such a client.
    pub fn new(client: kube::Client, options: Options) -> Self {
        let Options { node, config, prefix, timeouts, public, server } = options;
        let store = Store {
            api: Api::new(client, timeouts, server),
            keys: Keys::new(prefix),
            published: Arc::default(),
            node,
            name: OnceCell::new(),
            config,
            public,
            last_read: Mutex::default(),
            hasher: RandomState::new(),
        };
        Self { store: Arc::new(store) }
    }

    /// Writes the Node's condition `NetworkUnavailable`: False with flannel's reason and message, or True, which
    /// flannel never writes. Clouds taint Nodes until it is False. Call it once the overlay is ready, and again until
    /// it succeeds.
    ///
    /// # Errors
    /// Retry on [`SubnetError::Unavailable`], [`SubnetError::Denied`] and [`SubnetError::Unconfigured`].
    ///
    /// # Cancel safety
    /// If dropped, the condition may or may not be written.
    pub async fn set_network_unavailable(&self, is_unavailable: bool) -> Result<(), SubnetError> {
        self.store.set_network_unavailable(is_unavailable).await
    }

    /// Creates an Event about the Node, which `kubectl describe node` shows and the API server keeps for an hour by default.
    /// The reason is a word in CamelCase. Of a message only the first 1000 bytes are kept, with a note that it was cut.
    ///
    /// Needs the right to create `events` in the namespace `default`, which Go flannel's role does not have.
    ///
    /// # Errors
    /// Retry on [`SubnetError::Unavailable`] and [`SubnetError::Unconfigured`]; on [`SubnetError::Denied`] once the role has
    /// changed.
    ///
    /// # Cancel safety
    /// If dropped, the Event may or may not be created.
    pub async fn record_event(&self, kind: EventKind, reason: &str, message: &str) -> Result<(), SubnetError> {
        self.store.record_event(kind, reason, message).await
    }

    /// Checks what an agent needs from the cluster: rights, clocks, the own Node and its annotations. Writes nothing;
    /// failures are returned as [`Check`]s. Each request takes at most [`Timeouts::request`], and longer only if the
    /// server asked to wait.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn check(&self) -> Vec<Check> {
        self.store.check().await
    }
}

#[async_trait]
impl SubnetManager for KubeSubnets {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        self.store.this_node().await
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.store.config().await
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        self.store.previous(node).await
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        self.store.acquire(node, want).await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.store.renew(lease).await
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.store.release(&lease).await
    }

    async fn changed(&self) {
        self.store.changed().await;
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        let watch = watch::watch(Arc::clone(&self.store));
        match &self.store.config {
            ConfigSource::File(path) => with_config_file(watch, path.clone()),
            ConfigSource::Fixed(_) => watch,
        }
    }
}
