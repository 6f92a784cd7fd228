//! What the agent remembers of the kernel between audits: only objects that are not as wanted.
//!
//! Wanted state is a pure function of leases and host, so it is computed when needed and not kept. The last seen state
//! equals it, except for the few objects noted here. At ten thousand peers this saves megabytes (docs/kernel-facts.md,
//! "Cost of dumps and memory").

use std::collections::BTreeSet;

use crate::kernel::{Link, Object, OverlayName, RouteKey, State};

#[derive(Debug, Default)]
pub(crate) struct Divergence {
    /// Whether the remembered state is valid: false before the first audit and after a write of unknown outcome.
    pub(crate) known: bool,
    unsettled: BTreeSet<Object>,
    seen: State,
}

impl Divergence {
    /// Forgets all notes, before an audit makes new ones.
    pub(crate) fn clear(&mut self) {
        self.unsettled.clear();
        self.seen = State::default();
    }

    /// Notes that `object` is not as wanted, but as in `from`.
    pub(crate) fn note(&mut self, object: Object, from: &State) {
        self.forget(&object);
        copy(&object, from, &mut self.seen);
        self.unsettled.insert(object);
    }

    /// Notes that `object` is as wanted again.
    pub(crate) fn settle(&mut self, object: &Object) {
        if self.unsettled.remove(object) {
            self.forget(object);
        }
    }

    /// Copies the state of `object` in the kernel to `into`: as noted, else as in `wanted`.
    pub(crate) fn recall(&self, object: &Object, wanted: &State, into: &mut State) {
        let from = if self.unsettled.contains(object) { &self.seen } else { wanted };
        copy(object, from, into);
    }

    /// Whether `object` is not as wanted.
    pub(crate) fn is_unsettled(&self, object: &Object) -> bool {
        self.unsettled.contains(object)
    }

    /// The objects that are not as wanted.
    pub(crate) fn unsettled(&self) -> impl Iterator<Item = &Object> {
        self.unsettled.iter()
    }

    /// Whether the devices exist and belong to the overlay, so that changed peers can be written without an
    /// observation. A device that differs only in a part, because its name is taken or another program keeps changing
    /// it, still carries packets.
    pub(crate) fn devices_settled(&self, overlay: &OverlayName) -> bool {
        // Links come first in the order of objects.
        let links = self.unsettled.iter().map_while(|object| match object {
            // Parts are only changed on a device that is, or is about to be, the overlay's.
            Object::LinkPart(..) => Some(None),
            Object::Link(id) => Some(Some(id)),
            _ => None,
        });
        let ours = |link: &Link| overlay.owns(link.group, link.alias.as_deref());
        links.flatten().all(|id| self.seen.links.get(id).is_some_and(ours))
    }

    fn forget(&mut self, object: &Object) {
        match object {
            Object::Link(id) | Object::LinkPart(id, _) => drop(self.seen.links.remove(id)),
            Object::Address(key) => drop(self.seen.addresses.remove(key)),
            Object::Fdb(key) => drop(self.seen.fdb.remove(key)),
            Object::Neighbour(key) => drop(self.seen.neighbours.remove(key)),
            Object::Forward(key) => drop(self.seen.forwards.remove(key)),
            Object::Route(prefix) => {
                let keys: Vec<RouteKey> = self.seen.routes_to(*prefix).map(|(key, _)| *key).collect();
                for key in keys {
                    self.seen.routes.remove(&key);
                }
            }
        }
    }
}

fn copy(object: &Object, from: &State, into: &mut State) {
    match object {
        Object::Link(id) | Object::LinkPart(id, _) => {
            into.links.extend(from.links.get(id).map(|link| (*id, link.clone())))
        }
        Object::Address(key) => into.addresses.extend(from.addresses.get(key).map(|()| (*key, ()))),
        Object::Fdb(key) => into.fdb.extend(from.fdb.get(key).map(|dst| (*key, *dst))),
        Object::Neighbour(key) => into.neighbours.extend(from.neighbours.get(key).map(|mac| (*key, *mac))),
        Object::Forward(key) => into.forwards.extend(from.forwards.get(key).map(|forward| (*key, *forward))),
        Object::Route(prefix) => into.routes.extend(from.routes_to(*prefix).map(|(key, route)| (*key, route.clone()))),
    }
}
