//! Checks that a lease which ended is not written, renewed or released any more.

use super::watching::{snapshot, snapshot_key};
use super::{Families, Harness, Node, assert_lost, network, network_for, ok};

/// A lease whose record is gone is lost, and renewing it writes nothing (docs/faults.md, L11).
pub async fn renew_of_a_deleted_lease_is_lost(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network_for(&*harness, families, 1, 64)).await;
    let store = harness.open().await;
    let lease = Node::ready(&*harness, 0, families).await.acquire(&*store).await;
    harness.delete(&lease.key).await;
    assert_lost(store.renew(&lease).await, "deleted");
    let records = snapshot(&*store).await;
    assert!(records.is_empty(), "renew: a lost lease must not be written again: {records:?}");
}

/// A lease whose subnet another node has by now is lost, and the other node's record is not changed (docs/faults.md,
/// L4).
pub async fn renew_of_a_retaken_lease_is_lost(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 64)).await;
    let (one, two) = (harness.open().await, harness.open().await);
    let (a, b) = (Node::new(0, families), Node::new(1, families));
    let lost = a.acquire(&*one).await;
    harness.delete(&lost.key).await;
    let taken = b.acquire_preferring(&*two, lost.subnets).await;
    assert_eq!(taken.subnets, lost.subnets, "acquire: the subnet of a deleted record must be free");
    assert_lost(one.renew(&lost).await, "another node's");
    let records = snapshot(&*one).await;
    assert_eq!(records.len(), 1, "renew: a lost lease must not be written again: {records:?}");
    assert_eq!(snapshot_key(&records, &taken.key).attrs, b.attrs, "renew: must not write over the new owner");
}

/// A release frees the subnet at once, may be repeated, and never changes the record of a later holder.
pub async fn release_frees_and_leaves_a_successor_alone(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 64)).await;
    let (one, two) = (harness.open().await, harness.open().await);
    let (a, b) = (Node::new(0, families), Node::new(1, families));
    let lease = a.acquire(&*one).await;
    ok(one.release(lease.clone()).await, "release");
    assert_eq!(ok(two.previous(&a.id).await, "previous"), [], "release: the record must be gone");
    ok(one.release(lease.clone()).await, "release: repeating it must succeed");
    let taken = b.acquire_preferring(&*two, lease.subnets).await;
    assert_eq!(taken.subnets, lease.subnets, "release: must free the subnet");
    ok(one.release(lease.clone()).await, "release: must succeed if another node has the subnets by now");
    let records = snapshot(&*two).await;
    assert_eq!(snapshot_key(&records, &taken.key).attrs, b.attrs, "release: must leave another's record alone");
    let elsewhere = a.acquire(&*one).await;
    ok(one.release(lease).await, "release of an earlier lease");
    ok(one.renew(&elsewhere).await, "renew: releasing an older lease must not free the newer one");
}

/// A node that acquires the subnets of its deleted lease again has another lease: renewing the old one is
/// [`Lost`](crate::subnet::SubnetError::Lost), and releasing it changes nothing. Only the fence tells the two apart.
pub async fn an_earlier_lease_of_the_same_subnets_is_lost(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 64)).await;
    let store = harness.open().await;
    let node = Node::new(0, families);
    let old = node.acquire(&*store).await;
    harness.delete(&old.key).await;
    let new = node.acquire_preferring(&*store, old.subnets).await;
    assert_eq!(new.subnets, old.subnets, "acquire: a free preferred subnet must be had ({families})");
    assert_lost(store.renew(&old).await, "deleted and acquired again");
    ok(store.release(old).await, "release of an earlier lease");
    ok(store.renew(&new).await, "renew: releasing an older lease must not free the newer one");
}
