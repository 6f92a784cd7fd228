//! Checks a [`SubnetManager`]: the requirements on every lease store.
//!
//! Write a [`Harness`] for your store ([`InMemory`] is one for stores in front of another) and call [`all`] in a test,
//! or call each check in its own test. A failed check panics with what the store has to correct. The checks need a
//! tokio runtime and wait at most ten seconds for anything.
#![expect(clippy::panic, reason = "test support: a check fails as an assertion does")]

mod fencing;
mod in_memory;
mod sharing;
mod watcher;
mod watching;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinSet;

use crate::allocation::all_compatible;
use crate::config::{BackendConfig, Network, NetworkConfig, Object, Pool};
use crate::lease::{Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use crate::net::{Dual, Family, Prefix};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use crate::text::chain;
use watching::{snapshot, snapshot_key};

pub use fencing::{
    an_earlier_lease_of_the_same_subnets_is_lost, release_frees_and_leaves_a_successor_alone,
    renew_of_a_deleted_lease_is_lost, renew_of_a_retaken_lease_is_lost,
};
pub use in_memory::{InMemory, Nodes};
pub use sharing::{
    another_nodes_lease_under_the_same_identity_is_left_alone, another_nodes_lease_with_equal_attributes_is_left_alone,
};
pub use watcher::Watcher;
pub use watching::{
    a_bad_record_is_present_and_hurts_no_other, addresses_that_an_operator_sets_are_reported,
    an_expired_lease_goes_and_its_subnet_is_free, an_outage_is_said_and_over_when_it_ends,
    watch_begins_with_everything_in_order_of_creation, watch_follows_writes_of_another_handle,
};

/// How long the suite waits for an action or event of a store.
const PATIENCE: Duration = Duration::from_secs(10);

/// A store under test: creates handles on one shared backing, and changes the backing as other programs may.
#[async_trait]
pub trait Harness: Send + Sync {
    /// Creates a new backing that contains only this configuration. Handles on the old one are not used any more.
    async fn fresh(&mut self, config: &NetworkConfig);

    /// Opens another handle on the backing, as another process would.
    async fn open(&self) -> Arc<dyn SubnetManager>;

    /// Replaces the network's configuration, as an operator would.
    async fn put_config(&self, config: &NetworkConfig);

    /// Deletes a record directly in the backing.
    async fn delete(&self, key: &LeaseKey);

    /// Overwrites a record with content that does not parse. Returns false if the store has no such content; the
    /// calling check then passes.
    async fn put_raw_bad(&self, key: &LeaseKey) -> bool;

    /// Makes a lease expire now. Returns false if the store's leases do not expire; the calling check then passes.
    async fn expire(&self, key: &LeaseKey) -> bool;

    /// Returns whether nodes are identified by the address they publish, as in etcd, so that several may have leases
    /// under one identity. Default: false, nodes have names.
    fn is_by_address(&self) -> bool {
        false
    }

    /// Returns whether nodes choose their subnets from the network's pool. Default: true. If not, as with Kubernetes'
    /// podCIDRs, [`assign`](Self::assign) assigns subnets, and the networks of the checks have no pool.
    fn allocates(&self) -> bool {
        true
    }

    /// Assigns subnets to a node, replacing earlier ones. Called if nodes do not choose their subnets.
    async fn assign(&self, node: &NodeIdentity, subnets: &Dual<Prefix>) {
        let _ = (node, subnets);
    }

    /// Sets the addresses that the node of this name publishes, as an operator would. Returns false if the store does
    /// not support this; the calling check then passes. Default: false.
    async fn set_public(&self, node: &NodeIdentity, public: Dual<IpAddr>) -> bool {
        let _ = (node, public);
        false
    }

    /// If the store's times are coarse, waits until a new record is younger than the existing ones. Default: does
    /// nothing.
    async fn tick(&self) {}

    /// Returns whether the configuration is in the backing and unavailable in an outage. Default: true. Kubernetes' is
    /// a file.
    fn holds_config(&self) -> bool {
        true
    }

    /// Makes the backing unavailable to all handles, or available again. Returns false if this is not supported; the
    /// calling check then passes. Default: false.
    async fn outage(&mut self, outage: Outage) -> bool {
        let _ = outage;
        false
    }
}

/// The start or end of an outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// The backing stops answering.
    Begins,
    /// The backing answers again.
    Ends,
}

/// The families of a check's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// Both.
    Dual,
}

impl Families {
    /// All combinations.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Dual];

    pub(super) fn present(self) -> Dual<()> {
        let v4 = matches!(self, Self::V4 | Self::Dual).then_some(());
        let v6 = matches!(self, Self::V6 | Self::Dual).then_some(());
        Dual { v4, v6 }
    }
}

impl fmt::Display for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Dual => "dual stack",
        })
    }
}

/// Runs every check that applies to the store, for networks of each combination of families.
pub async fn all(harness: &mut dyn Harness) {
    for families in Families::ALL {
        this_node_is_known_as_the_harness_says(harness, families).await;
        addresses_that_an_operator_sets_are_reported(harness, families).await;
        config_round_trip(harness, families).await;
        acquire_is_idempotent_per_node(harness, families).await;
        previous_survives_reopening(harness, families).await;
        renew_extends_and_publishes(harness, families).await;
        renew_of_a_deleted_lease_is_lost(harness, families).await;
        watch_begins_with_everything_in_order_of_creation(harness, families).await;
        watch_follows_writes_of_another_handle(harness, families).await;
        a_bad_record_is_present_and_hurts_no_other(harness, families).await;
        an_outage_is_said_and_over_when_it_ends(harness, families).await;
        if harness.allocates() {
            allocating(harness, families).await;
        } else {
            assigned_subnets_are_waited_for_and_followed(harness, families).await;
        }
    }
}

/// Runs the checks of stores whose nodes choose their subnets.
async fn allocating(harness: &mut dyn Harness, families: Families) {
    a_preferred_subnet_is_had_if_free(harness, families).await;
    racing_nodes_get_subnets_of_their_own(harness, families).await;
    a_full_pool_is_exhausted_until_a_release(harness, families).await;
    a_widened_pool_is_used_at_once(harness, families).await;
    renew_of_a_retaken_lease_is_lost(harness, families).await;
    release_frees_and_leaves_a_successor_alone(harness, families).await;
    an_earlier_lease_of_the_same_subnets_is_lost(harness, families).await;
    a_lease_that_fits_no_longer_is_replaced(harness, families).await;
    another_nodes_lease_under_the_same_identity_is_left_alone(harness, families).await;
    another_nodes_lease_with_equal_attributes_is_left_alone(harness, families).await;
    an_expired_lease_goes_and_its_subnet_is_free(harness, families).await;
}

/// All handles always return the same identity for this node, a name or an address as the harness declares.
pub async fn this_node_is_known_as_the_harness_says(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let (one, two) = (harness.open().await, harness.open().await);
    let node = ok(one.this_node().await, "this_node");
    assert_eq!(node.name.is_none(), harness.is_by_address(), "this_node: {node:?}");
    assert_eq!(ok(one.this_node().await, "this_node"), node, "this_node: another answer the second time");
    assert_eq!(ok(two.this_node().await, "this_node"), node, "this_node: another answer of another handle");
}

/// The configuration reads back as written, and handles opened before see a change.
pub async fn config_round_trip(harness: &mut dyn Harness, families: Families) {
    let first = network_for(&*harness, families, 1, 64);
    harness.fresh(&first).await;
    let store = harness.open().await;
    assert_eq!(ok(store.network_config().await, "network_config"), first, "network_config: not what was put");
    let second = network_for(&*harness, families, 100, 8);
    harness.put_config(&second).await;
    let read = ok(store.network_config().await, "network_config");
    assert_eq!(read, second, "network_config: a changed configuration must be read again, not kept");
}

/// A node that acquires again gets its own lease again, with the attributes of the new call.
pub async fn acquire_is_idempotent_per_node(harness: &mut dyn Harness, families: Families) {
    let config = network_for(&*harness, families, 1, 64);
    harness.fresh(&config).await;
    let (one, two) = (harness.open().await, harness.open().await);
    let node = Node::ready(&*harness, 0, families).await;
    let first = node.acquire(&*one).await;
    assert!(all_compatible(&config, &first.subnets), "acquire: {:?} does not fit {families}", first.subnets);
    assert_eq!(first.attrs, node.attrs, "acquire: must publish want.attrs");
    let changed = node.clone().with_data(2);
    let again = ok(two.acquire(&node.id, changed.want().preferring(subnets(families, 33))).await, "acquire");
    assert_eq!(
        (&again.key, again.subnets),
        (&first.key, first.subnets),
        "acquire: a node's own lease that fits goes before want.preferred"
    );
    assert_eq!(again.attrs, changed.attrs, "acquire: must publish the attributes it is called with now");
    let records = snapshot(&*one).await;
    assert_eq!(records.len(), 1, "acquire: a node that asks twice must have one record: {records:?}");
}

/// `want.preferred` is granted if it is free; if another node has it, any other subnet is granted.
pub async fn a_preferred_subnet_is_had_if_free(harness: &mut dyn Harness, families: Families) {
    let config = network(families, 1, 64);
    harness.fresh(&config).await;
    let store = harness.open().await;
    let wish = subnets(families, 17);
    let (a, b) = (Node::new(0, families), Node::new(1, families));
    let first = a.acquire_preferring(&*store, wish).await;
    assert_eq!(first.subnets, wish, "acquire: a free preferred subnet must be had ({families})");
    let second = b.acquire_preferring(&*store, wish).await;
    assert_disjoint(&[first, second.clone()]);
    assert!(all_compatible(&config, &second.subnets), "acquire: {:?} does not fit", second.subnets);
    let outside = subnets(families, 99);
    let third = Node::new(2, families).acquire_preferring(&*store, outside).await;
    assert!(
        all_compatible(&config, &third.subnets),
        "acquire: a preferred subnet outside the pool must not be had: {:?}",
        third.subnets
    );
}

/// Fifty nodes that acquire at once, over several handles, all get subnets, and no two overlap (docs/faults.md, L5).
pub async fn racing_nodes_get_subnets_of_their_own(harness: &mut dyn Harness, families: Families) {
    const NODES: u16 = 50;
    let config = network(families, 1, 64);
    harness.fresh(&config).await;
    let mut handles = Vec::new();
    for _ in 0..5 {
        handles.push(harness.open().await);
    }
    let mut racing = JoinSet::new();
    for n in 0..NODES {
        let store = Arc::clone(&handles[usize::from(n) % handles.len()]);
        racing.spawn(async move {
            let node = Node::new(n, families);
            // All prefer the same subnet, so that all collide.
            store.acquire(&node.id, node.want().preferring(subnets(families, 20))).await
        });
    }
    let mut leases = Vec::new();
    while let Some(joined) = soon("fifty racing nodes get leases", racing.join_next()).await {
        match joined {
            Ok(lease) => leases.push(ok(lease, "acquire in a race (a lost race is not an error: try another subnet)")),
            Err(error) => panic!("acquire panicked: {error}"),
        }
    }
    assert_disjoint(&leases);
    for lease in &leases {
        assert!(all_compatible(&config, &lease.subnets), "acquire: {:?} does not fit", lease.subnets);
    }
    let records = snapshot(&*handles[0]).await;
    assert_eq!(records.len(), usize::from(NODES), "acquire: each racing node must have one record");
}

/// A full pool gives [`SubnetError::Exhausted`]; a release makes room; existing leases are not affected.
pub async fn a_full_pool_is_exhausted_until_a_release(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 3)).await;
    let store = harness.open().await;
    let mut leases = Vec::new();
    for n in 0..3 {
        leases.push(Node::new(n, families).acquire(&*store).await);
    }
    assert_disjoint(&leases);
    let late = Node::new(3, families);
    match store.acquire(&late.id, late.want()).await {
        Err(SubnetError::Exhausted(_)) => {}
        other => panic!("acquire: a full pool must be SubnetError::Exhausted, not {other:?}"),
    }
    let again = Node::new(1, families).acquire(&*store).await;
    assert_eq!(again.subnets, leases[1].subnets, "acquire: a full pool must not cost a holder its lease");
    let freed = leases[2].subnets;
    ok(store.release(leases[2].clone()).await, "release");
    let lease = late.acquire(&*store).await;
    assert_eq!(lease.subnets, freed, "acquire: the only free subnets must be found");
}

/// Widening a pool ends its exhaustion, also for handles opened before; existing leases are kept.
pub async fn a_widened_pool_is_used_at_once(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 1)).await;
    let store = harness.open().await;
    let (first, late) = (Node::new(0, families), Node::new(1, families));
    let held = first.acquire(&*store).await;
    match store.acquire(&late.id, late.want()).await {
        Err(SubnetError::Exhausted(_)) => {}
        other => panic!("acquire: a full pool must be SubnetError::Exhausted, not {other:?}"),
    }
    let widened = network(families, 1, 2);
    harness.put_config(&widened).await;
    let lease = late.acquire(&*store).await;
    assert!(all_compatible(&widened, &lease.subnets), "acquire: {:?} is not of the widened pool", lease.subnets);
    assert_disjoint(&[held.clone(), lease]);
    assert_eq!(first.acquire(&*store).await.subnets, held.subnets, "acquire: a wider pool must not cost a lease");
}

/// A node gets no lease before subnets are assigned to it, and then a lease of exactly these. When other subnets are
/// assigned, its lease is lost, and the next lease has the new subnets.
pub async fn assigned_subnets_are_waited_for_and_followed(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let store = harness.open().await;
    let node = Node::known_to(&*harness, 0, families);
    match store.acquire(&node.id, node.want().preferring(subnets(families, 7))).await {
        Err(SubnetError::Unconfigured { at, reason }) => {
            assert!(!at.is_empty() && !reason.is_empty(), "acquire: must say what is waited for: {at:?}: {reason:?}");
        }
        other => panic!("acquire: a node without subnets must be SubnetError::Unconfigured, not {other:?}"),
    }
    // A change between the two calls is not missed.
    harness.assign(&node.id, &subnets(families, 5)).await;
    soon("changed: after subnets were assigned", store.changed()).await;
    let lease = node.acquire_preferring(&*store, subnets(families, 7)).await;
    assert_eq!(lease.subnets, subnets(families, 5), "acquire: not what the node was assigned");
    harness.assign(&node.id, &subnets(families, 6)).await;
    assert_lost(store.renew(&lease).await, "of subnets that the node has no longer");
    let previous = ok(store.previous(&node.id).await, "previous");
    assert!(
        previous.iter().all(|lease| lease.subnets == subnets(families, 6)),
        "previous: subnets that the node has no longer: {previous:?}"
    );
    let lease = node.acquire_preferring(&*store, lease.subnets).await;
    assert_eq!(lease.subnets, subnets(families, 6), "acquire: not what the node was assigned last");
    let records = snapshot(&*store).await;
    assert_eq!(records.len(), 1, "acquire: must replace the record: {records:?}");
    assert_eq!(snapshot_key(&records, &lease.key).subnets, lease.subnets, "watch: not what acquire returned");
}

/// A handle opened later returns a node's previous lease, and only to that node.
pub async fn previous_survives_reopening(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let node = Node::ready(&*harness, 0, families).await;
    let store = harness.open().await;
    let none = ok(store.previous(&node.id).await, "previous");
    assert_eq!(none, [], "previous: a node that never had a lease has none");
    let lease = node.acquire(&*store).await;
    drop(store);
    let store = harness.open().await;
    let Some(previous) = ok(store.previous(&node.id).await, "previous").pop() else {
        panic!("previous: the lease acquired through another handle is not found")
    };
    assert_same(&previous, &lease, "previous");
    let stranger = Node::ready(&*harness, 1, families).await;
    assert_eq!(ok(store.previous(&stranger.id).await, "previous"), [], "previous: a stranger's lease is not ours");
    ok(store.renew(&previous).await, "renew of what previous returned");
}

/// A renewal does not shorten the lease, shows changed attributes to others, and may be repeated if its outcome is
/// unknown (docs/faults.md, L10).
pub async fn renew_extends_and_publishes(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let (one, two) = (harness.open().await, harness.open().await);
    let node = Node::ready(&*harness, 0, families).await;
    let lease = node.acquire(&*one).await;
    let changed = Lease { attrs: node.clone().with_data(2).attrs, ..lease.clone() };
    let renewed = ok(one.renew(&changed).await, "renew");
    assert_same(&renewed, &changed, "renew");
    assert_eq!(renewed.expires.is_some(), lease.expires.is_some(), "renew: a lease ends always or never");
    let slack = Duration::from_millis(5);
    assert!(
        renewed.expires.map(|at| at.after(slack)) >= lease.expires,
        "renew: {:?} is earlier than {:?}",
        renewed.expires,
        lease.expires
    );
    let Some(seen) = ok(two.previous(&node.id).await, "previous").pop() else { panic!("renew: the record is gone") };
    assert_eq!(seen.attrs, changed.attrs, "renew: must publish lease.attrs");
    let once_more = ok(
        one.renew(&changed).await,
        "renew with the lease of before a renewal whose answer was lost: our own record is to be adopted",
    );
    assert_same(&once_more, &changed, "renew");
    ok(two.renew(&once_more).await, "renew over another handle");
}

/// If a lease no longer fits the pool, `acquire` replaces it (docs/compatibility.md, "Acquiring a lease", step 2), and
/// `previous` does not return it.
pub async fn a_lease_that_fits_no_longer_is_replaced(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 64)).await;
    let store = harness.open().await;
    let node = Node::new(0, families);
    let old = node.acquire(&*store).await;
    let moved = network(families, 100, 8);
    harness.put_config(&moved).await;
    assert_eq!(
        ok(store.previous(&node.id).await, "previous"),
        [],
        "previous: a lease that does not fit the network any more must not be handed out"
    );
    let new = node.acquire_preferring(&*store, old.subnets).await;
    assert!(all_compatible(&moved, &new.subnets), "acquire: kept {:?}, which does not fit any more", new.subnets);
    let records = snapshot(&*store).await;
    assert_eq!(records.len(), 1, "acquire: the lease that does not fit must go: {records:?}");
    assert_eq!(snapshot_key(&records, &new.key).subnets, new.subnets, "watch: not what acquire returned");
    assert_lost(store.renew(&old).await, "replaced by one that fits");
}

/// A node with its attributes.
#[derive(Clone)]
struct Node {
    /// Its public IP, which identifies a node in etcd; other stores accept any name.
    id: NodeIdentity,
    attrs: LeaseAttrs,
}

impl Node {
    fn new(n: u16, families: Families) -> Self {
        let public_ip = families.present().map(|family, ()| match family {
            Family::V4 => (u32::from(Ipv4Addr::new(192, 168, 0, 1)) + u32::from(n)).to_be_bytes().into(),
            Family::V6 => IpAddr::from([0xfd01, 0, 0, 0, 0, 0, 0, n + 1]),
        });
        let name = public_ip.v4.or(public_ip.v6).map(|addr| addr.to_string()).unwrap_or_default();
        let Ok(id) = NodeIdentity::new(&name) else { panic!("{name} is no node identity") };
        let attrs = LeaseAttrs { public_ip, backend_type: "vxlan".into(), ..LeaseAttrs::default() };
        Self { id, attrs }.with_data(1)
    }

    fn with_data(mut self, vni: u64) -> Self {
        let fields = [("VNI", Scalar::Number(vni)), ("VtepMAC", Scalar::Text("02:00:5e:10:00:01"))];
        self.attrs.backend_data = self.attrs.public_ip.map(|_, _| Json::object(&fields));
        self
    }

    fn want(&self) -> Want {
        Want::new(self.attrs.clone())
    }

    /// The same, with a name if the store identifies nodes by name.
    fn known_to(harness: &dyn Harness, n: u16, families: Families) -> Self {
        let node = Self::new(n, families);
        if harness.is_by_address() {
            return node;
        }
        let Ok(id) = NodeIdentity::new(&format!("node-{n}")) else { panic!("node-{n} is no node identity") };
        Self { id, ..node }
    }

    /// A node that can acquire a lease: if the store does not let it choose, subnets are assigned to it.
    async fn ready(harness: &dyn Harness, n: u16, families: Families) -> Self {
        let node = Self::known_to(harness, n, families);
        if !harness.allocates() {
            harness.assign(&node.id, &subnets(families, n + 1)).await;
        }
        node
    }

    async fn acquire(&self, store: &dyn SubnetManager) -> Lease {
        self.acquire_preferring(store, Dual::default()).await
    }

    async fn acquire_preferring(&self, store: &dyn SubnetManager, preferred: Dual<Prefix>) -> Lease {
        ok(soon("acquire", store.acquire(&self.id, self.want().preferring(preferred))).await, "acquire")
    }
}

/// Returns the network of a check, with a pool if the store allocates.
fn network_for(harness: &dyn Harness, families: Families, first: u16, count: u16) -> NetworkConfig {
    let mut config = network(families, first, count);
    if !harness.allocates() {
        config.networks = config.networks.map(|_, network| Network { pool: None, ..network.clone() });
    }
    config
}

/// Returns a network whose pool has `count` subnets, starting with number `first`.
fn network(families: Families, first: u16, count: u16) -> NetworkConfig {
    let last = subnets(families, first + count - 1);
    let networks = subnets(families, first).map(|family, min| {
        let (network, len) = match family {
            Family::V4 => (prefix([10, 5, 0, 0].into(), 16), 24),
            Family::V6 => (prefix([0xfd00, 5, 0, 0, 0, 0, 0, 0].into(), 48), 64),
        };
        let max = last.get(family).unwrap_or(min).addr();
        Network { prefix: network, pool: Some(Pool { len, min: min.addr(), max }) }
    });
    let backend = BackendConfig::new("vxlan");
    NetworkConfig { networks, enable_nftables: false, backend, ignored: Box::new(Object::new("$")) }
}

fn subnets(families: Families, n: u16) -> Dual<Prefix> {
    let [high, low] = n.to_be_bytes();
    families.present().map(|family, ()| match family {
        Family::V4 => prefix([10, 5 + high, low, 0].into(), 24),
        Family::V6 => prefix([0xfd00, 5, 0, n, 0, 0, 0, 0].into(), 64),
    })
}

fn prefix(addr: IpAddr, len: u8) -> Prefix {
    match Prefix::new(addr, len) {
        Ok(prefix) => prefix,
        Err(error) => panic!("the suite's own network: {error}"),
    }
}

#[track_caller]
fn ok<T>(result: Result<T, SubnetError>, doing: &str) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{doing}: {}", chain(&error)),
    }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

#[track_caller]
fn assert_lost(result: Result<Lease, SubnetError>, how: &str) {
    match result {
        Err(SubnetError::Lost(_)) => {}
        other => panic!("renew: a lease that is {how} must be SubnetError::Lost, not {other:?}"),
    }
}

#[track_caller]
fn assert_same(found: &Lease, expected: &Lease, doing: &str) {
    assert_eq!(found.key, expected.key, "{doing}: another key");
    assert_eq!(found.subnets, expected.subnets, "{doing}: other subnets");
    assert_eq!(found.attrs, expected.attrs, "{doing}: other attributes");
}

#[track_caller]
fn assert_disjoint(leases: &[Lease]) {
    for (n, one) in leases.iter().enumerate() {
        for two in &leases[n + 1..] {
            let overlap = one.subnets.iter().any(|(_, a)| two.subnets.iter().any(|(_, b)| a.overlaps(b)));
            assert!(!overlap, "acquire: {} and {} overlap: {:?}, {:?}", one.key, two.key, one.subnets, two.subnets);
        }
    }
}
