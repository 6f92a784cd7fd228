//! Answers from the state file, and helpers of all tests.

mod file;
mod large;
mod own;
mod sharing;
mod wire;

use std::time::Duration;

use flannel_core::clock::{BootTime, SystemClock, TokioClock};
use flannel_core::config::Allocation;
use flannel_core::lease::{BadRecord, Fence, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::testing::store_contract::{self, InMemory, Nodes};
use flannel_core::testing::{Fault, MemorySubnets, samples};
use futures_util::{FutureExt, StreamExt};
use tempfile::TempDir;

use super::*;
use crate::known::{Known, Own};
use crate::records::Records;

const ORIGIN: &str = "memory";

fn config() -> NetworkConfig {
    NetworkConfig::parse(br#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#, Allocation::Pool).unwrap()
}

struct Bed {
    dir: TempDir,
    store: MemorySubnets,
    clock: Arc<dyn Clock>,
}

impl Bed {
    fn new() -> Self {
        let clock = Arc::new(TokioClock::new());
        let store = MemorySubnets::new(config()).for_node(ThisNode::named(node()));
        Self { dir: tempfile::tempdir().unwrap(), store, clock }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("state.json")
    }

    fn open(&self) -> CachedSubnets {
        self.open_as(ORIGIN)
    }

    fn open_as(&self, origin: &str) -> CachedSubnets {
        CachedSubnets::new(Arc::new(self.store.clone()), self.path(), origin, Arc::clone(&self.clock))
    }

    /// Writes the file of a node `a` that holds a lease and saw its own record.
    async fn saved(&self) -> Lease {
        let cached = self.open();
        let (lease, _watch) = begun(&cached).await;
        cached.flush().await.unwrap();
        lease
    }
}

fn node() -> NodeIdentity {
    NodeIdentity::new("a").unwrap()
}

fn want() -> Want {
    Want::new(LeaseAttrs::default())
}

/// Makes the calls that an agent makes at its start.
async fn begun(cached: &CachedSubnets) -> (Lease, BoxStream<'static, Result<LeaseEvent, SubnetError>>) {
    cached.this_node().await.unwrap();
    cached.network_config().await.unwrap();
    cached.previous(&node()).await.unwrap();
    let lease = cached.acquire(&node(), want()).await.unwrap();
    let mut watch = cached.watch();
    assert!(matches!(watch.next().await.unwrap().unwrap(), LeaseEvent::Reset(_)));
    (lease, watch)
}

fn peer(n: u32) -> Lease {
    let subnet = Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 8)).into(), 24).unwrap();
    let mut lease = samples::lease(n as u8, &[], "vxlan");
    lease.subnets.v4 = Some(subnet);
    lease
}

fn records(event: LeaseEvent) -> Vec<Record> {
    match event {
        LeaseEvent::Reset(records) => records,
        other => panic!("no reset: {other:?}"),
    }
}

fn held(expires: Option<u64>) -> Known {
    let expires = expires.map(|secs| BootTime(Duration::from_secs(secs)));
    let lease = peer(3).expiring(expires).fenced(Fence::new("7"));
    let own = Own::Held(node(), lease);
    let this_node =
        Some(ThisNode::named(node()).publishing(samples::lease(7, &[Family::V4, Family::V6], "vxlan").attrs.public_ip));
    Known { this_node, config: Some(config()), own, records: Some(Records::default()), asked: None }
}

/// Polls `watch` for this time and drops its items.
async fn drive(watch: &mut BoxStream<'static, Result<LeaseEvent, SubnetError>>, time: Duration) {
    let _ = tokio::time::timeout(time, async { while watch.next().await.is_some() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract_of_lease_stores() {
    let (dir, opened) = (tempfile::tempdir().unwrap(), std::sync::atomic::AtomicU32::new(0));
    let front = move |store: MemorySubnets| -> Arc<dyn SubnetManager> {
        let nth = opened.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = dir.path().join(format!("{nth}.json"));
        Arc::new(CachedSubnets::new(Arc::new(store), path, ORIGIN, Arc::new(SystemClock::default())))
    };
    store_contract::all(&mut InMemory::new(Nodes::Named, front).without_outages()).await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_stood_in_for_with_what_it_said_last() {
    let bed = Bed::new();
    bed.store.insert((3..6).map(peer));
    let bad = BadRecord { reason: "no JSON".to_owned(), subnets: peer(9).subnets };
    bed.store.insert_bad(&LeaseKey::new("bad"), bad);
    let lease = bed.saved().await;
    bed.store.outage();
    let cached = bed.open();
    assert_eq!(cached.this_node().await.unwrap(), ThisNode::named(node()));
    assert_eq!(cached.network_config().await.unwrap(), config());
    assert_eq!(cached.previous(&node()).await.unwrap(), std::slice::from_ref(&lease));
    let attrs = LeaseAttrs::default().with_backend("vxlan", Dual::default());
    let again = cached.acquire(&node(), Want::new(attrs.clone())).await.unwrap();
    assert_eq!(again, lease.clone().publishing(attrs), "the fence stays");
    let mut watch = cached.watch();
    let snapshot = records(watch.next().await.unwrap().unwrap());
    assert_eq!(snapshot, bed.store.records());
    assert!(watch.next().await.unwrap().is_err());
    assert!(watch.next().now_or_never().is_none());
    bed.store.recover();
    assert_eq!(records(watch.next().await.unwrap().unwrap()), bed.store.records());
    cached.renew(&lease).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn another_node_has_no_lease_in_the_file() {
    let bed = Bed::new();
    bed.saved().await;
    bed.store.outage();
    let other = NodeIdentity::new("b").unwrap();
    let cached = bed.open();
    assert!(matches!(cached.previous(&other).await, Err(SubnetError::Unavailable { .. })));
    assert!(matches!(cached.acquire(&other, want()).await, Err(SubnetError::Unavailable { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_fails_for_another_reason_is_not_answered_from_the_file() {
    let bed = Bed::new();
    bed.saved().await;
    let mut inner = flannel_core::subnet::MockSubnetManager::new();
    let invalid = || SubnetError::Invalid { at: "/config".to_owned(), reason: "not JSON".to_owned() };
    inner.expect_network_config().returning(move || Err(invalid()));
    inner.expect_acquire().returning(|_, _| Err(SubnetError::Exhausted("full".to_owned())));
    let cached = CachedSubnets::new(Arc::new(inner), bed.path(), ORIGIN, Arc::clone(&bed.clock));
    assert!(matches!(cached.network_config().await, Err(SubnetError::Invalid { .. })));
    assert!(matches!(cached.acquire(&node(), want()).await, Err(SubnetError::Exhausted(_))));
}
