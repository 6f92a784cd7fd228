//! Following the Nodes, without I/O: what to do next, and from where.

use std::time::Duration;

use flannel_core::backoff::Backoff;

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask which version the store behind the server is at, then call [`Machine::probed`].
    Probe,
    /// List everything, not older than this version, then call [`Machine::listed`]. The server's cache answers this: one
    /// that lies behind waits until it has caught up.
    List(String),
    /// Open a watch from this version on, then call [`Machine::opened`].
    Open(String),
    /// Read what the watch sends: [`Machine::seen`], [`Machine::silent`], [`Machine::ended`] or [`Machine::gone`].
    Read,
}

/// A version of the store behind the server. Versions of one store grow.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Version(String);

impl Version {
    /// Whether this came before `other`. Nothing is known of versions that are no numbers.
    fn is_before(&self, other: &Self) -> bool {
        let number = |version: &Self| version.0.parse::<u64>().ok();
        number(self).zip(number(other)).is_some_and(|(this, other)| this < other)
    }
}

/// Where a watch stands.
#[derive(Debug)]
pub(crate) struct Machine {
    step: Step,
    /// The last version that was seen; `None`: nothing was reported yet.
    version: Option<Version>,
    /// A list that nothing came after.
    is_fresh: bool,
    /// Trouble was reported, and nothing since.
    is_troubled: bool,
    backoff: Backoff,
}

impl Machine {
    pub(crate) fn new(backoff: Backoff) -> Self {
        Self { step: Step::Probe, version: None, is_fresh: false, is_troubled: false, backoff }
    }

    pub(crate) fn step(&self) -> Step {
        self.step.clone()
    }

    /// Everything was listed, as of this version, and is to be reported.
    pub(crate) fn listed(&mut self, version: String) {
        self.step = Step::Open(version.clone());
        self.version = Some(Version(version));
        (self.is_fresh, self.is_troubled) = (true, false);
    }

    /// The store is at this version. One that lies before what was seen is another history: a backup was restored.
    pub(crate) fn probed(&mut self, version: String) {
        let now = Version(version);
        self.step = match &self.version {
            Some(seen) if !now.is_before(seen) => Step::Open(seen.0.clone()),
            _ => Step::List(now.0),
        };
    }

    /// The server has taken the watch. Returns whether to report that it goes on after trouble.
    pub(crate) fn opened(&mut self) -> bool {
        self.step = Step::Read;
        std::mem::take(&mut self.is_troubled)
    }

    /// The watch brought something of this version, which may be reported.
    ///
    /// # Errors
    /// It is older than what was seen: the server is of another history, and everything is listed. Holds how long to wait
    /// first, as with [`gone`](Self::gone).
    pub(crate) fn seen(&mut self, version: &str) -> Result<(), Option<Duration>> {
        let now = Version(version.to_owned());
        if self.version.as_ref().is_some_and(|seen| now.is_before(seen)) {
            return Err(self.gone());
        }
        self.version = Some(now);
        self.is_fresh = false;
        self.backoff.reset();
        Ok(())
    }

    /// Nothing came for a while: either nothing happens, or nothing gets here. A new watch tells.
    pub(crate) fn silent(&mut self) {
        self.reopen();
    }

    /// The server ended the watch in order. Returns how long to wait before the next step, where it ends them too soon.
    pub(crate) fn ended(&mut self, lived: Duration) -> Option<Duration> {
        self.reopen();
        (lived < SHORT).then(|| self.backoff.wait())
    }

    /// The version asked for is gone. Returns how long to wait before everything is listed again, where that happens over
    /// and over.
    pub(crate) fn gone(&mut self) -> Option<Duration> {
        self.version = None;
        self.step = Step::Probe;
        std::mem::replace(&mut self.is_fresh, true).then(|| self.backoff.wait())
    }

    /// A step failed. Returns how long to wait before the next.
    ///
    /// `lived`: how long the watch that failed was open, if one was.
    pub(crate) fn failed(&mut self, lived: Option<Duration>) -> Duration {
        if lived.is_some_and(|lived| lived >= LASTING) {
            self.backoff.reset();
        }
        self.is_troubled = true;
        if matches!(self.step, Step::List(_)) {
            // What was held is given up when a list begins.
            self.version = None;
        }
        self.step = Step::Probe;
        self.backoff.wait()
    }

    /// Opens the watch anew where it was.
    fn reopen(&mut self) {
        self.step = self.version.as_ref().map_or(Step::Probe, |seen| Step::Open(seen.0.clone()));
    }
}

/// A watch that was open for this long begins the waits between tries anew.
const LASTING: Duration = Duration::from_secs(60);
/// A watch that ends in order before this is not opened again at once.
const SHORT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::backoff::Jitter;

    fn machine() -> Machine {
        Machine::new(Backoff::new(Jitter::seeded(1)))
    }

    fn list(version: &str) -> Step {
        Step::List(version.to_owned())
    }

    fn open_from(version: &str) -> Step {
        Step::Open(version.to_owned())
    }

    fn watching(version: &str) -> Machine {
        let mut machine = machine();
        assert_eq!(machine.step(), Step::Probe);
        machine.probed(version.to_owned());
        assert_eq!(machine.step(), list(version));
        machine.listed(version.to_owned());
        assert_eq!(machine.step(), open_from(version));
        assert!(!machine.opened());
        assert_eq!(machine.step(), Step::Read);
        machine
    }

    #[test]
    fn a_watch_that_failed_goes_on_where_it_was_and_says_so_once() {
        let mut machine = watching("10");
        machine.seen("17").unwrap();
        machine.failed(None);
        assert_eq!(machine.step(), Step::Probe);
        machine.probed("18".to_owned());
        assert_eq!(machine.step(), open_from("17"));
        assert!(machine.opened());
        machine.silent();
        assert_eq!(machine.step(), open_from("17"));
        assert!(!machine.opened());
    }

    #[test]
    fn a_server_with_an_older_store_is_listed_anew() {
        let mut machine = watching("20");
        machine.failed(None);
        machine.probed("19".to_owned());
        assert_eq!(machine.step(), list("19"));
        let mut machine = watching("20");
        machine.seen("21").unwrap();
        assert_eq!(machine.seen("3"), Err(None), "not even one event of another history is reported");
        machine.probed("4".to_owned());
        assert_eq!(machine.step(), list("4"));
    }

    #[test]
    fn what_is_gone_is_listed_at_once_but_not_in_a_loop() {
        let mut machine = watching("10");
        machine.seen("11").unwrap();
        assert_eq!(machine.gone(), None);
        machine.probed("30".to_owned());
        assert_eq!(machine.step(), list("30"));
        machine.listed("30".to_owned());
        machine.opened();
        assert!(machine.gone().is_some());
    }

    #[test]
    fn a_list_that_failed_is_followed_by_a_list() {
        let mut machine = watching("10");
        machine.gone();
        machine.probed("12".to_owned());
        machine.failed(None);
        machine.probed("12".to_owned());
        assert_eq!(machine.step(), list("12"));
    }

    #[test]
    fn versions_that_are_no_numbers_are_taken_as_they_come() {
        let mut machine = watching("a");
        machine.seen("b").unwrap();
        machine.failed(None);
        machine.probed("c".to_owned());
        assert_eq!(machine.step(), open_from("b"));
    }

    #[test]
    fn waits_grow_until_a_watch_brought_something() {
        let mut machine = watching("10");
        let waits: Vec<_> = (0..4).map(|_| machine.failed(None)).collect();
        assert!(waits.is_sorted() && waits[3] > 3 * waits[0], "{waits:?}");
        machine.probed("10".to_owned());
        machine.opened();
        assert_eq!(machine.ended(SHORT), None);
        assert!(machine.ended(Duration::ZERO).is_some(), "a watch that ends at once");
        machine.opened();
        machine.seen("11").unwrap();
        assert!(machine.failed(None) < waits[1]);
    }
}
