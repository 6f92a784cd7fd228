//! A lease store in memory, shared by as many nodes as hold a clone.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{BoxStream, unfold};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::Notify;

use crate::alloc;
use crate::clock::{BootTime, Clock, SystemClock};
use crate::config::NetworkConfig;
use crate::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseEvent, LeaseKey, Record};
use crate::net::{Dual, Prefix};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};

/// Events kept for a watcher that lags; beyond that it gets a `Reset` instead.
const BACKLOG: usize = 16_384;

/// A lease store in memory: for tests, benchmarks and programs whose nodes all live in one process.
///
/// Clones share one store. Nothing is kept when the last one goes. Failures can be scripted, records of any content be
/// put in, watches be cut.
#[derive(Clone)]
pub struct MemorySubnets {
    shared: Arc<Shared>,
}

/// A failure to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The call fails as [`SubnetError::Unavailable`] and does nothing.
    Unavailable,
    /// The call fails as [`SubnetError::Denied`] and does nothing.
    Denied,
    /// The call does its work and fails as [`SubnetError::Unavailable`]: the reply was lost.
    LostReply,
}

struct Shared {
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
}

/// What a record is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// The node's name, which is its key.
    Name,
    /// The address it publishes; its key is its subnets.
    Address,
}

struct Inner {
    known_by: Known,
    config: NetworkConfig,
    /// How long a lease lasts; `None`: for ever.
    ttl: Option<Duration>,
    revision: u64,
    records: BTreeMap<LeaseKey, Record>,
    /// Whether nothing is answered at all.
    away: bool,
    faults: VecDeque<Fault>,
    watchers: Vec<std::sync::Weak<Watcher>>,
    random: u64,
}

struct Watcher {
    pending: Mutex<Pending>,
    changed: Notify,
}

/// What a watcher has yet to be told.
#[derive(Default)]
struct Pending {
    reset: bool,
    trouble: Option<SubnetError>,
    events: VecDeque<LeaseEvent>,
}

impl MemorySubnets {
    /// An empty store of this network, whose leases last for ever.
    pub fn new(config: NetworkConfig) -> Self {
        Self::with_ttl(config, None, Arc::new(SystemClock::default()))
    }

    /// An empty store whose leases last for `ttl` on `clock`.
    pub fn with_ttl(config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        Self::known_by(Known::Name, config, ttl, clock)
    }

    /// The same, for nodes that are known by the address they publish, as in etcd: for
    /// [`Identity::PublicIp`](crate::overlay::Identity::PublicIp).
    pub fn by_address(config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        Self::known_by(Known::Address, config, ttl, clock)
    }

    fn known_by(known_by: Known, config: NetworkConfig, ttl: Option<Duration>, clock: Arc<dyn Clock>) -> Self {
        let inner = Inner {
            known_by,
            config,
            ttl,
            revision: 0,
            records: BTreeMap::new(),
            away: false,
            faults: VecDeque::new(),
            watchers: Vec::new(),
            random: 0x5eed,
        };
        Self { shared: Arc::new(Shared { clock, inner: Mutex::new(inner) }) }
    }

    /// Changes the network's configuration. Leases stay as they are.
    pub fn set_config(&self, config: NetworkConfig) {
        self.shared.lock().config = config;
    }

    /// Puts in leases that other nodes would have taken, as one change each; those of equal keys are replaced.
    pub fn insert(&self, leases: impl IntoIterator<Item = Lease>) {
        let mut inner = self.shared.lock();
        for lease in leases {
            inner.put(lease.key.clone(), Ok(Arc::new(lease)));
        }
    }

    /// Puts in a record that does not parse.
    pub fn insert_bad(&self, key: &LeaseKey, bad: BadRecord) {
        self.shared.lock().put(key.clone(), Err(bad));
    }

    /// Deletes a record, whosever it is. Returns whether there was one.
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

    /// All records, in the order of keys.
    pub fn records(&self) -> Vec<Record> {
        let mut inner = self.shared.lock();
        inner.sweep(self.shared.clock.now());
        inner.records.values().cloned().collect()
    }

    /// Lets the next calls fail, one fault each. Watches are not calls: see [`cut_watches`](Self::cut_watches).
    pub fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.lock().faults.extend(faults);
    }

    /// Cuts all watches: each reports trouble, then starts over with a `Reset`. What was pending is lost.
    pub fn cut_watches(&self) {
        for watcher in self.shared.lock().watchers() {
            let mut pending = watcher.lock();
            pending.events.clear();
            pending.reset = true;
            pending.trouble = Some(unavailable("watching"));
            watcher.changed.notify_one();
        }
    }

    /// Takes the store away until [`recover`](Self::recover): every call fails as [`SubnetError::Unavailable`], every
    /// watch, those to come too, reports trouble once and is silent then. Records change all the same.
    pub fn outage(&self) {
        self.shared.lock().away = true;
        self.cut_watches();
    }

    /// Ends an [`outage`](Self::outage): each watch starts over with a `Reset`.
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
        // A panic of a holder leaves a store that is still consistent: every change is one call.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one call, with the fault that was scripted for it.
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

impl Watcher {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn put(&mut self, key: LeaseKey, lease: Result<Arc<Lease>, BadRecord>) {
        self.revision += 1;
        let created = self.records.get(&key).map_or(self.revision, |record| record.created);
        let record = Record { key: key.clone(), created, lease: lease.map_err(Box::new) };
        self.records.insert(key, record.clone());
        self.tell(LeaseEvent::Upsert(record));
    }

    fn delete(&mut self, key: &LeaseKey) -> bool {
        let deleted = self.records.remove(key).is_some();
        if deleted {
            self.revision += 1;
            self.tell(LeaseEvent::Remove(key.clone()));
        }
        deleted
    }

    /// Removes what has expired.
    fn sweep(&mut self, now: BootTime) {
        let expired = |record: &Record| expiry(record).is_some_and(|expires| expires <= now);
        if self.ttl.is_none() {
            return;
        }
        let keys: Vec<_> = self.records.values().filter(|record| expired(record)).map(|r| r.key.clone()).collect();
        for key in keys {
            self.delete(&key);
        }
    }

    fn next_expiry(&self) -> Option<BootTime> {
        self.ttl?;
        self.records.values().filter_map(expiry).min()
    }

    fn watchers(&mut self) -> Vec<Arc<Watcher>> {
        self.watchers.retain(|watcher| watcher.strong_count() > 0);
        self.watchers.iter().filter_map(std::sync::Weak::upgrade).collect()
    }

    fn tell(&mut self, event: LeaseEvent) {
        for watcher in self.watchers() {
            let mut pending = watcher.lock();
            if pending.reset {
                // A snapshot is taken when it is read: this is in it.
                continue;
            }
            if pending.events.len() >= BACKLOG {
                pending.events.clear();
                pending.reset = true;
            } else {
                pending.events.push_back(event.clone());
            }
            watcher.changed.notify_one();
        }
    }

    /// The keys of the records of `node`.
    fn keys_of(&self, node: &NodeIdentity) -> Vec<LeaseKey> {
        match self.known_by {
            Known::Name => vec![LeaseKey::new(node.as_str())],
            Known::Address => {
                let publishes =
                    |lease: &Lease| lease.attrs.public_ip.iter().any(|(_, addr)| addr.to_string() == node.as_str());
                let own = |record: &&Record| record.lease.as_ref().is_ok_and(|lease| publishes(lease));
                self.records.values().filter(own).map(|record| record.key.clone()).collect()
            }
        }
    }

    /// The keys of the records of `node` that are its own beyond doubt. Where nodes are known by their address, another
    /// node may have had that before; what a backend publishes beside it is of one device.
    fn own_keys(&self, node: &NodeIdentity, attrs: &LeaseAttrs) -> Vec<LeaseKey> {
        let mut keys = self.keys_of(node);
        if self.known_by == Known::Address {
            keys.retain(|key| {
                let lease = self.records.get(key).and_then(|record| record.lease.as_ref().ok());
                lease.is_some_and(|lease| lease.attrs.backend_data == attrs.backend_data)
            });
        }
        keys
    }

    /// The first lease of `node` that fits the network as it is now.
    fn fitting(&self, node: &NodeIdentity) -> Option<Arc<Lease>> {
        let keys = self.keys_of(node);
        let mut leases = keys.iter().filter_map(|key| self.records.get(key)?.lease.as_ref().ok());
        leases.find(|lease| alloc::all_compatible(&self.config, &lease.subnets)).cloned()
    }

    /// The lease of `node` to take again: where nodes are known by their address, another node may have had it before, so
    /// the one that is preferred, or that has what is to be published, else any unless another is preferred.
    fn own(&self, node: &NodeIdentity, want: &Want) -> Option<Arc<Lease>> {
        if self.known_by == Known::Name {
            return self.fitting(node);
        }
        let keys = self.keys_of(node);
        let leases = keys.iter().filter_map(|key| self.records.get(key)?.lease.as_ref().ok());
        let fitting: Vec<_> = leases.filter(|lease| alloc::all_compatible(&self.config, &lease.subnets)).collect();
        let preferred = fitting.iter().find(|lease| lease.subnets == want.preferred);
        let same = fitting.iter().find(|lease| lease.attrs.backend_data == want.attrs.backend_data);
        let any = fitting.first().filter(|_| want.preferred.is_empty());
        preferred.or(same).or(any).map(|lease| Arc::clone(lease))
    }

    /// The key of a new record.
    fn new_key(&self, node: &NodeIdentity, subnets: &Dual<Prefix>) -> LeaseKey {
        match self.known_by {
            Known::Name => LeaseKey::new(node.as_str()),
            Known::Address => {
                let parts: Vec<_> = subnets.iter().map(|(_, subnet)| subnet.to_string().replace('/', "-")).collect();
                LeaseKey::new(&parts.join("&"))
            }
        }
    }

    fn choose(&mut self, own: &[LeaseKey], preferred: &Dual<Prefix>) -> Result<Dual<Prefix>, SubnetError> {
        let others = self.records.values().filter(|record| !own.contains(&record.key));
        let taken: Vec<Prefix> = others
            .flat_map(|record| match &record.lease {
                Ok(lease) => [lease.subnets.v4, lease.subnets.v6],
                Err(bad) => [bad.subnets.v4, bad.subnets.v6],
            })
            .flatten()
            .collect();
        let free = |prefix: &Prefix| !taken.iter().any(|other| other.overlaps(prefix));
        if alloc::all_compatible(&self.config, preferred) && preferred.iter().all(|(_, prefix)| free(prefix)) {
            return Ok(*preferred);
        }
        let mut subnets = Dual::default();
        let random = &mut self.random;
        let mut random = move || {
            // xorshift64: any sequence will do.
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            *random
        };
        for (family, network) in self.config.networks.iter() {
            let Some(pool) = &network.pool else {
                return Err(SubnetError::Unsupported("the network has no pool to choose from".to_owned()));
            };
            let chosen = alloc::choose(pool, taken.iter().copied(), &mut random)
                .map_err(|exhausted| SubnetError::Exhausted(exhausted.to_string()))?;
            *subnets.slot(family) = Some(chosen);
        }
        Ok(subnets)
    }

    /// Writes the lease of `node` and returns it as it now stands. The fence is that of taking the subnets, not of the
    /// last write: a renewal whose answer was lost can be repeated.
    fn write(&mut self, mut lease: Lease, now: BootTime) -> Lease {
        lease.expires = self.ttl.map(|ttl| now.after(ttl));
        if lease.fence == Fence::default() {
            lease.fence = Fence(Some((self.revision + 1).to_string().into()));
        }
        self.put(lease.key.clone(), Ok(Arc::new(lease.clone())));
        lease
    }
}

fn expiry(record: &Record) -> Option<BootTime> {
    record.lease.as_ref().ok().and_then(|lease| lease.expires)
}

fn unavailable(doing: &'static str) -> SubnetError {
    SubnetError::Unavailable { doing, source: "scripted".into() }
}

#[async_trait]
impl SubnetManager for MemorySubnets {
    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.shared.call("reading the configuration", |inner, _| Ok(inner.config.clone()))
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Option<Lease>, SubnetError> {
        self.shared.call("reading the previous lease", |inner, _| Ok(inner.fitting(node).map(|lease| (*lease).clone())))
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        self.shared.call("acquiring a lease", |inner, now| {
            let (key, subnets, fence) = match inner.own(node, &want) {
                Some(lease) => (lease.key.clone(), lease.subnets, lease.fence.clone()),
                None => {
                    let own = inner.own_keys(node, &want.attrs);
                    let subnets = inner.choose(&own, &want.preferred)?;
                    for key in own {
                        inner.delete(&key);
                    }
                    (inner.new_key(node, &subnets), subnets, Fence::default())
                }
            };
            let lease = Lease { key, subnets, attrs: want.attrs, expires: None, fence };
            Ok(inner.write(lease, now))
        })
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.shared.call("renewing the lease", |inner, now| {
            let current = inner.records.get(&lease.key).and_then(|record| record.lease.as_ref().ok());
            match current {
                None => Err(SubnetError::Lost(format!("there is no record {}", lease.key))),
                Some(current) if current.subnets != lease.subnets || current.fence != lease.fence => {
                    Err(SubnetError::Lost(format!("record {} was written by another", lease.key)))
                }
                Some(_) => Ok(inner.write(lease.clone(), now)),
            }
        })
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.shared.call("releasing the lease", |inner, _| {
            let current = inner.records.get(&lease.key).and_then(|record| record.lease.as_ref().ok());
            if current.is_some_and(|current| current.subnets == lease.subnets && current.fence == lease.fence) {
                inner.delete(&lease.key);
            }
            Ok(())
        })
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        let mut inner = self.shared.lock();
        let trouble = inner.away.then(|| unavailable("watching"));
        let pending = Pending { reset: true, trouble, ..Pending::default() };
        let watcher = Arc::new(Watcher { pending: Mutex::new(pending), changed: Notify::new() });
        inner.watchers.push(Arc::downgrade(&watcher));
        drop(inner);
        let state = (Arc::clone(&self.shared), watcher);
        unfold(state, |(shared, watcher)| async move {
            let event = next_event(&shared, &watcher).await;
            Some((event, (shared, watcher)))
        })
        .boxed()
    }
}

async fn next_event(shared: &Shared, watcher: &Watcher) -> Result<LeaseEvent, SubnetError> {
    loop {
        let next_expiry = {
            // The store's lock before the watcher's, as everywhere.
            let mut inner = shared.lock();
            inner.sweep(shared.clock.now());
            let mut pending = watcher.lock();
            if let Some(trouble) = pending.trouble.take() {
                return Err(trouble);
            }
            if !inner.away && std::mem::take(&mut pending.reset) {
                return Ok(LeaseEvent::Reset(inner.records.values().cloned().collect()));
            }
            if let Some(event) = pending.events.pop_front() {
                return Ok(event);
            }
            inner.next_expiry()
        };
        let expired = match next_expiry {
            Some(deadline) => shared.clock.sleep_until(deadline).boxed(),
            None => futures_util::future::pending().boxed(),
        };
        tokio::select! {
            () = watcher.changed.notified() => {}
            () = expired => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Allocation;
    use crate::testing::store_contract::{self, Harness};

    fn store(network: &str) -> MemorySubnets {
        let json = format!("{{\"Network\":\"{network}\"}}");
        MemorySubnets::new(NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap())
    }

    fn want() -> Want {
        Want { attrs: LeaseAttrs::default(), preferred: Dual::default() }
    }

    #[tokio::test]
    async fn a_lost_reply_leaves_the_lease_that_the_next_try_adopts() {
        let store = store("10.5.0.0/16");
        let node = NodeIdentity::new("a").unwrap();
        store.fail_next([Fault::LostReply]);
        assert!(matches!(store.acquire(&node, want()).await, Err(SubnetError::Unavailable { .. })));
        let first = store.previous(&node).await.unwrap().unwrap();
        assert_eq!(store.acquire(&node, want()).await.unwrap().subnets, first.subnets);
        assert_eq!(store.records().len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn keeps_the_contract_of_lease_stores() {
        store_contract::all(&mut Memory(store("10.5.0.0/16"))).await;
    }

    struct Memory(MemorySubnets);

    #[async_trait]
    impl Harness for Memory {
        async fn fresh(&mut self, config: &NetworkConfig) {
            self.0 = MemorySubnets::new(config.clone());
        }

        async fn open(&self) -> Arc<dyn SubnetManager> {
            Arc::new(self.0.clone())
        }

        async fn put_config(&self, config: &NetworkConfig) {
            self.0.set_config(config.clone());
        }

        async fn delete(&self, key: &LeaseKey) {
            self.0.delete(key);
        }

        async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
            self.0.insert_bad(key, BadRecord { reason: "no JSON".to_owned(), subnets: Dual::default() });
            true
        }

        async fn expire(&self, key: &LeaseKey) -> bool {
            self.0.delete(key)
        }
    }

    #[tokio::test]
    async fn a_cut_watch_reports_trouble_then_everything() {
        let store = store("10.5.0.0/16");
        let mut watch = store.watch();
        assert_eq!(watch.next().await.unwrap().unwrap(), LeaseEvent::Reset(Vec::new()));
        store.cut_watches();
        store.acquire(&NodeIdentity::new("a").unwrap(), want()).await.unwrap();
        assert!(watch.next().await.unwrap().is_err());
        let LeaseEvent::Reset(records) = watch.next().await.unwrap().unwrap() else { panic!("no reset") };
        assert_eq!(records, store.records());
    }

    #[tokio::test]
    async fn a_store_that_was_away_answers_with_everything_once_it_is_back() {
        let store = store("10.5.0.0/16");
        let mut before = store.watch();
        assert!(before.next().await.unwrap().is_ok());
        store.outage();
        let node = NodeIdentity::new("a").unwrap();
        assert!(matches!(store.acquire(&node, want()).await, Err(SubnetError::Unavailable { .. })));
        let mut during = store.watch();
        for watch in [&mut before, &mut during] {
            assert!(watch.next().await.unwrap().is_err());
            assert!(watch.next().now_or_never().is_none(), "a store that is away says nothing");
        }
        store.recover();
        store.acquire(&node, want()).await.unwrap();
        for watch in [&mut before, &mut during] {
            assert_eq!(watch.next().await.unwrap().unwrap(), LeaseEvent::Reset(store.records()));
        }
    }

    #[tokio::test]
    async fn a_node_known_by_its_address_keeps_its_record_under_its_subnet() {
        let config = NetworkConfig::parse(b"{\"Network\":\"10.5.0.0/16\"}", Allocation::Pool).unwrap();
        let store = MemorySubnets::by_address(config, None, Arc::new(SystemClock::default()));
        let publishing = |addr: &str| Want {
            attrs: LeaseAttrs { public_ip: Dual { v4: addr.parse().ok(), v6: None }, ..LeaseAttrs::default() },
            ..want()
        };
        let node = NodeIdentity::new("192.0.2.1").unwrap();
        let first = store.acquire(&node, publishing("192.0.2.1")).await.unwrap();
        assert_eq!(first.key.as_str(), first.subnets.v4.unwrap().to_string().replace('/', "-"));
        assert_eq!(store.acquire(&node, publishing("192.0.2.1")).await.unwrap().key, first.key);
        let moved = Lease { attrs: publishing("192.0.2.2").attrs, ..first.clone() };
        store.renew(&moved).await.unwrap();
        assert_eq!(store.previous(&node).await.unwrap(), None);
        let node = NodeIdentity::new("192.0.2.2").unwrap();
        assert_eq!(store.previous(&node).await.unwrap().unwrap().key, first.key);
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_lease_is_removed_and_its_subnet_free() {
        let config = NetworkConfig::parse(b"{\"Network\":\"10.5.0.0/28\",\"SubnetLen\":30}", Allocation::Pool).unwrap();
        let clock = Arc::new(crate::clock::TokioClock::new());
        let store = MemorySubnets::with_ttl(config, Some(Duration::from_secs(60)), clock);
        let node = |n: u8| NodeIdentity::new(&format!("n{n}")).unwrap();
        for n in 0..3 {
            store.acquire(&node(n), want()).await.unwrap();
        }
        assert!(matches!(store.acquire(&node(3), want()).await, Err(SubnetError::Exhausted(_))));
        let mut watch = store.watch();
        watch.next().await.unwrap().unwrap();
        for _ in 0..3 {
            assert!(matches!(watch.next().await.unwrap().unwrap(), LeaseEvent::Remove(_)));
        }
        store.acquire(&node(3), want()).await.unwrap();
    }
}
