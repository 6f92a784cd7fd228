//! Changes of this node's record by other programs, and the pace of the reactions to them.
//!
//! Two agents under one name would take the lease from each other as fast as the store allows. So the first loss or
//! edit is answered at once, and later ones at growing intervals, until the lease has been undisturbed for a while.

use std::time::Duration;

use crate::agent::status::Contended;
use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;

/// A lease that has been undisturbed for this long is no longer contended.
const CALM: Duration = Duration::from_secs(30);
/// The longest wait. It is less than [`CALM`], so that a rival that waits is not taken for none.
const LONGEST: Duration = Duration::from_secs(16);

#[derive(Debug)]
pub(crate) struct Contention {
    /// The number of answers in a row.
    answers: u32,
    /// Whether a change has yet to be answered.
    open: bool,
    /// The earliest time of the next answer.
    not_before: BootTime,
    /// Since when the lease has been undisturbed.
    stands: Option<BootTime>,
    backoff: Backoff,
}

impl Contention {
    pub(crate) fn new(jitter: Jitter) -> Self {
        let backoff = Backoff::up_to(LONGEST, jitter);
        Self { answers: 0, open: false, not_before: BootTime::default(), stands: None, backoff }
    }

    /// Notes that another program changed the record. Returns when to answer.
    pub(crate) fn raise(&mut self, now: BootTime) -> BootTime {
        self.calm(now);
        (self.open, self.stands) = (true, None);
        self.not_before.max(now)
    }

    /// Notes that no other program changed the record after all. Returns whether an answer was due.
    pub(crate) fn withdraw(&mut self) -> bool {
        std::mem::take(&mut self.open)
    }

    /// Notes that a call begins, which is the answer if one is due.
    pub(crate) fn call(&mut self, now: BootTime) {
        if std::mem::take(&mut self.open) {
            self.answers = self.answers.saturating_add(1);
            self.not_before = now.after(self.backoff.wait());
        }
    }

    /// Notes that the store confirmed the lease.
    pub(crate) fn stand(&mut self, now: BootTime) {
        self.stands.get_or_insert(now);
    }

    /// Resets the count once the lease has been undisturbed for [`CALM`].
    pub(crate) fn calm(&mut self, now: BootTime) {
        if self.calms().is_some_and(|calms| calms <= now) {
            self.answers = 0;
            self.backoff.reset();
        }
    }

    /// When [`calm`](Self::calm) will reset the count.
    pub(crate) fn calms(&self) -> Option<BootTime> {
        self.stands.filter(|_| self.answers > 0).map(|since| since.after(CALM))
    }

    /// The state for the status, with `due` as the time of the next call.
    pub(crate) fn show(&self, due: Option<BootTime>) -> Option<Contended> {
        (self.answers > 0).then(|| Contended { times: self.answers, next: due.filter(|_| self.open) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::samples::at;

    #[test]
    fn answers_come_at_once_then_ever_later_until_the_lease_has_stood_half_a_minute() {
        let mut contention = Contention::new(Jitter::seeded(3));
        let mut now = at(100);
        for want in [0, 1000, 2000, 4000, 8000, 16_000, 16_000] {
            let due = contention.raise(now);
            let waited = due.since(now).as_millis();
            assert!(waited >= want * 9 / 10 && waited <= want * 11 / 10, "{waited} is not about {want}");
            assert_eq!(contention.raise(due), due, "what comes before the answer changes nothing");
            contention.call(due);
            contention.stand(due);
            now = due;
        }
        assert_eq!(contention.show(None), Some(Contended { times: 7, next: None }));
        let calm = now.after(CALM);
        assert_eq!(contention.calms(), Some(calm));
        contention.calm(calm);
        assert_eq!((contention.show(None), contention.calms()), (None, None));
        assert_eq!(contention.raise(calm), calm);
    }

    #[test]
    fn what_was_nobody_is_not_counted() {
        let mut contention = Contention::new(Jitter::seeded(3));
        contention.raise(at(1));
        assert!(contention.withdraw() && !contention.withdraw());
        contention.call(at(1));
        assert_eq!((contention.show(Some(at(1))), contention.raise(at(1))), (None, at(1)));
    }
}
