//! An agent in the process of a test.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support: a wait fails as an assertion"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use flannel_core::overlay::{Event, Events, Handle, Overlay, OverlayError, Phase, Status, Teardown};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

type Outcome = Result<(), OverlayError>;
type Life = BoxFuture<'static, Outcome>;

/// A started agent. Dropping it does not end it.
#[derive(Debug)]
pub struct Agent {
    /// The agent's handle.
    pub handle: Handle,
    /// The agent's events, from its start.
    pub events: Events,
    stop: Mutex<Option<oneshot::Sender<Teardown>>>,
    patience: Duration,
    task: Mutex<Option<JoinHandle<Outcome>>>,
}

impl Agent {
    /// Starts an agent on the caller's runtime. A wait longer than `patience` on the runtime's clock fails.
    pub fn start(overlay: Overlay, patience: Duration) -> Self {
        Self::start_in(overlay, patience, |life| life)
    }

    /// Like [`start`](Self::start), with the agent's future inside of another one.
    pub fn start_in(overlay: Overlay, patience: Duration, frame: impl FnOnce(Life) -> Life) -> Self {
        let (handle, (stop, stopped)) = (overlay.handle(), oneshot::channel());
        let events = handle.events();
        let told = async {
            match stopped.await {
                Ok(teardown) => teardown,
                Err(_) => std::future::pending().await,
            }
        };
        let life = async move { overlay.run(told).await };
        let task = tokio::spawn(frame(life.boxed()));
        Self { handle, events, stop: Mutex::new(Some(stop)), patience, task: Mutex::new(Some(task)) }
    }

    /// Returns the present status.
    pub fn status(&self) -> Status {
        Arc::unwrap_or_clone(self.handle.status())
    }

    /// Waits for a status. If the agent ends or the time is over, the error contains the last status.
    pub async fn try_until(&self, reached: impl FnMut(&Status) -> bool) -> Result<Status, String> {
        match timeout(self.patience, self.handle.wait_for(reached)).await {
            Ok(Ok(status)) => Ok(Arc::unwrap_or_clone(status)),
            Ok(Err(ended)) => Err(format!("{ended}: {:?}", self.status())),
            Err(_) => Err(format!("not within {:?}: {:?}", self.patience, self.status())),
        }
    }

    /// Waits for a status, or panics.
    pub async fn until(&self, reached: impl FnMut(&Status) -> bool) -> Status {
        self.try_until(reached).await.unwrap_or_else(|status| panic!("the status never was as awaited: {status}"))
    }

    /// Waits until the agent is ready.
    pub async fn ready(&self) -> Status {
        self.reached(Phase::Ready).await
    }

    /// Waits until the agent has reached a phase, or panics.
    pub async fn reached(&self, phase: Phase) -> Status {
        self.until(|status| status.phase.has_reached(phase)).await
    }

    /// Waits until the agent is ready and returns it.
    pub async fn once_ready(self) -> Self {
        self.ready().await;
        self
    }

    /// Waits for an audit that began after this call.
    pub async fn audited(&self) -> Status {
        let audits = self.status().audits;
        self.until(|status| status.audits >= audits + 2).await
    }

    /// Waits for an event and drops those before it.
    pub async fn event(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Event {
        let found = timeout(self.patience, async {
            loop {
                match self.events.next().await {
                    Some(event) if !wanted(&event) => {}
                    last => return last,
                }
            }
        });
        found.await.ok().flatten().unwrap_or_else(|| panic!("no such event: {:?}", self.handle.status()))
    }

    /// Returns the events so far, in order.
    pub fn drain(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.next().now_or_never().flatten()).collect()
    }

    /// Takes the agent's task. Possible once.
    pub fn task(&self) -> JoinHandle<Outcome> {
        self.task.lock().unwrap().take().expect("an agent ends once")
    }

    /// Waits until the agent has ended, and returns its result.
    pub async fn ended(&self) -> Outcome {
        let ended = timeout(self.patience, self.task()).await;
        ended.unwrap_or_else(|_| panic!("the agent never ended: {:?}", self.status())).expect("the agent panicked")
    }

    /// Tells the agent to end in order, unless that was done before.
    pub fn stop(&self, teardown: Teardown) {
        if let Some(stop) = self.stop.lock().unwrap().take() {
            // The agent may have ended already.
            let _ = stop.send(teardown);
        }
    }

    /// Ends the agent in order without removing anything, and returns its result.
    pub async fn cancelled(&self) -> Outcome {
        self.stop(Teardown::Keep);
        self.ended().await
    }

    /// Ends the agent in order, removing everything, and returns its result.
    pub async fn removed(&self) -> Outcome {
        self.stop(Teardown::Remove);
        self.ended().await
    }

    /// Ends the agent as a crash would: drops its future at any point. Returns whether it was still running.
    pub async fn killed(&self) -> bool {
        let task = self.task();
        task.abort();
        task.await.is_err_and(|error| error.is_cancelled())
    }
}
