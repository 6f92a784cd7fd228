//! A lease store in front of another one, with a state file: a node can start its overlay while the store is
//! unavailable.
//!
//! The file contains the node's identity, the network's configuration, the node's lease and the last list of peers. It
//! is used only if the store is unavailable or denies access; in all other cases the store's answer is used. Once the
//! store is back, the agent applies what has changed meanwhile.
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
//! The third argument identifies the store: a file of another store is not used. A store in a directory of this host
//! (`flannel-subnet-file`) needs no state file. The crate `flannelkit` exports this crate under its feature `cached`.

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

/// The largest state file that is read or written, in bytes: room for several times 100 000 ordinary records.
const MAX_BYTES: u64 = 64 << 20;

/// A lease store with a state file that contains the node's identity, the configuration, the own lease and the last
/// snapshot.
///
/// Every call goes to the inner store first. Only if that returns [`SubnetError::Unavailable`] or
/// [`SubnetError::Denied`], the call is answered from the file:
///
/// * [`this_node`](SubnetManager::this_node) and [`network_config`](SubnetManager::network_config) return the values
///   last read, the latter only while no watch on the inner store works;
/// * [`previous`](SubnetManager::previous) and [`acquire`](SubnetManager::acquire) return the lease that the same node
///   last held. They do not if it has expired, does not fit the network, has since been reported lost by the store, or
///   belongs to another node according to the agent ([`Want::own`]). The lease keeps its fence, so the inner store
///   still decides what may be overwritten. `acquire` puts `want.attrs` in it, which the agent publishes once the store
///   is back;
/// * a [`watch`](SubnetManager::watch) that fails before its first `Reset` begins with the last snapshot as a `Reset`.
///   The error follows at once, so that [`Status::store`](flannel_core::overlay::Status::store) is
///   [`Lost`](flannel_core::overlay::Contact::Lost) while peers are programmed. The inner store's own `Reset` then
///   applies what has changed meanwhile.
///
/// While the store works, the file is never read. The watch writes it on a blocking thread, one write at a time and
/// without delaying events: 5 s after a change of its contents, and at most every 30 s. Renewals of other nodes are not
/// changes. Dropping the watch writes nothing: call [`flush`](Self::flush) at an orderly end; after a crash the file
/// lacks the last changes. Each write replaces the whole file (mode 0600) or leaves the old one. A failed write is
/// logged, returned by [`trouble`](Self::trouble) and retried after 30 s; leases and peers are not affected. More than
/// 64 MiB is not written; such a write is retried after an hour.
///
/// A file that is incomplete, of another version or of another store, or that other users can write, is ignored with
/// one warning. It is overwritten when there is something to write.
///
/// Use a file with one agent only. One value can acquire the leases of several nodes; the last one's is kept.
pub struct CachedSubnets {
    inner: Arc<dyn SubnetManager>,
    keeper: Arc<Keeper>,
}

impl CachedSubnets {
    /// Creates a store in front of `inner`, with its state in the file `path`, whose directory is created if needed.
    ///
    /// `origin` describes which network of which store this is (an etcd prefix, a cluster's name): a file of another
    /// origin is ignored. Leases expire on `clock`, which must be the one that `inner` uses.
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

    /// Returns the path of the state file.
    pub fn path(&self) -> &Path {
        self.keeper.path()
    }

    /// Returns the reason why the last write of the state file failed, or `None` if it succeeded.
    pub fn trouble(&self) -> Option<String> {
        self.keeper.trouble()
    }

    /// Whether the last answer came from the state file, because the store itself gave none.
    pub fn is_in_use(&self) -> bool {
        self.keeper.is_in_use()
    }

    /// Checks the state file, for diagnosis. Returns whether there is a file that a start could use. Blocks on the
    /// disk, and changes nothing.
    ///
    /// # Errors
    /// The reason why the file would be ignored. Delete it: the agent writes a new one.
    pub fn check(&self) -> Result<bool, String> {
        Ok(self.keeper.load()?.is_some())
    }

    /// Writes pending changes to the state file now.
    ///
    /// # Errors
    /// [`FileError`]: the file is unchanged. Retry after applying the remedy.
    ///
    /// # Cancel safety
    /// If dropped, the write continues in the background, and completes or changes nothing.
    pub async fn flush(&self) -> Result<(), FileError> {
        let keeper = Arc::clone(&self.keeper);
        match tokio::task::spawn_blocking(move || keeper.write()).await {
            Ok(outcome) => outcome,
            Err(error) => Err(FileError::new("write", self.path(), std::io::Error::other(error))),
        }
    }

    /// Deletes the state file, for a node that leaves the network for good. Idempotent; blocks on the disk.
    ///
    /// # Errors
    /// [`FileError`]: the file still exists. Retry after applying the remedy.
    pub fn erase(&self) -> Result<(), FileError> {
        files::remove(self.path())
    }

    /// Returns the cached lease of `node` in place of a missing answer.
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

/// Whether the store is unreachable, so that the cache may answer.
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
            // While the watch works, the store will answer soon, and its configuration may have changed.
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
