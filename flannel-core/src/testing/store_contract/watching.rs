//! Checks of a store's watch.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::{
    Families, Harness, Node, Outage, PATIENCE, Watcher, assert_disjoint, assert_lost, assert_same, network,
    network_for, ok, soon,
};
use crate::lease::{Lease, LeaseKey, Record};
use crate::net::{Dual, Family};
use crate::subnet::{SubnetError, SubnetManager};
use crate::text::chain;

/// Addresses that an operator sets for this node are returned by `this_node` and reported by the watch, also at its
/// start.
pub async fn addresses_that_an_operator_sets_are_reported(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let store = harness.open().await;
    let Some(name) = ok(store.this_node().await, "this_node").name else { return };
    let mut watcher = Watcher::open(&*store, PATIENCE.as_secs()).await;
    let public = |n: u8| {
        families.present().map(|family, ()| match family {
            Family::V4 => IpAddr::from([192, 0, 2, n]),
            Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(n)]),
        })
    };
    for wanted in [public(1), public(2), Dual::default()] {
        if !harness.set_public(&name, wanted).await {
            return;
        }
        watcher.until(PATIENCE.as_secs(), "the new addresses", |watcher| watcher.public == Some(wanted)).await;
        assert_eq!(ok(store.this_node().await, "this_node").public, wanted, "this_node: other addresses than were set");
    }
    harness.set_public(&name, public(3)).await;
    let mut late = Watcher::open(&*store, PATIENCE.as_secs()).await;
    late.until(PATIENCE.as_secs(), "the addresses that were set before", |late| late.public == Some(public(3))).await;
}

/// The first event is a [`Reset`](crate::lease::LeaseEvent::Reset) with all records, including the node's own, and
/// `created` increases in the order of their creation.
pub async fn watch_begins_with_everything_in_order_of_creation(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let store = harness.open().await;
    assert!(snapshot(&*store).await.is_empty(), "watch: an empty store begins with an empty Reset");
    let mut leases = Vec::new();
    // The highest number first, so that the order differs from that of the keys.
    for n in (0..5).rev() {
        leases.push(Node::ready(&*harness, n, families).await.acquire(&*store).await);
        harness.tick().await;
    }
    ok(store.renew(&leases[0]).await, "renew");
    let records = snapshot(&*harness.open().await).await;
    assert_eq!(records.len(), leases.len(), "watch: the Reset must hold every record, the own one too: {records:?}");
    for lease in &leases {
        let found = snapshot_key(&records, &lease.key);
        assert_eq!((found.subnets, &found.attrs), (lease.subnets, &lease.attrs), "watch: not what was acquired");
    }
    let created: Vec<u64> = leases.iter().map(|lease| records[&lease.key].created).collect();
    assert!(
        created.is_sorted_by(|a, b| a < b),
        "watch: `created` must grow in order of creation and not with a renewal, is {created:?}"
    );
}

/// Each new, changed and released lease is reported, whichever handle wrote it.
pub async fn watch_follows_writes_of_another_handle(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let (one, two) = (harness.open().await, harness.open().await);
    let mut watchers = [open(&*one).await, open(&*two).await];
    let (a, b) = (Node::ready(&*harness, 0, families).await, Node::ready(&*harness, 1, families).await);
    let mine = a.acquire(&*one).await;
    let theirs = b.acquire(&*two).await;
    for watcher in &mut watchers {
        watcher.until(WITHIN, "two new leases", |it| it.holds(&mine) && it.holds(&theirs)).await;
    }
    let created = watchers[0].seen[&theirs.key].created;
    let changed = Lease { attrs: b.with_data(2).attrs, ..theirs };
    let changed = ok(two.renew(&changed).await, "renew");
    for watcher in &mut watchers {
        watcher.until(WITHIN, "changed attributes", |it| it.holds(&changed)).await;
        assert_eq!(watcher.seen[&changed.key].created, created, "watch: a renewal must not change `created`");
    }
    ok(two.release(changed.clone()).await, "release");
    for watcher in &mut watchers {
        watcher.until(WITHIN, "a released lease goes", |it| !it.seen.contains_key(&changed.key)).await;
        assert!(watcher.holds(&mine), "watch: a release must remove one record only");
    }
    harness.delete(&mine.key).await;
    for watcher in &mut watchers {
        watcher.until(WITHIN, "a deleted record goes", |it| it.seen.is_empty()).await;
    }
}

/// A record that does not parse is present and bad, never absent, and all others still work (docs/faults.md, L12).
pub async fn a_bad_record_is_present_and_hurts_no_other(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let store = harness.open().await;
    let (a, b) = (Node::ready(&*harness, 0, families).await, Node::ready(&*harness, 1, families).await);
    let (bad, good) = (a.acquire(&*store).await, b.acquire(&*store).await);
    let mut watcher = open(&*store).await;
    if !harness.put_raw_bad(&bad.key).await {
        return;
    }
    watcher
        .until(WITHIN, "a record that does not parse is present with Record.lease an Err", |it| {
            it.seen.get(&bad.key).is_some_and(|record| record.lease.is_err()) && it.holds(&good)
        })
        .await;
    let records = snapshot(&*store).await;
    assert!(
        records.get(&bad.key).is_some_and(|record| record.lease.is_err()),
        "watch: a record that does not parse must be in the Reset, with Record.lease an Err: {records:?}"
    );
    assert_same(snapshot_key(&records, &good.key), &good, "watch: a bad record must not hide others");
    ok(store.renew(&good).await, "renew beside a bad record");
    let late = Node::ready(&*harness, 2, families).await.acquire(&*store).await;
    watcher.until(WITHIN, "a new lease beside a bad record", |it| it.holds(&late)).await;
}

/// An expired lease disappears from the watch, is lost for its holder, and its subnet is free.
pub async fn an_expired_lease_goes_and_its_subnet_is_free(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 64)).await;
    let store = harness.open().await;
    let (a, b) = (Node::new(0, families), Node::new(1, families));
    let (dead, live) = (a.acquire(&*store).await, b.acquire(&*store).await);
    let mut watcher = open(&*store).await;
    if !harness.expire(&dead.key).await {
        return;
    }
    watcher.until(WITHIN, "an expired lease goes", |it| !it.seen.contains_key(&dead.key) && it.holds(&live)).await;
    let records = snapshot(&*store).await;
    assert!(!records.contains_key(&dead.key), "watch: the Reset must not hold an expired lease: {records:?}");
    assert_lost(store.renew(&dead).await, "expired");
    let heir = Node::new(2, families).acquire_preferring(&*store, dead.subnets).await;
    assert_eq!(heir.subnets, dead.subnets, "acquire: the subnet of an expired lease must be free");
    let back = a.acquire(&*store).await;
    assert_disjoint(&[back, heir]);
}

/// If the store is unavailable, every call fails with [`SubnetError::Unavailable`], and the watch reports an error.
/// Once it is back, calls work again and the same watch continues with a complete state.
pub async fn an_outage_is_said_and_over_when_it_ends(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let store = harness.open().await;
    let (one, two) = (Node::ready(&*harness, 0, families).await, Node::ready(&*harness, 1, families).await);
    let held = one.acquire(&*store).await;
    let mut watcher = open(&*store).await;
    let errors = watcher.errors.len();
    if !harness.outage(Outage::Begins).await {
        return;
    }
    let unavailable = |error: Option<SubnetError>, doing: &str| match error {
        Some(SubnetError::Unavailable { .. }) => {}
        other => panic!("{doing}: a store out of reach must be SubnetError::Unavailable, not {other:?}"),
    };
    unavailable(soon("renew ends", store.renew(&held)).await.err(), "renew");
    if harness.holds_config() {
        unavailable(soon("network_config ends", store.network_config()).await.err(), "network_config");
    }
    unavailable(soon("previous ends", store.previous(&one.id)).await.err(), "previous");
    unavailable(soon("acquire ends", store.acquire(&two.id, two.want())).await.err(), "acquire");
    watcher.until(WITHIN, "an error while the store is out of reach", |it| it.errors.len() > errors).await;
    assert!(harness.outage(Outage::Ends).await);
    let renewed = soon("renew works again", async {
        loop {
            match store.renew(&held).await {
                Ok(lease) => return lease,
                Err(SubnetError::Unavailable { .. }) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(other) => panic!("renew after an outage: {}", chain(&other)),
            }
        }
    })
    .await;
    assert_same(&renewed, &held, "renew after an outage");
    let other = two.acquire(&*store).await;
    watcher.until(WITHIN, "both leases after the outage", |it| it.holds(&renewed) && it.holds(&other)).await;
}

/// The time limit for anything, in seconds.
const WITHIN: u64 = PATIENCE.as_secs();

type Records = BTreeMap<LeaseKey, Record>;

/// Returns the records at the start of a new watch.
pub(super) async fn snapshot(store: &dyn SubnetManager) -> Records {
    open(store).await.seen
}

async fn open(store: &dyn SubnetManager) -> Watcher {
    Watcher::open(store, WITHIN).await
}

/// Returns the lease of a record that must exist and be valid.
#[track_caller]
pub(super) fn snapshot_key<'a>(records: &'a Records, key: &LeaseKey) -> &'a Lease {
    match records.get(key).map(|record| &record.lease) {
        Some(Ok(lease)) if lease.key == *key => lease,
        other => panic!("watch: no good record {key}, but {other:?}"),
    }
}
