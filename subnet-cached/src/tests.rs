//! The state file and the answers from it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant, SystemTime};

use flannel_core::clock::{BootTime, SystemClock, TokioClock};
use flannel_core::config::Allocation;
use flannel_core::files::{Mode, Trust};
use flannel_core::lease::{BadRecord, Fence, Json, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::testing::store_contract::{self, Harness};
use flannel_core::testing::{Fault, MemorySubnets, arbitrary};
use futures_util::{FutureExt, StreamExt};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::keeper::{PACE, SETTLE};
use crate::known::{Changed, Entry, Known, Own};
use crate::records::Records;

const ORIGIN: &str = "memory";

fn config() -> NetworkConfig {
    NetworkConfig::parse(br#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#, Allocation::Pool).unwrap()
}

pub(crate) struct Bed {
    dir: TempDir,
    pub(crate) store: MemorySubnets,
    clock: Arc<dyn Clock>,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let clock = Arc::new(TokioClock::new());
        let store = MemorySubnets::new(config()).for_node(ThisNode::named(node()));
        Self { dir: tempfile::tempdir().unwrap(), store, clock }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("state.json")
    }

    pub(crate) fn open(&self) -> CachedSubnets {
        self.open_as(ORIGIN)
    }

    fn open_as(&self, origin: &str) -> CachedSubnets {
        CachedSubnets::new(Arc::new(self.store.clone()), self.path(), origin, Arc::clone(&self.clock))
    }

    /// A file of a node `a` that holds a lease and saw its own record.
    pub(crate) async fn saved(&self) -> Lease {
        let cached = self.open();
        let (lease, _watch) = begun(&cached).await;
        cached.flush().await.unwrap();
        lease
    }
}

pub(crate) fn node() -> NodeIdentity {
    NodeIdentity::new("a").unwrap()
}

pub(crate) fn want() -> Want {
    Want::new(LeaseAttrs::default())
}

/// Does what an agent does at its start.
pub(crate) async fn begun(cached: &CachedSubnets) -> (Lease, BoxStream<'static, Result<LeaseEvent, SubnetError>>) {
    cached.this_node().await.unwrap();
    cached.network_config().await.unwrap();
    cached.previous(&node()).await.unwrap();
    let lease = cached.acquire(&node(), want()).await.unwrap();
    let mut watch = cached.watch();
    assert!(matches!(watch.next().await.unwrap().unwrap(), LeaseEvent::Reset(_)));
    (lease, watch)
}

pub(crate) fn peer(n: u32) -> Lease {
    let subnet = Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 8)).into(), 24).unwrap();
    Lease { subnets: Dual { v4: Some(subnet), v6: None }, ..arbitrary::lease(n as u8, &[], "vxlan") }
}

fn records(event: LeaseEvent) -> Vec<Record> {
    match event {
        LeaseEvent::Reset(records) => records,
        other => panic!("no reset: {other:?}"),
    }
}

/// Polls `watch` for so long; what it says is lost.
pub(crate) async fn drive(watch: &mut BoxStream<'static, Result<LeaseEvent, SubnetError>>, time: Duration) {
    let _ = tokio::time::timeout(time, async { while watch.next().await.is_some() {} }).await;
}

struct Behind {
    store: MemorySubnets,
    dir: TempDir,
    opened: std::sync::atomic::AtomicU32,
}

#[async_trait]
impl Harness for Behind {
    async fn fresh(&mut self, config: &NetworkConfig) {
        let node = ThisNode::named(NodeIdentity::new("a").unwrap());
        self.store = MemorySubnets::new(config.clone()).for_node(node);
    }

    async fn open(&self) -> Arc<dyn SubnetManager> {
        let nth = self.opened.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = self.dir.path().join(format!("{nth}.json"));
        let clock = Arc::new(SystemClock::default());
        Arc::new(CachedSubnets::new(Arc::new(self.store.clone()), path, ORIGIN, clock))
    }

    async fn put_config(&self, config: &NetworkConfig) {
        self.store.set_config(config.clone());
    }

    async fn delete(&self, key: &LeaseKey) {
        self.store.delete(key);
    }

    async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
        self.store.insert_bad(key, BadRecord { reason: "no JSON".to_owned(), subnets: Dual::default() });
        true
    }

    async fn expire(&self, key: &LeaseKey) -> bool {
        self.store.delete(key)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract_of_lease_stores() {
    let store = MemorySubnets::new(config());
    let behind = Behind { store, dir: tempfile::tempdir().unwrap(), opened: 0.into() };
    store_contract::all(&mut { behind }).await;
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
    let attrs = LeaseAttrs { backend_type: "vxlan".into(), ..LeaseAttrs::default() };
    let again = cached.acquire(&node(), Want::new(attrs.clone())).await.unwrap();
    assert_eq!(again, Lease { attrs, ..lease.clone() }, "the fence stays");
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

/// The own lease after the node's address changed.
fn moved(lease: &Lease, fence: &str) -> Lease {
    let public_ip = Dual { v4: Some("192.0.2.77".parse().unwrap()), v6: None };
    let attrs = LeaseAttrs { public_ip, ..lease.attrs.clone() };
    Lease { attrs, fence: Fence(Some(fence.into())), ..lease.clone() }
}

fn shown(lease: &Lease) -> LeaseEvent {
    LeaseEvent::Upsert(Record { key: lease.key.clone(), created: 1, lease: Ok(Arc::new(lease.clone())) })
}

#[test]
fn a_change_of_address_leaves_the_own_lease_known() {
    let mut known = held(None);
    let Own::Held(_, before) = known.own.clone() else { unreachable!() };
    let after = moved(&before, "9");
    let own = |known: &Known, node: &NodeIdentity| known.own_lease(node, BootTime::default());
    let is_kept = |known: &Known| {
        let new = NodeIdentity::new("192.0.2.77").unwrap();
        assert_eq!(own(known, &node()).as_ref(), Some(&after));
        assert_eq!(own(known, &new).as_ref(), Some(&after), "by the address that it has now");
        assert_eq!(own(known, &NodeIdentity::new("192.0.2.1").unwrap()), None);
    };
    // The reply comes first, or what the watch shows; an older event may come late.
    for before_reply in [vec![], vec![&after], vec![&before, &after]] {
        for after_reply in [vec![], vec![&before, &after]] {
            let mut known = known.clone();
            known.renewing(&after);
            before_reply.iter().for_each(|lease| {
                known.event(&shown(lease));
            });
            known.renewed(&after);
            after_reply.iter().for_each(|lease| {
                known.event(&shown(lease));
            });
            is_kept(&known);
        }
    }
    // The reply is lost.
    known.renewing(&after);
    known.event(&shown(&after));
    is_kept(&known);
}

#[test]
fn what_the_store_shows_as_anothers_is_no_own_lease_until_a_renewal_says_so() {
    let mut known = held(None);
    let Own::Held(_, ours) = known.own.clone() else { unreachable!() };
    let own = |known: &Known| known.own_lease(&node(), BootTime::default());
    for event in [shown(&moved(&ours, "9")), LeaseEvent::Remove(ours.key.clone()), LeaseEvent::Reset(Vec::new())] {
        assert_eq!(known.event(&event), Changed::Yes);
        assert_eq!(own(&known), None, "{event:?}");
        assert_eq!(known.renewed(&ours), Changed::Yes);
        assert_eq!(own(&known), Some(ours.clone()));
        known.event(&event);
        known.event(&shown(&ours));
        assert_eq!(own(&known), Some(ours.clone()), "what was shown was older");
    }
    known.lost(&ours.key);
    known.renewed(&ours);
    known.event(&shown(&ours));
    assert_eq!(own(&known), None);
}

#[tokio::test(start_paused = true)]
async fn the_file_holds_the_own_lease_under_the_new_address() {
    let bed = Bed::new();
    let cached = bed.open();
    cached.network_config().await.unwrap();
    let old = NodeIdentity::new("192.0.2.1").unwrap();
    let lease = cached.acquire(&old, want()).await.unwrap();
    let mut watch = cached.watch();
    watch.next().await.unwrap().unwrap();
    bed.store.fail_next([Fault::LostReply]);
    cached.renew(&moved(&lease, lease.fence.0.as_deref().unwrap())).await.unwrap_err();
    watch.next().await.unwrap().unwrap();
    cached.flush().await.unwrap();
    bed.store.outage();
    let found = bed.open().previous(&NodeIdentity::new("192.0.2.77").unwrap()).await.unwrap().remove(0);
    assert_eq!(found.subnets, lease.subnets);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_fits_the_network_no_longer_is_not_used() {
    let bed = Bed::new();
    bed.saved().await;
    let moved = NetworkConfig::parse(br#"{"Network":"10.99.0.0/16"}"#, Allocation::Pool).unwrap();
    bed.store.set_config(moved);
    let cached = bed.open();
    cached.network_config().await.unwrap();
    bed.store.outage();
    assert!(cached.previous(&node()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lease_given_back_or_refused_is_forgotten() {
    for refused in [true, false] {
        let bed = Bed::new();
        let lease = bed.saved().await;
        let cached = bed.open();
        let _watch = begun(&cached).await;
        if refused {
            bed.store.delete(&lease.key);
            assert!(matches!(cached.renew(&lease).await, Err(SubnetError::Lost(_))));
        } else {
            cached.release(lease).await.unwrap();
        }
        cached.flush().await.unwrap();
        bed.store.outage();
        assert!(cached.previous(&node()).await.is_err());
        assert!(bed.open().previous(&node()).await.is_err());
    }
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

#[tokio::test(start_paused = true)]
async fn changes_are_gathered_and_writes_keep_their_distance() {
    let bed = Bed::new();
    let cached = bed.open();
    let (_, mut watch) = begun(&cached).await;
    drive(&mut watch, SETTLE - Duration::from_millis(100)).await;
    assert!(!bed.path().exists());
    drive(&mut watch, Duration::from_millis(200)).await;
    drive(&mut watch, Duration::from_millis(10)).await;
    let first = fs::read_to_string(bed.path()).unwrap();
    bed.store.insert([peer(3)]);
    drive(&mut watch, PACE - Duration::from_secs(1)).await;
    assert_eq!(fs::read_to_string(bed.path()).unwrap(), first);
    drive(&mut watch, Duration::from_secs(2)).await;
    let second = fs::read_to_string(bed.path()).unwrap();
    assert!(second.contains("node-3"), "{second}");
    // A renewal of another is no change.
    let modified = || fs::metadata(bed.path()).unwrap().modified().unwrap();
    let before = modified();
    bed.store.insert([Lease { fence: Fence(Some("8".into())), ..peer(3) }]);
    drive(&mut watch, 2 * PACE).await;
    assert_eq!(modified(), before);
    let mode = fs::metadata(bed.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_over_a_file_before_all_is_known() {
    let bed = Bed::new();
    bed.saved().await;
    let before = fs::read(bed.path()).unwrap();
    let cached = bed.open();
    cached.network_config().await.unwrap();
    cached.acquire(&node(), want()).await.unwrap();
    cached.flush().await.unwrap();
    assert_eq!(fs::read(bed.path()).unwrap(), before);
}

#[tokio::test(start_paused = true)]
async fn two_watches_do_not_undo_each_other() {
    let bed = Bed::new();
    let cached = bed.open();
    let (_, mut ahead) = begun(&cached).await;
    let mut behind = cached.watch();
    behind.next().await.unwrap().unwrap();
    bed.store.insert([peer(3)]);
    bed.store.delete(&peer(3).key);
    for _ in 0..2 {
        ahead.next().await.unwrap().unwrap();
    }
    behind.next().await.unwrap().unwrap();
    cached.flush().await.unwrap();
    assert!(!fs::read_to_string(bed.path()).unwrap().contains("node-3"));
    // When the first is gone, the other one takes over with its next snapshot.
    drop(ahead);
    bed.store.insert([peer(4)]);
    bed.store.cut_watches();
    while !matches!(behind.next().await.unwrap(), Ok(LeaseEvent::Reset(_))) {}
    cached.flush().await.unwrap();
    assert!(fs::read_to_string(bed.path()).unwrap().contains("node-4"));
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_left_of_a_write_is_no_matter_and_cleared() {
    let bed = Bed::new();
    bed.saved().await;
    let whole = fs::read(bed.path()).unwrap();
    let leftover = |name: &str, bytes: &[u8]| {
        let path = bed.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        #[expect(clippy::disallowed_methods, reason = "file times are of the wall clock")]
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        path
    };
    // Killed at any point before the rename: the old file counts.
    let torn = leftover(".state.json.0123456789abcdef.tmp", &whole[..whole.len() / 2]);
    let other = leftover(".state.json.swp", b"an editor's");
    let fresh = bed.dir.path().join(".state.json.fedcba9876543210.tmp");
    fs::write(&fresh, "").unwrap();
    bed.store.outage();
    assert_eq!(bed.open().network_config().await.unwrap(), config());
    bed.store.recover();
    bed.store.insert([peer(3)]);
    bed.saved().await;
    assert!(!torn.exists() && !fresh.exists() && other.exists());
    let names = fs::read_dir(bed.dir.path()).unwrap().count();
    assert_eq!(names, 2, "a temporary file was left");
    assert!(fs::read_to_string(bed.path()).unwrap().contains("node-3"));
    fs::write(&fresh, "").unwrap();
    bed.open().erase().unwrap();
    bed.open().erase().unwrap();
    assert_eq!(fs::read_dir(bed.dir.path()).unwrap().count(), 1, "only the editor's is left");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_not_whole_or_not_ours_is_ignored() {
    let bed = Bed::new();
    bed.store.insert([peer(3)]);
    assert_eq!(bed.open().check(), Ok(false));
    bed.saved().await;
    assert_eq!(bed.open().check(), Ok(true));
    let good = fs::read_to_string(bed.path()).unwrap();
    bed.store.outage();
    let ignored = |why: &str| {
        let cached = bed.open();
        let why = why.to_owned();
        async move {
            assert!(cached.check().is_err(), "{why}");
            assert!(cached.network_config().await.is_err(), "{why}");
            assert!(cached.previous(&node()).await.is_err(), "{why}");
            let first = cached.watch().next().await.unwrap();
            assert!(first.is_err(), "{why}: {first:?}");
        }
    };
    // Cut off anywhere, but for the white space at its end.
    for len in (0..good.trim_end().len()).step_by(7).chain([good.trim_end().len() - 1]) {
        fs::write(bed.path(), &good[..len]).unwrap();
        ignored(&format!("cut at {len}")).await;
    }
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"version\":1,", ""),
        ("{\"version\"", "[{\"version\""),
        ("\"Network\":\"10.5.0.0/16\"", "\"Network\":\"10.5.0.0/99\""),
        ("\"PublicIP\":\"", "\"PublicIP\":\"x"),
        ("10.5.3.0/24", "10.5.3.1/24"),
        ("\"records\"", "\"more\":1,\"records\""),
        ("\"node-3\"", "\"a\""),
        ("\"node\":\"a\"", "\"node\":\"../a\""),
        ("\n", "}\n"),
    ] {
        assert!(good.contains(from), "{from} in {good}");
        fs::write(bed.path(), good.replace(from, to)).unwrap();
        ignored(&format!("{from} for {to}")).await;
    }
    fs::write(bed.path(), b"\xff\xfe").unwrap();
    ignored("no text").await;
    fs::write(bed.path(), &good).unwrap();
    fs::set_permissions(bed.path(), fs::Permissions::from_mode(0o622)).unwrap();
    ignored("others may write").await;
    fs::set_permissions(bed.path(), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(bed.open_as("another").network_config().await.is_err(), "another store's");
    assert!(bed.open().network_config().await.is_ok(), "as it was");
    // White space at the end is as good as none.
    let padded = |len: u64| [good.as_bytes(), &vec![b' '; len as usize - good.len()]].concat();
    fs::write(bed.path(), padded(MAX_BYTES)).unwrap();
    assert_eq!(bed.open().check(), Ok(true));
    fs::write(bed.path(), padded(MAX_BYTES + 1)).unwrap();
    let why = bed.open().check().unwrap_err();
    assert!(why.contains(&format!("larger than {} bytes", MAX_BYTES)), "{why}");
    ignored("too large").await;
    fs::remove_file(bed.path()).unwrap();
    fs::create_dir(bed.path()).unwrap();
    ignored("a directory").await;
}

#[tokio::test(start_paused = true)]
async fn a_bad_file_is_overwritten_with_the_next_change() {
    let bed = Bed::new();
    fs::write(bed.path(), "{").unwrap();
    bed.store.fail_next([Fault::Unavailable]);
    let cached = bed.open();
    assert!(cached.network_config().await.is_err());
    let _begun = begun(&cached).await;
    cached.flush().await.unwrap();
    bed.store.outage();
    assert!(bed.open().network_config().await.is_ok());
}

pub(crate) fn held(expires: Option<u64>) -> Known {
    let expires = expires.map(|secs| BootTime(Duration::from_secs(secs)));
    let lease = Lease { expires, fence: Fence(Some("7".into())), ..peer(3) };
    let own = Own::Held(node(), lease);
    let this_node = Some(
        ThisNode::named(node()).publishing(arbitrary::lease(7, &[Family::V4, Family::V6], "vxlan").attrs.public_ip),
    );
    Known { this_node, config: Some(config()), own, records: Some(Records::default()), asked: None }
}

fn text(known: &Known, now: u64, wall: u64) -> Vec<u8> {
    let mut text = Vec::new();
    wire::write(&mut text, known, ORIGIN, BootTime(Duration::from_secs(now)), at(wall)).unwrap();
    text
}

fn read(text: &[u8], now: u64, wall: u64) -> Known {
    wire::parse(text, ORIGIN, BootTime(Duration::from_secs(now)), at(wall)).unwrap()
}

fn at(wall: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(wall)
}

#[test]
fn a_lease_runs_out_by_the_wall_clock_wherever_the_boot_clock_stands() {
    // Saved 100 s after boot and 60 s before its end, at wall time 10 000.
    let text = text(&held(Some(160)), 100, 10_000);
    assert_eq!(read(&text, 5, 10_020), held(Some(45)));
    for (wall, why) in [(10_060, "over"), (99_999, "long over"), (9_000, "the clock was set back")] {
        assert_eq!(read(&text, 5, wall).own, Own::None, "{why}");
    }
    assert_eq!(read(&text, 5, 9_990), held(Some(65)), "never longer than it was");
    let never = self::text(&held(None), 100, 10_000);
    assert_eq!(read(&never, 5, 0), held(None));
}

fn known(expires: impl Strategy<Value = Option<u64>>) -> impl Strategy<Value = Known> {
    let record = (any::<u8>(), any::<u64>(), "\\PC{0,12}", 0..3_u8).prop_map(|(n, created, noise, kind)| {
        let mut lease = peer(n.into());
        lease.key = LeaseKey::new(&format!("{noise}-{n}"));
        lease.attrs.backend_type = noise.as_str().into();
        let data = serde_json::to_string(&serde_json::json!({ "x": [noise.as_str()], "VNI": n })).unwrap();
        lease.attrs.backend_data.v4 = (kind == 1).then(|| Json::parse(&data).unwrap());
        if kind == 2 {
            lease.subnets.v6 = Some(arbitrary::node_subnet(Family::V6, n));
            lease.attrs.public_ip.v6 = Some(arbitrary::node_address(Family::V6, n));
        }
        let entry = if kind == 0 {
            Err(Box::new(BadRecord { reason: noise, subnets: lease.subnets }))
        } else {
            Ok(Arc::new(lease.clone()))
        };
        (lease.key, Entry { created, lease: entry })
    });
    let own = (expires, proptest::option::of("\\PC{0,8}"), any::<bool>());
    (own, proptest::collection::btree_map(any::<u8>(), record, 0..12)).prop_map(|((expires, fence, has), records)| {
        let mut known = held(expires);
        match &mut known.own {
            Own::Held(_, lease) if has => lease.fence = Fence(fence.map(Into::into)),
            _ => known.own = Own::None,
        }
        known.records = Some(records.into_values().collect());
        known
    })
}

proptest! {
    #[test]
    fn what_is_known_round_trips_byte_for_byte(known in known(proptest::option::of(200_u64..1000))) {
        let first = text(&known, 100, 10_000);
        let back = read(&first, 100, 10_000);
        prop_assert_eq!(&back, &known);
        prop_assert_eq!(text(&back, 100, 10_000), first);
    }

    #[test]
    fn any_bytes_are_read_or_refused(known in known(Just(None)), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = text(&known, 100, 10_000);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = wire::parse(&bytes, ORIGIN, BootTime::default(), self::at(10_000));
    }
}

#[test]
fn a_hostile_peers_nesting_is_kept_and_what_is_too_large_stays_bad() {
    let deep = format!("{}1{}", "[".repeat(1500), "]".repeat(1500));
    let large = format!("\"{}\"", "x".repeat(LeaseAttrs::MAX_BYTES));
    let entry = |data: &str, n: u32| {
        let mut lease = peer(n);
        lease.attrs.backend_data.v4 = Some(Json::parse(data).unwrap());
        (lease.key.clone(), Entry { created: 1, lease: Ok(Arc::new(lease)) })
    };
    let (deep, large) = (entry(&deep, 3), entry(&large, 4));
    let records = Some([deep.clone(), large.clone()].into_iter().collect());
    let back = read(&text(&Known { records, ..held(None) }, 0, 0), 0, 0).records.unwrap();
    assert_eq!(back[&deep.0], deep.1);
    assert_eq!(back[&large.0].lease.as_ref().unwrap_err().subnets, peer(4).subnets);
}

#[test]
fn an_own_lease_that_would_not_be_read_back_costs_nothing_else() {
    let mut known = held(None);
    let Own::Held(_, lease) = &mut known.own else { panic!("{known:?}") };
    let large = format!("\"{}\"", "x".repeat(LeaseAttrs::MAX_BYTES));
    lease.attrs.backend_data.v4 = Some(Json::parse(&large).unwrap());
    let back = read(&text(&known, 0, 0), 0, 0);
    assert_eq!(back, Known { own: Own::None, ..known });
}

#[test]
fn ten_thousand_records_are_kept_and_recalled() {
    let entry = |n: u32| {
        let mut lease = peer(0);
        lease.key = LeaseKey::new(&format!("10.{}.{}.0-24", n >> 8, n & 0xff));
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{:02x}:{:02x}"}}"#, n >> 8, n & 0xff);
        lease.attrs.backend_data.v4 = Some(Json::parse(&data).unwrap());
        (lease.key.clone(), Entry { created: n.into(), lease: Ok(Arc::new(lease)) })
    };
    let known = Known { records: Some((0..10_000).map(entry).collect()), ..held(None) };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.json");
    let begun = Instant::now();
    files::replace(&path, Mode::Private, MAX_BYTES, |to| wire::write(to, &known, ORIGIN, BootTime::default(), at(0)))
        .unwrap();
    let saved = begun.elapsed();
    let bytes = files::read(&path, Trust::OwnersAlone, MAX_BYTES).unwrap().unwrap();
    assert_eq!(read(&bytes, 0, 0), known);
    let loaded = begun.elapsed() - saved;
    println!("saved in {saved:?}, loaded in {loaded:?}");
}
