//! The handle of an overlay: its status, its events and questions to its agent.

use std::fmt;
use std::sync::{Arc, Weak};

use tokio::sync::{broadcast, oneshot, watch};

use crate::agent::{End, Event, Explanation, PeerList, Phase, Preview, Status, Wait};
use crate::kernel::{KernelError, OverlayName};
use crate::lease::Lease;
use crate::overlay::builder::{BuildError, check_uplink};
use crate::overlay::turn::Shared;
use crate::uplink::Select;

/// The number of events kept for a slow reader. Older ones are dropped, and the reader receives their count.
pub(crate) const EVENTS: usize = 1024;
/// The maximum number of waiting questions.
pub(crate) const QUESTIONS: usize = 16;

/// A handle to an overlay, valid over all of its runs. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    name: OverlayName,
    status: watch::Receiver<Arc<Status>>,
    shared: Weak<Shared>,
}

#[derive(Debug)]
pub(crate) enum Question {
    Plan(oneshot::Sender<Result<Preview, HandleError>>),
    Explain(String, oneshot::Sender<Vec<Explanation>>),
    Records(oneshot::Sender<Result<PeerList, HandleError>>),
    Peers(oneshot::Sender<Result<Vec<Arc<Lease>>, HandleError>>),
}

/// The events of this run and of later ones, in order.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Event>);

impl Events {
    /// Returns the next event. A reader that is more than 1024 events behind loses the oldest, and receives
    /// [`Event::Missed`] in their place. A run ends with [`Event::Stopped`], after which the next run's events follow.
    /// Returns `None` when every [`Overlay`](super::Overlay) has been dropped.
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

/// The run has ended. The status stays as it is until the next run begins with a fresh one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the agent has ended: {0}")]
pub struct Ended(
    /// How it ended.
    pub End,
);

/// A question to the agent was not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// The agent does not run yet, or is starting. Retry once [`Status::starting`] is `None`.
    #[error("the agent has not started: it waits for {}", list(.waits_for))]
    Starting {
        /// What the start waits for.
        waits_for: Vec<Wait>,
    },
    /// The run has ended. Retry in the next run.
    #[error(transparent)]
    Ended(Ended),
    /// The lease store has not listed the peers yet. Retry once [`Status::listed`] is true; [`Status::store`] shows the
    /// state of the store.
    #[error("the lease store has not listed the peers yet; the status says why")]
    NotSynced,
    /// The kernel could not be read. Retry.
    #[error("reading the kernel")]
    Kernel(#[source] KernelError),
}

impl Handle {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self { name: shared.name.clone(), status: shared.status.subscribe(), shared: Arc::downgrade(shared) }
    }

    /// Returns the overlay's name, which marks its devices and names the firewall's chains.
    pub fn name(&self) -> &OverlayName {
        &self.name
    }

    /// Returns the current status. It is a snapshot: keeping it blocks no other task.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status.borrow())
    }

    /// Waits until the status has changed since this handle was created or this method last returned, and returns it.
    /// Changes in quick succession may be seen as one.
    ///
    /// # Errors
    /// [`Ended`] while no run is going on and the last change of the previous run has been returned. When another run
    /// begins, its changes are returned.
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
    /// [`Ended`] when the run ended without reaching `phase`.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn reached(&self, phase: Phase) -> Result<Arc<Status>, Ended> {
        self.wait_for(|status| status.phase.has_reached(phase)).await
    }

    /// Waits until `reached` returns true for the status, and returns the status. Returns at once if it already does.
    ///
    /// # Errors
    /// [`Ended`] when the run ended before that, also if it ended before this call. [`status`](Self::status) shows how
    /// far it came.
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

    /// Changes how the uplink is chosen: at once while the overlay runs or starts, else for the next run. A running
    /// agent switches to another interface and address without the usual wait for them to be stable; it keeps its
    /// lease, and programmed objects stay until they are replaced. [`Status::uplink`] shows the result. A selection
    /// that matches no uplink is kept, and used once one matches.
    ///
    /// # Errors
    /// [`BuildError`], as for [`Builder::uplink`](super::Builder::uplink). Final for this input; nothing is changed.
    pub fn set_uplink(&self, select: Select) -> Result<(), BuildError> {
        check_uplink(&select)?;
        if let Some(shared) = self.shared.upgrade() {
            shared.uplink.send_replace(select);
        }
        Ok(())
    }

    /// Returns the events from now on.
    pub fn events(&self) -> Events {
        Events(match self.shared.upgrade() {
            Some(shared) => shared.events.subscribe(),
            // The overlay was dropped: returns a closed channel.
            None => broadcast::channel(1).1,
        })
    }

    /// Returns what the next audit would write, and the conflicts that it would find. Reads the kernel and writes
    /// nothing.
    ///
    /// # Errors
    /// [`HandleError`].
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn plan(&self) -> Result<Preview, HandleError> {
        self.ask(Question::Plan).await?
    }

    /// Returns why a peer is, or is not, programmed. `query` is the record's key (or its part before a dot: `node-a`
    /// for `node-a.json`), its subnet, an address in the subnet, or its public address; the record may be accepted or
    /// quarantined. Several records may have one subnet or address; this node's and accepted ones come first, and at
    /// most [`Explanation::MOST`] are returned. Empty if no record matches.
    ///
    /// # Errors
    /// [`HandleError::Starting`] and [`HandleError::Ended`].
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn explain(&self, query: &str) -> Result<Vec<Explanation>, HandleError> {
        self.ask(|answer| Question::Explain(query.to_owned(), answer)).await
    }

    /// Returns the accepted peers. The list is complete and usable as an allow-list. The status is then at least as new
    /// as the list: prefixes in [`Status::withheld`] belong to peers that are currently missing.
    ///
    /// # Errors
    /// [`HandleError::Starting`] and [`HandleError::Ended`]; [`HandleError::NotSynced`] before the lease store has
    /// listed the peers.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn peers(&self) -> Result<Vec<Arc<Lease>>, HandleError> {
        self.ask(Question::Peers).await?
    }

    /// Returns the records of all other nodes, with what became of each. The status is then at least as new.
    ///
    /// # Errors
    /// As for [`peers`](Self::peers).
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn records(&self) -> Result<PeerList, HandleError> {
        self.ask(Question::Records).await?
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, HandleError> {
        let (answer, answered) = oneshot::channel();
        let questions = self.shared.upgrade().and_then(|shared| shared.questions());
        questions.ok_or_else(|| self.not_answered())?.send(question(answer)).await.map_err(|_| self.not_answered())?;
        answered.await.map_err(|_| self.not_answered())
    }

    /// The reason why a question was not answered.
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
