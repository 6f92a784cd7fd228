//! Embedded lease store of flannelkit: a directory of JSON records, no server.
//!
//! ```text
//! DIR/config.json          the network's configuration, flannel's document
//! DIR/leases/NODE.json     one record a node: flannel's lease JSON, with Subnet, IPv6Subnet, Created, ExpiresUnixMs
//! DIR/lock                 locked while somebody decides and writes; holds the last generation
//! ```
//!
//! For overlays whose nodes share a local directory: several agents on one host, tests, an appliance. Any number of
//! processes may use a directory at once. Whoever writes holds an exclusive `flock` on `DIR/lock` from reading to
//! writing, and every file is replaced by rename, so a reader, who needs no lock, never sees half a record. Changes
//! are noticed through inotify, which does not report what other hosts write to a network file system: there the
//! watch would stay blind, so do not put `DIR` on one.
//!
//! Others may read a store, but not write it; nor may they hold its lock, with which they would keep its users from
//! renewing leases. So all who write to one run as the same user.
//!
//! Leases end by the wall clock, the only one that processes and reboots share. A clock set forward ends leases
//! early; the watch shows that, and the agents acquire again.
//!
//! A record that does not parse is shown as bad; what it held is unknown then, so unless its `Subnet` can still be
//! read, that subnet counts as free.
//!
//! Each watch takes a thread, named `flannel-leases`, and an inotify instance, until it is dropped.
//!
//! ```no_run
//! # async fn example() -> Result<(), flannel_core::subnet::SubnetError> {
//! use flannel_subnet_file::{FileSubnets, Options};
//!
//! let store = FileSubnets::create("/var/lib/overlay", Options::default())?;
//! store.put_config_json(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).await?;
//! # Ok(())
//! # }
//! ```

mod dir;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod lifetime;
mod store;
mod watch;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::clock::{Clock, SystemClock};
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use futures_util::stream::BoxStream;
use tokio::sync::Semaphore;

pub use error::FileError;
pub use lifetime::{LeaseTime, LeaseTimeError, Ttl};
use store::Store;

/// A directory of leases.
///
/// Clones are handles on the same directory that take turns; so are those opened anew, also in other processes.
#[derive(Clone)]
pub struct FileSubnets {
    store: Arc<Store>,
    /// Calls that write take turns here rather than in the blocking pool, where they would hold a thread each.
    turn: Arc<Semaphore>,
    /// The name of this handle's node.
    node: Option<NodeIdentity>,
}

/// How a handle behaves. Handles on one directory may differ in it.
#[derive(Clone)]
#[non_exhaustive]
pub struct Options {
    /// The name under which this node takes leases: one node's alone. Default: the host's name.
    pub node: Option<NodeIdentity>,
    /// How long a lease lasts that this handle writes. Default: 24 h, as flannel's.
    pub ttl: Ttl,
    /// How long a write waits for others to finish theirs before it is [`SubnetError::Unavailable`]. Default: 10 s.
    pub lock_wait: Duration,
    /// What [`Lease::expires`] is counted on. Default: the machine's.
    pub clock: Arc<dyn Clock>,
}

impl Options {
    /// The same for a node of this name.
    #[must_use]
    pub fn for_node(self, node: NodeIdentity) -> Self {
        Self { node: Some(node), ..self }
    }

    /// The same with leases that last so long.
    #[must_use]
    pub fn with_ttl(self, ttl: Ttl) -> Self {
        Self { ttl, ..self }
    }

    /// The same with writes that wait so long for others.
    #[must_use]
    pub fn with_lock_wait(self, lock_wait: Duration) -> Self {
        Self { lock_wait, ..self }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            node: None,
            ttl: Ttl::default(),
            lock_wait: Duration::from_secs(10),
            clock: Arc::new(SystemClock::default()),
        }
    }
}

impl FileSubnets {
    /// Opens a directory, and makes it and those above it if they are missing.
    ///
    /// For a program that owns the place. Where the directory may be one that is not mounted yet, or a path that somebody
    /// typed, [`open`](Self::open) does not take an empty store for the right one.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn create(dir: impl Into<PathBuf>, options: Options) -> Result<Self, SubnetError> {
        let dir = dir.into();
        dir::make(&dir)?;
        Self::open(dir, options)
    }

    /// Opens a directory that exists, and makes `leases` in it if that is missing.
    ///
    /// A new directory needs a configuration next: [`put_config`](Self::put_config).
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] when `dir` is missing or no directory: create it. [`SubnetError::Denied`] when it may
    /// not be used. Each names the path and what to do.
    pub fn open(dir: impl Into<PathBuf>, options: Options) -> Result<Self, SubnetError> {
        let node = options.node.clone();
        let store = Arc::new(Store::open(dir.into(), options)?);
        Ok(Self { store, turn: Arc::new(Semaphore::new(1)), node })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.store.dir.root()
    }

    /// Writes the network's configuration, in place of what was there. Leases that no longer fit stay until their
    /// nodes acquire again.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] when it would not read back as it is (a network without a pool): final.
    /// [`SubnetError::Unavailable`] and [`SubnetError::Denied`]: the old one is in force; retry.
    ///
    /// # Cancel safety
    /// Dropped midway it may or may not be written, but never half.
    pub async fn put_config(&self, config: &NetworkConfig) -> Result<(), SubnetError> {
        let text = config.to_json();
        if store::parse_config(&self.store.dir.config_path(), text.as_bytes())? != *config {
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
        let json = json.to_owned();
        self.write("writing the network configuration", move |store| store.put_config(&json)).await
    }

    async fn read<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Store) -> Result<T, SubnetError> + Send + 'static,
    ) -> Result<T, SubnetError> {
        let store = Arc::clone(&self.store);
        error::joined(doing, tokio::task::spawn_blocking(move || work(&store)).await)
    }

    async fn write<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Store) -> Result<T, SubnetError> + Send + 'static,
    ) -> Result<T, SubnetError> {
        let turn = Arc::clone(&self.turn).acquire_owned();
        let turn = match tokio::time::timeout(self.store.options.lock_wait, turn).await {
            Ok(Ok(turn)) => turn,
            Ok(Err(closed)) => return Err(SubnetError::Unavailable { doing, source: closed.into() }),
            Err(late) => return Err(SubnetError::Unavailable { doing, source: late.into() }),
        };
        self.read(doing, move |store| {
            // Kept to the end of the work, even when the caller is gone.
            let _turn = turn;
            work(store)
        })
        .await
    }
}

#[async_trait]
impl SubnetManager for FileSubnets {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        if let Some(name) = &self.node {
            return Ok(ThisNode::named(name.clone()));
        }
        let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let named = NodeIdentity::new(&host).map(ThisNode::named);
        named.map_err(|error| {
            SubnetError::Unsupported(format!("the host's name as the node's: {error}; set Options::node"))
        })
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.read("reading the network configuration", |store| store.config()).await
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        let node = node.clone();
        self.read("reading the previous lease", move |store| Ok(store.previous(&node)?.into_iter().collect())).await
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        let node = node.clone();
        self.write("acquiring a lease", move |store| store.acquire(&node, want)).await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        let lease = lease.clone();
        self.write("renewing a lease", move |store| store.renew(lease)).await
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.write("releasing a lease", move |store| store.release(&lease)).await
    }

    async fn changed(&self) {
        std::future::pending().await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        watch::watch(Arc::clone(&self.store))
    }
}
