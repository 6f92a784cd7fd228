//! When the store is asked to list everything again, because records were dropped and there is room for them now.

use std::time::Duration;

use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;

/// The longest pause between two such lists.
const LONGEST: Duration = Duration::from_secs(60);

/// Requests one list at a time, with growing pauses while lists leave room and still drop records.
#[derive(Debug)]
pub(super) struct Relist {
    /// A list was requested and has not arrived.
    is_under_way: bool,
    not_before: BootTime,
    backoff: Backoff,
}

impl Relist {
    pub(super) fn new(jitter: Jitter) -> Self {
        Self { is_under_way: false, not_before: BootTime::default(), backoff: Backoff::up_to(LONGEST, jitter) }
    }

    /// When to request a list, if there is room.
    pub(super) fn due(&self, has_room: bool) -> Option<BootTime> {
        (has_room && !self.is_under_way).then_some(self.not_before)
    }

    /// Whether to request a list now, if there is room. Returns true once for each list.
    pub(super) fn take(&mut self, now: BootTime, has_room: bool) -> bool {
        let is_due = self.due(has_room).is_some_and(|due| due <= now);
        if is_due {
            self.is_under_way = true;
            self.not_before = now.after(self.backoff.wait());
        }
        is_due
    }

    /// Notes that the store listed everything. If that left no room, the pauses start over.
    pub(super) fn listed(&mut self, has_room: bool) {
        self.is_under_way = false;
        if !has_room {
            self.backoff.reset();
        }
    }
}
