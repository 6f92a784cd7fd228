//! The state machine of the watch, without I/O: what to do next, and from which revision.

use std::time::Duration;

use flannel_core::backoff::Backoff;
use flannel_core::lease::LeaseEvent;

use crate::connect::Header;

/// The next action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// List everything, then call [`ListWatch::listed`].
    List,
    /// Read the header of the store through its majority, then call [`ListWatch::probed`].
    Probe,
    /// Open a watch from this revision on, then call [`ListWatch::opened`].
    Open(i64),
    /// Read the next message of the watch, then call [`ListWatch::message`].
    Read,
}

/// One message of a watch.
#[derive(Debug, Default)]
pub(crate) struct Message {
    /// The state of the store.
    pub(crate) header: Header,
    /// Whether the watch is established.
    pub(crate) is_created: bool,
    /// Whether the requested revision is compacted.
    pub(crate) is_compacted: bool,
    /// Set if the server ends the watch, with the reason.
    pub(crate) cancelled: Option<String>,
    /// The changes, each with its revision.
    pub(crate) changes: Vec<(i64, LeaseEvent)>,
}

/// The server ended the watch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cancelled(pub(crate) String);

/// The state of a watch.
#[derive(Debug)]
pub(crate) struct ListWatch {
    step: Step,
    /// The state of the store that was last read through its majority; `None` until a first listing.
    store: Option<Header>,
    /// The revision at which the next watch begins.
    resume: i64,
    /// Whether no change has followed the last listing.
    is_fresh: bool,
    /// Whether an error was reported, and nothing since.
    is_troubled: bool,
    backoff: Backoff,
}

impl ListWatch {
    pub(crate) fn new() -> Self {
        Self {
            step: Step::List,
            store: None,
            resume: 0,
            is_fresh: false,
            is_troubled: false,
            backoff: Backoff::default(),
        }
    }

    pub(crate) fn step(&self) -> Step {
        self.step
    }

    /// Records that everything was listed and is reported as a [`LeaseEvent::Reset`].
    pub(crate) fn listed(&mut self, header: Header) {
        self.store = Some(header);
        self.resume = header.revision.saturating_add(1);
        self.is_fresh = true;
        self.is_troubled = false;
        self.step = Step::Open(self.resume);
    }

    /// Records the state of the store on a new connection. If it is behind what was seen, the history is another one:
    /// the store was restored from a backup.
    pub(crate) fn probed(&mut self, header: Header) {
        if self.continues(header) {
            self.store = Some(header);
            self.step = Step::Open(self.resume);
        } else {
            self.step = Step::List;
        }
    }

    /// Whether a state of the store follows all that was seen, in the same history.
    fn continues(&self, header: Header) -> bool {
        self.store.is_some_and(|store| {
            header.cluster == store.cluster
                && header.term >= store.term
                && header.revision >= store.revision
                && header.revision.saturating_add(1) >= self.resume
        })
    }

    /// Records that the request for a watch was sent.
    pub(crate) fn opened(&mut self) {
        self.step = Step::Read;
    }

    /// Handles a message and returns its events to be reported.
    ///
    /// The next watch begins at the revision of the last change, not after it, because a large transaction arrives in
    /// several messages. A repeated change does no harm.
    pub(crate) fn message(&mut self, message: Message) -> Result<Vec<LeaseEvent>, Cancelled> {
        if message.is_compacted {
            self.step = Step::List;
            // Twice in a row without a change in between: compaction is faster than listing. Back off instead of
            // looping.
            return if self.is_fresh { Err(Cancelled(COMPACTED.to_owned())) } else { Ok(Vec::new()) };
        }
        if let Some(reason) = message.cancelled {
            return Err(Cancelled(if reason.is_empty() { "the watch was cancelled".to_owned() } else { reason }));
        }
        if message.is_created {
            // The client reconnects automatically, so the store may have been restored between two steps, or the member
            // is only behind. A watch that begins at a future revision would be silent until then, so the majority is
            // asked.
            if !self.continues(message.header) {
                return Err(Cancelled(BEHIND.to_owned()));
            }
            let resumed = std::mem::take(&mut self.is_troubled).then_some(LeaseEvent::Resumed);
            return Ok(resumed.into_iter().collect());
        }
        // Not earlier: an established watch may repeatedly fail at its first message.
        self.backoff.reset();
        self.is_fresh = false;
        if message.changes.is_empty() {
            // A progress notice: all changes up to here were sent.
            self.resume = self.resume.max(message.header.revision.saturating_add(1));
        }
        let mut events = Vec::with_capacity(message.changes.len());
        for (revision, event) in message.changes {
            self.resume = self.resume.max(revision);
            events.push(event);
        }
        Ok(events)
    }

    /// Records that the next message is too large to read, and would be so again. A listing follows, because it can
    /// leave out large values.
    pub(crate) fn unreadable(&mut self) {
        self.step = Step::List;
    }

    /// Records a failed step. Returns how long to wait before the next.
    ///
    /// `lived`: how long the watch that failed was open, if one was.
    pub(crate) fn failed(&mut self, lived: Option<Duration>) -> Duration {
        if lived.is_some_and(|lived| lived >= LASTING) {
            self.backoff.reset();
        }
        self.is_troubled = true;
        self.step = match (self.step, self.store) {
            (Step::List, _) | (_, None) => Step::List,
            (Step::Probe | Step::Open(_) | Step::Read, Some(_)) => Step::Probe,
        };
        self.backoff.wait()
    }
}

/// A watch that was open for this long, or delivered a message, resets the back-off.
const LASTING: Duration = Duration::from_secs(60);
const BEHIND: &str = "the member is behind what was read before, or was restored from a backup";
const COMPACTED: &str = "etcd compacts faster than the records can be listed";

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::lease::LeaseKey;

    fn header(revision: i64) -> Header {
        Header { cluster: 1, term: 2, revision }
    }

    fn watching(revision: i64) -> ListWatch {
        let mut list_watch = ListWatch::new();
        assert_eq!(list_watch.step(), Step::List);
        list_watch.listed(header(revision));
        assert_eq!(list_watch.step(), Step::Open(revision + 1));
        list_watch.opened();
        let created = Message { is_created: true, header: header(revision), ..Message::default() };
        assert_eq!(list_watch.message(created), Ok(Vec::new()));
        assert_eq!(list_watch.step(), Step::Read);
        list_watch
    }

    fn change(revision: i64) -> Message {
        let event = LeaseEvent::Remove(LeaseKey::new("10.5.1.0-24"));
        Message { header: header(revision + 5), changes: vec![(revision, event)], ..Message::default() }
    }

    #[test]
    fn a_message_that_cannot_be_read_is_not_asked_for_again() {
        let mut list_watch = watching(10);
        list_watch.message(change(17)).unwrap();
        list_watch.unreadable();
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::List);
        list_watch.listed(header(40));
        assert_eq!(list_watch.step(), Step::Open(41));
    }

    #[test]
    fn a_cut_watch_resumes_at_the_last_change() {
        let mut list_watch = watching(10);
        assert_eq!(list_watch.message(change(17)).unwrap().len(), 1);
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Probe);
        list_watch.probed(header(30));
        assert_eq!(list_watch.step(), Step::Open(17));
    }

    #[test]
    fn a_watch_that_missed_nothing_says_once_that_it_goes_on() {
        let mut list_watch = watching(10);
        list_watch.failed(None);
        list_watch.probed(header(10));
        list_watch.opened();
        let created = || Message { is_created: true, header: header(10), ..Message::default() };
        assert_eq!(list_watch.message(created()), Ok(vec![LeaseEvent::Resumed]));
        assert_eq!(list_watch.message(created()), Ok(Vec::new()));
        // A listing makes it redundant.
        list_watch.failed(None);
        list_watch.listed(header(12));
        list_watch.opened();
        assert_eq!(list_watch.message(Message { header: header(12), ..created() }), Ok(Vec::new()));
    }

    #[test]
    fn a_progress_notice_moves_the_point_to_resume_from() {
        let mut list_watch = watching(10);
        list_watch.message(Message { header: header(40), ..Message::default() }).unwrap();
        list_watch.failed(None);
        list_watch.probed(header(41));
        assert_eq!(list_watch.step(), Step::Open(41));
    }

    #[test]
    fn a_created_message_does_not_move_it() {
        let mut list_watch = watching(10);
        list_watch.message(Message { is_created: true, header: header(40), ..Message::default() }).unwrap();
        list_watch.failed(None);
        list_watch.probed(header(41));
        assert_eq!(list_watch.step(), Step::Open(11));
    }

    #[test]
    fn a_compacted_watch_lists_again_at_once() {
        let mut list_watch = watching(10);
        list_watch.message(change(17)).unwrap();
        let compacted = || Message { is_compacted: true, cancelled: Some(String::new()), ..Message::default() };
        assert_eq!(list_watch.message(compacted()), Ok(Vec::new()));
        assert_eq!(list_watch.step(), Step::List);
        list_watch.listed(header(50));
        list_watch.opened();
        assert!(list_watch.message(compacted()).is_err());
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::List);
    }

    #[test]
    fn another_history_is_listed_anew() {
        for other in [header(9), Header { cluster: 9, ..header(40) }, Header { term: 1, ..header(40) }] {
            let mut list_watch = watching(10);
            list_watch.failed(None);
            list_watch.probed(other);
            assert_eq!(list_watch.step(), Step::List, "{other:?}");
        }
    }

    #[test]
    fn a_member_that_only_lags_costs_no_listing() {
        // A follower may be behind; the probe reads through the majority and never is.
        let mut list_watch = watching(10);
        list_watch.failed(None);
        list_watch.probed(header(10));
        assert_eq!(list_watch.step(), Step::Open(11));
    }

    #[test]
    fn a_watch_that_would_begin_in_the_future_is_given_up_and_the_majority_asked() {
        let mut list_watch = ListWatch::new();
        list_watch.listed(header(10));
        list_watch.opened();
        let behind = Message { is_created: true, header: header(9), ..Message::default() };
        assert!(list_watch.message(behind).is_err());
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Probe);
        list_watch.probed(header(9));
        assert_eq!(list_watch.step(), Step::List);
    }

    fn assert_around(wait: Duration, expected: f64) {
        let wait = wait.as_secs_f64();
        assert!((expected * 0.9..=expected * 1.1).contains(&wait), "{wait} {expected}");
    }

    /// Opens a watch after a failure. It is established, but delivers nothing.
    fn establish(list_watch: &mut ListWatch) {
        match list_watch.step() {
            Step::List => list_watch.listed(header(10)),
            _ => list_watch.probed(header(10)),
        }
        list_watch.opened();
        list_watch.message(Message { is_created: true, header: header(10), ..Message::default() }).unwrap();
    }

    #[test]
    fn failures_wait_1_2_4_and_then_4_and_a_half_seconds_until_a_watch_delivers_or_lasts() {
        let mut list_watch = watching(10);
        for expected in [1.0, 2.0, 4.0, 4.5, 4.5] {
            assert_around(list_watch.failed(None), expected);
            assert_eq!(list_watch.step(), Step::Probe);
        }
        establish(&mut list_watch);
        list_watch.message(change(17)).unwrap();
        assert_around(list_watch.failed(None), 1.0);
        assert_around(list_watch.failed(Some(LASTING / 2)), 2.0);
        assert_around(list_watch.failed(Some(LASTING)), 1.0);
    }

    #[test]
    fn messages_that_cannot_be_read_one_after_the_other_are_listed_around_ever_more_seldom() {
        let mut list_watch = watching(10);
        for expected in [1.0, 2.0, 4.0, 4.5, 4.5] {
            list_watch.unreadable();
            assert_around(list_watch.failed(Some(Duration::from_millis(5))), expected);
            assert_eq!(list_watch.step(), Step::List);
            establish(&mut list_watch);
        }
    }

    #[test]
    fn a_first_listing_that_fails_is_tried_again() {
        let mut list_watch = ListWatch::new();
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::List);
    }

    #[test]
    fn a_cancelled_watch_says_why() {
        let mut list_watch = watching(10);
        let message = Message { cancelled: Some("no leader".to_owned()), ..Message::default() };
        assert_eq!(list_watch.message(message), Err(Cancelled("no leader".to_owned())));
    }
}
