//! What a node publishes, and whether other nodes can read it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::world::{PEERS, World, advertised, objects, objects_of_peer};
use super::{Families, Harness};
use crate::backend::{BackendError, Skip};
use crate::kernel::LinkKind;
use crate::lease::LeaseAttrs;
use crate::testing::samples;

/// How many MAC addresses are marked as taken, one after the other.
const TAKEN: usize = 8;

/// The configuration's `Type` is the backend's name, its leases have its wire type, and neither ever changes.
pub fn names_agree_with_configuration_and_lease(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let (one, two) = (world.node(1), world.backend(2));
    let said = |backend: &dyn crate::backend::Backend| (backend.name(), backend.wire_type(), backend.writes());
    let (name, wire_type, _) = said(&*one.backend);
    assert_eq!(said(&*one.backend), said(&*two), "name, wire_type, writes: must be the same on every node");
    assert_eq!(name, &*world.config.backend.kind, "name: must be the `Type` of the configuration");
    let published = &*one.local.lease.attrs.backend_type;
    assert_eq!(published, wire_type, "advertise: must publish wire_type() as its backend_type: peers refuse others");
}

/// The published attributes have an address in each family of the network and in no other, fit a record, survive a JSON
/// round trip, and are readable by the same backend on another node. A restart publishes the same.
pub fn what_is_published_is_read_back(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let peer = world.peer(2);
    let attrs = &peer.attrs;
    let present: Vec<_> = world.families();
    assert_eq!(
        attrs.public_ip.families().collect::<Vec<_>>(),
        present,
        "advertise: must publish an address of each family of the network and of no other"
    );
    for family in attrs.backend_data.families() {
        assert!(present.contains(&family), "advertise: publishes data for {family}, which the network does not have");
    }
    let json = attrs.to_json();
    let max = LeaseAttrs::MAX_BYTES;
    assert!(json.len() <= max, "advertise: {} bytes are more than the {max} that peers accept", json.len());
    match LeaseAttrs::from_json(json.as_bytes()) {
        Ok(read) => assert_eq!(read, *attrs, "advertise: must publish what its JSON gives back"),
        Err(error) => panic!("advertise: publishes what is no record: {error}"),
    }
    for family in present {
        if let Err(skip) = node.backend.hardware_address(attrs, family) {
            panic!("hardware_address: must read what the same backend published for {family}: {skip}");
        }
        match node.backend.peer(&node.local, &peer, family) {
            Ok(_) | Err(Skip::Unprogrammed(_) | Skip::NotReady { .. }) => {}
            Err(skip) => panic!("peer: must read what the same backend published for {family}: {skip}"),
        }
    }
    let mut restarted = node.local.context.clone();
    restarted.previous = Some(node.local.lease.clone());
    let again = advertised(&*world.backend(1), &restarted);
    assert_eq!(again, node.local.lease.attrs, "advertise: must publish what the previous lease says");
}

/// A public address other than the uplink's own is published unchanged, or refused with a remedy. So is a missing one.
pub fn a_public_address_is_published_or_refused(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    for family in world.families() {
        for public in [Some(samples::node_address(family, 99)), None] {
            let mut context = node.local.context.clone();
            *context.public.slot(family) = public;
            if public.is_none() {
                *context.uplink.addrs.slot(family) = None;
            }
            match node.backend.advertise(&context) {
                Ok(attrs) => assert_eq!(
                    attrs.public_ip, context.public,
                    "advertise: must publish the public addresses that it is given, or refuse them"
                ),
                Err(BackendError::Host { what, remedy }) => {
                    assert!(!what.is_empty() && !remedy.is_empty(), "advertise: a refusal must say what to do");
                }
                Err(BackendError::Config(_) | BackendError::Misnamed { .. }) => {}
            }
        }
    }
}

/// No two nodes publish the same MAC address, no node publishes one in [`NodeContext::taken`], and each node's device
/// has the address it publishes. Checks nothing if the backend uses no MAC addresses.
///
/// [`NodeContext::taken`]: crate::backend::NodeContext::taken
pub fn mac_addresses_are_of_one_node_alone(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let mut holders = BTreeMap::new();
    let address = |attrs: &LeaseAttrs, family| node.backend.hardware_address(attrs, family).ok().flatten();
    for n in std::iter::once(1).chain(PEERS) {
        let attrs = world.peer(n).attrs;
        let macs: BTreeSet<_> = world.families().into_iter().filter_map(|family| address(&attrs, family)).collect();
        for mac in macs {
            assert!(!mac.is_zero() && !mac.is_multicast(), "advertise: {mac} can be the address of no device");
            if let Some(other) = holders.insert(mac, n) {
                panic!("advertise: nodes {other} and {n} publish the same MAC address {mac}");
            }
        }
    }
    let base = node.backend.base(&node.local);
    let unknown = base.links.values().any(|link| link.mac.is_none() && matches!(link.kind, LinkKind::External(_)));
    for mac in world.families().into_iter().filter_map(|family| address(&node.local.lease.attrs, family)) {
        let has_it = base.links.values().any(|link| link.mac == Some(mac));
        assert!(has_it || unknown, "base: no device has {mac}, which is published");
    }
    let mut context = node.local.context.clone();
    context.previous = Some(node.local.lease.clone());
    let mut attrs = node.local.lease.attrs.clone();
    for _ in 0..TAKEN {
        context.taken.extend(world.families().into_iter().filter_map(|family| address(&attrs, family)));
        if context.taken.is_empty() {
            return;
        }
        attrs = advertised(&*world.backend(1), &context);
        for mac in world.families().into_iter().filter_map(|family| address(&attrs, family)) {
            assert!(!context.taken.contains(&mac), "advertise: must not publish {mac}, which is taken");
        }
        context.previous = Some(Arc::new(crate::lease::Lease { attrs: attrs.clone(), ..world.peer(1) }));
    }
}

/// If [`writes`](crate::backend::Backend::writes) is false, the wanted state is always empty; if it is true, it is not
/// empty.
pub fn writes_says_whether_anything_is_wanted(harness: &dyn Harness, families: Families) {
    let world = World::new(harness, families);
    let node = world.node(1);
    let mut wanted = objects(&node.backend.base(&node.local));
    wanted.extend(node.states(&world.peers()).iter().flatten().flat_map(objects_of_peer));
    match (node.backend.writes(), wanted.first()) {
        (false, Some(object)) => panic!("writes: must be true, since {object:?} is wanted"),
        (true, None) => panic!("writes: must be false, since nothing is wanted of the kernel"),
        (false, None) => {
            let devices = node.scope().devices;
            assert!(devices.is_empty(), "writes: must be true, since the scope has devices: {devices:?}");
        }
        (true, Some(_)) => {}
    }
}
