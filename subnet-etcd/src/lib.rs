//! etcd lease store of flannelkit, byte for byte flannel's: nodes with Go flannel and with this crate share one
//! network.
//!
//! ```text
//! PREFIX/config                                  the network's configuration, flannel's document
//! PREFIX/subnets/10.5.34.0-24                    one record a node: flannel's lease JSON
//! PREFIX/subnets/10.5.34.0-24&fd00:12:13::-56    the same in a dual-stack network
//! ```
//!
//! A node is known by its public IP. Every write of a lease is a transaction fenced by what was read: a node that was
//! away never writes over the new owner of its subnet, and a lost race costs another try, not the agent. A record
//! without etcd lease is an operator's reservation; it is used and renewed, and stays one.
//!
//! Requests go to one member at a time and move to the next when it fails; one that is slow to connect to is not waited
//! for. Each has a deadline. TLS files and the password file are read again for every new connection. When a peer's
//! lease ends is not asked, for that would be a request a record: [`Lease::expires`] is known of the own lease only.
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

mod config;
mod connect;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod list;
mod list_watch;
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
use futures_util::stream::BoxStream;

pub use config::{
    ClearText, ClientCertificate, Config, ConfigError, Credentials, KeyPrefix, Password, Secret, Timeouts, Tls, Ttl,
};
pub use connect::credential_file;
pub use error::EtcdError;

use connect::Connector;
use store::Store;

/// Leases in etcd.
///
/// Clones share one connection.
#[derive(Clone)]
pub struct EtcdSubnets {
    store: Arc<Store>,
}

impl EtcdSubnets {
    /// A store that connects when it is first used, so that a node boots while etcd is away.
    ///
    /// # Errors
    /// [`ConfigError`] names what to change. Final for this configuration.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let (prefix, ttl) = (config.prefix.clone(), config.ttl);
        Ok(Self::of(Connector::new(config)?, &prefix, ttl))
    }

    /// A store over a client that is ready, with all that was set when it was made: TLS, user, keep-alive. Without
    /// keep-alive a frozen member is not noticed; without automatic token refresh a log-in ends after minutes.
    pub fn with_client(client: etcd_client::Client, prefix: &KeyPrefix, ttl: Ttl, timeouts: Timeouts) -> Self {
        Self::of(Connector::ready(client, prefix.config(), timeouts), prefix, ttl)
    }

    /// The same store, with [`Lease::expires`] counted on `clock`. Default: the machine's.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { store: Arc::new(Store { clock, ..Store::clone(&self.store) }) }
    }

    /// Writes the network's configuration in place of what was there. Leases that no longer fit stay until their
    /// nodes acquire again.
    ///
    /// The last writer wins: this is an operator's word, which is not made out of what was there, so there is no read
    /// to fence it by. An acquire under way is fenced by the configuration it went by, and begins anew.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] when it would not read back as it is (a network without a pool): final. Else retry.
    ///
    /// # Cancel safety
    /// Dropped midway it may or may not be written, but never half.
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

    /// Writes the network's configuration as flannel's JSON document, kept to the letter.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] names the JSON path: final for this text, and nothing is written. Else as
    /// [`put_config`](Self::put_config).
    ///
    /// # Cancel safety
    /// As [`put_config`](Self::put_config).
    pub async fn put_config_json(&self, json: &str) -> Result<(), SubnetError> {
        self.store.put_config(json).await
    }

    /// All records, in the order of their keys, as they were at one revision: one request for each thousand.
    ///
    /// # Errors
    /// [`SubnetError::Unavailable`] and [`SubnetError::Denied`]: retry.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list(&self) -> Result<Vec<Record>, SubnetError> {
        self.store.list().await
    }

    fn of(connector: Connector, prefix: &KeyPrefix, ttl: Ttl) -> Self {
        let store = Store {
            connector: Arc::new(connector),
            config_key: prefix.config().into(),
            base: prefix.subnets().into(),
            ttl,
            clock: Arc::new(SystemClock::default()),
            unacknowledged: Arc::default(),
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
        watch::watch(Arc::clone(&self.store))
    }
}
