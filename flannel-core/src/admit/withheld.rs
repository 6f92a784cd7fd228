//! The prefixes that bad records name, and which of them nobody else holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::net::{Dual, Family, Prefix};

/// Kept as records change: a change costs that of the prefixes it overlaps, not of all.
#[derive(Default)]
pub(super) struct Withheld {
    /// How many bad records name each.
    named: BTreeMap<Prefix, u32>,
    /// Those to be judged again.
    doubtful: BTreeSet<Prefix>,
    /// Those of `named` that are withheld.
    found: BTreeSet<Prefix>,
}

impl Withheld {
    pub(super) fn found(&self) -> &BTreeSet<Prefix> {
        &self.found
    }

    /// A bad record names these.
    pub(super) fn name(&mut self, subnets: &Dual<Prefix>) {
        for prefix in both(subnets) {
            *self.named.entry(prefix).or_default() += 1;
            self.doubtful.insert(prefix);
        }
    }

    /// It does not any more.
    pub(super) fn unname(&mut self, subnets: &Dual<Prefix>) {
        for prefix in both(subnets) {
            self.doubtful.insert(prefix);
            if let Some(count) = self.named.get_mut(&prefix) {
                *count -= 1;
                if *count == 0 {
                    self.named.remove(&prefix);
                }
            }
        }
    }

    /// Who holds `subnets` may have changed.
    pub(super) fn doubt(&mut self, subnets: &Dual<Prefix>) {
        if self.named.is_empty() {
            return;
        }
        for prefix in both(subnets) {
            let wider = (0..prefix.len()).filter_map(|len| Prefix::masked(prefix.addr(), len).ok());
            let inside = self.named.range(prefix..=Prefix::host(prefix.last())).map(|(inside, _)| *inside);
            self.doubtful.extend(wider.filter(|wider| self.named.contains_key(wider)).chain(inside));
        }
    }

    /// Anything may have changed.
    pub(super) fn doubt_all(&mut self) {
        self.doubtful.extend(self.named.keys());
    }

    /// Judges what is doubtful. Returns what changed.
    pub(super) fn settle(&mut self, possible: impl Fn(&Prefix) -> bool) -> BTreeSet<Prefix> {
        let mut changed = std::mem::take(&mut self.doubtful);
        changed.retain(|prefix| {
            if self.named.contains_key(prefix) && possible(prefix) {
                self.found.insert(*prefix)
            } else {
                self.found.remove(prefix)
            }
        });
        changed
    }
}

fn both(subnets: &Dual<Prefix>) -> impl Iterator<Item = Prefix> {
    Family::BOTH.map(|family| subnets.get(family).copied()).into_iter().flatten()
}
