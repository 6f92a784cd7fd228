//! The state of peers: independent of other peers, deterministic, and without shared objects.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::hostile::alive;
use super::world::{Node, PEERS, World, objects, objects_of_peer};
use super::{Families, Harness};
use crate::backend::{LocalNode, Peer, Skip};
use crate::clock::BootTime;
use crate::kernel::{HostFacts, OpText};
use crate::lease::{Fence, Lease};
use crate::net::Family;
use crate::plan::plan;
use crate::testing::samples;

/// Equal arguments give equal results: from another instance, in another order, and after a renewal.
pub fn base_and_peer_are_functions_of_what_they_are_given(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let (node, other) = (world.node(1), world.node(1));
    let mut peers = world.peers();
    let base = node.backend.base(&node.local);
    let states: BTreeMap<_, _> = peers.iter().map(|peer| (peer.key.clone(), node.states_of(peer))).collect();
    peers.reverse();
    for peer in &peers {
        let rule = "peer: must depend on nothing but its arguments";
        assert_eq!(node.states_of(peer), states[&peer.key], "{rule}, not on when it is called");
        assert_eq!(other.states_of(peer), states[&peer.key], "{rule}, not on who was asked for before");
        let renewed = renewed(peer);
        assert_eq!(node.states_of(&renewed), states[&peer.key], "peer: must not depend on when the peer's lease ends");
    }
    for node in [&node, &other] {
        assert_eq!(node.backend.base(&node.local), base, "base: must depend on nothing but its argument, not on peers");
        assert_eq!(node.scope(), other.scope(), "devices: must depend on nothing but its argument");
        let published = node.backend.advertise(&node.local.context);
        assert_eq!(
            published,
            other.backend.advertise(&node.local.context),
            "advertise: another answer the second time"
        );
    }
    let local = LocalNode { lease: Arc::new(renewed(&node.local.lease)), ..node.local.clone() };
    assert_eq!(node.backend.base(&local), base, "base: must not depend on when the own lease ends");
    for peer in &peers {
        for (family, state) in world.families().into_iter().zip(&states[&peer.key]) {
            let again = node.backend.peer(&local, peer, family);
            assert_eq!(again, *state, "peer: must not depend on when the own lease ends");
        }
    }
}

fn renewed(lease: &Lease) -> Lease {
    Lease { expires: Some(BootTime::default()), fence: Fence::new("renewed"), ..lease.clone() }
}

/// The names, kinds and order of devices depend only on the configuration: whatever a node's host, subnet and address
/// are, the device at a position is the same, so that it is recognized instead of created anew.
pub fn devices_stay_what_they_are(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let devices = node.backend.devices(&node.local);
    let mut bare = node.local.clone();
    bare.context.host = Arc::new(HostFacts::default());
    let mut elsewhere = node.local.clone();
    elsewhere.lease = Arc::new(Lease { subnets: world.peer(9).subnets, ..Lease::clone(&node.local.lease) });
    let mut moved = node.local.clone();
    for family in world.families() {
        *moved.context.public.slot(family) = Some(samples::node_address(family, 99));
    }
    for (local, of) in [(bare, "host"), (elsewhere, "subnet"), (moved, "public address")] {
        let now = node.backend.devices(&local);
        let same = now.len() == devices.len()
            && now.iter().zip(&devices).all(|(a, b)| a.name == b.name && a.kind.is_same_device(&b.kind));
        assert!(same, "devices: with another {of} the devices are others: {now:?}, before: {devices:?}");
    }
}

/// In a family that the network lacks, or in which the peer has no subnet, the result is only a reason. In a family
/// that both have, the peer is programmed, whatever its other families are.
pub fn a_family_that_one_side_lacks_is_skipped(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    for theirs in harness.families() {
        let peer = World::new(harness, *theirs).peer(2);
        for family in Family::BOTH {
            let ours = node.local.context.config.networks.get(family).is_some();
            let what = || format!("{family} of a {theirs} peer in a {families} network");
            let outcome = alive("peer", &what, || node.backend.peer(&node.local, &peer, family));
            match (ours, peer.subnets.get(family), outcome) {
                (false, _, Ok(_)) => panic!("peer: must skip {family}, which the network does not have"),
                (true, None, Ok(_)) => panic!("peer: must skip a peer without an {family} subnet"),
                (true, Some(_), Err(Skip::Unprogrammed(_) | Skip::NotReady { .. })) => {}
                (true, Some(_), Err(skip)) => panic!("peer: must program {}: {skip}", what()),
                (_, _, _) => {}
            }
        }
    }
}

/// No two peers share an object, nor a peer and the node itself: otherwise one that leaves would delete the other's
/// object.
pub fn no_two_want_one_object(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let mut holders: BTreeMap<_, _> =
        objects(&node.backend.base(&node.local)).into_iter().map(|object| (object, "base".to_owned())).collect();
    for peer in world.peers() {
        for (family, state) in world.families().into_iter().zip(node.states_of(&peer)) {
            for object in state.iter().flat_map(objects_of_peer) {
                let holder = format!("{} ({family})", peer.key);
                if let Some(other) = holders.insert(object.clone(), holder.clone()) {
                    panic!("peer: {other} and {holder} want the same object {object:?}");
                }
            }
        }
    }
}

/// When a peer leaves, its objects are deleted and nothing else is written.
pub fn a_peer_that_leaves_takes_its_objects_alone(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let peers = world.peers();
    for leaving in &peers {
        let others: Vec<_> = peers.iter().filter(|peer| peer.key != leaving.key).cloned().collect();
        check_leaving(&node, leaving, &others, &peers);
    }
    assert_eq!(peers.len(), PEERS.count());
}

fn check_leaving(node: &Node, leaving: &Peer, others: &[Peer], all: &[Peer]) {
    let scope = node.scope();
    let plan = plan(&node.wanted(others), &node.wanted(all), &scope, &|_| None);
    let its: BTreeSet<_> = node.states_of(leaving).iter().flatten().flat_map(objects_of_peer).collect();
    let mut left = its.clone();
    for op in &plan.ops {
        let text = OpText { op, scope: &scope };
        left.remove(&op.object());
        let expected = op.is_delete() && its.contains(&op.object());
        assert!(expected, "peer: when {} leaves, this is written: {text}", leaving.key);
    }
    assert!(left.is_empty(), "peer: when {} leaves, this stays: {left:?}", leaving.key);
}
