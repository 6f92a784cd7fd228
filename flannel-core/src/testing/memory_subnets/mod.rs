//! A lease store in memory, shared by all nodes that have a clone.

mod records;
#[cfg(test)]
mod tests;
mod watching;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use tokio::sync::watch::{Receiver, Sender};

use crate::clock::{BootTime, Clock, SystemClock};
use crate::config::NetworkConfig;
use crate::lease::{BadRecord, Lease, LeaseEvent, LeaseKey, Record};
use crate::net::{Dual, Prefix};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use records::{Inner, Known};

/// A lease store in memory: for tests, benchmarks and programs whose nodes all run in one process.
///
/// Clones share one store, which is dropped with the last clone. Tests can script failures, insert records with any
/// content, and cut watches.
#[derive(Clone)]
pub struct MemorySubnets {
    shared: Arc<Shared>,
    /// The node of this handle.
    node: ThisNode,
    /// Marks the last call that asked for a lease; [`changed`](SubnetManager::changed) waits for a later change.
    seen: Arc<Mutex<Receiver<()>>>,
}

/// A scripted failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The call fails with [`SubnetError::Unavailable`] and does nothing.
    Unavailable,
    /// The call fails with [`SubnetError::Denied`] and does nothing.
    Denied,
    /// The call does its work and fails with [`SubnetError::Unavailable`]: the reply was lost.
    LostReply,
}

struct Shared {
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
    /// Notified when something that nodes wait for is set.
    changed: Sender<()>,
}

impl MemorySubnets {
    /// Creates an empty store of this network, whose leases never expire.
    pub fn new(config: NetworkConfig) -> Self {
        Self::with_ttl(config, None, Arc::new(SystemClock::default()))
    }

    /// Creates an empty store whose leases last for `ttl` on `clock`.
    pub fn with_ttl(config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        Self::known_by(Known::Name, config, ttl, clock)
    }

    /// Same as [`with_ttl`](Self::with_ttl), for nodes that are identified by the address they publish, as in etcd.
    pub fn by_address(config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        Self::known_by(Known::Address, config, ttl, clock)
    }

    /// Creates an empty store of named nodes that do not choose their subnets, as with Kubernetes' podCIDRs: each waits
    /// until subnets are [assigned](Self::assign) to it. Pools of the configuration are ignored.
    pub fn assigned(config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        let store = Self::known_by(Known::Name, config, ttl, clock);
        store.shared.lock().assigned = Some(BTreeMap::new());
        store
    }

    /// Assigns subnets to a node and updates its record at once. Replaces earlier ones. Only works in a store that
    /// [`assigned`](Self::assigned) created; others ignore it.
    pub fn assign(&self, node: &NodeIdentity, subnets: Dual<Prefix>) {
        self.shared.lock().assign(node, subnets);
        // Wakes nodes that wait for a first lease.
        self.shared.changed.send_replace(());
    }

    /// Sets the addresses that the node of this name publishes, as an operator would. They replace the addresses that
    /// its handle was created with.
    pub fn set_public(&self, node: &NodeIdentity, public: Dual<IpAddr>) {
        self.shared.lock().set_public(node, public);
    }

    fn known_by(known_by: Known, config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        let (changed, seen) = tokio::sync::watch::channel(());
        let inner = Mutex::new(Inner::new(known_by, config, ttl));
        Self {
            shared: Arc::new(Shared { clock, inner, changed }),
            node: ThisNode::by_address(),
            seen: Arc::new(Mutex::new(seen)),
        }
    }

    /// Returns a handle on the same store for this node. A new store's handle, and every handle of a
    /// [`by_address`](Self::by_address) store, is for a node identified by its address.
    #[must_use]
    pub fn for_node(&self, node: ThisNode) -> Self {
        let seen = Arc::new(Mutex::new(self.shared.changed.subscribe()));
        Self { node, seen, ..self.clone() }
    }

    fn seen(&self) -> MutexGuard<'_, Receiver<()>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the current identity of this handle's node.
    fn node(&self, inner: &Inner) -> ThisNode {
        let name = match inner.known_by {
            Known::Name => self.node.name.clone(),
            Known::Address => None,
        };
        ThisNode { name, public: inner.public_of(&self.node).unwrap_or(self.node.public) }
    }

    /// Changes the network's configuration. Leases do not change.
    pub fn set_config(&self, config: NetworkConfig) {
        self.shared.lock().set_config(config);
    }

    /// Inserts leases as other nodes would, each as one change. Leases with equal keys are replaced.
    pub fn insert(&self, leases: impl IntoIterator<Item = Lease>) {
        let mut inner = self.shared.lock();
        for lease in leases {
            inner.put(lease.key.clone(), Ok(Arc::new(lease)));
        }
    }

    /// Inserts a record that does not parse.
    pub fn insert_bad(&self, key: &LeaseKey, bad: BadRecord) {
        self.shared.lock().put(key.clone(), Err(bad));
    }

    /// Deletes a record of any node. Returns whether it existed.
    pub fn delete(&self, key: &LeaseKey) -> bool {
        self.shared.lock().delete(key)
    }

    /// Deletes many records at once.
    pub fn delete_all<'a>(&self, keys: impl IntoIterator<Item = &'a LeaseKey>) {
        let mut inner = self.shared.lock();
        for key in keys {
            inner.delete(key);
        }
    }

    /// Returns all records, in the order of keys.
    pub fn records(&self) -> Vec<Record> {
        let mut inner = self.shared.lock();
        inner.sweep(self.shared.clock.now());
        inner.records.values().cloned().collect()
    }

    /// Makes the next calls fail, one fault per call. Watches are not calls: see [`cut_watches`](Self::cut_watches).
    pub fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.lock().faults.extend(faults);
    }

    /// Cuts all watches: each reports an error, then starts again with a `Reset`. Pending events are lost.
    pub fn cut_watches(&self) {
        for watcher in self.shared.lock().watchers() {
            let mut pending = watcher.lock();
            pending.events.clear();
            pending.reset = true;
            pending.trouble = Some(unavailable("watching"));
            watcher.changed.notify_one();
        }
    }

    /// Makes the store unavailable until [`recover`](Self::recover): every call fails with
    /// [`SubnetError::Unavailable`], and every watch, including new ones, reports one error and is then silent. Records
    /// can still be changed.
    pub fn outage(&self) {
        self.shared.lock().away = true;
        self.cut_watches();
    }

    /// Ends an [`outage`](Self::outage): each watch starts again with a `Reset`.
    pub fn recover(&self) {
        let mut inner = self.shared.lock();
        inner.away = false;
        for watcher in inner.watchers() {
            watcher.changed.notify_one();
        }
    }
}

impl fmt::Debug for MemorySubnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySubnets").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while the lock is held leaves the store consistent: every change is one call.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one call, with the fault scripted for it.
    fn call<T>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&mut Inner, BootTime) -> Result<T, SubnetError>,
    ) -> Result<T, SubnetError> {
        let now = self.clock.now();
        let mut inner = self.lock();
        inner.sweep(now);
        if inner.away {
            return Err(unavailable(doing));
        }
        match inner.faults.pop_front() {
            None => work(&mut inner, now),
            Some(Fault::Unavailable) => Err(unavailable(doing)),
            Some(Fault::Denied) => Err(SubnetError::Denied { doing, source: "scripted".into() }),
            Some(Fault::LostReply) => work(&mut inner, now).and_then(|_| Err(unavailable(doing))),
        }
    }
}

fn unavailable(doing: &'static str) -> SubnetError {
    SubnetError::Unavailable { doing, source: "scripted".into() }
}

#[async_trait]
impl SubnetManager for MemorySubnets {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        let inner = self.shared.lock();
        if inner.away {
            return Err(unavailable("asking who this node is"));
        }
        Ok(self.node(&inner))
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.shared.call("reading the configuration", |inner, _| Ok(inner.config.clone()))
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        self.shared.call("reading the previous leases", |inner, _| Ok(inner.previous(node)))
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        self.seen().mark_unchanged();
        self.shared.call("acquiring a lease", |inner, now| inner.acquire(node, want, now))
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.shared.call("renewing the lease", |inner, now| inner.renew(lease, now))
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.shared.call("releasing the lease", |inner, _| {
            inner.release(&lease);
            Ok(())
        })
    }

    async fn changed(&self) {
        let mut seen = self.seen().clone();
        // It cannot fail: the sender is in the store, which this handle keeps alive.
        let _ = seen.changed().await;
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        watching::watch(&self.shared, self.node.clone())
    }
}
