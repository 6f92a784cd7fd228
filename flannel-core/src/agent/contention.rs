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

/// The number of losses in a row that only another program can cause: a deleted record or a store that lost its data
/// is one loss.
const LOSSES_BY_ANOTHER: u32 = 3;

/// What happened to the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Disturbance {
    /// It is gone, or the store shows something that may be older than this node's last write.
    Loss,
    /// Another program wrote it.
    Write,
}

#[derive(Debug)]
pub(crate) struct Contention {
    /// The number of answers in a row.
    answers: u32,
    /// Whether one of them answered a [`Disturbance::Write`].
    is_written: bool,
    /// What has yet to be answered.
    open: Option<Disturbance>,
    /// The earliest time of the next answer.
    not_before: BootTime,
    /// Since when the lease has been undisturbed.
    stands: Option<BootTime>,
    backoff: Backoff,
}

impl Contention {
    pub(crate) fn new(jitter: Jitter) -> Self {
        let backoff = Backoff::up_to(LONGEST, jitter);
        Self { answers: 0, is_written: false, open: None, not_before: BootTime::default(), stands: None, backoff }
    }

    /// Notes that the record changed without this node. Returns when to answer.
    pub(crate) fn raise(&mut self, disturbance: Disturbance, now: BootTime) -> BootTime {
        self.calm(now);
        (self.open, self.stands) = (self.open.max(Some(disturbance)), None);
        self.not_before.max(now)
    }

    /// Notes that no other program changed the record after all. Returns whether an answer was due.
    pub(crate) fn withdraw(&mut self) -> bool {
        self.open.take().is_some()
    }

    /// Notes that a call begins, which is the answer if one is due.
    pub(crate) fn call(&mut self, now: BootTime) {
        if let Some(disturbance) = self.open.take() {
            self.answers = self.answers.saturating_add(1);
            self.is_written |= disturbance == Disturbance::Write;
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
            (self.answers, self.is_written) = (0, false);
            self.backoff.reset();
        }
    }

    /// When [`calm`](Self::calm) will reset the count.
    pub(crate) fn calms(&self) -> Option<BootTime> {
        self.stands.filter(|_| self.answers > 0).map(|since| since.after(CALM))
    }

    /// The state for the status, with `due` as the time of the next call. `None` unless another program is the cause.
    pub(crate) fn show(&self, due: Option<BootTime>) -> Option<Contended> {
        let is_contended = self.answers > 0 && self.is_written || self.answers >= LOSSES_BY_ANOTHER;
        is_contended.then(|| Contended { times: self.answers, next: due.filter(|_| self.open.is_some()) })
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
            let due = contention.raise(Disturbance::Write, now);
            let waited = due.since(now).as_millis();
            assert!(waited >= want * 9 / 10 && waited <= want * 11 / 10, "{waited} is not about {want}");
            assert_eq!(contention.raise(Disturbance::Loss, due), due, "what comes before the answer changes nothing");
            contention.call(due);
            contention.stand(due);
            now = due;
        }
        assert_eq!(contention.show(None), Some(Contended { times: 7, next: None }));
        let calm = now.after(CALM);
        assert_eq!(contention.calms(), Some(calm));
        contention.calm(calm);
        assert_eq!((contention.show(None), contention.calms()), (None, None));
        assert_eq!(contention.raise(Disturbance::Loss, calm), calm);
    }

    #[test]
    fn what_was_nobody_is_not_counted() {
        let mut contention = Contention::new(Jitter::seeded(3));
        contention.raise(Disturbance::Write, at(1));
        assert!(contention.withdraw() && !contention.withdraw());
        contention.call(at(1));
        assert_eq!((contention.show(Some(at(1))), contention.raise(Disturbance::Write, at(1))), (None, at(1)));
    }

    #[test]
    fn a_single_loss_is_no_contention_and_several_in_a_row_are() {
        let mut contention = Contention::new(Jitter::seeded(3));
        let mut now = at(100);
        for answers in 1..=LOSSES_BY_ANOTHER {
            now = contention.raise(Disturbance::Loss, now);
            contention.call(now);
            contention.stand(now);
            assert_eq!(contention.show(None).is_some(), answers == LOSSES_BY_ANOTHER, "{answers}");
        }
    }
}
