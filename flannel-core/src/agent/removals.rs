//! Prefixes of peers that went away of late, one by one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::clock::BootTime;
use crate::net::Prefix;

/// How long a removal counts.
const WINDOW: Duration = Duration::from_secs(10);

/// What went within [`WINDOW`], had been there for as long, and has not come back: at most one prefix for each that a peer
/// had.
#[derive(Debug, Clone, Default)]
pub(crate) struct Removals {
    went: Recent,
    /// Those that joined of late: a peer that comes and goes says nothing of the others.
    joined: Recent,
}

impl Removals {
    /// A peer's prefix went away.
    pub(crate) fn went(&mut self, now: BootTime, prefix: Prefix) {
        self.joined.forget(now);
        if !self.joined.remove(&prefix) {
            self.went.insert(now, prefix);
        }
    }

    /// A peer has the prefix.
    pub(crate) fn came(&mut self, prefix: &Prefix) {
        self.went.remove(prefix);
    }

    /// A peer has the prefix now, and had not before.
    pub(crate) fn joined(&mut self, now: BootTime, prefix: Prefix) {
        self.joined.forget(now);
        // One that is back was there before.
        if !self.went.remove(&prefix) {
            self.joined.insert(now, prefix);
        }
    }

    /// Returns how many prefixes went of late.
    pub(crate) fn count(&mut self, now: BootTime) -> usize {
        self.went.forget(now);
        self.went.at.len()
    }

    /// Forgets all: a list says what there is.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Prefixes, each until [`WINDOW`] after it was put in.
#[derive(Debug, Clone, Default)]
struct Recent {
    at: BTreeMap<Prefix, BootTime>,
    /// In the order of time. Those that were taken out, or put in once more, are of no account.
    order: VecDeque<(BootTime, Prefix)>,
}

impl Recent {
    fn insert(&mut self, now: BootTime, prefix: Prefix) {
        self.at.insert(prefix, now);
        self.order.push_back((now, prefix));
        // One that comes and goes all the time must not pile up.
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

    fn at(secs: u64) -> BootTime {
        BootTime(Duration::from_secs(secs))
    }

    fn prefix(n: u32) -> Prefix {
        Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 8)).into(), 24).unwrap()
    }

    #[test]
    fn what_came_back_or_went_long_ago_does_not_count() {
        let mut removals = Removals::default();
        for n in 0..4 {
            removals.went(at(u64::from(n)), prefix(n));
        }
        assert_eq!(removals.count(at(4)), 4);
        removals.came(&prefix(3));
        assert_eq!(removals.count(at(9)), 3);
        removals.went(at(9), prefix(0));
        assert_eq!(removals.count(at(11)), 2, "the second went at 1, and the first once more at 9");
        assert_eq!(removals.count(at(19)), 0);
        assert!(removals.went.order.is_empty());
    }

    #[test]
    fn who_joined_of_late_and_leaves_does_not_count() {
        let mut removals = Removals::default();
        removals.joined(at(0), prefix(1));
        removals.went(at(9), prefix(1));
        assert_eq!(removals.count(at(9)), 0);
        removals.joined(at(20), prefix(1));
        removals.went(at(30), prefix(1));
        assert_eq!(removals.count(at(30)), 1, "it was there for as long as a removal counts");
        removals.joined(at(31), prefix(1));
        removals.went(at(32), prefix(1));
        assert_eq!(removals.count(at(32)), 1, "it was away for a moment only");
    }

    #[test]
    fn a_peer_that_comes_and_goes_without_end_takes_no_room() {
        let mut removals = Removals::default();
        for _ in 0..10_000 {
            removals.went(at(1), prefix(1));
            removals.came(&prefix(1));
            removals.joined(at(1), prefix(2));
            removals.went(at(1), prefix(2));
        }
        assert!(removals.went.order.len() + removals.joined.order.len() < 100);
    }
}
