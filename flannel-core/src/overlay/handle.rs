//! The view from outside: status, events and questions to a running agent.

use std::fmt;
use std::sync::{Arc, Weak};

use tokio::sync::{broadcast, oneshot, watch};

use crate::agent::{End, Event, Explanation, Phase, Preview, Status, Wait};
use crate::kernel::KernelError;
use crate::lease::Lease;
use crate::overlay::builder::{BuildError, check_uplink};
use crate::overlay::turn::Shared;
use crate::uplink::Select;

/// Events kept for a reader that lags; an older one is lost to it, and it is told so.
pub(crate) const EVENTS: usize = 1024;
/// Questions that may wait.
pub(crate) const QUESTIONS: usize = 16;

/// An overlay, seen from outside: valid over all of its runs. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    status: watch::Receiver<Arc<Status>>,
    shared: Weak<Shared>,
}

#[derive(Debug)]
pub(crate) enum Question {
    Plan(oneshot::Sender<Result<Preview, HandleError>>),
    Explain(String, oneshot::Sender<Option<Explanation>>),
    Peers(oneshot::Sender<Result<Vec<Arc<Lease>>, HandleError>>),
}

/// What happens, in order, in this run and those after it.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Event>);

impl Events {
    /// The next event. For a reader that is more than 1024 events behind, the oldest are lost, and
    /// [`Event::Missed`] stands for them. A run ends with [`Event::Stopped`], after which the next run's events come. `None`
    /// when no [`Overlay`](super::Overlay) is left to be run.
    ///
    /// # Cancel safety
    /// May be dropped at any await; no event is lost.
    pub async fn next(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// The run has ended: the status stays as it is until the next run, which begins with a fresh one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the agent has ended: {0}")]
pub struct Ended(
    /// How.
    pub End,
);

/// A running agent could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// It does not run yet, or starts. Ask again once [`Status::starting`] is `None`.
    #[error("the agent has not started: it waits for {}", list(.waits_for))]
    Starting {
        /// What it waits for.
        waits_for: Vec<Wait>,
    },
    /// It has ended. Ask again in the next run.
    #[error(transparent)]
    Ended(Ended),
    /// The lease store has not said yet which peers there are, so that nothing can be said of theirs. Retry once
    /// [`Status::audits`] counts; [`Status::store`] says what keeps the store.
    #[error("not synced yet: the lease store has not said which peers there are; see the status for what keeps it")]
    NotSynced,
    /// The kernel could not be read. Retry.
    #[error("reading the kernel")]
    Kernel(#[source] KernelError),
}

impl Handle {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self { status: shared.status.subscribe(), shared: Arc::downgrade(shared) }
    }

    /// The status as it is now. A value: to keep it holds up nobody.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status.borrow())
    }

    /// Waits until the status has changed since this handle was made or last returned from here, and returns it.
    /// Changes that follow each other quickly may be seen as one.
    ///
    /// # Errors
    /// [`Ended`] while no run is going on and the last change of the one before was seen. Once there is another run, its
    /// changes are returned.
    ///
    /// # Cancel safety
    /// May be dropped at any await; no change is lost.
    pub async fn changed(&mut self) -> Result<Arc<Status>, Ended> {
        if matches!(self.status.has_changed(), Ok(false))
            && let Some(end) = &self.status.borrow().ended
        {
            return Err(Ended(end.clone()));
        }
        self.status.changed().await.map_err(|_| self.ended())?;
        Ok(Arc::clone(&self.status.borrow_and_update()))
    }

    /// Waits until the overlay [has reached](Phase::has_reached) `phase`, and returns its status.
    ///
    /// # Errors
    /// [`Ended`] when the run has ended without that.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn reached(&self, phase: Phase) -> Result<Arc<Status>, Ended> {
        self.wait_for(|status| status.phase.has_reached(phase)).await
    }

    /// Waits until the status is as `reached` wants it, if it is not so already, and returns it.
    ///
    /// # Errors
    /// [`Ended`] when the run has ended without that, or had before this was called: [`status`](Self::status) says how far
    /// it came.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn wait_for(&self, mut reached: impl FnMut(&Status) -> bool) -> Result<Arc<Status>, Ended> {
        let mut watch = self.status.clone();
        loop {
            let status = Arc::clone(&watch.borrow_and_update());
            if reached(&status) {
                return Ok(status);
            }
            if let Some(end) = &status.ended {
                return Err(Ended(end.clone()));
            }
            watch.changed().await.map_err(|_| self.ended())?;
        }
    }

    /// Has the uplink be found in another way from now on: at once while the overlay runs or starts, else in the next run.
    /// A running agent goes over to another interface and address without the wait that such a change has if it comes by
    /// itself; it keeps its lease, and what is programmed stays until it is programmed anew. [`Status::uplink`] says what
    /// came of it; a selection that nothing fits is kept, and used once something does.
    ///
    /// # Errors
    /// [`BuildError`], as for [`Builder::uplink`](super::Builder::uplink). Final for this input; nothing has changed then.
    pub fn set_uplink(&self, select: Select) -> Result<(), BuildError> {
        check_uplink(&select)?;
        if let Some(shared) = self.shared.upgrade() {
            shared.uplink.send_replace(select);
        }
        Ok(())
    }

    /// Events from now on.
    pub fn events(&self) -> Events {
        Events(match self.shared.upgrade() {
            Some(shared) => shared.events.subscribe(),
            // The agent is gone: a channel that is closed already says so.
            None => broadcast::channel(1).1,
        })
    }

    /// What the next audit would write, and what stands in its way. Reads the kernel and writes nothing.
    ///
    /// # Errors
    /// [`HandleError`].
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn plan(&self) -> Result<Preview, HandleError> {
        self.ask(Question::Plan).await?
    }

    /// Why a peer is, or is not, programmed: by its key (or what stands before a dot in it: `node-a` for
    /// `node-a.json`), its subnet, an address in that, or its public address, be it accepted or quarantined. `None`
    /// when no record is meant by `query`.
    ///
    /// # Errors
    /// [`HandleError::Starting`] and [`HandleError::Ended`].
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn explain(&self, query: &str) -> Result<Option<Explanation>, HandleError> {
        self.ask(|answer| Question::Explain(query.to_owned(), answer)).await
    }

    /// Returns the accepted peers: the list is complete and usable as an allow-list. The status is then as new as the
    /// answer: prefixes in [`Status::withheld`] belong to peers that are missing for now.
    ///
    /// # Errors
    /// [`HandleError::Starting`] and [`HandleError::Ended`]; [`HandleError::NotSynced`] before the lease store has said which peers there are.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn peers(&self) -> Result<Vec<Arc<Lease>>, HandleError> {
        self.ask(Question::Peers).await?
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, HandleError> {
        let (answer, answered) = oneshot::channel();
        let questions = self.shared.upgrade().and_then(|shared| shared.questions());
        questions.ok_or_else(|| self.not_answered())?.send(question(answer)).await.map_err(|_| self.not_answered())?;
        answered.await.map_err(|_| self.not_answered())
    }

    /// Why a question was not answered.
    fn not_answered(&self) -> HandleError {
        let status = self.status();
        match (&status.ended, &status.starting) {
            (None, Some(_)) if self.shared.strong_count() > 0 => {
                HandleError::Starting { waits_for: status.waits_for() }
            }
            _ => HandleError::Ended(self.ended()),
        }
    }

    fn ended(&self) -> Ended {
        let status = self.status.borrow();
        let gone = if self.shared.strong_count() > 0 { End::Stopped } else { End::Dropped };
        Ended(status.ended.clone().unwrap_or(gone))
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("status", &*self.status.borrow()).finish_non_exhaustive()
    }
}

fn list(waits: &[Wait]) -> String {
    let texts: Vec<_> = waits.iter().map(ToString::to_string).collect();
    texts.join(", ")
}
