//! The filter of a round's plan. It leaves out writes that would delete objects of a protected prefix, delete or
//! replace a route that could not be added again, or write an object that another program keeps changing.

use std::collections::BTreeSet;

use crate::agent::flapping::Flapping;
use crate::agent::preview::HeldBecause;
use crate::agent::protected::Protected;
use crate::agent::status::{Contact, WithheldBecause};
use crate::agent::unreached::{IsUnreached, Unreached};
use crate::clock::BootTime;
use crate::kernel::{Op, Refusals};
use crate::net::Prefix;
use crate::plan::Plan;

/// The state that decides which writes the rounds of one overlay leave out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard {
    pub(crate) protected: Protected,
    pub(crate) unreached: Unreached,
    pub(crate) flapping: Flapping,
}

/// A wait that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// The wait of a mass deletion.
    Mass,
    /// The wait of a flapping object.
    Flapping,
    /// The wait for the replacement of a route whose connected route is missing.
    Replacement,
}

/// A plan, and the writes that were left out of it.
#[derive(Debug, Default)]
pub(crate) struct Restrained {
    pub(crate) plan: Plan,
    pub(crate) held: Vec<Op>,
}

impl Guard {
    /// Ends the waits that are over. Returns one of them, after which an audit is due.
    pub(crate) fn expire(&mut self, now: BootTime, store: &Contact) -> Option<Over> {
        let flapping = self.flapping.expire(now).then_some(Over::Flapping);
        let replacement = self.unreached.expire(now).then_some(Over::Replacement);
        let mass = self.protected.expire(now, store).then_some(Over::Mass);
        mass.or(replacement).or(flapping)
    }

    /// When to call [`expire`](Self::expire) next.
    pub(crate) fn deadline(&self, store: &Contact) -> Option<BootTime> {
        [self.protected.deadline(store), self.flapping.deadline(), self.unreached.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Why `op` has to wait, if it does.
    fn why(&self, op: &Op, now: BootTime, is_unreached: &IsUnreached<'_>) -> Option<HeldBecause> {
        if let Some(until) = self.flapping.waits_until(&op.object(), now) {
            return Some(HeldBecause::Flapping(until));
        }
        let unreached = || self.unreached.holds(op, now, is_unreached).then_some(WithheldBecause::Unreached);
        self.protected.why_held(op).or_else(unreached).map(HeldBecause::Withheld)
    }

    /// Removes from `plan` the writes that must not happen now, and those that depend on them.
    pub(crate) fn restrain(&self, plan: Plan, now: BootTime, is_unreached: &IsUnreached<'_>) -> Restrained {
        let holds_some = |op: &Op| self.unreached.holds(op, now, is_unreached);
        if self.protected.is_empty() && self.flapping.objects().len() == 0 && !plan.ops.iter().any(holds_some) {
            return Restrained { plan, held: Vec::new() };
        }
        let mut refusals = Refusals::default();
        let mut restrained = Restrained { plan: Plan { ops: Vec::new(), conflicts: plan.conflicts }, held: Vec::new() };
        // Destinations of held deletions of routes, where no other route can be created.
        let mut kept = BTreeSet::new();
        for op in plan.ops {
            let has_no_room = matches!(&op, Op::CreateRoute { prefix, .. } if kept.contains(prefix));
            if has_no_room || self.why(&op, now, is_unreached).is_some() || refusals.block(&op) {
                refusals.refused(&op);
                if let Op::DeleteRoute { prefix, .. } = &op {
                    kept.insert(*prefix);
                }
                restrained.held.push(op);
            } else if !refusals.makes_needless(&op) {
                restrained.plan.ops.push(op);
            }
        }
        restrained
    }

    /// Why [`restrain`](Self::restrain) holds `op`.
    pub(crate) fn why_held(&self, op: &Op, now: BootTime, is_unreached: &IsUnreached<'_>) -> HeldBecause {
        self.why(op, now, is_unreached).unwrap_or(HeldBecause::StandsOnHeld)
    }

    /// Why the objects of `prefix` are not deleted, or its route is not replaced.
    pub(crate) fn why_withheld(&self, prefix: &Prefix, now: BootTime) -> Option<WithheldBecause> {
        let unreached = || self.unreached.is_kept(prefix, now).then_some(WithheldBecause::Unreached);
        self.protected.why(prefix).or_else(unreached)
    }

    /// The prefixes for which [`why_withheld`](Self::why_withheld) may have a reason.
    pub(crate) fn prefixes(&self) -> BTreeSet<Prefix> {
        self.protected.prefixes().chain(self.unreached.prefixes()).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{FdbKey, LinkId, NeighbourKey, Route};
    use crate::net::MacAddr;
    use crate::testing::samples::at_millis as at;

    fn prefix(n: u8) -> Prefix {
        format!("10.5.{n}.0/24").parse().unwrap()
    }

    fn lost() -> Contact {
        Contact::Lost { since: at(0), error: "away".to_owned() }
    }

    /// Every connected route exists.
    fn none(_: &Prefix, _: &Route) -> bool {
        false
    }

    fn removal(n: u8) -> [Op; 3] {
        let (prefix, link, mac) = (prefix(n), LinkId::Own(0), MacAddr([2, 0, 0, 0, 0, n]));
        [
            Op::DeleteRoute { prefix, route: Route::overlay(prefix, prefix.addr(), link) },
            Op::DeleteNeighbour { key: NeighbourKey { link, addr: prefix.addr() }, mac },
            Op::DeleteFdb { key: FdbKey { link, mac, nth: 0 }, dst: "192.0.2.1".parse().unwrap() },
        ]
    }

    #[test]
    fn a_reset_that_removes_most_peers_waits_a_minute() {
        let mut guard = Guard::default();
        guard.protected.judge_reset(at(0), 16, (0..13).map(prefix).collect());
        let plan = Plan { ops: [removal(3), removal(200)].concat(), conflicts: Vec::new() };
        let restrained = guard.restrain(plan, at(0), &none);
        assert_eq!((restrained.held, restrained.plan.ops), (removal(3).to_vec(), removal(200).to_vec()));
        assert_eq!(guard.expire(at(59_999), &Contact::Live), None);
        assert_eq!(guard.expire(at(60_000), &Contact::Live), Some(Over::Mass));
        assert!(!guard.protected.mass_waits());
    }

    #[test]
    fn what_overlaps_a_new_peer_does_not_wait() {
        let wait = |peer: &str| {
            let mut guard = Guard::default();
            guard.protected.judge_reset(at(0), 16, (0..14).map(prefix).collect());
            assert!(guard.protected.in_use(&peer.parse().unwrap()), "{peer}");
            guard.prefixes()
        };
        let without = |gone: std::ops::Range<u8>| (0..14).filter(|n| !gone.contains(n)).map(prefix).collect();
        assert_eq!(wait("10.5.3.128/25"), without(3..4));
        assert_eq!(wait("10.5.4.0/23"), without(4..6));
        assert_eq!(wait("10.5.0.0/16"), BTreeSet::new());
        let mut guard = Guard::default();
        guard.protected.judge_reset(at(0), 16, (0..14).map(prefix).collect());
        assert!(!guard.protected.in_use(&prefix(3)), "its own change writes it");
        assert!(!guard.protected.in_use(&prefix(20)), "nothing is there");
        assert_eq!(guard.prefixes(), without(3..4));
    }

    #[test]
    fn a_second_loss_does_not_cut_the_first_wait_short() {
        let mut guard = Guard::default();
        guard.protected.judge_reset(at(0), 100, (0..80).map(prefix).collect());
        guard.protected.judge_reset(at(30_000), 20, (80..98).map(prefix).collect());
        let plan = Plan { ops: [removal(3), removal(90)].concat(), conflicts: Vec::new() };
        assert_eq!(guard.restrain(plan, at(59_000), &none).held.len(), 6);
    }

    #[test]
    fn what_an_old_snapshot_lacks_waits_for_the_store() {
        let mut guard = Guard::default();
        guard.protected.await_store([prefix(3), prefix(4)]);
        guard.protected.in_use(&prefix(4));
        let plan = Plan { ops: [removal(3), removal(4)].concat(), conflicts: Vec::new() };
        let restrained = guard.restrain(plan.clone(), at(0), &none);
        assert_eq!((restrained.held, restrained.plan.ops), (removal(3).to_vec(), removal(4).to_vec()));
        assert!(
            guard.expire(at(3_600_000), &Contact::Live).is_none()
                && guard.protected.confirm()
                && !guard.protected.confirm()
        );
        assert!(guard.restrain(plan, at(0), &none).held.is_empty());
    }

    #[test]
    fn without_its_connected_route_a_route_is_never_deleted_and_replaced_after_a_while() {
        let direct = |n| Route::direct(prefix(n), "192.0.2.9".parse().unwrap(), LinkId::Uplink);
        let tunnel = |n: u8| Route::overlay(prefix(n), prefix(n).addr(), LinkId::Own(0));
        let replace = |n, from, to| Op::ReplaceRoute { prefix: prefix(n), change: Box::new((from, to)) };
        let left = [Op::DeleteRoute { prefix: prefix(1), route: direct(1) }, replace(2, direct(2), tunnel(2))];
        let done = [
            Op::CreateRoute { prefix: prefix(3), route: direct(3) },
            replace(4, tunnel(4), direct(4)),
            Op::DeleteRoute { prefix: prefix(5), route: tunnel(5) },
        ];
        let mut guard = Guard::default();
        let plan = Plan { ops: [&left[..], &done].concat(), conflicts: Vec::new() };
        let leave = |_: &Prefix, route: &Route| !route.onlink;
        assert_eq!(guard.unreached.note(&plan, at(0), &leave, |_| true), [prefix(1), prefix(2)].into());
        let restrained = guard.restrain(plan.clone(), at(0), &leave);
        assert_eq!((restrained.held, restrained.plan.ops), (left.to_vec(), done.to_vec()));
        let because = HeldBecause::Withheld(WithheldBecause::Unreached);
        assert!(left.iter().all(|op| guard.why_held(op, at(0), &leave) == because));
        // Further rounds do not restart the wait, and a plan about other prefixes changes nothing.
        guard.unreached.note(&plan, at(4_000), &leave, |_| true);
        assert!(guard.unreached.note(&Plan::default(), at(5_000), &leave, |other| *other == prefix(9)).is_empty());
        assert_eq!(guard.deadline(&lost()), Some(at(10_000)));
        assert_eq!(guard.expire(at(9_999), &lost()), None);
        assert_eq!(guard.expire(at(10_000), &lost()), Some(Over::Replacement));
        assert_eq!((guard.deadline(&lost()), guard.expire(at(10_001), &lost())), (None, None));
        // The replacement stays allowed however often it fails.
        guard.unreached.note(&plan, at(20_000), &leave, |_| true);
        let restrained = guard.restrain(plan, at(20_000), &leave);
        assert_eq!(restrained.held, left[..1]);
        assert!(guard.unreached.is_kept(&prefix(1), at(20_000)) && !guard.unreached.is_kept(&prefix(2), at(20_000)));
        guard.unreached.note(&Plan::default(), at(30_000), &leave, |_| true);
        assert_eq!(guard.unreached.prefixes().count(), 0);
    }

    /// In IPv6 the kernel refuses a route through the tunnel while a direct one exists, so the direct one is deleted
    /// first.
    #[test]
    fn a_route_that_makes_room_is_replaced_after_a_while_and_the_other_waits_with_it() {
        let prefix: Prefix = "fd05:0:0:1::/64".parse().unwrap();
        let direct = Route::direct(prefix, "2001:db8::9".parse().unwrap(), LinkId::Uplink);
        let tunnel = Route::overlay(prefix, prefix.addr(), LinkId::Own(0));
        let ops = vec![Op::DeleteRoute { prefix, route: direct }, Op::CreateRoute { prefix, route: tunnel }];
        let mut guard = Guard::default();
        let plan = Plan { ops: ops.clone(), conflicts: Vec::new() };
        let leave = |_: &Prefix, route: &Route| !route.onlink;
        for now in [0, 4_000, 9_999] {
            guard.unreached.note(&plan, at(now), &leave, |_| true);
            let restrained = guard.restrain(plan.clone(), at(now), &leave);
            assert_eq!((restrained.held, restrained.plan.ops), (ops.clone(), Vec::new()));
        }
        assert_eq!(guard.expire(at(10_000), &lost()), Some(Over::Replacement));
        guard.unreached.note(&plan, at(10_000), &leave, |_| true);
        assert_eq!(guard.restrain(plan, at(10_000), &leave).plan.ops, ops);
    }

    #[test]
    fn a_reset_that_removes_three_quarters_or_few_does_not_wait() {
        let mut guard = Guard::default();
        guard.protected.judge_reset(at(0), 16, (0..12).map(prefix).collect());
        guard.protected.judge_reset(at(0), 15, (0..15).map(prefix).collect());
        assert!(!guard.protected.mass_waits());
    }

    #[test]
    fn a_mass_deletion_waits_for_a_store_that_cannot_be_heard() {
        let mut guard = Guard::default();
        guard.protected.judge_reset(at(0), 16, (0..13).map(prefix).collect());
        assert_eq!(guard.deadline(&Contact::Live), Some(at(60_000)));
        assert_eq!(guard.deadline(&lost()), None, "a timer cannot help");
        assert_eq!(guard.expire(at(3_600_000), &lost()), None);
        assert!(guard.protected.mass_waits());
        assert_eq!(guard.expire(at(3_600_001), &Contact::Live), Some(Over::Mass));
    }
}
