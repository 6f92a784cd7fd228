//! Writes that the kernel refused: shown in the status with the error, and those for peers retried after a back-off of
//! their own.

use crate::kernel::{EINVAL, KernelError, LinkId, Object, Op};
use crate::plan::Conflict;
use std::collections::{BTreeMap, BTreeSet};

use crate::agent::status::Refusal;
use crate::backoff::Keyed;
use crate::clock::BootTime;
use crate::lease::LeaseKey;
use crate::net::Family;
use crate::text::chain;

/// The maximum number of refusals that are listed and attributed to peers. More indicate a problem of the kernel.
pub(crate) const MOST: usize = 1024;

/// The refused writes of the last audit.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    objects: BTreeMap<Object, Refusal>,
    /// Objects whose refusal does not count against the node. Every audit retries them; when a wait ends, an audit is
    /// due.
    waits: Keyed<Object>,
}

/// The node that an object is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Whose {
    /// This node, or a peer that has left.
    Node,
    /// This peer.
    Peer(LeaseKey),
    /// None: it was left in a former network.
    Former,
}

/// A refused write.
pub(crate) struct Entry<'a> {
    pub(crate) object: Object,
    pub(crate) whose: Whose,
    pub(crate) error: &'a KernelError,
}

/// Objects that the kernel accepts or refuses for the same reasons, whichever peer they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Fdb(LinkId),
    Neighbour(LinkId),
    Forward(LinkId),
    Route(Family),
}

impl Kind {
    pub(crate) fn of(object: &Object) -> Option<Self> {
        match object {
            Object::Fdb(key) => Some(Self::Fdb(key.link)),
            Object::Neighbour(key) => Some(Self::Neighbour(key.link)),
            Object::Forward(key) => Some(Self::Forward(key.link)),
            Object::Route(prefix) => Some(Self::Route(prefix.family())),
            Object::Link(_) | Object::LinkPart(..) | Object::Address(_) => None,
        }
    }
}

impl Entry<'_> {
    /// Whether the refusal counts against the node. A peer's record is the cause instead if the kernel rejects the
    /// value and has accepted an object of the same kind for another peer. With a single peer there is no such
    /// evidence, and no peer can be reached. Objects in a former network do not count: nothing depends on them.
    fn is_nodes(&self, in_place: &BTreeSet<Kind>) -> bool {
        let proven = || Kind::of(&self.object).is_some_and(|kind| in_place.contains(&kind));
        match self.whose {
            Whose::Node => true,
            Whose::Peer(_) => !(proven() && self.error.rejects_value()),
            Whose::Former => false,
        }
    }
}

impl Refused {
    /// Replaces the refusals by those of an audit. `in_place` are the kinds of which some peer's object is as wanted.
    /// Returns the number of refusals that count against the node, including those beyond [`MOST`].
    pub(crate) fn replace(&mut self, now: BootTime, mut entries: Vec<Entry<'_>>, in_place: &BTreeSet<Kind>) -> usize {
        // Former networks come last, so that they displace no peer from the list.
        entries.sort_by_key(|entry| entry.whose == Whose::Former);
        let (mut waiting, mut nodes) = (BTreeSet::new(), 0);
        self.objects.clear();
        for entry in entries {
            let listed = self.objects.len() < MOST;
            let waits = listed && !entry.is_nodes(in_place);
            // Refusals beyond the list count against the node: something is wrong with the kernel.
            nodes += usize::from(!waits && entry.whose != Whose::Former);
            if waits {
                self.waits.fail(entry.object.clone(), now);
                waiting.insert(entry.object.clone());
            }
            if listed {
                let peer = match entry.whose {
                    Whose::Peer(key) => Some(key),
                    Whose::Node | Whose::Former => None,
                };
                self.objects.insert(entry.object, Refusal { peer, error: chain(entry.error) });
            }
        }
        self.waits.retain(|object| waiting.contains(object));
        nodes
    }

    /// When the next audit is due because of these.
    pub(crate) fn due(&self) -> Option<BootTime> {
        self.waits.deadline()
    }

    pub(crate) fn objects(&self) -> &BTreeMap<Object, Refusal> {
        &self.objects
    }
}

/// Returns the conflict that a refusal indicates: a foreign IPv6 route, outside the scope, that leads to the `onlink`
/// next hop through another device. Whatever its metric and length, the kernel then refuses the overlay's routes to
/// that next hop.
pub(crate) fn kept_out(op: &Op, error: &KernelError) -> Option<Conflict> {
    let Op::CreateRoute { prefix, route } = op else { return None };
    let KernelError::Refused { errno: EINVAL, message, .. } = error else { return None };
    let gateway = route.gateway.filter(|_| route.onlink && prefix.family() == Family::V6)?;
    Some(Conflict {
        object: Object::Route(*prefix),
        found: format!("another device's route to {gateway} ({message})"),
        remedy: format!("not managed by this overlay: delete it or move it (ip -6 route show match {gateway})"),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::net::Prefix;
    use crate::testing::samples::at;

    fn error(errno: i32) -> KernelError {
        KernelError::Refused { doing: "route add".to_owned(), errno, message: String::new() }
    }

    fn route(n: u32) -> Object {
        Object::Route(Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 8)).into(), 24).unwrap())
    }

    fn entry<'a>(n: u32, peer: bool, error: &'a KernelError) -> Entry<'a> {
        let whose = if peer { Whose::Peer(LeaseKey::new("peer")) } else { Whose::Node };
        Entry { whose, object: route(n), error }
    }

    fn routes() -> BTreeSet<Kind> {
        [Kind::Route(Family::V4)].into()
    }

    #[test]
    fn only_a_value_that_the_kernel_rejects_is_counted_as_its_peers() {
        let (invalid, unreachable, memory) = (error(22), error(101), error(12));
        let mut refused = Refused::default();
        let entries = vec![
            entry(1, true, &invalid),
            entry(2, true, &unreachable),
            entry(3, true, &memory),
            entry(4, false, &invalid),
        ];
        assert_eq!(refused.replace(at(0), entries, &routes()), 2);
        assert_eq!((refused.objects().len(), refused.waits.keys().len()), (4, 2));
        assert_eq!(refused.replace(at(1), Vec::new(), &routes()), 0);
        assert!(refused.objects().is_empty() && refused.due().is_none());
    }

    #[test]
    fn a_refusal_is_the_peers_only_where_another_peers_object_of_that_kind_is_in_place() {
        let (invalid, mut refused) = (error(22), Refused::default());
        let others = [Kind::Route(Family::V6), Kind::Neighbour(LinkId::Own(0)), Kind::Fdb(LinkId::Own(0))].into();
        for (in_place, nodes) in [(BTreeSet::new(), 1), (others, 1), (routes(), 0)] {
            let entries = vec![entry(1, true, &invalid)];
            assert_eq!(refused.replace(at(0), entries, &in_place), nodes, "{in_place:?}");
            assert_eq!((refused.objects().len(), refused.waits.keys().len()), (1, 1 - nodes));
        }
    }

    #[test]
    fn waits_double_to_half_a_minute_and_audits_in_between_put_them_off() {
        let (invalid, mut refused) = (error(22), Refused::default());
        let (mut now, mut waits) = (at(0), Vec::new());
        for _ in 0..8 {
            refused.replace(now, vec![entry(1, true, &invalid)], &routes());
            let due = refused.due().unwrap();
            waits.push(due.since(now).as_secs_f64().round());
            now = due;
        }
        assert!(waits[..3] == [1.0, 2.0, 4.0] && waits[7] >= 27.0 && waits[7] <= 33.0, "{waits:?}");
        // A new entry has its own wait, and the existing wait is restarted.
        refused.replace(now, vec![entry(1, true, &invalid), entry(2, true, &invalid)], &routes());
        assert!(refused.due().unwrap().since(now) < Duration::from_secs(2));
    }

    #[test]
    fn a_flood_of_refusals_is_listed_up_to_a_bound_and_the_rest_is_the_nodes() {
        let (invalid, mut refused) = (error(22), Refused::default());
        let entries = (0..MOST as u32 + 7).map(|n| entry(n, true, &invalid)).collect();
        assert_eq!(refused.replace(at(0), entries, &routes()), 7);
        assert_eq!((refused.objects().len(), refused.waits.keys().len()), (MOST, MOST));
    }
}
