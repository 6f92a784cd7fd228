//! What a round leaves out: mass deletions, what bad records name, and what somebody else keeps changing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clock::BootTime;
use crate::net::Prefix;
use crate::overlay::handle::HeldBecause;
use crate::overlay::status::WithheldBecause;
use crate::plan::{Object, Op, Plan, Refusals};

/// How long a suspicious mass deletion waits (design, Guards).
pub(crate) const MASS_WAIT: Duration = Duration::from_secs(60);
/// Networks smaller than this are never suspicious.
const MASS_LEAST: usize = 16;
/// So many writes …
const CONTEST_WRITES: u8 = 10;
/// … within this time mean that somebody else keeps changing the object.
const CONTEST_WINDOW: Duration = Duration::from_secs(10);
/// The first and the longest wait before a contested object is written again.
const CONTEST_WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// An object left alone for so long is no longer contested.
const CONTEST_CLEAR: Duration = Duration::from_secs(30);

/// The guards of one overlay.
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard {
    mass: Option<Mass>,
    /// What a snapshot lacks that the store itself has not confirmed.
    unconfirmed: BTreeSet<Prefix>,
    contests: BTreeMap<Object, Contest>,
}

/// A mass deletion that waits for its second look.
#[derive(Debug, Clone)]
pub(crate) struct Mass {
    pub(crate) prefixes: BTreeSet<Prefix>,
    pub(crate) until: BootTime,
}

/// What waited and does not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// A mass deletion.
    Mass,
    /// A contested object.
    Contest,
}

#[derive(Debug, Clone)]
struct Contest {
    since: BootTime,
    last: BootTime,
    writes: u8,
    /// Set once contested.
    wait: Option<Wait>,
}

#[derive(Debug, Clone)]
struct Wait {
    /// How long the last one was.
    length: Duration,
    until: BootTime,
    /// Whether an audit was asked for at its end.
    over: bool,
}

impl Wait {
    fn new(length: Duration, now: BootTime) -> Self {
        Self { length, until: now.after(length), over: false }
    }
}

impl Contest {
    /// When the object has been right, or was nobody's to write, for long enough.
    fn clears(&self) -> BootTime {
        self.wait.as_ref().map_or(self.last, |wait| wait.until.max(self.last)).after(CONTEST_CLEAR)
    }
}

/// A plan, and what was left out of it.
#[derive(Debug, Default)]
pub(crate) struct Restrained {
    pub(crate) plan: Plan,
    pub(crate) held: Vec<Op>,
}

impl Guard {
    /// Judges a store's word that `gone` of `before` prefixes do not exist any more. Additions go ahead; these wait.
    pub(crate) fn judge_reset(&mut self, now: BootTime, before: usize, gone: BTreeSet<Prefix>) {
        if before >= MASS_LEAST && gone.len() * 4 > before * 3 {
            // What waits already goes on waiting, with the newcomers: a second loss must not cut the first look short.
            let waiting = self.mass.take().map(|mass| mass.prefixes).unwrap_or_default();
            self.mass = Some(Mass { prefixes: &waiting | &gone, until: now.after(MASS_WAIT) });
        }
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

    /// A prefix has a peer again, so nothing there waits for deletion.
    pub(crate) fn returned(&mut self, prefix: &Prefix) {
        self.unconfirmed.remove(prefix);
        if let Some(mass) = &mut self.mass {
            mass.prefixes.remove(prefix);
            if mass.prefixes.is_empty() {
                self.mass = None;
            }
        }
    }

    /// Lets go of waits that are over. Returns why an audit has something new to do.
    pub(crate) fn expire(&mut self, now: BootTime) -> Option<Over> {
        self.contests.retain(|_, contest| contest.clears() > now);
        let mut over = None;
        for wait in self.contests.values_mut().filter_map(|contest| contest.wait.as_mut()) {
            if wait.until <= now && !wait.over {
                (wait.over, over) = (true, Some(Over::Contest));
            }
        }
        if self.mass.as_ref().is_some_and(|mass| mass.until <= now) {
            (self.mass, over) = (None, Some(Over::Mass));
        }
        over
    }

    /// When [`expire`](Self::expire) or another audit is next worth it.
    pub(crate) fn deadline(&self) -> Option<BootTime> {
        let mass = self.mass.as_ref().map(|mass| mass.until);
        // A wait that is over must not be waited for: the timer would never sleep again.
        let contests = self.contests.values().filter_map(|contest| {
            let wait = contest.wait.as_ref()?;
            Some(if wait.over { contest.clears() } else { wait.until })
        });
        mass.into_iter().chain(contests).min()
    }

    /// What is contested now.
    pub(crate) fn contested(&self) -> impl Iterator<Item = &Object> {
        self.contests.iter().filter(|(_, contest)| contest.wait.is_some()).map(|(object, _)| object)
    }

    /// Whether `object` waits because somebody else keeps changing it.
    fn waits(&self, object: &Object, now: BootTime) -> bool {
        self.contests.get(object).is_some_and(|contest| contest.wait.as_ref().is_some_and(|wait| wait.until > now))
    }

    /// Takes out of `plan` what must not happen now, and what stands on that.
    pub(crate) fn restrain(&self, plan: Plan, now: BootTime, bad: &[Prefix]) -> Restrained {
        let held_prefix = |prefix: &Prefix| {
            bad.contains(prefix)
                || self.unconfirmed.contains(prefix)
                || self.mass.as_ref().is_some_and(|mass| mass.prefixes.contains(prefix))
        };
        let nothing_to_hold =
            bad.is_empty() && self.unconfirmed.is_empty() && self.mass.is_none() && self.contests.is_empty();
        if nothing_to_hold {
            return Restrained { plan, held: Vec::new() };
        }
        let mass = self.mass.iter().flat_map(|mass| &mass.prefixes);
        let gateways: BTreeSet<_> = bad.iter().chain(&self.unconfirmed).chain(mass).map(Prefix::addr).collect();
        let mut refusals = Refusals::default();
        let mut restrained = Restrained { plan: Plan { ops: Vec::new(), conflicts: plan.conflicts }, held: Vec::new() };
        for op in plan.ops {
            let hold = match &op {
                Op::DeleteRoute { prefix, .. } => held_prefix(prefix),
                Op::DeleteNeighbour { key, .. } => gateways.contains(&key.addr),
                _ => false,
            };
            if hold || self.waits(&op.object(), now) || refusals.block(&op) {
                refusals.refused(&op);
                restrained.held.push(op);
            } else {
                restrained.plan.ops.push(op);
            }
        }
        restrained
    }

    /// Why [`restrain`](Self::restrain) holds `op`.
    pub(crate) fn why_held(&self, op: &Op, now: BootTime, bad: &[Prefix]) -> HeldBecause {
        let contest = self.contests.get(&op.object()).and_then(|contest| contest.wait.as_ref());
        if let Some(wait) = contest.filter(|wait| wait.until > now) {
            return HeldBecause::Contested(wait.until);
        }
        let meant = |prefix: &Prefix| match op {
            Op::DeleteRoute { prefix: route, .. } => prefix == route,
            Op::DeleteNeighbour { key, .. } => prefix.addr() == key.addr,
            _ => false,
        };
        let mass = self.mass.as_ref().filter(|mass| mass.prefixes.iter().any(meant));
        match mass {
            Some(mass) => HeldBecause::Withheld(WithheldBecause::MassRemoval(mass.until)),
            None if bad.iter().any(meant) => HeldBecause::Withheld(WithheldBecause::BadRecord),
            None if self.unconfirmed.iter().any(meant) => HeldBecause::Withheld(WithheldBecause::Unconfirmed),
            None => HeldBecause::StandsOnHeld,
        }
    }

    /// Notes that an audit had to write these. Returns those that became contested by it.
    pub(crate) fn wrote<'a>(&mut self, now: BootTime, ops: impl Iterator<Item = &'a Op>) -> Vec<Object> {
        let mut fresh = Vec::new();
        for op in ops {
            let object = op.object();
            let contest =
                self.contests.entry(object.clone()).or_insert(Contest { since: now, last: now, writes: 0, wait: None });
            contest.last = now;
            match &mut contest.wait {
                Some(wait) => *wait = Wait::new((wait.length * 2).min(CONTEST_WAIT.1), now),
                None => {
                    if now.since(contest.since) > CONTEST_WINDOW {
                        (contest.since, contest.writes) = (now, 0);
                    }
                    contest.writes += 1;
                    if contest.writes >= CONTEST_WRITES {
                        contest.wait = Some(Wait::new(CONTEST_WAIT.0, now));
                        fresh.push(object);
                    }
                }
            }
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::MacAddr;
    use crate::state::{FdbKey, LinkId, NeighbourKey, Route};

    fn at(millis: u64) -> BootTime {
        BootTime(Duration::from_millis(millis))
    }

    fn prefix(n: u8) -> Prefix {
        format!("10.5.{n}.0/24").parse().unwrap()
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
        let restrained = guard.restrain(plan, at(0), &[]);
        assert_eq!((restrained.held, restrained.plan.ops), (removal(3).to_vec(), removal(200).to_vec()));
        assert_eq!(guard.expire(at(59_999)), None);
        assert_eq!(guard.expire(at(60_000)), Some(Over::Mass));
        assert!(guard.mass().is_none());
    }

    #[test]
    fn a_second_loss_does_not_cut_the_first_wait_short() {
        let mut guard = Guard::default();
        guard.judge_reset(at(0), 100, (0..80).map(prefix).collect());
        guard.judge_reset(at(30_000), 20, (80..98).map(prefix).collect());
        let plan = Plan { ops: [removal(3), removal(90)].concat(), conflicts: Vec::new() };
        assert_eq!(guard.restrain(plan, at(59_000), &[]).held.len(), 6);
    }

    #[test]
    fn what_an_old_snapshot_lacks_waits_for_the_store() {
        let mut guard = Guard::default();
        guard.leave([prefix(3), prefix(4)].into());
        guard.returned(&prefix(4));
        let plan = Plan { ops: [removal(3), removal(4)].concat(), conflicts: Vec::new() };
        let restrained = guard.restrain(plan.clone(), at(0), &[]);
        assert_eq!((restrained.held, restrained.plan.ops), (removal(3).to_vec(), removal(4).to_vec()));
        assert!(guard.expire(at(3_600_000)).is_none() && guard.confirm() && !guard.confirm());
        assert!(guard.restrain(plan, at(0), &[]).held.is_empty());
    }

    #[test]
    fn a_reset_that_removes_three_quarters_or_few_does_not_wait() {
        let mut guard = Guard::default();
        guard.judge_reset(at(0), 16, (0..12).map(prefix).collect());
        guard.judge_reset(at(0), 15, (0..15).map(prefix).collect());
        assert!(guard.mass().is_none());
    }

    #[test]
    fn ten_writes_in_ten_seconds_make_an_object_contested_and_waits_double() {
        let mut guard = Guard::default();
        let op = &removal(1)[0];
        for n in 0..9 {
            assert!(guard.wrote(at(n * 1000), [op].into_iter()).is_empty());
        }
        assert_eq!(guard.wrote(at(9_000), [op].into_iter()), vec![op.object()]);
        let plan = Plan { ops: vec![op.clone()], conflicts: Vec::new() };
        let none = [];
        assert_eq!(guard.restrain(plan.clone(), at(9_999), &none).held.len(), 1);
        assert!(guard.restrain(plan.clone(), at(10_000), &none).held.is_empty());
        guard.wrote(at(10_000), [op].into_iter());
        assert_eq!(guard.deadline(), Some(at(12_000)));
        assert_eq!(guard.expire(at(12_000)), Some(Over::Contest), "its turn has come: an audit has to look");
        assert_eq!(guard.expire(at(12_001)), None);
        assert_eq!(guard.deadline(), Some(at(42_000)));
        assert_eq!(guard.contested().count(), 1);
        guard.expire(at(42_000));
        assert_eq!((guard.contested().count(), guard.deadline()), (0, None));
    }
}
