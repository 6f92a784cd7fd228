//! What a round leaves out: mass deletions, what bad records name, routes whose connected route is missing, and what
//! somebody else keeps changing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::agent::flapping::Flapping;
use crate::agent::preview::HeldBecause;
use crate::agent::removals::Removals;
use crate::agent::status::{Contact, WithheldBecause};
use crate::clock::BootTime;
use crate::kernel::{Op, Refusals, Route};
use crate::net::Prefix;
use crate::plan::Plan;

/// How long a suspicious mass deletion waits (docs/design.md, "Guards").
pub(crate) const MASS_WAIT: Duration = Duration::from_secs(60);
/// Networks smaller than this are never suspicious.
const MASS_LEAST: usize = 16;
/// How long a route whose connected route is missing is kept from being replaced. Whoever takes a link over deletes the
/// connected route and adds it again within moments; a connected route that stays away is not coming back.
const REPLACE_WAIT: Duration = Duration::from_secs(10);

/// The guards of one overlay.
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard {
    mass: Option<Mass>,
    /// Peers that left one by one.
    removals: Removals,
    /// Whether peers left since that was last judged.
    is_unjudged: bool,
    /// How often a mass deletion was found.
    #[cfg(test)]
    pub(crate) judged: u32,
    /// What a snapshot lacks that the store itself has not confirmed.
    unconfirmed: BTreeSet<Prefix>,
    /// Routes of peers whose connected route is missing, as the last round found them: at most one for each prefix of a
    /// peer.
    unreached: BTreeMap<Prefix, Unreached>,
    /// The first time at which one of these may be replaced.
    replace_at: Option<BootTime>,
    /// What somebody else keeps changing.
    pub(crate) flapping: Flapping,
}

/// A mass deletion that waits for its second look.
#[derive(Debug, Clone)]
pub(crate) struct Mass {
    pub(crate) prefixes: BTreeSet<Prefix>,
    pub(crate) until: BootTime,
}

/// A route to a peer whose connected route is missing.
#[derive(Debug, Clone, Copy, Default)]
struct Unreached {
    /// Whether the peer would have no route at all otherwise: that is never done.
    deleted: bool,
    /// When it may be replaced by another.
    replace_at: Option<BootTime>,
}

impl Unreached {
    fn is_kept(&self, now: BootTime) -> bool {
        self.deleted || self.replace_at.is_some_and(|at| at > now)
    }
}

/// What waited and does not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// A mass deletion.
    Mass,
    /// A contested object.
    Contest,
    /// A route that is to be replaced while its connected route is missing.
    Replacement,
}

/// What is left alone beside what the guard itself has noted.
pub(crate) struct Leave<'a> {
    /// What bad records name: nobody deletes that.
    pub(crate) bad: &'a BTreeSet<Prefix>,
    /// Whether a route leads to a peer that is on a prefix of the host's, while the connected route to that prefix is
    /// missing. The kernel goes on using such a route, but takes no new one.
    pub(crate) is_unreached: &'a dyn Fn(&Prefix, &Route) -> bool,
}

impl Leave<'_> {
    /// The prefix of a route whose connected route is missing and that `op` takes away, and what it would do to it.
    fn unreached_route(&self, op: &Op) -> Option<(Prefix, Write)> {
        let (prefix, route, fate) = match op {
            Op::DeleteRoute { prefix, route } => (prefix, route, Write::Deleted),
            Op::ReplaceRoute { prefix, change } => (prefix, &change.0, Write::Replaced),
            _ => return None,
        };
        (self.is_unreached)(prefix, route).then_some((*prefix, fate))
    }
}

/// What a write does to a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    Deleted,
    Replaced,
}

/// A plan, and what was left out of it.
#[derive(Debug, Default)]
pub(crate) struct Restrained {
    pub(crate) plan: Plan,
    pub(crate) held: Vec<Op>,
}

impl Guard {
    /// Judges a store's list, by which `gone` of `before` prefixes do not exist any more. Additions go ahead; these wait.
    pub(crate) fn judge_reset(&mut self, now: BootTime, before: usize, gone: BTreeSet<Prefix>) {
        self.removals.clear();
        self.judge(now, before, gone.len(), || gone);
    }

    /// Notes that a peer with this prefix left by itself, not by a list.
    pub(crate) fn note_left(&mut self, now: BootTime, prefix: Prefix) {
        self.removals.left(now, prefix);
        self.is_unjudged = true;
    }

    /// Notes that a peer joined with this prefix, which no peer had.
    pub(crate) fn note_joined(&mut self, now: BootTime, prefix: Prefix) {
        self.removals.joined(now, prefix);
    }

    /// Judges the peers that left one by one, if any did since the last call. `there` prefixes are left; `waiting` returns
    /// those of peers that left whose deletion has not begun. Returns whether deletions wait because of it.
    pub(crate) fn judge_removals(
        &mut self,
        now: BootTime,
        there: usize,
        waiting: impl FnOnce() -> BTreeSet<Prefix>,
    ) -> bool {
        if !std::mem::take(&mut self.is_unjudged) {
            return false;
        }
        let gone = self.removals.count(now);
        self.judge(now, there + gone, gone, waiting)
    }

    /// Has the deletions of `waiting` wait if most prefixes have gone. Returns whether they do.
    fn judge(&mut self, now: BootTime, before: usize, gone: usize, waiting: impl FnOnce() -> BTreeSet<Prefix>) -> bool {
        let is_mass = before >= MASS_LEAST && gone * 4 > before * 3;
        if is_mass {
            #[cfg(test)]
            {
                self.judged += 1;
            }
            let gone = waiting();
            // What waits already goes on waiting, with the newcomers: a second loss must not cut the first look short.
            let waiting = self.mass.take().map(|mass| mass.prefixes).unwrap_or_default();
            self.mass = Some(Mass { prefixes: &waiting | &gone, until: now.after(MASS_WAIT) });
        }
        is_mass
    }

    /// A snapshot from before the store went away does not know `gone`: that is left alone until the store has spoken.
    pub(crate) fn leave(&mut self, gone: BTreeSet<Prefix>) {
        self.unconfirmed = gone;
    }

    /// The store has spoken. Returns whether something was left alone until now.
    pub(crate) fn confirm(&mut self) -> bool {
        !std::mem::take(&mut self.unconfirmed).is_empty()
    }

    /// What is left alone until the store has spoken.
    pub(crate) fn unconfirmed(&self) -> &BTreeSet<Prefix> {
        &self.unconfirmed
    }

    /// The mass deletion that waits, if one does.
    pub(crate) fn mass(&self) -> Option<&Mass> {
        self.mass.as_ref()
    }

    /// The prefix is in use, so no deletion there waits. Returns whether deletions of other prefixes that overlap it no
    /// longer wait either: their subnets were given out again, and their routes would take packets from the new owner.
    pub(crate) fn release_overlapping(&mut self, prefix: &Prefix) -> bool {
        self.removals.in_use(prefix);
        self.unconfirmed.remove(prefix);
        let Some(mass) = &mut self.mass else { return false };
        mass.prefixes.remove(prefix);
        let over: Vec<Prefix> = overlapping(&mass.prefixes, prefix).collect();
        for prefix in &over {
            mass.prefixes.remove(prefix);
        }
        if mass.prefixes.is_empty() {
            self.mass = None;
        }
        !over.is_empty()
    }

    /// Lets go of waits that are over. Returns why an audit has something new to do. Nobody takes a second look at what
    /// a store that is away does not show.
    pub(crate) fn expire(&mut self, now: BootTime, store: &Contact) -> Option<Over> {
        let mut over = self.flapping.expire(now).then_some(Over::Contest);
        if self.replace_at.is_some_and(|at| at <= now) {
            self.look_ahead(now);
            over = Some(Over::Replacement);
        }
        if *store == Contact::Live && self.mass.as_ref().is_some_and(|mass| mass.until <= now) {
            self.mass = None;
            return Some(Over::Mass);
        }
        over
    }

    /// When [`expire`](Self::expire) is next worth it.
    pub(crate) fn deadline(&self, store: &Contact) -> Option<BootTime> {
        let mass = self.mass.as_ref().filter(|_| *store == Contact::Live).map(|mass| mass.until);
        [mass, self.flapping.deadline(), self.replace_at].into_iter().flatten().min()
    }

    /// Notes which routes `plan` would take away while their connected route is missing. The plan is about the prefixes
    /// that `concerns` names and no others. Returns the prefixes for which something may have changed by that.
    pub(crate) fn note_unreached(
        &mut self,
        plan: &Plan,
        now: BootTime,
        leave: &Leave<'_>,
        concerns: impl Fn(&Prefix) -> bool,
    ) -> BTreeSet<Prefix> {
        let (old, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.unreached).into_iter().partition(|(prefix, _)| concerns(prefix));
        self.unreached = others;
        let mut changed: BTreeSet<Prefix> = old.keys().copied().collect();
        for (prefix, fate) in plan.ops.iter().filter_map(|op| leave.unreached_route(op)) {
            changed.insert(prefix);
            let noted = self.unreached.entry(prefix).or_default();
            match fate {
                Write::Deleted => noted.deleted = true,
                Write::Replaced => {
                    let before = old.get(&prefix).and_then(|old| old.replace_at);
                    noted.replace_at = before.or_else(|| Some(now.after(REPLACE_WAIT)));
                }
            }
        }
        self.look_ahead(now);
        changed
    }

    /// Keeps only times that lie ahead: one that has passed would wake the agent without end.
    fn look_ahead(&mut self, now: BootTime) {
        let ahead = self.unreached.values().filter_map(|noted| noted.replace_at).filter(|at| *at > now);
        self.replace_at = ahead.min();
    }

    /// Prefixes whose route is, or was lately, kept because its connected route is missing.
    pub(crate) fn unreached(&self) -> impl Iterator<Item = &Prefix> {
        self.unreached.keys()
    }

    /// Whether the route to `prefix` is kept because its connected route is missing.
    pub(crate) fn keeps_unreached(&self, prefix: &Prefix, now: BootTime) -> bool {
        self.unreached.get(prefix).is_some_and(|noted| noted.is_kept(now))
    }

    /// Whether `op` waits for the connected route of what it takes away.
    fn keeps_way(&self, op: &Op, now: BootTime, leave: &Leave<'_>) -> bool {
        match leave.unreached_route(op) {
            None => false,
            Some((_, Write::Deleted)) => true,
            Some((prefix, Write::Replaced)) => {
                let noted = self.unreached.get(&prefix).and_then(|noted| noted.replace_at);
                noted.is_none_or(|at| at > now)
            }
        }
    }

    /// Takes out of `plan` what must not happen now, and what stands on that.
    pub(crate) fn restrain(&self, plan: Plan, now: BootTime, leave: &Leave<'_>) -> Restrained {
        let mass = self.mass.as_ref().map(|mass| &mass.prefixes);
        let held: Vec<_> =
            [leave.bad, &self.unconfirmed].into_iter().chain(mass).filter(|prefixes| !prefixes.is_empty()).collect();
        let unreached_route = plan.ops.iter().any(|op| self.keeps_way(op, now, leave));
        if held.is_empty() && self.flapping.is_empty() && !unreached_route {
            return Restrained { plan, held: Vec::new() };
        }
        let mut refusals = Refusals::default();
        let mut restrained = Restrained { plan: Plan { ops: Vec::new(), conflicts: plan.conflicts }, held: Vec::new() };
        for op in plan.ops {
            let hold = held.iter().any(|prefixes| deletes_one_of(&op, prefixes)) || self.keeps_way(&op, now, leave);
            if hold || self.flapping.waits_until(&op.object(), now).is_some() || refusals.block(&op) {
                refusals.refused(&op);
                restrained.held.push(op);
            } else if !refusals.makes_needless(&op) {
                restrained.plan.ops.push(op);
            }
        }
        restrained
    }

    /// Why [`restrain`](Self::restrain) holds `op`.
    pub(crate) fn why_held(&self, op: &Op, now: BootTime, leave: &Leave<'_>) -> HeldBecause {
        if let Some(until) = self.flapping.waits_until(&op.object(), now) {
            return HeldBecause::Contested(until);
        }
        let among = |prefixes: &BTreeSet<Prefix>| deletes_one_of(op, prefixes);
        match self.mass.as_ref().filter(|mass| among(&mass.prefixes)) {
            Some(mass) => HeldBecause::Withheld(WithheldBecause::MassRemoval(mass.until)),
            None if among(leave.bad) => HeldBecause::Withheld(WithheldBecause::BadRecord),
            None if among(&self.unconfirmed) => HeldBecause::Withheld(WithheldBecause::Unconfirmed),
            None if self.keeps_way(op, now, leave) => HeldBecause::Withheld(WithheldBecause::Unreached),
            None => HeldBecause::StandsOnHeld,
        }
    }
}

/// Those of `prefixes` that overlap `prefix`: a few searches, however many there are.
fn overlapping(prefixes: &BTreeSet<Prefix>, prefix: &Prefix) -> impl Iterator<Item = Prefix> {
    let around = (0..prefix.len()).filter_map(|len| Prefix::masked(prefix.addr(), len).ok());
    let inside = prefixes.range(*prefix..).take_while(|other| prefix.covers(other)).copied();
    around.filter(|around| prefixes.contains(around)).chain(inside)
}

/// Whether `op` takes something of one of `prefixes` away. They are in the order of address, then length.
fn deletes_one_of(op: &Op, prefixes: &BTreeSet<Prefix>) -> bool {
    match op {
        Op::DeleteRoute { prefix, .. } => prefixes.contains(prefix),
        // The gateway is where the prefix begins.
        Op::DeleteNeighbour { key, .. } => {
            let last = prefixes.range(..=Prefix::host(key.addr)).next_back();
            last.is_some_and(|prefix| prefix.addr() == key.addr)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{FdbKey, LinkId, NeighbourKey};
    use crate::net::MacAddr;

    fn at(millis: u64) -> BootTime {
        BootTime(Duration::from_millis(millis))
    }

    fn prefix(n: u8) -> Prefix {
        format!("10.5.{n}.0/24").parse().unwrap()
    }

    fn lost() -> Contact {
        Contact::Lost { since: at(0), error: "away".to_owned() }
    }

    /// Leaves nothing alone.
    fn none() -> Leave<'static> {
        static NONE: BTreeSet<Prefix> = BTreeSet::new();
        Leave { bad: &NONE, is_unreached: &|_, _| false }
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
        guard.judge_reset(at(0), 16, (0..13).map(prefix).collect());
        let plan = Plan { ops: [removal(3), removal(200)].concat(), conflicts: Vec::new() };
        let restrained = guard.restrain(plan, at(0), &none());
        assert_eq!((restrained.held, restrained.plan.ops), (removal(3).to_vec(), removal(200).to_vec()));
        assert_eq!(guard.expire(at(59_999), &Contact::Live), None);
        assert_eq!(guard.expire(at(60_000), &Contact::Live), Some(Over::Mass));
        assert!(guard.mass().is_none());
    }

    #[test]
    fn what_overlaps_a_new_peer_does_not_wait() {
        let wait = |peer: &str| {
            let mut guard = Guard::default();
            guard.judge_reset(at(0), 16, (0..14).map(prefix).collect());
            assert!(guard.release_overlapping(&peer.parse().unwrap()), "{peer}");
            guard.mass.map(|mass| mass.prefixes).unwrap_or_default()
        };
        let without = |gone: std::ops::Range<u8>| (0..14).filter(|n| !gone.contains(n)).map(prefix).collect();
        assert_eq!(wait("10.5.3.128/25"), without(3..4));
        assert_eq!(wait("10.5.4.0/23"), without(4..6));
        assert_eq!(wait("10.5.0.0/16"), BTreeSet::new());
        let mut guard = Guard::default();
        guard.judge_reset(at(0), 16, (0..14).map(prefix).collect());
        assert!(!guard.release_overlapping(&prefix(3)), "its own change writes it");
        assert!(!guard.release_overlapping(&prefix(20)), "nothing is there");
        assert_eq!(guard.mass.unwrap().prefixes, without(3..4));
    }

    #[test]
    fn a_second_loss_does_not_cut_the_first_wait_short() {
        let mut guard = Guard::default();
        guard.judge_reset(at(0), 100, (0..80).map(prefix).collect());
        guard.judge_reset(at(30_000), 20, (80..98).map(prefix).collect());
        let plan = Plan { ops: [removal(3), removal(90)].concat(), conflicts: Vec::new() };
        assert_eq!(guard.restrain(plan, at(59_000), &none()).held.len(), 6);
    }

    #[test]
    fn what_an_old_snapshot_lacks_waits_for_the_store() {
        let mut guard = Guard::default();
        guard.leave([prefix(3), prefix(4)].into());
        guard.release_overlapping(&prefix(4));
        let plan = Plan { ops: [removal(3), removal(4)].concat(), conflicts: Vec::new() };
        let restrained = guard.restrain(plan.clone(), at(0), &none());
        assert_eq!((restrained.held, restrained.plan.ops), (removal(3).to_vec(), removal(4).to_vec()));
        assert!(guard.expire(at(3_600_000), &Contact::Live).is_none() && guard.confirm() && !guard.confirm());
        assert!(guard.restrain(plan, at(0), &none()).held.is_empty());
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
        let leave = Leave { is_unreached: &|_, route| !route.onlink, ..none() };
        assert_eq!(guard.note_unreached(&plan, at(0), &leave, |_| true), [prefix(1), prefix(2)].into());
        let restrained = guard.restrain(plan.clone(), at(0), &leave);
        assert_eq!((restrained.held, restrained.plan.ops), (left.to_vec(), done.to_vec()));
        let because = HeldBecause::Withheld(WithheldBecause::Unreached);
        assert!(left.iter().all(|op| guard.why_held(op, at(0), &leave) == because));
        // What other rounds find in between puts nothing off, and what is about others changes nothing.
        guard.note_unreached(&plan, at(4_000), &leave, |_| true);
        assert!(guard.note_unreached(&Plan::default(), at(5_000), &leave, |other| *other == prefix(9)).is_empty());
        assert_eq!(guard.deadline(&lost()), Some(at(10_000)));
        assert_eq!(guard.expire(at(9_999), &lost()), None);
        assert_eq!(guard.expire(at(10_000), &lost()), Some(Over::Replacement));
        assert_eq!((guard.deadline(&lost()), guard.expire(at(10_001), &lost())), (None, None));
        // It stays allowed however often it fails.
        guard.note_unreached(&plan, at(20_000), &leave, |_| true);
        let restrained = guard.restrain(plan, at(20_000), &leave);
        assert_eq!(restrained.held, left[..1]);
        assert!(guard.keeps_unreached(&prefix(1), at(20_000)) && !guard.keeps_unreached(&prefix(2), at(20_000)));
        guard.note_unreached(&Plan::default(), at(30_000), &leave, |_| true);
        assert_eq!(guard.unreached().count(), 0);
    }

    #[test]
    fn a_reset_that_removes_three_quarters_or_few_does_not_wait() {
        let mut guard = Guard::default();
        guard.judge_reset(at(0), 16, (0..12).map(prefix).collect());
        guard.judge_reset(at(0), 15, (0..15).map(prefix).collect());
        assert!(guard.mass().is_none());
    }

    #[test]
    fn a_mass_deletion_waits_for_a_store_that_cannot_be_heard() {
        let mut guard = Guard::default();
        guard.judge_reset(at(0), 16, (0..13).map(prefix).collect());
        assert_eq!(guard.deadline(&Contact::Live), Some(at(60_000)));
        assert_eq!(guard.deadline(&lost()), None, "a timer cannot help");
        assert_eq!(guard.expire(at(3_600_000), &lost()), None);
        assert!(guard.mass().is_some());
        assert_eq!(guard.expire(at(3_600_001), &Contact::Live), Some(Over::Mass));
    }
}
