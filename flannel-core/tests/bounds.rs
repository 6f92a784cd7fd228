//! What a whole agent costs, whatever the store holds. Alone in its process: it measures the process.
#![cfg(all(target_os = "linux", feature = "testing"))]
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "helpers of tests")]

/// Nobody reads the log here.
mod log {
    pub(crate) struct Log;

    impl Log {
        pub(crate) fn install() {}
    }
}
#[path = "agent/node.rs"]
#[expect(dead_code, reason = "shared with the tests of the agent's reactions")]
mod node;
#[path = "agent/tunnel.rs"]
mod tunnel;

use std::process::Command;

use flannel_core::lease::{BadRecord, Json, Lease, LeaseEvent, LeaseKey, MAX_RECORDS, RECORD_BYTES, Record};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::Status;
use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_core::testing::{MemorySubnets, StoreDouble};
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use node::{Node, pass, peer, public, subnet};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use tunnel::{data, mac_of};

/// What an agent may take, beside the tens of thousands of peers that it may have.
const MOST_BYTES: usize = 64 << 20;
/// Peers that were there before all others.
const GOOD: std::ops::RangeInclusive<u8> = 1..=20;

/// What is wrong with hostile records, and how large they are.
#[derive(Debug, Clone)]
struct Hostile {
    kinds: Vec<Kind>,
    /// How many the store lists.
    listed: usize,
    /// How many come, change and go after that.
    storm: usize,
    key_bytes: usize,
    data_bytes: usize,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// All have one subnet.
    Subnet,
    /// All have one MAC address.
    Mac,
    /// A good peer's subnet, or a part of it.
    Taken,
    /// Not of this network.
    Outside,
    /// Nothing that parses, with a reason and a prefix.
    Unreadable,
    /// A key that is too long.
    LongKey,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    let kind = prop_oneof![
        Just(Kind::Subnet),
        Just(Kind::Mac),
        Just(Kind::Taken),
        Just(Kind::Outside),
        Just(Kind::Unreadable),
        Just(Kind::LongKey)
    ];
    let kinds = proptest::collection::vec(kind, 1..4);
    // Short ones by number, long ones by size, and those that are just not large.
    let sizes = prop_oneof![
        Just((12, 0)),
        (12..=LeaseKey::MAX_BYTES, 0..100_usize),
        Just((100, 4000)),
        // The largest leases that count as one.
        Just((RECORD_BYTES - 47, 0))
    ];
    (kinds, sizes, 0..6_000_usize).prop_map(|(kinds, (key_bytes, data_bytes), storm)| Hostile {
        kinds,
        listed: MAX_RECORDS + 5000,
        storm,
        key_bytes,
        data_bytes,
    })
}

impl Hostile {
    fn key(&self, n: usize, kind: Kind) -> LeaseKey {
        let bytes = if matches!(kind, Kind::LongKey) { LeaseKey::MAX_BYTES + 1 } else { self.key_bytes };
        LeaseKey::new(&format!("{n:0>bytes$}"))
    }

    fn record(&self, n: usize) -> Record {
        let kind = self.kinds[n % self.kinds.len()];
        let (key, [.., high, low]) = (self.key(n, kind), n.to_be_bytes());
        let within = |len: u8| Prefix::masked([10, 42, 128 | high, low].into(), len).ok();
        let subnets = match kind {
            Kind::Subnet => Some(subnet(250)),
            Kind::Mac | Kind::Unreadable | Kind::LongKey => within(30),
            Kind::Taken => Prefix::masked([10, 42, 1 + low % 20, low].into(), 24 + low % 7).ok(),
            Kind::Outside => Prefix::masked([10, 43, high, low].into(), 30).ok(),
        };
        let subnets = Dual { v4: subnets, v6: None };
        let created = 1_000_000 + n as u64;
        if let Kind::Unreadable = kind {
            return Record::bad(key, created, BadRecord::new("é".repeat(self.data_bytes), subnets));
        }
        let name = if let Kind::Mac = kind { "everybody" } else { key.as_str() };
        let mut lease = Lease::new(key.clone(), subnets, peer(1).attrs);
        lease.attrs.public_ip.v4 = Some(public(Family::V4, 250));
        lease.attrs.backend_data.v4 = Some(data(mac_of(name, Family::V4)));
        lease.attrs.backend_data.v6 = Json::parse(&format!("\"{}\"", "x".repeat(self.data_bytes))).ok();
        Record::of(lease, created)
    }

    /// A list as a store gives it that is bounded itself.
    fn list(&self) -> impl Iterator<Item = Record> {
        let mut weight = 0;
        (0..self.listed).map(|n| self.record(n)).take_while(move |record| {
            weight += record.weight();
            weight <= MAX_RECORDS + 5000
        })
    }

    /// The `n`-th event after the list.
    fn event(&self, n: usize) -> LeaseEvent {
        let record = self.record(n * 31 % (2 * self.listed));
        if n.is_multiple_of(3) { LeaseEvent::Remove(record.key) } else { LeaseEvent::Upsert(record) }
    }
}

/// A store that holds hostile records beside good ones. They come into being when they are told, so that they are nobody's
/// but the agent's.
#[derive(Clone)]
struct Flooded {
    store: MemorySubnets,
    hostile: Hostile,
}

impl StoreDouble for Flooded {
    type Store = MemorySubnets;

    fn store(&self) -> &MemorySubnets {
        &self.store
    }

    fn watch_with(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        let (mut good, list, storm) = (self.store.watch(), self.hostile.clone(), self.hostile.clone());
        let first = async move {
            let mut records = Vec::with_capacity(list.listed + 100);
            if let Some(Ok(LeaseEvent::Reset(good))) = good.next().await {
                records.extend(good);
            }
            records.extend(list.list());
            let events = (0..storm.storm).map(move |n| Ok(storm.event(n)));
            stream::iter([Ok(LeaseEvent::Reset(records))]).chain(stream::iter(events)).chain(good)
        };
        first.flatten_stream().boxed()
    }
}

/// The field of `/proc/self/status`, in bytes.
fn resident(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("this test needs /proc");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field of proc(5)");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
    kib * 1024
}

async fn survives(hostile: Hostile) -> Result<(), TestCaseError> {
    let node = Node::alone();
    node.join(GOOD);
    let store = Flooded { store: node.store.clone(), hostile };
    std::fs::write("/proc/self/clear_refs", "5").expect("this test needs /proc/self/clear_refs");
    let before = resident("VmHWM:");
    let agent = node.run_over(&store);
    let status = agent.ready().await;
    prop_assert!(GOOD.into_iter().all(|n| node.has_route(subnet(n))));
    prop_assert!(status.quarantined.len() <= Status::MAX_QUARANTINED);
    // There are more than are held, or the keys of the others are too long.
    prop_assert!(status.peers.dropped > 0, "{:?}", status.peers);
    // What stays is answered for, and events go on meanwhile.
    for _ in 0..1000 {
        node.kernel.carrier_change("tun4.1").unwrap();
    }
    pass(2.0).await;
    let status = agent.audited().await;
    let peers = agent.handle.peers().await.unwrap();
    prop_assert_eq!(peers.len(), status.peers.accepted);
    prop_assert!(GOOD.into_iter().all(|n| peers.iter().any(|held| held.key == peer(n).key)));
    prop_assert!(!agent.handle.explain("peer-1").await.unwrap().is_empty());
    prop_assert!(agent.handle.plan().await.unwrap().plan.is_empty());
    let used = resident("VmHWM:").saturating_sub(before);
    println!("{} KiB, {status:?}", used / 1024, status = status.peers);
    prop_assert!(used < MOST_BYTES, "{} KiB", used / 1024);
    prop_assert!(agent.cancelled().await.is_ok());
    Ok(())
}

/// The seed of the one case that this process is for.
const SEED: &str = "BOUNDS_SEED";
const TEST: &str = "whatever_the_store_holds_an_agent_stays_small_keeps_its_peers_answers_and_stops";

/// Each case has a process to itself: what an earlier one left behind in the allocator, up to 5 MiB, would count for it.
#[test]
fn whatever_the_store_holds_an_agent_stays_small_keeps_its_peers_answers_and_stops() {
    if let Ok(seed) = std::env::var(SEED) {
        let hostile = hostile_of(seed.parse().unwrap());
        println!("{hostile:?}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        return runtime.block_on(survives(hostile)).unwrap();
    }
    let config =
        ProptestConfig { cases: 3, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() };
    let alone = |seed: u64| {
        let mut case = Command::new(std::env::current_exe().unwrap());
        let case = case.args(["--exact", TEST, "--nocapture"]).env(SEED, seed.to_string()).output().unwrap();
        println!("{}", String::from_utf8_lossy(&case.stdout));
        prop_assert!(case.status.success(), "{}", String::from_utf8_lossy(&case.stderr));
        Ok(())
    };
    TestRunner::new(config).run(&any::<u64>(), alone).unwrap();
}

fn hostile_of(seed: u64) -> Hostile {
    let rng = TestRng::from_seed(RngAlgorithm::XorShift, &[seed.to_le_bytes(), [1; 8]].concat());
    hostile().new_tree(&mut TestRunner::new_with_rng(ProptestConfig::default(), rng)).unwrap().current()
}
