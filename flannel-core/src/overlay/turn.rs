//! State that outlives the runs of an overlay, and the lock that allows one run at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{broadcast, mpsc, watch};

use crate::agent::{End, Event, Phase, Status, Wait};
use crate::clock::Clock;
use crate::kernel::OverlayName;
use crate::overlay::event_log::EventLog;
use crate::overlay::handle::{EVENTS, Question};
use crate::overlay::host_files::HostFiles;
use crate::overlay::published::Published;
use crate::uplink::Select;

/// State shared by the handles and runs of an overlay.
pub(crate) struct Shared {
    pub(crate) name: OverlayName,
    pub(crate) status: Published,
    pub(crate) events: broadcast::Sender<Event>,
    /// How the uplink is chosen from now on.
    pub(crate) uplink: watch::Sender<Select>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) journal: Arc<Mutex<EventLog>>,
    pub(crate) files: HostFiles,
    /// The channel for questions, while an agent answers them.
    questions: Mutex<Option<mpsc::Sender<Question>>>,
    /// Whether a run is going on. Locked while a turn begins or ends, so that the two do not overlap.
    taken: Mutex<bool>,
}

impl Shared {
    pub(crate) fn new(name: OverlayName, status: Status, uplink: Select, clock: Arc<dyn Clock>) -> Self {
        Self {
            name,
            status: Published::new(status),
            events: broadcast::Sender::new(EVENTS),
            uplink: watch::Sender::new(uplink),
            clock,
            journal: Arc::default(),
            files: HostFiles::default(),
            questions: Mutex::default(),
            taken: Mutex::default(),
        }
    }

    /// Begins a turn with a fresh status. Returns `None`, and changes nothing, while another turn goes on.
    pub(crate) fn begin(self: &Arc<Self>, fresh: Status) -> Option<Turn> {
        let mut taken = lock(&self.taken);
        if std::mem::replace(&mut *taken, true) {
            return None;
        }
        self.status.set(Status { starting: Some(Wait::Store { error: None }), ..fresh });
        Some(Turn { shared: Arc::clone(self), end: End::Dropped })
    }

    /// Returns the channel for questions, while an agent answers them.
    pub(crate) fn questions(&self) -> Option<mpsc::Sender<Question>> {
        lock(&self.questions).clone()
    }

    /// Sets or removes the channel for questions.
    pub(crate) fn answer_at(&self, questions: Option<mpsc::Sender<Question>>) {
        *lock(&self.questions) = questions;
    }
}

/// The turn of a run. Its end is published on drop, so that it is published in every case.
pub(crate) struct Turn {
    shared: Arc<Shared>,
    end: End,
}

impl Turn {
    pub(crate) fn end(mut self, end: End) {
        self.end = end;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.shared.answer_at(None);
        let end = std::mem::replace(&mut self.end, End::Dropped);
        let event = Event::Stopped(end.clone());
        lock(&self.shared.journal).tell(self.shared.clock.now(), &event);
        let mut taken = lock(&self.shared.taken);
        self.shared.status.send_modify(|status| {
            (status.phase, status.starting) = (Phase::Stopped, Some(Wait::Run));
            status.ended = Some(end);
        });
        // Sending fails without subscribers: not an error.
        let _ = self.shared.events.send(event);
        *taken = false;
    }
}

/// A panic of a lock's holder never leaves the value half-written, so poisoning is ignored.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    #[test]
    fn a_turn_is_one_at_a_time_and_however_it_ends_the_next_begins_afresh() {
        let shared = Arc::new(Shared::new(
            OverlayName::default(),
            Status::default(),
            Select::default(),
            Arc::new(SystemClock::default()),
        ));
        let mut events = shared.events.subscribe();
        let status = || Status::clone(&shared.status.borrow());
        let begin = || shared.begin(Status { audits: 7, ..Status::default() });
        let first = begin().unwrap();
        shared.status.send_modify(|status| status.audits = 8);
        assert!(begin().is_none());
        assert_eq!((status().audits, status().ended), (8, None), "the turn that goes on is not touched");
        drop(first);
        assert_eq!((status().phase, status().ended, status().audits), (Phase::Stopped, Some(End::Dropped), 8));
        let second = begin().unwrap();
        assert_eq!((status().phase, status().ended, status().audits), (Phase::Starting, None, 7));
        second.end(End::Stopped);
        assert_eq!(status().ended, Some(End::Stopped));
        let told: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        assert_eq!(told, [Event::Stopped(End::Dropped), Event::Stopped(End::Stopped)]);
    }
}
