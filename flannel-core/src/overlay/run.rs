//! An overlay's life: from its parts through its run to its end.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::agent::{EnvFile, Event, Input, Machine, Phase, Preview, Settings, Status, Teardown};
use crate::backend::{BackendError, LocalNode};
use crate::backoff::Jitter;
use crate::clock::Clock;
use crate::kernel::{Kernel, KernelError};
use crate::lease::LeaseEvent;
use crate::overlay::builder::{Builder, Factory};
use crate::overlay::driver::Driver;
use crate::overlay::event_log::EventLog;
use crate::overlay::handle::{EVENTS, Handle, QUESTIONS, Question};
use crate::overlay::published::Published;
use crate::overlay::removal::{self, Removed};
use crate::overlay::start::{self, Claims, Progress, Started};
use crate::overlay::survey::{Surveyed, configuration, identified, survey};
use crate::subnet::{SubnetError, SubnetManager};
use crate::text::{Plain, chain};
use crate::uplink::UplinkError;

/// The maximum age of host facts at start. Until then nothing reports changes of the host.
const FRESH: Duration = Duration::from_millis(500);
/// How long a preview waits for store and host.
const PATIENCE: Duration = Duration::from_secs(10);

/// An overlay: put together by a [`Builder`], run once.
pub struct Overlay {
    settings: Arc<Settings>,
    backends: Vec<(&'static str, Factory)>,
    seams: Seams,
    questions: (mpsc::Sender<Question>, mpsc::Receiver<Question>),
}

/// What the agent works with.
pub(crate) struct Seams {
    pub(crate) subnets: Arc<dyn SubnetManager>,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) clock: Arc<dyn Clock>,
    /// What all waits are varied by.
    pub(crate) jitter: Jitter,
    pub(crate) status: Published,
    pub(crate) events: broadcast::Sender<Event>,
    pub(crate) journal: Mutex<EventLog>,
}

impl Seams {
    /// Tells operators and whoever listens what happened.
    pub(crate) fn tell(&self, event: Event) {
        self.journal().tell(self.clock.now(), &event);
        // Nobody listens: not an error.
        let _ = self.events.send(event);
    }

    pub(crate) fn journal(&self) -> MutexGuard<'_, EventLog> {
        // Nothing is left half-done by a holder that panicked: it only counts.
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why an overlay ended by itself, or did not start. Never for trouble that may pass: that is in the status.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// The store holds a configuration or record that cannot be used. Mend it there, then start again.
    #[error("reading the network from the lease store")]
    Store(#[source] SubnetError),
    /// No uplink. Name one, or mend the host, then start again.
    #[error("choosing the uplink")]
    Uplink(#[source] UplinkError),
    /// The backend cannot run here as configured.
    #[error("setting up the backend")]
    Backend(#[source] BackendError),
    /// The kernel cannot be used: no privilege, no support, or another overlay holds the name.
    #[error("using the kernel")]
    Kernel(#[source] KernelError),
    /// The lease is gone and [`LossPolicy::Stop`](super::LossPolicy::Stop) is the policy.
    #[error("the lease was lost")]
    LeaseLost,
    /// The store holds another configuration than the agent goes by, and [`ConfigPolicy`](super::ConfigPolicy) is to end
    /// then. The end does to the kernel what [`Teardown`] says. Start again to go by the new one.
    #[error("the network configuration changed: start the agent again to go by the new one")]
    Reconfigured,
    /// A preview cannot wait for ever. Ask again once what it waited for is mended.
    #[error("no answer within {within:?} ({waited_for}): see that the lease store runs and can be reached, then retry")]
    Unanswered {
        /// How long it waited.
        within: Duration,
        /// What was in the way, in words.
        waited_for: String,
    },
    /// A removal could not remove everything from the kernel; what is left is named. Run it again.
    #[error("{left} objects of ours could not be removed, the first of them: {first}")]
    Teardown {
        /// How many.
        left: usize,
        /// What was to be done with the first one, as it would be said to `ip`.
        first: String,
        /// What the kernel said to that.
        #[source]
        source: Option<KernelError>,
    },
    /// A removal could not delete `subnet.env`. Delete it, or mend what is in the way and run the removal again.
    #[error("removing {}", Plain(path.display()))]
    SubnetEnv {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The lease could not be given back. It runs out by itself where leases expire; else run the removal again.
    #[error("giving the lease back to the lease store")]
    Release(#[source] SubnetError),
}

impl Overlay {
    /// Returns a builder with the defaults.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn new(
        settings: Settings,
        backends: Vec<(&'static str, Factory)>,
        clock: Arc<dyn Clock>,
        jitter: Jitter,
        subnets: Arc<dyn SubnetManager>,
        kernel: Arc<dyn Kernel>,
    ) -> Self {
        let subnet_env =
            if settings.subnet_env.is_some() { EnvFile::Pending { error: None } } else { EnvFile::Settled };
        let status = Published::new(Status { subnet_env, ..Status::default() });
        let events = broadcast::Sender::new(EVENTS);
        let seams = Seams { subnets, kernel, clock, jitter, status, events, journal: Mutex::default() };
        Self { settings: Arc::new(settings), backends, seams, questions: mpsc::channel(QUESTIONS) }
    }

    /// Status, events and questions, for as long as this overlay lives.
    pub fn handle(&self) -> Handle {
        Handle {
            status: self.seams.status.subscribe(),
            events: self.seams.events.downgrade(),
            questions: self.questions.0.clone(),
        }
    }

    /// What a start would write, from the lease this node had last; touches neither kernel nor store.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`OverlayError::Unanswered`] when store or host have not answered after 10 s: retry.
    /// `Ok(None)` when the store has no lease for this node: which subnet it would take is not known before it takes it.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn preview(&self) -> Result<Option<Preview>, OverlayError> {
        let deadline = self.seams.clock.sleep_until(self.seams.clock.now().after(PATIENCE));
        tokio::select! {
            biased;
            preview = self.look_ahead() => preview,
            () = deadline => {
                let trouble = self.seams.status.borrow().last_error.clone();
                let waited_for = trouble.unwrap_or_else(|| "the first list of peers".to_owned());
                Err(OverlayError::Unanswered { within: PATIENCE, waited_for })
            }
        }
    }

    async fn look_ahead(&self) -> Result<Option<Preview>, OverlayError> {
        let settings = identified(&self.seams, &self.settings).await?;
        let config = configuration(&self.seams).await?;
        let surveyed = survey(&self.seams, &settings, &self.backends, config, None).await?;
        let Some(lease) = surveyed.context.previous.clone() else { return Ok(None) };
        let local = LocalNode { lease, context: surveyed.context };
        let now = self.seams.clock.now();
        let status = Status::default();
        let mut machine = Machine::new(settings, surveyed.backend, local, status, now, self.seams.jitter.clone());
        let mut watch = self.seams.subnets.watch();
        while let Some(event) = watch.next().await {
            match event {
                Ok(event @ LeaseEvent::Reset(_)) => {
                    machine.handle(now, Input::Store(Ok(event)));
                    break;
                }
                Ok(_) => {}
                Err(error) => self.seams.status.send_modify(|status| status.last_error = Some(chain(&error))),
            }
        }
        if !machine.is_synced() {
            // A stream that ended against its contract says nothing more.
            return std::future::pending().await;
        }
        // A snapshot that stands in for a store that is away is followed by the trouble.
        if let Some(Some(trouble @ Err(_))) = watch.next().now_or_never() {
            machine.handle(now, Input::Store(trouble));
        }
        let seen = self.seams.kernel.observe(machine.scope()).await?;
        Ok(Some(machine.preview(seen, now)))
    }

    /// Removes everything of this overlay from the kernel, its `subnet.env` and its lease, without taking one first:
    /// the clean-up after an agent that is gone. Idempotent. What is ours is told from marks alone, so that it works
    /// while the store is away: then the lease stays, and routes are looked for where `subnet.env` says the network is.
    ///
    /// # Errors
    /// [`OverlayError::Kernel`] with [`KernelError::Conflict`] while the agent runs: nothing was touched.
    /// [`OverlayError::Teardown`] and [`OverlayError::SubnetEnv`] when something is left: run it again.
    ///
    /// # Cancel safety
    /// May be dropped at any await; what was removed until then is gone.
    pub async fn remove(&self) -> Result<Removed, OverlayError> {
        removal::remove(&self.seams, &self.settings, &self.backends).await
    }

    /// Runs the agent until `cancel` is cancelled, then ends as the teardown policy says.
    ///
    /// The kernel is written only after the store has said what is everything. Trouble with store or kernel that may
    /// pass is retried, shown in the status, and leaves the data plane as it is.
    ///
    /// # Errors
    /// [`OverlayError`]: what cannot pass by itself.
    ///
    /// # Cancel safety
    /// Dropping the future stops the agent where it is, as a crash would: the next run takes over from what is there.
    /// Handles are told that it has stopped, as they are when it panics.
    /// For an orderly end use `cancel`; it takes at most two seconds with [`Teardown::Keep`].
    /// [`Teardown::Remove`] takes as long as the kernel does, and for a store that is away no
    /// more than ten seconds; a start that is cancelled before it has taken the overlay's name removes nothing.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), OverlayError> {
        let Self { settings, backends, seams, questions: (asker, questions) } = self;
        // Handles keep theirs; ours would keep the channel open for ever.
        drop(asker);
        let span = tracing::info_span!("overlay", name = settings.name.as_str());
        let life = async {
            let _over = Over(&seams);
            agent(&seams, settings, &backends, questions, cancel).await
        };
        tracing::Instrument::instrument(life, span).await
    }
}

/// Says that the agent has ended, also where it panics or is dropped.
struct Over<'a>(&'a Seams);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.status.send_modify(|status| status.phase = Phase::Stopped);
        self.0.tell(Event::Stopped);
    }
}

async fn agent(
    seams: &Seams,
    settings: Arc<Settings>,
    backends: &[(&'static str, Factory)],
    mut questions: mpsc::Receiver<Question>,
    cancel: CancellationToken,
) -> Result<(), OverlayError> {
    let Some(Started { settings, surveyed, claims, lease }) =
        begin(seams, &settings, backends, &mut questions, &cancel).await?
    else {
        return Ok(());
    };
    let Claims { present: claim, former } = claims;
    let (former, former_claims): (Vec<_>, Vec<_>) = former.into_iter().unzip();
    // Before the first route, and not before there may be one.
    start::remember(&settings, &surveyed, &former).await;
    let Surveyed { backend, context, read, want, .. } = surveyed;
    let is_new = context.previous.is_none();
    let local = LocalNode { lease: Arc::new(lease), context };
    let now = seams.clock.now();
    let status = Status::clone(&seams.status.borrow());
    let mut machine = Machine::new(Arc::clone(&settings), backend, local, status, now, seams.jitter.clone());
    if now.since(read) > FRESH {
        machine.doubt_host();
    }
    machine.look_after(former.iter().flat_map(|networks| networks.iter()).map(|(_, network)| *network).collect());
    let mut driver = Driver::new(seams, settings, machine, questions, former_claims, want.foreign);
    let outcome = driver.until(&cancel).await;
    if let (true, Err(OverlayError::Kernel(KernelError::Denied { .. } | KernelError::Unsupported { .. }))) =
        (is_new, &outcome)
    {
        // Only a first round ends so: what it took is of no use to anybody.
        driver.give_back().await;
    }
    let ended = driver.finish().await;
    drop(claim);
    // What ended the agent says more than what became of its end.
    outcome.and(ended)
}

/// Starts. Cancelled meanwhile it does what the teardown policy says, and nothing has started.
async fn begin(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    questions: &mut mpsc::Receiver<Question>,
    cancel: &CancellationToken,
) -> Result<Option<Started>, OverlayError> {
    let progress = Progress::default();
    let mut starting = std::pin::pin!(start::start(seams, settings, backends, &progress));
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        started = &mut starting => return started.map(Some),
        never = refuse(questions) => match never {},
    }
    if let (Teardown::Remove, Some(claimed)) = (settings.teardown, progress.claimed()) {
        let started = match progress.is_asking() {
            true => removal::in_time(seams, &mut starting).await.and_then(Result::ok),
            false => None,
        };
        let lease = started.as_ref().map(|started| started.lease.clone());
        removal::undo_start(seams, settings, &claimed, lease).await?;
        // The overlay's name is held until everything is gone.
        drop(started);
    }
    Ok(None)
}

/// Drops what is asked before there is anybody to answer, for ever: the asker is told that the agent does not run.
async fn refuse(questions: &mut mpsc::Receiver<Question>) -> Infallible {
    loop {
        match questions.recv().await {
            Some(question) => drop(question),
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::backend::alloc::Alloc;
    use crate::net::Family;
    use crate::testing::{FakeKernel, MemorySubnets, samples};

    #[test]
    fn so_many_questions_wait_for_an_agent_that_is_busy_and_further_askers_wait_for_a_place() {
        let store = MemorySubnets::new(samples::config(&[Family::V4], r#"{"Type":"alloc"}"#));
        let builder = Overlay::builder().backend(Alloc::TYPE, |_| Ok(Alloc));
        let mut overlay = builder.build(Arc::new(store), Arc::new(FakeKernel::new())).unwrap();
        let handle = overlay.handle();
        let mut asked: Vec<_> = (0..QUESTIONS + 7).map(|_| Box::pin(handle.plan())).collect();
        assert!(asked.iter_mut().all(|asked| asked.now_or_never().is_none()));
        assert_eq!(overlay.questions.1.len(), QUESTIONS);
        // Whoever waits for a place has it as soon as there is one.
        overlay.questions.1.try_recv().unwrap();
        assert!(asked.iter_mut().skip(QUESTIONS).all(|asked| asked.now_or_never().is_none()));
        assert_eq!(overlay.questions.1.len(), QUESTIONS);
    }
}
