//! Prefixes of peers that went away of late, one by one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::clock::BootTime;
use crate::net::Prefix;

/// How long a removal counts.
const WINDOW: Duration = Duration::from_secs(10);

/// What went within [`WINDOW`] and has not come back: at most one prefix for each that a peer had.
#[derive(Debug, Clone, Default)]
pub(crate) struct Removals {
    last: BTreeMap<Prefix, BootTime>,
    /// In the order of time. Those that have come back, or went once more, are of no account.
    order: VecDeque<(BootTime, Prefix)>,
}

impl Removals {
    /// A peer's prefix went away.
    pub(crate) fn went(&mut self, now: BootTime, prefix: Prefix) {
        self.last.insert(prefix, now);
        self.order.push_back((now, prefix));
    }

    /// A peer has the prefix.
    pub(crate) fn came(&mut self, prefix: &Prefix) {
        self.last.remove(prefix);
    }

    /// Returns how many prefixes went of late.
    pub(crate) fn count(&mut self, now: BootTime) -> usize {
        while let Some((at, prefix)) = self.order.front().filter(|(at, _)| at.after(WINDOW) <= now) {
            if self.last.get(prefix) == Some(at) {
                self.last.remove(prefix);
            }
            self.order.pop_front();
        }
        // One that comes and goes all the time must not pile up.
        if self.order.len() > 2 * self.last.len() + 16 {
            self.order.retain(|(at, prefix)| self.last.get(prefix) == Some(at));
        }
        self.last.len()
    }

    /// Forgets all: a list says what there is.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
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
        assert!(removals.order.is_empty());
    }

    #[test]
    fn a_peer_that_comes_and_goes_without_end_takes_no_room() {
        let mut removals = Removals::default();
        for _ in 0..10_000 {
            removals.went(at(1), prefix(1));
            removals.came(&prefix(1));
            removals.count(at(1));
        }
        assert!(removals.order.len() < 100, "{}", removals.order.len());
    }
}
