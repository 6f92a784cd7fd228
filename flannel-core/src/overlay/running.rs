//! A run on a task of its own.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tokio::runtime::Handle as Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::agent::{Status, Teardown};
use crate::overlay::handle::{Ended, Handle};
use crate::overlay::run::OverlayError;

type Outcome = Result<(), OverlayError>;

/// A run on a task of its own, created by [`Overlay::spawn`](super::Overlay::spawn).
///
/// Dropping it ends the run at once, as a crash would: the kernel objects and the lease stay, and the next run takes
/// over. For an orderly end use [`shutdown`](Self::shutdown). The drop waits while a worker thread polls the run's
/// future, so the run's own store, kernel and backends must not drop it from within a call.
#[must_use = "dropping it ends the run as a crash would"]
pub struct Running {
    handle: Handle,
    stop: Option<oneshot::Sender<Teardown>>,
    life: Slot,
    task: JoinHandle<Outcome>,
    /// Whether the outcome has been returned.
    is_over: bool,
}

impl Running {
    pub(crate) fn start(
        runtime: &Runtime,
        handle: Handle,
        stop: oneshot::Sender<Teardown>,
        life: BoxFuture<'static, Outcome>,
    ) -> Self {
        let life: Slot = Arc::new(Mutex::new(Some(life)));
        let task = runtime.spawn(Life(Arc::clone(&life)));
        Self { handle, stop: Some(stop), life, task, is_over: false }
    }

    /// Returns the handle of the overlay.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits until the overlay [is ready](Status::is_ready) and returns its status.
    ///
    /// # Errors
    /// [`Ended`] when the run ended before that, with the reason as text. [`wait`](Self::wait) returns it as a value.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn ready(&self) -> Result<Arc<Status>, Ended> {
        self.handle.wait_for(Status::is_ready).await
    }

    /// Ends the run as `teardown` says, and waits until it has ended.
    ///
    /// # Errors
    /// [`OverlayError`] if the run had already ended by itself, and `teardown` was then not carried out, or if
    /// something could not be removed. In both cases [`Overlay::remove`](super::Overlay::remove) removes the rest
    /// later.
    ///
    /// # Cancel safety
    /// Dropping the future before it completes ends the run as a crash would;
    /// [`Overlay::remove`](super::Overlay::remove) removes the rest.
    pub async fn shutdown(mut self, teardown: Teardown) -> Result<(), OverlayError> {
        if let Some(stop) = self.stop.take() {
            // Sending fails if the run has already ended by itself: not an error.
            let _ = stop.send(teardown);
        }
        self.wait().await
    }

    /// Waits until the run ends by itself, and returns its outcome. The outcome is returned once; later calls return
    /// success.
    ///
    /// # Errors
    /// [`OverlayError`], as [`Overlay::run`](super::Overlay::run); [`OverlayError::NoRuntime`] when the runtime was shut
    /// down.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn wait(&mut self) -> Result<(), OverlayError> {
        if self.is_over {
            return Ok(());
        }
        let outcome = (&mut self.task).await;
        self.is_over = true;
        outcome.unwrap_or(Err(OverlayError::NoRuntime))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        cut_short(&self.life);
        self.task.abort();
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

/// A run's future, until it completes or is dropped.
type Slot = Arc<Mutex<Option<BoxFuture<'static, Outcome>>>>;

/// Drops a run's future. If a worker thread is polling it, waits until the poll returns.
fn cut_short(slot: &Slot) {
    let life = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(life);
}

/// The future of the task. The run's future inside can be dropped from outside at once, while the task itself ends only
/// when the runtime polls it: the overlay can then be run again without waiting for the task.
struct Life(Slot);

impl Drop for Life {
    fn drop(&mut self) {
        cut_short(&self.0);
    }
}

impl Future for Life {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.as_mut().map(|life| life.as_mut().poll(context)) {
            Some(Poll::Ready(outcome)) => {
                let done = slot.take();
                drop(slot);
                drop(done);
                Poll::Ready(outcome)
            }
            // The run's future was dropped, so no task waits for an outcome.
            Some(Poll::Pending) | None => Poll::Pending,
        }
    }
}
