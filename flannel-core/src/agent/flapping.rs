//! Objects that another program keeps changing: they are left alone for growing intervals.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::backoff::Keyed;
use crate::clock::BootTime;
use crate::kernel::{Object, Op};

/// This many writes …
const WRITES: u8 = 10;
/// … within this time mean that another program keeps changing the object.
const WINDOW: Duration = Duration::from_secs(10);
/// The maximum number of objects that are counted or flapping at once: counting everything after a flush at 100 000
/// peers would take as much memory as the peers do. Further objects are written by every audit.
const MOST: usize = 16_384;

/// Tracks which objects flap. A flush by another program causes one write for each of ten thousand objects, of which
/// none flaps: so flapping objects are kept apart, and no collection is walked before its time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flapping {
    /// Recently written objects that do not flap: since when they are counted, and the number of writes.
    tallies: BTreeMap<Object, (BootTime, u8)>,
    /// Flapping objects, which are left alone until their wait ends.
    waits: Keyed<Object>,
    /// When to forget tallies.
    sweep: Option<BootTime>,
    /// The next time at which the wait of a flapping object ends.
    next: Option<BootTime>,
    /// Whether the set of flapping objects has changed since [`take_changed`](Self::take_changed).
    changed: bool,
    /// How often a whole collection was walked.
    #[cfg(test)]
    walks: u32,
}

impl Flapping {
    /// Notes the writes of an audit. Returns the objects that flap as of now.
    pub(crate) fn wrote<'a>(&mut self, now: BootTime, ops: impl Iterator<Item = &'a Op>) -> Vec<Object> {
        let mut fresh = Vec::new();
        for op in ops {
            let object = op.object();
            if self.waits.until(&object).is_some() || self.tally(&object, now) >= WRITES {
                fresh.extend(self.tallies.remove_entry(&object).map(|(object, _)| object));
                self.waits.fail(object, now);
            }
        }
        self.changed |= !fresh.is_empty();
        self.look_ahead();
        fresh
    }

    /// Removes expired entries. Returns whether an audit is due because a wait ended.
    pub(crate) fn expire(&mut self, now: BootTime) -> bool {
        if self.sweep.is_some_and(|sweep| sweep <= now) {
            self.walked();
            self.tallies.retain(|_, (since, _)| now.since(*since) <= WINDOW);
            self.sweep = (!self.tallies.is_empty()).then(|| now.after(WINDOW));
        }
        if self.next.is_none_or(|next| next > now) {
            return false;
        }
        let before = self.waits.keys().len();
        let is_over = self.waits.expire(now);
        self.changed |= self.waits.keys().len() != before;
        self.look_ahead();
        is_over
    }

    /// When to call [`expire`](Self::expire) next.
    pub(crate) fn deadline(&self) -> Option<BootTime> {
        self.next
    }

    /// The objects that flap now.
    pub(crate) fn objects(&self) -> impl ExactSizeIterator<Item = &Object> {
        self.waits.keys()
    }

    /// Returns whether the set of flapping objects has changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Until when `object` waits because another program keeps changing it, if it does.
    pub(crate) fn waits_until(&self, object: &Object, now: BootTime) -> Option<BootTime> {
        self.waits.until(object).filter(|until| *until > now)
    }

    /// Counts a write. Returns the recent number of writes.
    fn tally(&mut self, object: &Object, now: BootTime) -> u8 {
        self.sweep.get_or_insert(now.after(WINDOW));
        if self.tallies.len() + self.waits.keys().len() >= MOST && !self.tallies.contains_key(object) {
            return 0;
        }
        let (since, writes) = self.tallies.entry(object.clone()).or_insert((now, 0));
        if now.since(*since) > WINDOW {
            (*since, *writes) = (now, 0);
        }
        *writes += 1;
        *writes
    }

    fn look_ahead(&mut self) {
        self.walked();
        self.next = self.waits.deadline();
    }

    fn walked(&mut self) {
        #[cfg(test)]
        {
            self.walks += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{LinkId, Route};
    use crate::net::Prefix;
    use crate::testing::samples::at_millis as at;

    fn deletion(n: u32) -> Op {
        let prefix = Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 2)).into(), 30).unwrap();
        Op::DeleteRoute { prefix, route: Route::overlay(prefix, prefix.addr(), LinkId::Own(0)) }
    }

    #[test]
    fn ten_writes_in_ten_seconds_make_an_object_flap_and_waits_double() {
        let mut flapping = Flapping::default();
        let op = &deletion(1);
        for n in 0..9 {
            assert!(flapping.wrote(at(n * 1000), [op].into_iter()).is_empty());
        }
        assert_eq!(flapping.wrote(at(9_000), [op].into_iter()), vec![op.object()]);
        assert_eq!(flapping.waits_until(&op.object(), at(9_999)), Some(at(10_000)));
        assert_eq!(flapping.waits_until(&op.object(), at(10_000)), None);
        flapping.wrote(at(10_000), [op].into_iter());
        assert_eq!(flapping.deadline(), Some(at(12_000)));
        assert!(flapping.expire(at(12_000)), "its turn has come: an audit has to look");
        assert!(!flapping.expire(at(12_001)));
        assert_eq!(flapping.deadline(), Some(at(42_000)));
        assert_eq!(flapping.objects().len(), 1);
        flapping.expire(at(42_000));
        assert_eq!((flapping.objects().len(), flapping.deadline()), (0, None));
    }

    #[test]
    fn the_waits_for_a_flapping_object_grow_to_half_a_minute() {
        let (mut flapping, op) = (Flapping::default(), deletion(1));
        (0..10).for_each(|n| drop(flapping.wrote(at(n), [&op].into_iter())));
        let mut waits = Vec::new();
        let mut now = at(9);
        for _ in 0..8 {
            let until = flapping.waits_until(&op.object(), now).unwrap();
            waits.push(until.since(now).as_secs());
            now = until;
            flapping.wrote(now, [&op].into_iter());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
    }

    #[test]
    fn after_a_flush_of_everything_an_event_walks_over_nothing() {
        let mut flapping = Flapping::default();
        let ops: Vec<_> = (0..10_000).map(deletion).collect();
        assert!(flapping.wrote(at(0), ops.iter()).is_empty());
        assert_eq!((flapping.objects().len(), flapping.tallies.len()), (0, 10_000));
        let walks = flapping.walks;
        for now in 0..1000 {
            assert!(!flapping.expire(at(now)) && flapping.deadline().is_none() && !flapping.take_changed());
            assert!(flapping.waits_until(&ops[0].object(), at(now)).is_none() && flapping.objects().len() == 0);
        }
        assert_eq!(flapping.walks, walks);
        flapping.expire(at(30_000));
        assert!(flapping.tallies.is_empty(), "what was written once is forgotten");
        // The same while everything flaps.
        for now in 40_000..40_010 {
            flapping.wrote(at(now), ops.iter());
        }
        assert_eq!((flapping.objects().len(), flapping.tallies.len()), (10_000, 0));
        assert!(flapping.take_changed());
        let walks = flapping.walks;
        for now in 40_010..41_000 {
            assert!(!flapping.expire(at(now)) && flapping.deadline() == Some(at(41_009)) && !flapping.take_changed());
        }
        assert_eq!(flapping.walks, walks);
        assert!(flapping.expire(at(41_009)));
    }

    #[test]
    fn objects_beyond_the_limit_are_not_counted() {
        let mut flapping = Flapping::default();
        let ops: Vec<_> = (0..MOST as u32 + 100).map(deletion).collect();
        for second in 0..10 {
            let fresh = flapping.wrote(at(second * 1000), ops.iter());
            assert_eq!(fresh.len(), if second < 9 { 0 } else { MOST });
            assert!(flapping.tallies.len() + flapping.objects().len() <= MOST);
        }
        assert_eq!(flapping.waits_until(&ops[MOST].object(), at(9000)), None);
        flapping.expire(at(60_000));
        flapping.wrote(at(60_000), ops[MOST..].iter());
        assert_eq!(flapping.tallies.len(), 100, "there is room again");
    }
}
