//! A lease store in front of another one, with a state file: a node boots into a working overlay while the store is away.
//!
//! The file holds who this node is, the network's configuration, the node's lease and the last list of peers. It answers
//! only where the store is unavailable or denies access; every other answer of the store counts. Once the store is back, the
//! agent corrects what has changed meanwhile.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use flannel_core::{clock::SystemClock, subnet::SubnetManager};
//! # fn cached(etcd: Arc<dyn SubnetManager>) -> impl SubnetManager {
//! use flannel_subnet_cached::CachedSubnets;
//!
//! let clock = Arc::new(SystemClock::default());
//! CachedSubnets::new(etcd, "/var/lib/flannelkit/state.json", "etcd /coreos.com/network", clock)
//! # }
//! ```
//!
//! The last text names the store behind it: a file of another store is not used. A store that is a directory of this host
//! (`flannel-subnet-file`) needs no state file. The crate `flannelkit` has this one behind its feature `cached`.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod keeper;
mod known;
mod records;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::clock::Clock;
use flannel_core::config::NetworkConfig;
use flannel_core::files::{self, FileError};
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use futures_util::stream::BoxStream;
use keeper::Keeper;

/// The largest state file that is read or written, in bytes: room for 100 000 ordinary records several times over.
const MAX_BYTES: u64 = 64 << 20;

/// A lease store with a state file: who the node is, the configuration, the own lease and the last snapshot, from which it
/// answers while the store cannot.
///
/// Every call goes to the inner store first, and what that says counts. Only where it is [`SubnetError::Unavailable`]
/// or [`SubnetError::Denied`]:
///
/// * [`this_node`](SubnetManager::this_node) and [`network_config`](SubnetManager::network_config) answer with what was
///   last read, the latter only while no watch shows that the store is there;
/// * [`previous`](SubnetManager::previous) and [`acquire`](SubnetManager::acquire) with the lease that the same node
///   last held, unless it has run out, fits the network no longer, the store has said since that it is lost, or the
///   agent says that it is another node's ([`Want::own`]). It keeps its fence: what may be written over is still the
///   inner store's to judge. `acquire` puts `want.attrs` in it, which the agent publishes once the store is back;
/// * a [`watch`](SubnetManager::watch) that meets trouble before its first `Reset` begins with the last snapshot as a
///   `Reset`; the trouble follows at once, so that [`Status::store`](flannel_core::overlay::Status::store) says
///   [`Lost`](flannel_core::overlay::Contact::Lost) beside peers that are programmed. The inner store's own `Reset` then
///   corrects what has changed meanwhile.
///
/// With a live store the file is never read. It is written from inside the watch, on a blocking thread, one write at a
/// time and never in the way of an event: 5 s after a change of what it holds, and at most every 30 s. Renewals of
/// other nodes are no change. Dropping the watch writes nothing: call [`flush`](Self::flush) at an orderly end; after
/// a crash the file lacks the last changes. Each write replaces the whole file (mode 0600) or leaves the old one. One
/// that fails is logged, shown by [`trouble`](Self::trouble) and tried again after 30 s; leases and peers do not
/// suffer. More than 64 MiB is not written: that is tried again after an hour.
///
/// A file that is not whole, of another version or of another store, or that others may write, is ignored with one
/// warning, and overwritten when there is something to write.
///
/// Run one agent on a file. The leases of several nodes may be taken through one value: the last one's is kept.
pub struct CachedSubnets {
    inner: Arc<dyn SubnetManager>,
    keeper: Arc<Keeper>,
}

impl CachedSubnets {
    /// A store in front of `inner`, with its state in the file `path`, whose directory is made if needed.
    ///
    /// `origin` says in words which network of which store this is (an etcd prefix, a cluster's name): a file of
    /// another origin is ignored. Leases run out on `clock`, which must be the one that `inner` counts on.
    ///
    /// Reads and writes nothing yet.
    pub fn new(
        inner: Arc<dyn SubnetManager>,
        path: impl Into<PathBuf>,
        origin: impl Into<String>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { inner, keeper: Arc::new(Keeper::new(path.into(), origin.into(), clock)) }
    }

    /// The state file.
    pub fn path(&self) -> &Path {
        self.keeper.path()
    }

    /// Why the last write of the state file failed, in words; `None` where it did not.
    pub fn trouble(&self) -> Option<String> {
        self.keeper.trouble()
    }

    /// Whether the last answer was the state file's, because the store itself gave none.
    pub fn stands_in(&self) -> bool {
        self.keeper.stands_in()
    }

    /// Reads the state file, for whoever looks for faults: whether there is one that a start could go by. Blocks on the
    /// disk, and changes nothing.
    ///
    /// # Errors
    /// Why it would be ignored, in words. Delete it: the agent writes it anew.
    pub fn check(&self) -> Result<bool, String> {
        Ok(self.keeper.load()?.is_some())
    }

    /// Writes what the state file lacks, now.
    ///
    /// # Errors
    /// [`FileError`]: the file is as it was. Retry once the remedy is applied.
    ///
    /// # Cancel safety
    /// Dropped midway the write goes on in the background, and ends whole or not at all.
    pub async fn flush(&self) -> Result<(), FileError> {
        let keeper = Arc::clone(&self.keeper);
        match tokio::task::spawn_blocking(move || keeper.write()).await {
            Ok(outcome) => outcome,
            Err(error) => Err(FileError::new("write", self.path(), std::io::Error::other(error))),
        }
    }

    /// Deletes the state file: for whoever leaves the network for good. Idempotent; blocks on the disk.
    ///
    /// # Errors
    /// [`FileError`]: the file is still there. Retry once the remedy is applied.
    pub fn erase(&self) -> Result<(), FileError> {
        files::remove(self.path())
    }

    /// The cached lease of `node` in the place of an answer that did not come.
    async fn cached_lease(
        &self,
        node: &NodeIdentity,
        error: SubnetError,
        is_own: impl Fn(&Lease) -> bool,
    ) -> Result<Lease, SubnetError> {
        self.keeper.recall().await;
        let now = self.keeper.now();
        let lease = self.keeper.known(|known| known.own_lease(node, now)).filter(is_own);
        let Some(lease) = lease else { return Err(error) };
        self.keeper.standing_in(&error);
        Ok(lease)
    }
}

impl std::fmt::Debug for CachedSubnets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedSubnets").field("path", &self.path()).finish_non_exhaustive()
    }
}

/// Whether the store is out of reach, so that what it said last may stand in.
fn is_away(error: &SubnetError) -> bool {
    matches!(error, SubnetError::Unavailable { .. } | SubnetError::Denied { .. })
}

#[async_trait]
impl SubnetManager for CachedSubnets {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        match self.inner.this_node().await {
            Ok(node) => {
                self.keeper.learn(|known| known.identified(&node));
                Ok(node)
            }
            Err(error) if is_away(&error) => {
                self.keeper.recall().await;
                let Some(node) = self.keeper.known(|known| known.this_node.clone()) else { return Err(error) };
                self.keeper.standing_in(&error);
                Ok(node)
            }
            Err(error) => Err(error),
        }
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        let was_live = self.keeper.is_live();
        match self.inner.network_config().await {
            Ok(config) => {
                self.keeper.note(|known| known.configured(&config));
                Ok(config)
            }
            // While the watch lives the store will answer soon, and it may have another configuration by now.
            Err(error) if is_away(&error) && !was_live && !self.keeper.is_live() => {
                self.keeper.recall().await;
                let Some(config) = self.keeper.known(|known| known.config.clone()) else { return Err(error) };
                self.keeper.standing_in(&error);
                Ok(config)
            }
            Err(error) => Err(error),
        }
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        match self.inner.previous(node).await {
            Ok(leases) => {
                self.keeper.learn(|known| known.found(node, &leases));
                Ok(leases)
            }
            Err(error) if is_away(&error) => Ok(vec![self.cached_lease(node, error, |_| true).await?]),
            Err(error) => Err(error),
        }
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        match self.inner.acquire(node, want.clone()).await {
            Ok(lease) => {
                self.keeper.learn(|known| known.held(node, &lease));
                Ok(lease)
            }
            Err(error) if is_away(&error) => {
                let lease = self.cached_lease(node, error, |lease| want.is_own(lease)).await?;
                Ok(lease.publishing(want.attrs))
            }
            Err(error) => {
                self.keeper.learn(|known| known.without_lease(node));
                Err(error)
            }
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.keeper.asks(lease);
        let answer = self.inner.renew(lease).await;
        match &answer {
            Ok(renewed) => self.keeper.learn(|known| known.renewed(renewed)),
            Err(SubnetError::Lost(_)) => self.keeper.learn(|known| known.lost(&lease.key)),
            Err(_) => {}
        }
        answer
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        let key = lease.key.clone();
        self.inner.release(lease).await?;
        self.keeper.learn(|known| known.lost(&key));
        Ok(())
    }

    async fn changed(&self) {
        self.inner.changed().await;
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        watch::watch(self.inner.watch(), Arc::clone(&self.keeper))
    }
}
