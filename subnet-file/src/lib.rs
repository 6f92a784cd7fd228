//! Embedded lease store of flannelkit: a directory of JSON records, without a server.
//!
//! ```text
//! DIR/config.json          the network's configuration, flannel's document
//! DIR/leases/NODE.json     one record per node: flannel's lease JSON, with Subnet, IPv6Subnet, Created, ExpiresUnixMs
//! DIR/lock                 locked during each read-and-write; contains the last generation
//! ```
//!
//! For overlays whose nodes share a local directory: several agents on one host, tests, an appliance. Any number of
//! processes can use a directory at the same time. A writer holds an exclusive `flock` on `DIR/lock` from reading to
//! writing. Every file is replaced by rename, so a reader needs no lock and never sees an incomplete record. Changes
//! are detected through inotify. Do not put `DIR` on a network file system: inotify does not report what other hosts
//! write there, and the watch would miss it.
//!
//! Other users can read a store, but not write it. They cannot lock it either, because that would keep its users from
//! renewing leases. So all writers of a store have to run as the same user.
//!
//! Leases end by the wall clock, the only one that processes and reboots share. A clock set forward ends leases early;
//! the watch reports that, and the agents acquire again.
//!
//! A record that does not parse or cannot be read is reported as bad. Unless the `Subnet` of one that does not parse can
//! still be read, that subnet counts as free. While a record cannot be read, a node that needs a new subnet gets
//! [`SubnetError::Unavailable`] or [`SubnetError::Denied`], which name the file; so do all calls about the lease of the
//! node whose record it is.
//!
//! Each watch uses a thread, named `flannel-leases`, and an inotify instance, until it is dropped. A list is read by two
//! threads, if there are two processors; the second, named `flannel-list`, ends with the list.
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
mod reader;
mod store;
mod watch;
mod wire;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::clock::{Clock, SystemClock};
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want, with_config_file};
use futures_util::stream::BoxStream;
use tokio::sync::Semaphore;

pub use error::FileError;
pub use lifetime::{LeaseTime, LeaseTimeError, Ttl};
use store::Store;

/// A directory of leases.
///
/// Clones are handles to the same directory that exclude each other when writing. So do handles opened separately, also
/// in other processes.
#[derive(Clone)]
pub struct FileSubnets {
    store: Arc<Store>,
    /// Calls that write queue here rather than in the blocking pool, where each would hold a thread.
    turn: Arc<Semaphore>,
    /// The name of this handle's node.
    node: Option<NodeIdentity>,
}

/// The options of a handle. They may differ between handles to one directory.
#[derive(Clone)]
#[non_exhaustive]
pub struct Options {
    /// The name under which this node takes leases. Must be unique. Default: the host's name.
    pub node: Option<NodeIdentity>,
    /// The lifetime of leases that this handle writes. Default: 24 h, as in flannel.
    pub ttl: Ttl,
    /// How long a write waits for other writers before it fails with [`SubnetError::Unavailable`]: first for those of
    /// this handle, then as long for other processes. Default: 10 s.
    pub lock_wait: Duration,
    /// The clock of [`Lease::expires`]. Default: the machine's.
    pub clock: Arc<dyn Clock>,
}

impl Options {
    /// Sets the node's name.
    #[must_use]
    pub fn for_node(self, node: NodeIdentity) -> Self {
        Self { node: Some(node), ..self }
    }

    /// Sets the lifetime of leases.
    #[must_use]
    pub fn with_ttl(self, ttl: Ttl) -> Self {
        Self { ttl, ..self }
    }

    /// Sets how long writes wait for other writers.
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
    /// Opens a directory, and creates it and its missing parents.
    ///
    /// For a program that owns the path. If the path may be unmounted or mistyped, use [`open`](Self::open), which does
    /// not take a missing directory for an empty store.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn create(dir: impl Into<PathBuf>, options: Options) -> Result<Self, SubnetError> {
        let dir = dir.into();
        dir::make(&dir)?;
        Self::open(dir, options)
    }

    /// Opens an existing directory, and creates `leases` in it if that is missing.
    ///
    /// A new directory needs a configuration next: [`put_config`](Self::put_config).
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] if `dir` is missing or not a directory: create it. [`SubnetError::Denied`] if it may
    /// not be used. [`SubnetError::Unavailable`] for any other error: retry. Each names the path and the remedy.
    pub fn open(dir: impl Into<PathBuf>, options: Options) -> Result<Self, SubnetError> {
        let node = options.node.clone();
        let store = Arc::new(Store::open(dir.into(), options)?);
        Ok(Self { store, turn: Arc::new(Semaphore::new(1)), node })
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        self.store.dir.root()
    }

    /// Writes the network's configuration and replaces the old one. Leases that no longer fit stay until their nodes
    /// acquire again.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] if it would not read back unchanged (a network without a pool): final.
    /// [`SubnetError::Unavailable`] and [`SubnetError::Denied`]: retry. The old one stays in effect, unless only the
    /// disk did not confirm the new one.
    ///
    /// # Cancel safety
    /// If dropped, the configuration may or may not be written, but is never incomplete.
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

    /// Writes the network's configuration as flannel's JSON document, unchanged.
    ///
    /// # Errors
    /// [`SubnetError::Invalid`] names the JSON path: final for this text, and nothing is written. Otherwise as
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
            Err(_) => {
                return Err(error::fault(doing, &self.store.dir.root().join("lock"), io::ErrorKind::WouldBlock.into()));
            }
        };
        self.read(doing, move |store| {
            // Held until the work ends, even if the caller is gone.
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
        with_config_file(watch::watch(Arc::clone(&self.store)), self.store.dir.config_path())
    }
}
