//! The state machine of the watch, without I/O: what to do next, and from which version.

use std::cmp::Ordering;
use std::time::Duration;

use flannel_core::backoff::{Backoff, Jitter};

/// The next action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Read the present version of the store behind the server, then call [`ListWatch::probed`].
    Probe,
    /// List everything, not older than this version, then call [`ListWatch::listed`]. The server answers from its
    /// cache; a cache that is behind waits until it has caught up.
    List(String),
    /// Ask whether this change is the last of its Node in the server's history at this version, which was seen, then
    /// call [`ListWatch::checked`].
    Check(Mark, String),
    /// Open a watch from this version on, then call [`ListWatch::opened`].
    Open(String),
    /// Read what the watch sends: [`ListWatch::seen`], [`ListWatch::silent`], [`ListWatch::ended`] or
    /// [`ListWatch::gone`].
    Read,
}

/// A change that was seen: this Node was changed at this version. It shows whether a server still has the same history.
/// After a restore from a backup, versions continue from an older one, and each belongs to another change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Mark {
    pub(crate) node: String,
    pub(crate) version: String,
}

/// Whether a version came before another in one history. False for versions that are not numbers.
pub(crate) fn is_before(one: &str, other: &str) -> bool {
    let number = |version: &str| version.parse::<u64>().ok();
    number(one).zip(number(other)).is_some_and(|(one, other)| one < other)
}

/// The state of a watch.
#[derive(Debug)]
pub(crate) struct ListWatch {
    step: Step,
    /// The last version that was seen; `None` if a list is needed.
    version: Option<String>,
    /// The last change that was seen.
    mark: Option<Mark>,
    /// Whether no event has followed the last list.
    is_fresh: bool,
    /// Whether the last report was an error.
    is_troubled: bool,
    /// How many checks in a row the server refused.
    refusals: u32,
    /// Whether the version is requested only to find out whether the server refuses other requests too.
    is_in_doubt: bool,
    backoff: Backoff,
}

impl ListWatch {
    pub(crate) fn new(jitter: Jitter) -> Self {
        let backoff = Backoff::up_to(LONGEST, jitter);
        Self {
            step: Step::Probe,
            version: None,
            mark: None,
            is_fresh: false,
            is_troubled: false,
            refusals: 0,
            is_in_doubt: false,
            backoff,
        }
    }

    pub(crate) fn step(&self) -> Step {
        self.step.clone()
    }

    /// Records that everything was listed as of this version, to be reported. `mark` is the last change in the list.
    pub(crate) fn listed(&mut self, version: String, mark: Option<Mark>) {
        self.step = Step::Open(version.clone());
        (self.version, self.mark) = (Some(version), mark);
        (self.is_fresh, self.is_troubled) = (true, false);
    }

    /// Records the store's present version.
    pub(crate) fn probed(&mut self, version: String) {
        if std::mem::take(&mut self.is_in_doubt) {
            self.check();
        } else {
            self.step = Step::List(version);
        }
    }

    /// Records whether the server has the change in question. If it has, the watch continues where it was. If not, its
    /// store was restored from a backup, or the change is too old to check, and everything is listed.
    pub(crate) fn checked(&mut self, has_it: bool) {
        self.refusals = 0;
        if has_it {
            self.reopen();
        } else {
            self.list_again();
        }
    }

    /// Records that the server accepted the watch. Returns whether to report that it continues after an error.
    pub(crate) fn opened(&mut self) -> bool {
        self.step = Step::Read;
        std::mem::take(&mut self.is_troubled)
    }

    /// Records an event of this version, which may be reported, with the changed Node if it is a change.
    ///
    /// # Errors
    /// The version is older than what was seen: the server has another history, and everything is listed. Contains the
    /// wait before that, as with [`gone`](Self::gone).
    pub(crate) fn seen(&mut self, version: &str, changed: Option<&str>) -> Result<(), Option<Duration>> {
        if self.version.as_ref().is_some_and(|seen| is_before(version, seen)) {
            return Err(self.gone());
        }
        // Most events are heartbeats, for which nothing is allocated.
        version.clone_into(self.version.get_or_insert_default());
        if let Some(node) = changed {
            let mark = self.mark.get_or_insert_default();
            node.clone_into(&mut mark.node);
            version.clone_into(&mut mark.version);
        }
        self.is_fresh = false;
        self.backoff.reset();
        Ok(())
    }

    /// Records a deletion of this version. A deleted Node cannot be checked: until the next change there is no way to
    /// ask whether a server still has this history, so an error before that is followed by a list.
    ///
    /// # Errors
    /// As [`seen`](Self::seen).
    pub(crate) fn deleted(&mut self, version: &str) -> Result<(), Option<Duration>> {
        self.seen(version, None)?;
        self.mark = None;
        Ok(())
    }

    /// Records a silent watch: either nothing changes, or the connection is dead. A new watch shows which. A server
    /// that was away may have come back with an older store.
    pub(crate) fn silent(&mut self) {
        self.check();
    }

    /// Records that the server ended the watch in order after the time `lived`; `asked` was requested. If it ended
    /// earlier, the server is going down. Returns how long to wait before the next step, if the watch ended at once.
    pub(crate) fn ended(&mut self, lived: Duration, asked: Duration) -> Option<Duration> {
        if lived >= asked {
            self.reopen();
        } else {
            self.check();
        }
        (lived < SHORT).then(|| self.backoff.wait())
    }

    /// Records that the requested version is gone. Returns how long to wait before everything is listed again, if that
    /// happens repeatedly.
    pub(crate) fn gone(&mut self) -> Option<Duration> {
        self.list_again();
        std::mem::replace(&mut self.is_fresh, true).then(|| self.backoff.wait())
    }

    /// Records a failed step. Returns how long to wait before the next.
    ///
    /// `lived`: how long the watch that failed was open, if one was.
    pub(crate) fn failed(&mut self, lived: Option<Duration>) -> Duration {
        if lived.is_some_and(|lived| lived >= LASTING) {
            self.backoff.reset();
        }
        self.is_troubled = true;
        self.refusals = 0;
        match self.step {
            // The server is in trouble, and says nothing about its history.
            Step::Probe if std::mem::take(&mut self.is_in_doubt) => self.check(),
            // The known state is discarded when a list begins.
            Step::Probe | Step::List(_) => self.list_again(),
            Step::Check(..) | Step::Open(_) | Step::Read => self.check(),
        }
        self.backoff.wait()
    }

    /// Records a step that the server refused. As [`failed`](Self::failed), except for a check that is refused again and
    /// again: it may mean, in words that are not known, that the server has another history. Then the version is
    /// requested, and if the server answers that and refuses the check once more, everything is listed.
    pub(crate) fn refused(&mut self, lived: Option<Duration>) -> Duration {
        let refusals = match self.step {
            Step::Check(..) => self.refusals + 1,
            Step::Probe | Step::List(_) | Step::Open(_) | Step::Read => 0,
        };
        let wait = self.failed(lived);
        match refusals.cmp(&MOST_REFUSALS) {
            Ordering::Less => self.refusals = refusals,
            Ordering::Equal => (self.refusals, self.is_in_doubt, self.step) = (refusals, true, Step::Probe),
            Ordering::Greater => self.list_again(),
        }
        wait
    }

    /// Reopens the watch where it was.
    fn reopen(&mut self) {
        match &self.version {
            Some(seen) => self.step = Step::Open(seen.clone()),
            None => self.list_again(),
        }
    }

    /// Reopens the watch once the server has shown that it has the same history.
    fn check(&mut self) {
        match (&self.mark, &self.version) {
            (Some(mark), Some(version)) => self.step = Step::Check(mark.clone(), version.clone()),
            _ => self.list_again(),
        }
    }

    /// Lists everything again.
    fn list_again(&mut self) {
        (self.version, self.mark, self.is_in_doubt) = (None, None, false);
        self.step = Step::Probe;
    }
}

/// The longest wait between two tries. With an unavailable server there are at most 15 tries in a minute, and its
/// return is detected within 7 s.
const LONGEST: Duration = Duration::from_millis(5500);
/// A watch that was open for this long resets the back-off.
const LASTING: Duration = Duration::from_secs(60);
/// A watch that ends in order before this is not reopened at once.
const SHORT: Duration = Duration::from_secs(1);
/// After so many refusals of a check in a row, the server is asked whether it answers at all. A server that is only in
/// trouble is not asked for everything.
const MOST_REFUSALS: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Duration = Duration::from_secs(600);

    fn mark(version: &str) -> Mark {
        Mark { node: "a".to_owned(), version: version.to_owned() }
    }

    fn list(version: &str) -> Step {
        Step::List(version.to_owned())
    }

    fn open_from(version: &str) -> Step {
        Step::Open(version.to_owned())
    }

    /// Returns a watch of a list whose newest change has version 5.
    fn watching(version: &str) -> ListWatch {
        let mut list_watch = ListWatch::new(Jitter::seeded(1));
        assert_eq!(list_watch.step(), Step::Probe);
        list_watch.probed(version.to_owned());
        assert_eq!(list_watch.step(), list(version));
        list_watch.listed(version.to_owned(), Some(mark("5")));
        assert_eq!(list_watch.step(), open_from(version));
        assert!(!list_watch.opened());
        assert_eq!(list_watch.step(), Step::Read);
        list_watch
    }

    /// docs/faults.md, K3: each step is one request.
    #[test]
    fn a_server_that_is_away_is_asked_at_most_fifteen_times_a_minute_and_at_least_every_seven_seconds() {
        for (seed, is_held) in (0..500).map(|seed| (seed, seed % 2 == 0)) {
            let mut list_watch = if is_held { watching("10") } else { ListWatch::new(Jitter::seeded(seed)) };
            list_watch.backoff = Backoff::up_to(LONGEST, Jitter::seeded(seed));
            let (mut passed, mut tries) = (Duration::ZERO, 0);
            while passed < Duration::from_secs(60) {
                tries += 1;
                let wait = list_watch.failed(None);
                assert!(wait <= Duration::from_secs(7), "{wait:?}");
                passed += wait;
            }
            assert!(tries <= 15, "seed {seed}: {tries}");
        }
    }

    #[test]
    fn a_watch_that_failed_goes_on_where_it_was_and_says_so_once() {
        let mut list_watch = watching("10");
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Check(mark("5"), "10".to_owned()));
        list_watch.checked(true);
        assert_eq!(list_watch.step(), open_from("10"));
        assert!(list_watch.opened());
        list_watch.seen("17", Some("a")).unwrap();
        list_watch.seen("19", None).unwrap();
        list_watch.silent();
        assert_eq!(list_watch.step(), Step::Check(mark("17"), "19".to_owned()));
        list_watch.checked(true);
        assert_eq!(list_watch.step(), open_from("19"));
        assert!(!list_watch.opened());
        list_watch.failed(None);
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Check(mark("17"), "19".to_owned()));
    }

    #[test]
    fn a_server_with_an_older_store_is_listed_anew() {
        let mut list_watch = watching("20");
        list_watch.failed(None);
        list_watch.checked(false);
        assert_eq!(list_watch.step(), Step::Probe);
        list_watch.probed("19".to_owned());
        assert_eq!(list_watch.step(), list("19"));
        let mut list_watch = watching("20");
        list_watch.seen("21", Some("a")).unwrap();
        assert_eq!(list_watch.seen("3", Some("a")), Err(None), "not even one event of another history is reported");
        list_watch.probed("4".to_owned());
        assert_eq!(list_watch.step(), list("4"));
    }

    /// docs/faults.md, K3.
    #[test]
    fn trouble_right_after_a_deletion_is_followed_by_a_list() {
        let mut list_watch = watching("20");
        list_watch.deleted("21").unwrap();
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Probe);
        let mut list_watch = watching("20");
        list_watch.deleted("21").unwrap();
        list_watch.seen("22", Some("b")).unwrap();
        list_watch.failed(None);
        assert_eq!(
            list_watch.step(),
            Step::Check(Mark { node: "b".to_owned(), version: "22".to_owned() }, "22".to_owned())
        );
    }

    /// Returns a watch whose check was refused so often that the version is requested.
    fn in_doubt() -> ListWatch {
        let mut list_watch = watching("10");
        list_watch.refused(None);
        for _ in 0..MOST_REFUSALS {
            assert_eq!(list_watch.step(), check_of("10"), "a refused watch is not a refused check");
            list_watch.refused(None);
        }
        assert_eq!(list_watch.step(), Step::Probe);
        list_watch
    }

    fn check_of(version: &str) -> Step {
        Step::Check(mark("5"), version.to_owned())
    }

    #[test]
    fn a_check_that_a_server_refuses_which_answers_otherwise_is_followed_by_a_list() {
        let mut list_watch = in_doubt();
        list_watch.probed("7".to_owned());
        assert_eq!(list_watch.step(), check_of("10"));
        list_watch.refused(None);
        assert_eq!(list_watch.step(), Step::Probe);
        list_watch.probed("7".to_owned());
        assert_eq!(list_watch.step(), list("7"));
    }

    #[test]
    fn a_server_that_refuses_everything_for_a_while_is_not_asked_for_a_list() {
        let refused: [fn(&mut ListWatch) -> Duration; 2] = [|it| it.refused(None), |it| it.failed(None)];
        for refused in refused {
            let mut list_watch = in_doubt();
            refused(&mut list_watch);
            for _ in 1..MOST_REFUSALS {
                assert_eq!(list_watch.step(), check_of("10"), "counted from the first again");
                list_watch.refused(None);
            }
            assert_eq!(list_watch.step(), check_of("10"));
            list_watch.checked(true);
            assert_eq!(list_watch.step(), open_from("10"));
        }
    }

    #[test]
    fn a_server_that_ends_a_watch_before_its_time_is_checked() {
        let mut list_watch = watching("10");
        assert_eq!(list_watch.ended(ASKED, ASKED), None);
        assert_eq!(list_watch.step(), open_from("10"));
        list_watch.opened();
        assert_eq!(list_watch.ended(ASKED / 2, ASKED), None);
        assert_eq!(list_watch.step(), Step::Check(mark("5"), "10".to_owned()));
    }

    #[test]
    fn what_is_gone_is_listed_at_once_but_not_in_a_loop() {
        let mut list_watch = watching("10");
        list_watch.seen("11", None).unwrap();
        assert_eq!(list_watch.gone(), None);
        list_watch.probed("30".to_owned());
        assert_eq!(list_watch.step(), list("30"));
        list_watch.listed("30".to_owned(), None);
        list_watch.opened();
        assert!(list_watch.gone().is_some());
    }

    #[test]
    fn a_list_that_failed_and_one_without_nodes_are_followed_by_a_list() {
        let mut list_watch = watching("10");
        list_watch.gone();
        list_watch.probed("12".to_owned());
        list_watch.failed(None);
        list_watch.probed("12".to_owned());
        assert_eq!(list_watch.step(), list("12"));
        list_watch.listed("12".to_owned(), None);
        list_watch.opened();
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Probe);
    }

    #[test]
    fn versions_that_are_no_numbers_are_taken_as_they_come() {
        let mut list_watch = watching("a");
        list_watch.seen("b", Some("a")).unwrap();
        list_watch.failed(None);
        assert_eq!(list_watch.step(), Step::Check(mark("b"), "b".to_owned()));
        assert!(!is_before("a", "b") && !is_before("b", "a") && is_before("9", "10"));
    }

    #[test]
    fn waits_grow_until_a_watch_brought_something() {
        let mut list_watch = watching("10");
        let waits: Vec<_> = (0..4).map(|_| list_watch.failed(None)).collect();
        assert!(waits.is_sorted() && waits[3] > 3 * waits[0], "{waits:?}");
        list_watch.checked(true);
        list_watch.opened();
        assert_eq!(list_watch.ended(SHORT, ASKED), None);
        assert!(list_watch.ended(Duration::ZERO, ASKED).is_some(), "a watch that ends at once");
        list_watch.checked(true);
        list_watch.opened();
        list_watch.seen("11", None).unwrap();
        assert!(list_watch.failed(None) < waits[1]);
    }
}
