//! The view from outside: status, events and questions to a running agent.

use std::sync::Arc;

use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::agent::{Event, Explanation, Phase, Preview, Status};
use crate::kernel::KernelError;
use crate::lease::Lease;

/// Events kept for a reader that lags; an older one is lost to it, and it is told so.
pub(crate) const EVENTS: usize = 1024;
/// Questions that may wait.
pub(crate) const QUESTIONS: usize = 16;

/// A running overlay, seen from outside. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(crate) status: watch::Receiver<Arc<Status>>,
    pub(crate) events: broadcast::WeakSender<Event>,
    pub(crate) questions: mpsc::Sender<Question>,
}

#[derive(Debug)]
pub(crate) enum Question {
    Plan(oneshot::Sender<Result<Preview, HandleError>>),
    Explain(String, oneshot::Sender<Option<Explanation>>),
    Peers(oneshot::Sender<Result<Vec<Arc<Lease>>, HandleError>>),
}

/// What happens, in order.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Event>);

impl Events {
    /// The next event. For a reader that is more than 1024 events behind, the oldest are lost, and
    /// [`Event::Missed`] stands for them. `None` when the agent has ended and no [`Overlay`](super::Overlay) is left.
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

/// The agent has ended, or was dropped: the status stays as it is from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the agent has ended")]
pub struct Ended;

/// A running agent could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// It has ended, or does not run yet.
    #[error("the agent is not running")]
    NotRunning,
    /// The lease store has not said yet which peers there are, so that nothing can be said of theirs. Retry once
    /// [`Status::audits`] counts; [`Status::store`] says what keeps the store.
    #[error("not synced yet: the lease store has not said which peers there are; see the status for what keeps it")]
    NotSynced,
    /// The kernel could not be read. Retry.
    #[error("reading the kernel")]
    Kernel(#[source] KernelError),
}

impl Handle {
    /// The status as it is now. A value: to keep it holds up nobody.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status.borrow())
    }

    /// Waits until the status has changed since this handle was made or last returned from here, and returns it.
    /// Changes that follow each other quickly may be seen as one.
    ///
    /// # Errors
    /// [`Ended`] once the agent has ended and its last change was seen.
    ///
    /// # Cancel safety
    /// May be dropped at any await; no change is lost.
    pub async fn changed(&mut self) -> Result<Arc<Status>, Ended> {
        self.status.changed().await.map_err(|_| Ended)?;
        Ok(Arc::clone(&self.status.borrow_and_update()))
    }

    /// Waits until the status is as `reached` wants it, if it is not so already, and returns it.
    ///
    /// # Errors
    /// [`Ended`] when the agent has ended without that: [`status`](Self::status) says how far it came.
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
            if status.phase == Phase::Stopped {
                return Err(Ended);
            }
            watch.changed().await.map_err(|_| Ended)?;
        }
    }

    /// Events from now on.
    pub fn events(&self) -> Events {
        Events(match self.events.upgrade() {
            Some(sender) => sender.subscribe(),
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
    /// [`HandleError::NotRunning`].
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
    /// [`HandleError::NotRunning`]; [`HandleError::NotSynced`] before the lease store has said which peers there are.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn peers(&self) -> Result<Vec<Arc<Lease>>, HandleError> {
        self.ask(Question::Peers).await?
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, HandleError> {
        let (answer, answered) = oneshot::channel();
        self.questions.send(question(answer)).await.map_err(|_| HandleError::NotRunning)?;
        answered.await.map_err(|_| HandleError::NotRunning)
    }
}
