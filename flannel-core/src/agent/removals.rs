//! Prefixes of peers that left of late, one by one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::clock::BootTime;
use crate::net::Prefix;

/// How long a removal counts.
const WINDOW: Duration = Duration::from_secs(10);

/// Prefixes that peers left within [`WINDOW`], had held for as long, and do not hold again: no more than peers had.
#[derive(Debug, Clone, Default)]
pub(crate) struct Removals {
    left: Recent,
    /// Prefixes of peers that joined of late. One that joins and leaves says nothing about the others.
    joined: Recent,
}

impl Removals {
    /// Notes that a peer with this prefix left.
    pub(crate) fn left(&mut self, now: BootTime, prefix: Prefix) {
        self.joined.forget(now);
        if !self.joined.remove(&prefix) {
            self.left.insert(now, prefix);
        }
    }

    /// Notes that the prefix is in use.
    pub(crate) fn in_use(&mut self, prefix: &Prefix) {
        self.left.remove(prefix);
    }

    /// Notes that a peer with this prefix joined.
    pub(crate) fn joined(&mut self, now: BootTime, prefix: Prefix) {
        self.joined.forget(now);
        // A peer that is back had been there before.
        if !self.left.remove(&prefix) {
            self.joined.insert(now, prefix);
        }
    }

    /// Returns how many prefixes were left of late.
    pub(crate) fn count(&mut self, now: BootTime) -> usize {
        self.left.forget(now);
        self.left.at.len()
    }

    /// Forgets all: a list says what there is.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Prefixes, each for [`WINDOW`] from when it was put in.
#[derive(Debug, Clone, Default)]
struct Recent {
    at: BTreeMap<Prefix, BootTime>,
    /// In the order of time. An entry counts only if `at` has the same time.
    order: VecDeque<(BootTime, Prefix)>,
}

impl Recent {
    fn insert(&mut self, now: BootTime, prefix: Prefix) {
        self.at.insert(prefix, now);
        self.order.push_back((now, prefix));
        // A prefix that is put in and taken out all the time must not pile up.
        if self.order.len() > 2 * self.at.len() + 16 {
            let mut order: Vec<_> = self.at.iter().map(|(prefix, at)| (*at, *prefix)).collect();
            order.sort_unstable();
            self.order = order.into();
        }
    }

    fn remove(&mut self, prefix: &Prefix) -> bool {
        self.at.remove(prefix).is_some()
    }

    fn forget(&mut self, now: BootTime) {
        while let Some((at, prefix)) = self.order.front().filter(|(at, _)| at.after(WINDOW) <= now) {
            if self.at.get(prefix) == Some(at) {
                self.at.remove(prefix);
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::samples::at;

    fn prefix(n: u32) -> Prefix {
        Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 8)).into(), 24).unwrap()
    }

    #[test]
    fn what_came_back_or_went_long_ago_does_not_count() {
        let mut removals = Removals::default();
        for n in 0..4 {
            removals.left(at(u64::from(n)), prefix(n));
        }
        assert_eq!(removals.count(at(4)), 4);
        removals.in_use(&prefix(3));
        assert_eq!(removals.count(at(9)), 3);
        removals.left(at(9), prefix(0));
        assert_eq!(removals.count(at(11)), 2, "the second went at 1, and the first once more at 9");
        assert_eq!(removals.count(at(19)), 0);
        assert!(removals.left.order.is_empty());
    }

    #[test]
    fn who_joined_of_late_and_leaves_does_not_count() {
        let mut removals = Removals::default();
        removals.joined(at(0), prefix(1));
        removals.left(at(9), prefix(1));
        assert_eq!(removals.count(at(9)), 0);
        removals.joined(at(20), prefix(1));
        removals.left(at(30), prefix(1));
        assert_eq!(removals.count(at(30)), 1, "it was there for as long as a removal counts");
        removals.joined(at(31), prefix(1));
        removals.left(at(32), prefix(1));
        assert_eq!(removals.count(at(32)), 1, "it was away for a moment only");
    }

    #[test]
    fn a_peer_that_comes_and_goes_without_end_takes_no_room() {
        let mut removals = Removals::default();
        for _ in 0..10_000 {
            removals.left(at(1), prefix(1));
            removals.in_use(&prefix(1));
            removals.joined(at(1), prefix(2));
            removals.left(at(1), prefix(2));
        }
        assert!(removals.left.order.len() + removals.joined.order.len() < 100);
    }
}
