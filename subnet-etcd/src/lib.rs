//! etcd lease store of flannelkit, byte for byte compatible with flannel: nodes with Go flannel and with this crate
//! share one network.
//!
//! ```text
//! PREFIX/config                                  the network's configuration, flannel's document
//! PREFIX/subnets/10.5.34.0-24                    one record per node: flannel's lease JSON
//! PREFIX/subnets/10.5.34.0-24&fd00:12:13::-56    the same in a dual-stack network
//! ```
//!
//! A node is identified by its public IP. Every write of a lease is a transaction fenced by what was read: a node that
//! was away never overwrites the new owner of its subnet, and a lost race is retried. A record without an etcd lease is
//! an operator's reservation; it is used and renewed, and stays a reservation.
//!
//! Requests go to one member at a time and move to the next if it fails; a member that is slow to connect is not waited
//! for. Each request has a deadline. TLS files and the password file are read again for every new connection.
//! [`Lease::expires`] is known for the own lease only: the expiry of each peer's lease would need one request per
//! record.
//!
//! ```no_run
//! use flannel_subnet_etcd::{Config, EtcdSubnets};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let store = EtcdSubnets::new(Config::new(["http://127.0.0.1:2379"]))?;
//! for record in store.list().await? {
//!     println!("{} {:?}", record.key, record.lease);
//! }
//! # Ok(())
//! # }
//! ```

mod check;
mod config;
mod config_watch;
mod connect;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod list;
mod list_watch;
mod scheme;
mod shared_list;
mod store;
mod watch;
mod wire;
mod write;

use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::clock::{Clock, SystemClock};
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent, Record};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

pub use config::{
    ClearText, ClientCertificate, Config, ConfigError, Credentials, KeyPrefix, Password, Secret, Timeouts, Tls, Ttl,
};
pub use connect::credential_file;
pub use error::EtcdError;

use connect::Connector;
use store::Store;

/// Leases in etcd.
///
/// Clones share one connection and, until the first watch, one list of the records: it is used for a minute.
#[derive(Clone)]
pub struct EtcdSubnets {
    store: Arc<Store>,
}

impl EtcdSubnets {
    /// Creates a store that connects when it is first used, so that a node can start while etcd is unavailable.
    ///
    /// # Errors
    /// [`ConfigError`] names what to change. Final for this configuration.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let (prefix, ttl) = (config.prefix.clone(), config.ttl);
        Ok(Self::of(Connector::new(config)?, &prefix, ttl))
    }

    /// Creates a store with an existing client and the client's settings: TLS, user, keep-alive. Without keep-alive a
    /// frozen member is not detected; without automatic token refresh a log-in ends after minutes.
    pub fn with_client(client: etcd_client::Client, prefix: &KeyPrefix, ttl: Ttl, timeouts: Timeouts) -> Self {
        Self::of(Connector::ready(client, prefix.config(), timeouts), prefix, ttl)
    }

    /// Sets the clock of [`Lease::expires`]. Default: the machine's.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { store: Arc::new(Store { clock, ..Store::clone(&self.store) }) }
    }

    /// Writes the network's configuration and replaces the old one. Leases that no longer fit stay until their nodes
    /// acquire again.
    ///
    /// The last writer wins: an operator's configuration does not depend on the old one, so there is no read to fence
    /// it by. A concurrent acquire is fenced by the configuration that it read, and starts over.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] if it would not read back unchanged (a network without a pool): final. Otherwise retry.
    ///
    /// # Cancel safety
    /// If dropped, the configuration may or may not be written, but is never incomplete.
    pub async fn put_config(&self, config: &NetworkConfig) -> Result<(), SubnetError> {
        let text = config.to_json();
        if self.store.parse_config(text.as_bytes())? != *config {
            return Err(SubnetError::Invalid {
                at: "network configuration".to_owned(),
                reason: "it does not read back as it is; give each network a pool".to_owned(),
            });
        }
        self.put_config_json(&text).await
    }

    /// Writes the network's configuration as flannel's JSON document, unchanged.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] names the JSON path: final for this text, and nothing is written. Otherwise as
    /// [`put_config`](Self::put_config).
    ///
    /// # Cancel safety
    /// As [`put_config`](Self::put_config).
    pub async fn put_config_json(&self, json: &str) -> Result<(), SubnetError> {
        self.store.put_config(json).await
    }

    /// Returns all records in the order of their keys, as of one revision. Makes one request per thousand records.
    ///
    /// # Errors
    /// [`SubnetError::Unavailable`] and [`SubnetError::Denied`]: retry.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list(&self) -> Result<Vec<Record>, SubnetError> {
        self.store.list().await
    }

    /// Checks that this store's user may read the configuration and the leases, and write a lease. Changes nothing: the
    /// write is in a transaction whose condition never holds.
    ///
    /// # Errors
    /// [`SubnetError::Denied`] if a permission is missing; retry after an operator has granted it.
    /// [`SubnetError::Unavailable`]: retry.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn check_access(&self) -> Result<(), SubnetError> {
        self.store.check_access().await
    }

    /// Returns the roles of a user in etcd. A user may read their own.
    ///
    /// # Errors
    /// As [`check_access`](Self::check_access).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn roles_of(&self, user: &str) -> Result<Vec<String>, SubnetError> {
        self.store.roles_of(user).await
    }

    fn of(connector: Connector, prefix: &KeyPrefix, ttl: Ttl) -> Self {
        let store = Store {
            connector: Arc::new(connector),
            config_key: prefix.config().into(),
            base: prefix.subnets().into(),
            ttl,
            clock: Arc::new(SystemClock::default()),
            unacknowledged: Arc::default(),
            config_seen: Arc::default(),
            shared_list: Arc::default(),
        };
        Self { store: Arc::new(store) }
    }
}

#[async_trait]
impl SubnetManager for EtcdSubnets {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        Ok(ThisNode::by_address())
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.store.network_config().await
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
        std::future::pending().await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        stream::select(watch::watch(Arc::clone(&self.store)), config_watch::watch(Arc::clone(&self.store))).boxed()
    }
}
