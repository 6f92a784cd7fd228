//! The choice of the lease store.

use std::future::ready;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::clock::SystemClock;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use flannel_subnet_cached::CachedSubnets;
use flannel_subnet_etcd::EtcdSubnets;
use flannel_subnet_file::{FileSubnets, LeaseTime, LeaseTimeError, Options as FileOptions, Ttl};
use flannel_subnet_kube::{AccessError, ConfigSource, Connection, KubeSubnets, NodeName};
use futures_util::stream::{self, BoxStream, StreamExt};

use crate::credentials::{self, CredentialError};
use crate::options::{KubeOptions, StateFile, StoreLocation, StoreOptions};

/// An opened store.
pub(crate) struct Opened {
    pub(crate) subnets: Arc<dyn SubnetManager>,
    /// The store's addresses, which no peer may publish.
    pub(crate) addresses: Vec<IpAddr>,
    /// The name to show.
    pub(crate) name: String,
    /// The state file that replaces the store while it is unavailable.
    pub(crate) state: Option<Arc<CachedSubnets>>,
    /// The same store, for checks of its permissions.
    pub(crate) etcd: Option<EtcdSubnets>,
    /// The same store, if it is Kubernetes: it also shows the agent's state at the Node.
    pub(crate) node: Option<NodeStatus>,
}

/// Shows the agent's state at its Node in Kubernetes.
#[derive(Clone)]
pub(crate) struct NodeStatus {
    pub(crate) store: KubeSubnets,
    /// Whether the condition NetworkUnavailable is written. Events are created in any case.
    pub(crate) sets_condition: bool,
}

impl Opened {
    /// Keeps the store's last state in `file`.
    pub(crate) fn with_state_file(self, file: Option<&StateFile>) -> Self {
        let Some(file) = file else { return self };
        let clock = Arc::new(SystemClock::default());
        let state = Arc::new(CachedSubnets::new(self.subnets, &file.path, self.name.clone(), clock));
        Self { subnets: Arc::clone(&state) as Arc<dyn SubnetManager>, state: Some(state), ..self }
    }
}

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("opening the lease store in {dir}")]
    Dir {
        dir: String,
        #[source]
        source: SubnetError,
    },
    #[error("-subnet-lease-ttl")]
    Ttl(#[from] LeaseTimeError),
    #[error(
        "user and password would be sent to {0} unencrypted: write https://, or give -etcd-allow-clear-text-credentials"
    )]
    ClearText(String),
    #[error(transparent)]
    Credential(#[from] CredentialError),
    #[error("etcd")]
    Etcd(#[source] flannel_subnet_etcd::ConfigError),
    #[error("the Kubernetes API")]
    Kube(#[from] AccessError),
}

impl From<flannel_subnet_etcd::ConfigError> for StoreError {
    fn from(error: flannel_subnet_etcd::ConfigError) -> Self {
        match error {
            flannel_subnet_etcd::ConfigError::CredentialsOverClearText(endpoint) => Self::ClearText(endpoint),
            error => Self::Etcd(error),
        }
    }
}

/// Opens the store that the options name. Sends no request to etcd or the Kubernetes API yet: they may be unavailable.
pub(crate) async fn open(options: &StoreOptions) -> Result<Opened, StoreError> {
    match &options.location {
        StoreLocation::Dir { dir, node } => {
            let ttl = Ttl::After(LeaseTime::new(options.ttl)?);
            let subnets = FileSubnets::open(dir, FileOptions::default().for_node(node.clone()).with_ttl(ttl))
                .map_err(|source| StoreError::Dir { dir: dir.display().to_string(), source })?;
            Ok(Opened {
                subnets: Arc::new(subnets),
                addresses: Vec::new(),
                name: format!("directory {}", dir.display()),
                state: None,
                etcd: None,
                node: None,
            })
        }
        StoreLocation::Etcd(config) => {
            credentials::check(config)?;
            let ttl = flannel_subnet_etcd::Ttl::new(options.ttl)?;
            let subnets = EtcdSubnets::new(flannel_subnet_etcd::Config::clone(config).with_ttl(ttl))?;
            Ok(Opened {
                subnets: Arc::new(subnets.clone()),
                addresses: config.endpoints.iter().filter_map(|endpoint| address(endpoint)).collect(),
                name: format!("etcd {} under {}", config.endpoints.join(","), config.prefix),
                state: None,
                etcd: Some(subnets),
                node: None,
            })
        }
        StoreLocation::Kube(kube) => {
            let (subnets, server) = kubernetes(kube).await?;
            Ok(Opened {
                subnets: Arc::new(subnets.clone()),
                addresses: address(&server).into_iter().collect(),
                name: format!("Kubernetes {server} under {}", kube.prefix),
                state: None,
                etcd: None,
                node: Some(NodeStatus { store: subnets, sets_condition: kube.sets_condition }),
            })
        }
    }
}

/// Returns the store in Kubernetes, and the API server's URL.
pub(crate) async fn kubernetes(kube: &KubeOptions) -> Result<(KubeSubnets, String), AccessError> {
    let Connection { client, server, .. } = kube.access.connect().await?;
    let options = flannel_subnet_kube::Options::new(kube.node.clone(), ConfigSource::File(kube.config.clone()));
    let options = options.with_prefix(kube.prefix.clone()).with_public(kube.public).with_server(server.clone());
    Ok((KubeSubnets::new(client, options), server))
}

/// Returns a store that is always unavailable, for one that cannot be opened. A cleanup of this host works without the
/// store.
pub(crate) fn unavailable(options: &StoreOptions, error: StoreError) -> Opened {
    let node = match &options.location {
        StoreLocation::Dir { node, .. } => ThisNode::named(node.clone()),
        StoreLocation::Kube(kube) => match &kube.node {
            NodeName::Named(name) => ThisNode::named(name.clone()),
            NodeName::OfPod { .. } => ThisNode::by_address(),
        },
        StoreLocation::Etcd(_) => ThisNode::by_address(),
    };
    let subnets = Arc::new(UnavailableStore { node, reason: crate::chain(&error) });
    let name = "unavailable".to_owned();
    Opened { subnets, addresses: Vec::new(), name, state: None, etcd: None, node: None }
}

/// A store that is always unavailable, for this reason.
struct UnavailableStore {
    node: ThisNode,
    reason: String,
}

impl UnavailableStore {
    fn unavailable<T>(&self, doing: &'static str) -> Result<T, SubnetError> {
        Err(SubnetError::Unavailable { doing, source: self.reason.clone().into() })
    }
}

#[async_trait]
impl SubnetManager for UnavailableStore {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        Ok(self.node.clone())
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.unavailable("reading the network configuration")
    }

    async fn previous(&self, _: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        self.unavailable("looking for the own lease")
    }

    async fn acquire(&self, _: &NodeIdentity, _: Want) -> Result<Lease, SubnetError> {
        self.unavailable("acquiring a lease")
    }

    async fn renew(&self, _: &Lease) -> Result<Lease, SubnetError> {
        self.unavailable("renewing the lease")
    }

    async fn release(&self, _: Lease) -> Result<(), SubnetError> {
        self.unavailable("releasing the lease")
    }

    async fn changed(&self) {
        std::future::pending().await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        let error: Result<LeaseEvent, SubnetError> = self.unavailable("watching the leases");
        stream::once(ready(error)).chain(stream::pending()).boxed()
    }
}

/// Returns the address in an endpoint, if it is not a host name and not a loopback address.
fn address(endpoint: &str) -> Option<IpAddr> {
    let host = endpoint.rsplit("://").next()?.trim_end_matches('/');
    let socket: Result<SocketAddr, _> = host.parse();
    socket
        .map(|socket| socket.ip())
        .or_else(|_| host.trim_matches(['[', ']']).parse())
        .ok()
        .filter(|ip| !ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_with_an_address_name_it() {
        for (endpoint, wanted) in [
            ("http://10.0.0.1:2379", Some("10.0.0.1")),
            ("10.0.0.1", Some("10.0.0.1")),
            ("https://[fd00::1]:2379/", Some("fd00::1")),
            ("https://[fd00::1]", Some("fd00::1")),
            ("https://etcd.example:2379", None),
            ("http://127.0.0.1:2379", None),
        ] {
            assert_eq!(address(endpoint).map(|ip| ip.to_string()).as_deref(), wanted, "{endpoint}");
        }
    }
}
