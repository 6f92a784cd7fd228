//! Prefixes of peers that recently left, one by one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::clock::BootTime;
use crate::net::Prefix;

/// How long a removal counts.
const WINDOW: Duration = Duration::from_secs(10);

/// Prefixes whose peers left within [`WINDOW`] after having held them for at least as long, and that are not in use
/// again. At most as many as peers had.
#[derive(Debug, Clone, Default)]
pub(crate) struct Removals {
    left: Recent,
    /// Prefixes of peers that joined recently. A peer that joins and leaves again is no evidence about the others.
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
        // A peer that returns has not just joined.
        if !self.left.remove(&prefix) {
            self.joined.insert(now, prefix);
        }
    }

    /// Returns the number of recently left prefixes.
    pub(crate) fn count(&mut self, now: BootTime) -> usize {
        self.left.forget(now);
        self.left.at.len()
    }

    /// Forgets all entries, after a list of all peers.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Prefixes, each kept for [`WINDOW`] after it was inserted.
#[derive(Debug, Clone, Default)]
struct Recent {
    at: BTreeMap<Prefix, BootTime>,
    /// In order of time. An entry is valid only if `at` has the same time.
    order: VecDeque<(BootTime, Prefix)>,
}

impl Recent {
    fn insert(&mut self, now: BootTime, prefix: Prefix) {
        self.at.insert(prefix, now);
        self.order.push_back((now, prefix));
        // Bounds the queue for a prefix that is inserted and removed again and again.
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
