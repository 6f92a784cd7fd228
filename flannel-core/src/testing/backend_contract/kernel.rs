//! Applies the wanted state to a kernel.

use std::sync::Arc;

use super::world::{Node, World, advertised, facts, now, seen};
use super::{Families, Harness};
use crate::backend::Peer;
use crate::kernel::{Kernel, OpText, Scope, State};
use crate::plan::{Plan, plan};

/// Planning from the wanted state to itself gives no writes, and an empty kernel reaches it after one round. A node
/// that starts again on this kernel has the same wanted state. When a peer leaves, its objects are deleted. A removal
/// deletes all of the overlay's objects and no others.
pub fn one_round_converges_and_removal_leaves_nothing(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let (scope, peers) = (node.scope(), world.peers());
    let wanted = node.wanted(&peers);
    check_empty("what is wanted, seen", &scope, &plan(&wanted, &wanted, &scope, &|_| None));
    let before = node.kernel.snapshot();
    converge(&node, &scope, &wanted);
    let after = node.kernel.snapshot();
    assert_eq!(before.missing_from(&after), Vec::<&str>::new(), "base, peer: what was there before is gone");

    let backend = world.backend(1);
    let mut context = node.local.context.clone();
    context.host = facts(&node.kernel);
    for previous in [None, Some(node.local.lease.clone())] {
        let rule = "advertise: must publish the same after a restart, also where the lease is gone";
        context.previous = previous;
        assert_eq!(advertised(&*backend, &context), node.local.lease.attrs, "{rule}");
    }
    let attrs = node.local.lease.attrs.clone();
    let node = Node { local: world.local(1, context, attrs), backend, kernel: node.kernel, slots: node.slots };
    assert_eq!(node.scope(), scope, "scope: must be the same after a restart");
    check_empty("after a restart", &scope, &plan(&node.wanted(&peers), &seen(&node.kernel, &scope), &scope, &|_| None));

    for kept in (0..peers.len()).rev() {
        converge(&node, &scope, &node.wanted(&peers[..kept]));
    }
    converge(&node, &scope, &State::default());
    let after = node.kernel.snapshot();
    assert_eq!(after.added_since(&before), Vec::<&str>::new(), "base, peer: what a removal leaves");
    assert_eq!(before.missing_from(&after), Vec::<&str>::new(), "base, peer: what a removal takes with it");
}

/// Adding peers one by one, the last one first, gives the same state as adding all at once.
pub fn the_order_of_peers_makes_no_difference(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let (at_once, one_by_one) = (world.node(1), world.node(1));
    let mut peers = world.peers();
    let scope = at_once.scope();
    converge(&at_once, &scope, &at_once.wanted(&peers));
    peers.reverse();
    for there in 0..=peers.len() {
        let there: &[Peer] = &peers[..there];
        converge(&one_by_one, &scope, &one_by_one.wanted(there));
    }
    let (one, other) = (seen(&one_by_one.kernel, &scope), seen(&at_once.kernel, &scope));
    assert_eq!(one, other, "peer: peers that come one by one get something else");
}

/// Writes the difference, all of which the kernel has to accept, and checks that no difference remains.
fn converge(node: &Node, scope: &Scope, wanted: &State) {
    let first = plan(wanted, &seen(&node.kernel, scope), scope, &|_| None);
    if let Some(conflict) = first.conflicts.first() {
        panic!("plan: {:?} cannot be: {}: {}", conflict.object, conflict.found, conflict.remedy);
    }
    let report = now(node.kernel.apply(scope, Arc::new(first.ops)));
    if let Some((_, error)) = report.refused.first() {
        panic!("base, peer: {error}");
    }
    assert!(report.is_complete(), "base, peer: not all could be written: {report:?}");
    check_empty("after one round", scope, &plan(wanted, &seen(&node.kernel, scope), scope, &|_| None));
}

fn check_empty(when: &str, scope: &Scope, plan: &Plan) {
    if let Some(conflict) = plan.conflicts.first() {
        panic!("plan: {when}, {:?} cannot be: {}: {}", conflict.object, conflict.found, conflict.remedy);
    }
    if let Some(op) = plan.ops.first() {
        panic!("plan: {when}, this is still written: {}", OpText { op, scope });
    }
}
