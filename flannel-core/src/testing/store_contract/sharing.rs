//! Checks of stores in which several nodes publish one address.

use std::collections::BTreeSet;

use super::{Families, Harness, Node, assert_disjoint, assert_same, network, ok, snapshot, snapshot_key};
use crate::lease::Lease;
use crate::subnet::{OwnLeases, SubnetManager, Want};

/// Another node's lease under the node's own identity is neither taken nor rewritten nor deleted, whatever is preferred
/// and whether or not the node still has its own lease ([`Want::own`]).
///
/// If nodes are identified by name (see [`Harness::is_by_address`]), there is no such lease: the lease under the node's
/// name is its own, whatever `Want::own` is.
pub async fn another_nodes_lease_under_the_same_identity_is_left_alone(harness: &mut dyn Harness, families: Families) {
    harness.fresh(&network(families, 1, 64)).await;
    let store = harness.open().await;
    let node = Node::new(0, families);
    // Its backend data is that of another device.
    let theirs = node.clone().with_data(2).acquire(&*store).await;
    let acquire = async |want: Want| ok(store.acquire(&node.id, want).await, "acquire");
    let unheld = node.want().preferring(theirs.subnets).owning(OwnLeases::Unheld);
    let first = acquire(unheld.clone()).await;
    if !harness.is_by_address() {
        assert_eq!(first.key, theirs.key, "acquire: the lease under a node's name is its own, whatever want.own says");
        assert_eq!(snapshot(&*store).await.len(), 1, "acquire: a node must have one record");
        return;
    }
    assert_disjoint(&[theirs.clone(), first.clone()]);
    assert_left(&*store, &theirs, &first).await;
    let mut previous = ok(store.previous(&node.id).await, "previous");
    previous.retain(|lease| [&theirs.key, &first.key].contains(&&lease.key));
    assert_eq!(previous.len(), 2, "previous: all leases under the identity, for the caller to judge");

    let again = acquire(unheld).await;
    assert_same(&again, &first, "acquire of what an earlier call has written, whose answer may have been lost");
    assert_left(&*store, &theirs, &first).await;

    let changed = node.clone().with_data(3);
    let own = || OwnLeases::Key(first.key.clone());
    let kept = acquire(changed.want().preferring(theirs.subnets).owning(own())).await;
    assert_eq!((&kept.key, kept.subnets), (&first.key, first.subnets), "acquire: the lease that want.own names");
    assert_eq!(kept.attrs, changed.attrs, "acquire: must publish want.attrs");
    assert_left(&*store, &theirs, &kept).await;

    harness.delete(&first.key).await;
    let new = acquire(changed.want().preferring(theirs.subnets).owning(own())).await;
    assert_disjoint(&[theirs.clone(), new.clone()]);
    assert_left(&*store, &theirs, &new).await;

    harness.put_config(&network(families, 100, 8)).await;
    let moved = acquire(changed.want().owning(OwnLeases::Key(new.key.clone()))).await;
    assert_eq!(moved.subnets.map(|_, _| ()), families.present(), "acquire: not the families of the network");
    assert_left(&*store, &theirs, &moved).await;
    ok(store.renew(&theirs).await, "renew by the other node");
}

/// Another node's lease that publishes exactly the node's own attributes is not changed if the caller lists it in
/// [`Want::foreign`], whether the node has its own lease, has lost it, or has one that no longer fits.
///
/// If nodes are identified by name (see [`Harness::is_by_address`]), there is no such lease.
pub async fn another_nodes_lease_with_equal_attributes_is_left_alone(harness: &mut dyn Harness, families: Families) {
    if !harness.is_by_address() {
        return;
    }
    harness.fresh(&network(families, 1, 64)).await;
    let store = harness.open().await;
    let node = Node::new(0, families);
    let theirs = node.acquire(&*store).await;
    let acquire = async |want: Want| ok(store.acquire(&node.id, want).await, "acquire");
    let foreign = || BTreeSet::from([theirs.key.clone()]);
    let unheld = || node.want().preferring(theirs.subnets).owning(OwnLeases::Unheld).leaving_alone(foreign());
    let first = acquire(unheld()).await;
    assert_disjoint(&[theirs.clone(), first.clone()]);
    assert_left(&*store, &theirs, &first).await;

    let again = acquire(unheld()).await;
    assert_same(&again, &first, "acquire of what an earlier call has written, whose answer may have been lost");
    let kept = acquire(unheld().owning(OwnLeases::Key(first.key.clone()))).await;
    assert_same(&kept, &first, "acquire: the lease that want.own names");
    assert_left(&*store, &theirs, &first).await;

    harness.delete(&first.key).await;
    let new = acquire(unheld().owning(OwnLeases::Key(first.key.clone()))).await;
    assert_disjoint(&[theirs.clone(), new.clone()]);
    assert_left(&*store, &theirs, &new).await;

    harness.put_config(&network(families, 100, 8)).await;
    let moved = acquire(unheld()).await;
    assert_eq!(moved.subnets.map(|_, _| ()), families.present(), "acquire: not the families of the network");
    assert_left(&*store, &theirs, &moved).await;
    ok(store.renew(&theirs).await, "renew by the other node");
}

/// Checks that both leases exist, and no other records.
async fn assert_left(store: &dyn SubnetManager, theirs: &Lease, ours: &Lease) {
    let records = snapshot(store).await;
    assert_eq!(records.len(), 2, "acquire: one record of this node and one of the other: {records:?}");
    assert_same(snapshot_key(&records, &theirs.key), theirs, "acquire: must leave another node's record as it is");
    assert_same(snapshot_key(&records, &ours.key), ours, "acquire: not the record that it returned");
}
