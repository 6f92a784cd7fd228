//! Computes wanted state from a backend and the peers: complete for an audit, partial for a lease round.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backend::{Backend, LocalNode, Skip};
use crate::kernel::{Object, PeerState, Scope, State};
use crate::lease::{Lease, LeaseKey};
use crate::net::Family;
use crate::plan;

/// Peers that the backend skips, by address family.
pub(crate) type Skips = BTreeMap<(LeaseKey, Family), Skip>;

/// Returns the wanted state, except for peers whose objects are all in `seen` as wanted. Those are removed from `seen`
/// too, and the plan for the rest is the same. So an audit without differences keeps the kernel's state in memory only
/// once.
///
/// Entries are collected in vectors and the maps built from those, because a map filled one by one in ascending order
/// is half empty (docs/kernel-facts.md, "Cost of dumps and memory").
pub(crate) fn whole<'a>(
    backend: &dyn Backend,
    local: &LocalNode,
    scope: &Scope,
    peers: impl Iterator<Item = &'a Arc<Lease>>,
    seen: &mut State,
) -> (State, Skips) {
    let mut base = backend.base(local);
    scope.mark(&mut base);
    let links_settled = plan::links_settled(&base, seen, scope);
    let peers: Vec<_> = peers.collect();
    // Reserved in advance: three vectors that grow in turn leave three times the memory behind that they need.
    let room = peers.len() * local.context.config.networks.families().count();
    let missing = |there: usize| if links_settled { room.saturating_sub(there) } else { room };
    let mut fdb = Vec::with_capacity(missing(seen.fdb.len()));
    let mut neighbours = Vec::with_capacity(missing(seen.neighbours.len()));
    let mut forwards = Vec::new();
    let mut routes = Vec::with_capacity(missing(seen.routes.len()) * (1 + scope.slots.len()));
    let mut skips = Skips::new();
    for peer in peers {
        for (family, outcome) in states(backend, local, peer) {
            match outcome {
                Ok(state) if links_settled && plan::take_settled(&state, seen) => {}
                Ok(state) => {
                    fdb.extend(state.fdb);
                    neighbours.extend(state.neighbour);
                    forwards.extend(state.forward);
                    routes.extend(state.keyed_routes());
                }
                Err(skip) => {
                    skips.insert((peer.key.clone(), family), skip);
                }
            }
        }
    }
    fdb.extend(std::mem::take(&mut base.fdb));
    neighbours.extend(std::mem::take(&mut base.neighbours));
    forwards.extend(std::mem::take(&mut base.forwards));
    routes.extend(std::mem::take(&mut base.routes));
    let state = State {
        fdb: fdb.into_iter().collect(),
        neighbours: neighbours.into_iter().collect(),
        forwards: forwards.into_iter().collect(),
        routes: routes.into_iter().collect(),
        ..base
    };
    (state, skips)
}

/// The objects of one peer in each family in use, or why it is skipped.
pub(crate) fn states<'a>(
    backend: &'a dyn Backend,
    local: &'a LocalNode,
    peer: &'a Lease,
) -> impl Iterator<Item = (Family, Result<PeerState, Skip>)> + 'a {
    let families = local.context.config.networks.families();
    families.map(move |family| (family, backend.peer(local, peer, family)))
}

/// The objects of one peer in one family.
pub(crate) fn objects(state: &PeerState) -> impl Iterator<Item = Object> {
    let fdb = state.fdb.map(|(key, _)| Object::Fdb(key));
    let neighbour = state.neighbour.map(|(key, _)| Object::Neighbour(key));
    let forward = state.forward.map(|(key, _)| Object::Forward(key));
    let routes = state.routes.iter().map(|(prefix, _)| Object::Route(*prefix));
    fdb.into_iter().chain(neighbour).chain(forward).chain(routes)
}

/// [`add`] for the former lease of a peer. Its routes count as its objects even if the backend gives it none, because
/// one may have been kept; its state is remembered.
pub(crate) fn add_former(
    backend: &dyn Backend,
    local: &LocalNode,
    peer: &Lease,
    state: &mut State,
    objects: &mut BTreeSet<Object>,
) {
    add(backend, local, peer, state, objects);
    objects.extend(peer.subnets.iter().map(|(_, prefix)| Object::Route(*prefix)));
}

/// Adds the wanted state of `peer` to `state`, and its objects to `objects`. Returns the families that are skipped.
pub(crate) fn add(
    backend: &dyn Backend,
    local: &LocalNode,
    peer: &Lease,
    state: &mut State,
    objects: &mut BTreeSet<Object>,
) -> Skips {
    let mut skips = Skips::new();
    for (family, outcome) in states(backend, local, peer) {
        match outcome {
            Ok(part) => {
                objects.extend(self::objects(&part));
                state.add(&part);
            }
            Err(skip) => {
                skips.insert((peer.key.clone(), family), skip);
            }
        }
    }
    skips
}
