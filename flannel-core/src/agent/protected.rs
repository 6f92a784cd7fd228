//! Prefixes whose deletion waits, with the reasons.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::agent::removals::Removals;
use crate::agent::status::{Contact, WithheldBecause};
use crate::clock::BootTime;
use crate::kernel::Op;
use crate::net::Prefix;

/// How long a suspicious mass deletion waits (docs/design.md, "Guards").
pub(crate) const MASS_WAIT: Duration = Duration::from_secs(60);
/// Networks smaller than this are never suspicious.
const MASS_LEAST: usize = 16;

/// Why the objects of a prefix are not deleted. Of several reasons the first is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// Most prefixes left at once.
    MassRemoval,
    /// A snapshot from before the store went away lacks the prefix, and the store has not listed its records since.
    Unconfirmed,
    /// A bad record names the prefix, and no other node has it.
    BadRecord,
}

impl Reason {
    const FIRST: Self = Self::MassRemoval;
    const LAST: Self = Self::BadRecord;
}

/// The prefixes of one overlay whose deletion waits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Protected {
    prefixes: BTreeSet<(Prefix, Reason)>,
    /// When a mass deletion may go ahead, if one waits.
    until: Option<BootTime>,
    /// The number of prefixes of the mass deletion.
    mass: usize,
    /// That number when it was last reported.
    told: usize,
    /// Peers that left one by one.
    removals: Removals,
    /// Whether peers left since the last judgement.
    is_unjudged: bool,
    /// How often a mass deletion was found.
    #[cfg(test)]
    pub(crate) judged: u32,
}

impl Protected {
    /// Judges a list of the store in which `gone` of `before` prefixes are missing. Additions proceed; these deletions
    /// may have to wait.
    pub(crate) fn judge_reset(&mut self, now: BootTime, before: usize, gone: BTreeSet<Prefix>) {
        self.removals.clear();
        self.judge(now, before, gone.len(), || gone);
    }

    /// Notes that a peer with this prefix left by a single removal, not by a list.
    pub(crate) fn note_left(&mut self, now: BootTime, prefix: Prefix) {
        self.removals.left(now, prefix);
        self.is_unjudged = true;
    }

    /// Notes that a peer joined with this prefix, which no peer had.
    pub(crate) fn note_joined(&mut self, now: BootTime, prefix: Prefix) {
        self.removals.joined(now, prefix);
    }

    /// Judges the peers that left one by one since the last call. `there` prefixes are left; `waiting` returns the
    /// prefixes of peers that left whose deletion has not begun. Returns whether deletions wait because of it.
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

    /// Makes the deletions of `waiting` wait if most prefixes are gone. Returns whether they do.
    fn judge(&mut self, now: BootTime, before: usize, gone: usize, waiting: impl FnOnce() -> BTreeSet<Prefix>) -> bool {
        let is_mass = before >= MASS_LEAST && gone * 4 > before * 3;
        if is_mass {
            #[cfg(test)]
            {
                self.judged += 1;
            }
            // Earlier deletions keep waiting together with the new ones: a second loss must not end the first wait.
            self.protect(waiting(), Reason::MassRemoval);
            self.until = Some(now.after(MASS_WAIT)).filter(|_| self.mass > 0);
        }
        is_mass
    }

    /// Makes the deletions of these prefixes wait.
    pub(crate) fn protect(&mut self, prefixes: impl IntoIterator<Item = Prefix>, reason: Reason) {
        for prefix in prefixes {
            let is_new = self.prefixes.insert((prefix, reason));
            self.mass += usize::from(is_new && reason == Reason::MassRemoval);
        }
    }

    /// Removes this reason from `prefix`.
    pub(crate) fn release(&mut self, prefix: Prefix, reason: Reason) {
        let was_there = self.prefixes.remove(&(prefix, reason));
        if was_there && reason == Reason::MassRemoval {
            self.mass -= 1;
            self.until = self.until.filter(|_| self.mass > 0);
        }
    }

    /// Makes the deletions of exactly these prefixes, which a snapshot lacks, wait for the store.
    pub(crate) fn await_store(&mut self, prefixes: impl IntoIterator<Item = Prefix>) {
        self.lift(Reason::Unconfirmed);
        self.protect(prefixes, Reason::Unconfirmed);
    }

    /// Notes that the store has listed its records. Returns whether a deletion waited for that.
    pub(crate) fn confirm(&mut self) -> bool {
        self.lift(Reason::Unconfirmed)
    }

    /// Removes this reason from every prefix. Returns whether one had it.
    fn lift(&mut self, reason: Reason) -> bool {
        let before = self.prefixes.len();
        self.prefixes.retain(|(_, its)| *its != reason);
        self.prefixes.len() < before
    }

    /// Notes that a node holds `prefix`: its deletion no longer waits, unless a bad record names it. Mass deletions of
    /// other prefixes that overlap it no longer wait either, because their routes would divert packets from the new
    /// owner. Returns whether there were any.
    pub(crate) fn in_use(&mut self, prefix: &Prefix) -> bool {
        self.removals.in_use(prefix);
        // Usually nothing waits, and a list calls this for every peer.
        if self.prefixes.is_empty() {
            return false;
        }
        self.release(*prefix, Reason::Unconfirmed);
        self.release(*prefix, Reason::MassRemoval);
        let over: Vec<_> = self.overlapping(prefix).filter(|(_, reason)| *reason == Reason::MassRemoval).collect();
        for (prefix, reason) in &over {
            self.release(*prefix, *reason);
        }
        !over.is_empty()
    }

    /// The entries that overlap `prefix`. Takes a few searches, however many entries there are.
    fn overlapping(&self, prefix: &Prefix) -> impl Iterator<Item = (Prefix, Reason)> {
        let around = (0..prefix.len()).filter_map(|len| Prefix::masked(prefix.addr(), len).ok());
        let around = around.flat_map(|around| self.from(around).take_while(move |(prefix, _)| *prefix == around));
        around.chain(self.from(*prefix).take_while(|(inside, _)| prefix.covers(inside)))
    }

    /// The entries from `prefix` on, in the order of address, then length.
    fn from(&self, prefix: Prefix) -> impl Iterator<Item = (Prefix, Reason)> {
        self.prefixes.range((prefix, Reason::FIRST)..).copied()
    }

    /// Ends the wait of a mass deletion whose time has come. While the store is away the wait continues, because its
    /// records cannot be listed again. Returns whether a wait ended.
    pub(crate) fn expire(&mut self, now: BootTime, store: &Contact) -> bool {
        let is_over = self.deadline(store).is_some_and(|until| until <= now);
        if is_over {
            (self.until, self.mass) = (None, 0);
            self.lift(Reason::MassRemoval);
        }
        is_over
    }

    /// When to call [`expire`](Self::expire) next.
    pub(crate) fn deadline(&self, store: &Contact) -> Option<BootTime> {
        self.until.filter(|_| *store == Contact::Live)
    }

    /// Whether a mass deletion waits.
    pub(crate) fn mass_waits(&self) -> bool {
        self.until.is_some()
    }

    /// Returns the number of prefixes of a mass deletion if it has to be reported: once for each, and again when twice
    /// as many wait.
    pub(crate) fn take_mass_to_tell(&mut self) -> Option<usize> {
        if !self.mass_waits() {
            self.told = 0;
        }
        let is_told = self.mass_waits() && self.mass >= 2 * self.told;
        is_told.then(|| {
            self.told = self.mass;
            self.mass
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    /// The prefixes, in order. One with several reasons appears once for each.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = &Prefix> {
        self.prefixes.iter().map(|(prefix, _)| prefix)
    }

    /// Why deletions of `prefix` wait, if they do.
    pub(crate) fn why(&self, prefix: &Prefix) -> Option<WithheldBecause> {
        let (_, reason) = self.from(*prefix).next().filter(|(first, _)| first == prefix)?;
        match reason {
            Reason::MassRemoval => self.until.map(WithheldBecause::MassRemoval),
            Reason::Unconfirmed => Some(WithheldBecause::Unconfirmed),
            Reason::BadRecord => Some(WithheldBecause::BadRecord),
        }
    }

    /// Why `op` waits, if it deletes an object of one of the prefixes.
    pub(crate) fn why_held(&self, op: &Op) -> Option<WithheldBecause> {
        match op {
            Op::DeleteRoute { prefix, .. } => self.why(prefix),
            Op::DeleteForward { key, .. } => self.why(&key.prefix),
            // The neighbour's address is the first address of the prefix.
            Op::DeleteNeighbour { key, .. } => {
                let (last, _) = self.prefixes.range(..=(Prefix::host(key.addr), Reason::LAST)).next_back()?;
                self.why(last).filter(|_| last.addr() == key.addr)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::samples::at;
    use proptest::prelude::*;

    /// Prefixes of which many overlap.
    fn prefix() -> impl Strategy<Value = Prefix> {
        (0u8..4, 22u8..25).prop_map(|(n, len)| Prefix::masked([10, 5, n, 0].into(), len).unwrap())
    }

    #[derive(Debug, Clone)]
    enum Step {
        Lost(BTreeSet<Prefix>),
        Await(BTreeSet<Prefix>),
        Confirm,
        Named(Prefix, bool),
        InUse(Prefix),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let some = || proptest::collection::btree_set(prefix(), 0..4);
        prop_oneof![
            some().prop_map(Step::Lost),
            some().prop_map(Step::Await),
            Just(Step::Confirm),
            (prefix(), any::<bool>()).prop_map(|(prefix, is)| Step::Named(prefix, is)),
            prefix().prop_map(Step::InUse),
            (0u64..90).prop_map(Step::Pass),
        ]
    }

    proptest! {
        #[test]
        fn each_reason_protects_its_prefixes_whatever_the_others_do(
            steps in proptest::collection::vec(step(), 0..40), asked in prefix(),
        ) {
            let mut protected = Protected::default();
            let (mut mass, mut unconfirmed, mut bad) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            let (mut now, mut until) = (0, 0);
            for step in steps {
                match step {
                    Step::Lost(gone) => {
                        mass.extend(gone.iter().copied());
                        until = now + MASS_WAIT.as_secs();
                        protected.judge(at(now), 100, 100, || gone);
                    }
                    Step::Await(gone) => {
                        unconfirmed.clone_from(&gone);
                        protected.await_store(gone);
                    }
                    Step::Confirm => {
                        prop_assert_eq!(protected.confirm(), !std::mem::take(&mut unconfirmed).is_empty());
                    }
                    Step::Named(prefix, true) => {
                        bad.insert(prefix);
                        protected.protect([prefix], Reason::BadRecord);
                    }
                    Step::Named(prefix, false) => {
                        bad.remove(&prefix);
                        protected.release(prefix, Reason::BadRecord);
                    }
                    Step::InUse(prefix) => {
                        unconfirmed.remove(&prefix);
                        mass.remove(&prefix);
                        let before = mass.len();
                        mass.retain(|other| !(other.covers(&prefix) || prefix.covers(other)));
                        prop_assert_eq!(protected.in_use(&prefix), mass.len() < before);
                    }
                    Step::Pass(seconds) => {
                        now += seconds;
                        let is_over = !mass.is_empty() && until <= now;
                        prop_assert_eq!(protected.expire(at(now), &Contact::Live), is_over);
                        if is_over {
                            mass.clear();
                        }
                    }
                }
                prop_assert_eq!(protected.mass_waits(), !mass.is_empty());
                let named = [(&mass, Reason::MassRemoval), (&unconfirmed, Reason::Unconfirmed), (&bad, Reason::BadRecord)];
                let why = named.iter().find(|(prefixes, _)| prefixes.contains(&asked)).map(|(_, reason)| *reason);
                let expected = why.map(|reason| match reason {
                    Reason::MassRemoval => WithheldBecause::MassRemoval(at(until)),
                    Reason::Unconfirmed => WithheldBecause::Unconfirmed,
                    Reason::BadRecord => WithheldBecause::BadRecord,
                });
                prop_assert_eq!(protected.why(&asked), expected);
                let all: BTreeSet<_> = protected.prefixes().copied().collect();
                prop_assert_eq!(all, &(&mass | &unconfirmed) | &bad);
            }
        }
    }
}
