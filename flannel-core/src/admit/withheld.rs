//! The prefixes that bad records name, and which of them no peer has.

use std::collections::{BTreeMap, BTreeSet};

use super::Admission;
use crate::net::{Dual, Prefix};

/// Updated incrementally: a change costs only as much as the prefixes it overlaps.
#[derive(Default)]
pub(super) struct Withheld {
    /// How many bad records name each prefix.
    named: BTreeMap<Prefix, u32>,
    /// Prefixes to judge again.
    doubtful: BTreeSet<Prefix>,
    /// The prefixes in `named` that are withheld.
    found: BTreeSet<Prefix>,
    /// How many prefixes were rejected because there were already [`Admission::MAX_WITHHELD`].
    pub(super) overflow: usize,
}

impl Withheld {
    pub(super) fn found(&self) -> &BTreeSet<Prefix> {
        &self.found
    }

    /// Adds the prefixes that a bad record names. Returns those that were added; pass them to [`unname`](Self::unname)
    /// when the record no longer names them.
    pub(super) fn name(&mut self, subnets: &Dual<Prefix>) -> Dual<Prefix> {
        let mut taken = Dual::default();
        for (family, prefix) in subnets.iter() {
            if self.named.len() >= Admission::MAX_WITHHELD && !self.named.contains_key(prefix) {
                self.overflow = self.overflow.saturating_add(1);
                continue;
            }
            *self.named.entry(*prefix).or_default() += 1;
            self.doubtful.insert(*prefix);
            *taken.slot(family) = Some(*prefix);
        }
        taken
    }

    /// Removes prefixes that a bad record no longer names.
    pub(super) fn unname(&mut self, named: &Dual<Prefix>) {
        for (_, prefix) in named.iter() {
            self.doubtful.insert(*prefix);
            if let Some(count) = self.named.get_mut(prefix) {
                *count -= 1;
                if *count == 0 {
                    self.named.remove(prefix);
                }
            }
        }
    }

    /// Marks prefixes that overlap `subnets` to be judged again.
    pub(super) fn doubt(&mut self, subnets: &Dual<Prefix>) {
        if self.named.is_empty() {
            return;
        }
        for (_, prefix) in subnets.iter() {
            let wider = (0..prefix.len()).filter_map(|len| Prefix::masked(prefix.addr(), len).ok());
            let inside = self.named.range(*prefix..=Prefix::host(prefix.last())).map(|(inside, _)| *inside);
            self.doubtful.extend(wider.filter(|wider| self.named.contains_key(wider)).chain(inside));
        }
    }

    /// Marks all prefixes to be judged again.
    pub(super) fn doubt_all(&mut self) {
        self.doubtful.extend(self.named.keys());
    }

    /// Judges the marked prefixes. Returns those that changed.
    pub(super) fn settle(&mut self, is_free: impl Fn(&Prefix) -> bool) -> BTreeSet<Prefix> {
        let mut changed = std::mem::take(&mut self.doubtful);
        changed.retain(|prefix| {
            if self.named.contains_key(prefix) && is_free(prefix) {
                self.found.insert(*prefix)
            } else {
                self.found.remove(prefix)
            }
        });
        changed
    }
}
