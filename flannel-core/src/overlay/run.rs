//! The overlay: its parts, its runs and their end.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::try_join;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tracing::Instrument;

use crate::agent::{End, EnvFile, Event, Input, Machine, Preview, Settings, Status, Teardown, Wait};
use crate::backend::{BackendError, LocalNode};
use crate::backoff::Jitter;
use crate::clock::Clock;
use crate::kernel::{Kernel, KernelError};
use crate::lease::LeaseEvent;
use crate::overlay::builder::{Builder, Factory};
use crate::overlay::driver::Driver;
use crate::overlay::event_log::EventLog;
use crate::overlay::handle::{Handle, QUESTIONS};
use crate::overlay::host_files::HostFiles;
use crate::overlay::published::Published;
use crate::overlay::removal::{self, Removed};
use crate::overlay::running::Running;
use crate::overlay::start::{self, Claims, Progress, Started};
use crate::overlay::survey::{Surveyed, configuration, identified, survey};
use crate::overlay::turn::{Shared, Turn, lock};
use crate::subnet::{SubnetError, SubnetManager};
use crate::text::{Plain, chain};
use crate::uplink::{Select, UplinkError};

/// The maximum age of host facts at start. Until then nothing reports changes of the host.
const FRESH: Duration = Duration::from_millis(500);
/// How long a preview waits for the store and the host.
const PATIENCE: Duration = Duration::from_secs(10);

/// An overlay, created by a [`Builder`]. It may be run any number of times, one run at a time. Clones refer to the same
/// overlay.
///
/// A run begins with a fresh [`Status`]. Handles and their event subscriptions are valid over all runs.
#[derive(Clone)]
pub struct Overlay(Arc<Parts>);

struct Parts {
    settings: Settings,
    backends: Vec<(&'static str, Factory)>,
    subnets: Arc<dyn SubnetManager>,
    kernel: Arc<dyn Kernel>,
    jitter: Jitter,
    shared: Arc<Shared>,
}

/// The interfaces that an agent works with.
pub(crate) struct Seams {
    pub(crate) subnets: Arc<dyn SubnetManager>,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) clock: Arc<dyn Clock>,
    /// The random variation of all waits.
    pub(crate) jitter: Jitter,
    pub(crate) status: Published,
    pub(crate) events: broadcast::Sender<Event>,
    /// How the uplink is chosen. This takes precedence over the initial settings.
    pub(crate) uplink: watch::Receiver<Select>,
    pub(crate) journal: Arc<Mutex<EventLog>>,
    pub(crate) files: HostFiles,
}

impl Seams {
    /// Logs an event and sends it to subscribers.
    pub(crate) fn tell(&self, event: Event) {
        self.journal().tell(self.clock.now(), &event);
        // Sending fails without subscribers: not an error.
        let _ = self.events.send(event);
    }

    pub(crate) fn journal(&self) -> MutexGuard<'_, EventLog> {
        lock(&self.journal)
    }

    /// The settings, with the current uplink selection.
    pub(crate) fn up_to_date(&self, settings: &Settings) -> Settings {
        Settings { uplink: self.uplink.borrow().clone(), ..settings.clone() }
    }

    /// Shows in the status what a start waits for.
    pub(crate) fn show_wait(&self, wait: Wait) {
        let wait = Some(wait);
        self.status.send_if(|status| status.starting != wait, |status| status.starting.clone_from(&wait));
    }

    /// Shows in the status which step a start is at, unless the status shows an error because of which the step is
    /// repeated.
    pub(crate) fn show_step(&self, step: Wait) {
        if self.status.borrow().starting.as_ref().is_none_or(|wait| wait.error().is_none()) {
            self.show_wait(step);
        }
    }
}

/// Why an overlay ended by itself or did not start. Temporary errors are never returned: they are shown in the status.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// The store has a configuration or record that cannot be used. Correct it there, then start again.
    #[error("reading the network from the lease store")]
    Store(#[source] SubnetError),
    /// There is no uplink. Select one or fix the host, then start again.
    #[error("choosing the uplink")]
    Uplink(#[source] UplinkError),
    /// The backend cannot run here as configured.
    #[error("setting up the backend")]
    Backend(#[source] BackendError),
    /// The kernel cannot be used: a privilege or kernel support is missing, or another overlay has the name.
    #[error("using the kernel")]
    Kernel(#[source] KernelError),
    /// The lease was lost and the policy is [`LossPolicy::Stop`](super::LossPolicy::Stop). Kernel objects stay. Run
    /// again to acquire another lease, or [remove](Overlay::remove) the rest.
    #[error("the lease was lost")]
    LeaseLost,
    /// The configuration in the store differs from the one in force, and the [`ConfigPolicy`](super::ConfigPolicy) is
    /// to end then. Everything is kept. Run again to use the new one.
    #[error("the network configuration changed: start the agent again to use the new one")]
    Reconfigured,
    /// A preview was not answered in time. Retry once the cause is fixed.
    #[error(
        "no answer within {within:?} ({waited_for}): check what it waited for, such as the lease store, then retry"
    )]
    Unanswered {
        /// How long it waited.
        within: Duration,
        /// What it waited for, as text.
        waited_for: String,
    },
    /// A removal could not delete everything from the kernel; the first remaining object is named. Run it again.
    #[error("{left} objects of the overlay could not be removed, the first of them: {first}")]
    Teardown {
        /// The number of objects left.
        left: usize,
        /// The failed operation on the first one, in the style of `ip`.
        first: String,
        /// The kernel's error for it.
        #[source]
        source: Option<KernelError>,
    },
    /// A removal could not read or delete `subnet.env`. Fix the cause and run the removal again. With
    /// [`TimedOut`](std::io::ErrorKind::TimedOut) its file system does not answer.
    #[error("removing {}", Plain(path.display()))]
    SubnetEnv {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// Another run of this overlay is going on; nothing was changed. Retry once it has ended.
    #[error("the overlay is already running")]
    AlreadyRunning,
    /// The agent panicked: a bug of this crate, or of a backend, store or kernel implementation. Kernel objects stay,
    /// and another run takes over.
    #[error("the agent panicked: {}", Plain(message))]
    Panicked {
        /// The panic's message.
        message: String,
    },
    /// There is no tokio runtime to spawn a run on, or it was shut down during the run.
    #[error("there is no tokio runtime, or it was shut down: spawn on one that outlives the run")]
    NoRuntime,
    /// The lease could not be released. It expires by itself if the store's leases expire; else run the removal again.
    #[error("releasing the lease")]
    Release(#[source] SubnetError),
}

/// Returns the first list of the watch, and the error after it if the list comes from a state file.
async fn first_list(seams: &Seams) -> Vec<Result<LeaseEvent, SubnetError>> {
    let mut watch = seams.subnets.watch();
    while let Some(item) = watch.next().await {
        match item {
            Ok(LeaseEvent::Reset(_)) => {
                let error = watch.next().now_or_never().flatten().filter(Result::is_err);
                return [Some(item), error].into_iter().flatten().collect();
            }
            Ok(_) => {}
            Err(error) => seams.status.send_modify(|status| status.last_error = Some(chain(&error))),
        }
    }
    // A watch that ended against its contract yields no list.
    std::future::pending().await
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
        let shared = Arc::new(Shared::new(settings.name.clone(), fresh(&settings), settings.uplink.clone(), clock));
        Self(Arc::new(Parts { settings, backends, subnets, kernel, jitter, shared }))
    }

    /// Returns a handle for status, events and questions, valid over all runs of this overlay.
    pub fn handle(&self) -> Handle {
        Handle::new(&self.0.shared)
    }

    fn seams(&self, status: Published, events: broadcast::Sender<Event>) -> Seams {
        let Parts { subnets, kernel, jitter, shared, .. } = &*self.0;
        Seams {
            subnets: Arc::clone(subnets),
            kernel: Arc::clone(kernel),
            clock: Arc::clone(&shared.clock),
            jitter: jitter.clone(),
            status,
            events,
            uplink: shared.uplink.subscribe(),
            journal: Arc::clone(&shared.journal),
            files: shared.files.clone(),
        }
    }

    /// The interfaces for an operation that is not a run: its status is not published.
    fn aside(&self) -> Seams {
        self.seams(Published::new(Status::default()), broadcast::Sender::new(1))
    }

    /// Returns what a start would write, based on the last lease of this node. Writes to neither the kernel nor the
    /// store.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`OverlayError::Unanswered`] if the store or the host has not answered after 10 s:
    /// retry; and [`OverlayError::Store`] with [`SubnetError::Unconfigured`], at once, if there is no network
    /// configuration. Returns `Ok(None)` if the store has no lease of this node, because its subnet is not known before
    /// a lease is acquired.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn preview(&self) -> Result<Option<Preview>, OverlayError> {
        let seams = self.aside();
        let deadline = seams.clock.sleep_until(seams.clock.now().after(PATIENCE));
        tokio::select! {
            biased;
            preview = self.look_ahead(&seams) => preview,
            () = deadline => {
                let trouble = seams.status.borrow().last_error.clone();
                let waited_for = trouble.unwrap_or_else(|| "the first list of peers".to_owned());
                Err(OverlayError::Unanswered { within: PATIENCE, waited_for })
            }
        }
    }

    async fn look_ahead(&self, seams: &Seams) -> Result<Option<Preview>, OverlayError> {
        let settings = identified(seams, &self.0.settings).await?;
        // A configuration that is missing is not waited for: a preview shows what a start would find now.
        let config = match seams.subnets.network_config().await {
            Err(error @ SubnetError::Unconfigured { .. }) => return Err(OverlayError::Store(error)),
            Ok(config) => Arc::new(config),
            Err(_) => configuration(seams).await?,
        };
        let surveyed = survey(seams, &settings, &self.0.backends, config, None).await?;
        let Some(lease) = surveyed.context.previous.clone() else { return Ok(None) };
        let local = LocalNode { lease, context: surveyed.context };
        let now = seams.clock.now();
        let status = Status::default();
        let mut machine = Machine::new(surveyed.settings, surveyed.backend, local, status, now, seams.jitter.clone());
        let scope = machine.scope().clone();
        let admitted = async {
            first_list(seams).await.into_iter().for_each(|item| machine.handle(now, Input::Store(item)));
            Ok(())
        };
        // Both take long if there are many peers.
        let ((), seen) = try_join(admitted, seams.kernel.observe(&scope)).await?;
        Ok(Some(machine.preview(seen, now)))
    }

    /// Removes this overlay's objects from the kernel, its `subnet.env` and its lease, without starting an agent: the
    /// clean-up after an agent that has ended. Idempotent. It takes as long as the kernel needs, and at most ten seconds
    /// more if the store is unavailable. Objects are recognised by their marks alone, so that this
    /// works while the store is away: the lease then stays, and routes are removed in the networks that `subnet.env`
    /// and the record beside it name.
    ///
    /// Two things are known only from the store's configuration. Without it, routes in
    /// [`Backend::slots`](crate::backend::Backend::slots) stay. Without it or without an uplink, a marked TUN device of
    /// another program ([`LinkKind::External`](crate::kernel::LinkKind::External)) is deleted like one of the overlay.
    ///
    /// # Errors
    /// [`OverlayError::Kernel`] with [`KernelError::Conflict`] while the agent runs: nothing was changed.
    /// [`OverlayError::Teardown`] and [`OverlayError::SubnetEnv`] if something is left: run it again.
    ///
    /// # Cancel safety
    /// May be dropped at any await; objects deleted until then stay deleted.
    pub async fn remove(&self) -> Result<Removed, OverlayError> {
        let seams = self.aside();
        removal::remove(&seams, &seams.up_to_date(&self.0.settings), &self.0.backends, removal::Mode::Remove).await
    }

    /// Returns what [`remove`](Self::remove) would remove. Writes to neither the kernel nor the store.
    ///
    /// # Errors
    /// As [`remove`](Self::remove): while the agent runs, nothing would be removed.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub async fn preview_removal(&self) -> Result<Removed, OverlayError> {
        let seams = self.aside();
        removal::remove(&seams, &seams.up_to_date(&self.0.settings), &self.0.backends, removal::Mode::Preview).await
    }

    /// Runs the agent until `stop` completes, then ends as the returned [`Teardown`] says. The run begins when the
    /// future is first polled; [`spawn`](Self::spawn) begins one at once.
    ///
    /// The kernel is written only after the store has listed all leases. Temporary errors of the store or the kernel
    /// are retried and shown in the status, and leave the data plane as it is.
    ///
    /// # Errors
    /// [`OverlayError::AlreadyRunning`] while another run goes on, which is not affected. Other errors are permanent:
    /// everything is kept, see [`Teardown`]. A panic of the agent is returned as an error too.
    ///
    /// # Cancel safety
    /// Dropping the future stops the agent as a crash would: the next run takes over the kernel objects, and may begin
    /// at once. Handles see that this run has ended. For an orderly end use `stop`, which takes at most two seconds
    /// with [`Teardown::Keep`]. [`Teardown::Remove`] takes as long as the kernel needs, and at most ten seconds more if
    /// the store is away; a start that is stopped before it has claimed the overlay's name removes nothing.
    pub async fn run(&self, stop: impl Future<Output = Teardown>) -> Result<(), OverlayError> {
        let turn = self.begin()?;
        self.live(turn, stop).await
    }

    /// Begins a run on a task of its own. When this returns, the status is already the fresh one of this run.
    ///
    /// # Errors
    /// [`OverlayError::AlreadyRunning`] while another run goes on, which is not affected. [`OverlayError::NoRuntime`]
    /// outside of a tokio runtime.
    pub fn spawn(&self) -> Result<Running, OverlayError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| OverlayError::NoRuntime)?;
        let turn = self.begin()?;
        let (stop, stopped) = oneshot::channel();
        let stop_asked = async {
            match stopped.await {
                Ok(teardown) => teardown,
                // `Running` was dropped, and this run with it.
                Err(_) => std::future::pending().await,
            }
        };
        let overlay = self.clone();
        let life = async move { overlay.live(turn, stop_asked).await };
        Ok(Running::start(&runtime, self.handle(), stop, life.boxed()))
    }

    fn begin(&self) -> Result<Turn, OverlayError> {
        self.0.shared.begin(fresh(&self.0.settings)).ok_or(OverlayError::AlreadyRunning)
    }

    async fn live(&self, turn: Turn, stop: impl Future<Output = Teardown>) -> Result<(), OverlayError> {
        let Parts { settings, backends, shared, .. } = &*self.0;
        let seams = self.seams(shared.status.clone(), shared.events.clone());
        let span = tracing::info_span!("flannel", overlay = settings.name.as_str());
        let life = async move {
            // After a panic, the remaining state is either dropped or behind locks that ignore poisoning.
            let agent = AssertUnwindSafe(agent(&seams, settings, backends, shared, stop)).catch_unwind();
            let outcome = agent.await.unwrap_or_else(|panic| {
                let message = panic.downcast_ref::<String>().map(String::as_str);
                let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
                Err(OverlayError::Panicked { message: message.unwrap_or("without a message").to_owned() })
            });
            turn.end(match &outcome {
                Ok(()) => End::Stopped,
                Err(OverlayError::Panicked { message }) => End::Panicked(message.clone()),
                Err(error) => End::Failed(chain(error)),
            });
            outcome
        };
        life.instrument(span).await
    }
}

/// The initial status of a run.
fn fresh(settings: &Settings) -> Status {
    let subnet_env = if settings.subnet_env.is_some() { EnvFile::Pending { error: None } } else { EnvFile::Settled };
    Status { subnet_env, ..Status::default() }
}

async fn agent(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    shared: &Shared,
    stop: impl Future<Output = Teardown>,
) -> Result<(), OverlayError> {
    let mut stop = pin!(stop);
    let Some(Started { surveyed, claims, lease }) = begin(seams, settings, backends, stop.as_mut()).await? else {
        return Ok(());
    };
    let Claims { present: claim, former } = claims;
    let (former, former_claims): (Vec<_>, Vec<_>) = former.into_iter().unzip();
    let Surveyed { settings, backend, context, read, want, .. } = surveyed;
    let is_new = context.previous.is_none();
    let local = LocalNode { lease: Arc::new(lease), context };
    let now = seams.clock.now();
    let status = Status::clone(&seams.status.borrow());
    let mut machine = Machine::new(Arc::clone(&settings), backend, local, status, now, seams.jitter.clone());
    if now.since(read) > FRESH {
        machine.doubt_host();
    }
    machine.look_after(former.iter().flat_map(|networks| networks.iter()).map(|(_, network)| *network).collect());
    let (asker, questions) = mpsc::channel(QUESTIONS);
    let mut driver = Driver::new(seams, backends, settings, machine, questions, former_claims, want.foreign);
    shared.answer_at(Some(asker));
    let outcome = driver.until(stop).await;
    shared.answer_at(None);
    if let (true, Err(OverlayError::Kernel(KernelError::Denied { .. } | KernelError::Unsupported { .. }))) =
        (is_new, &outcome)
    {
        // Only a first round ends like this: the new lease is of no use to this node.
        driver.give_back().await;
    }
    // After an end by itself everything is kept.
    let ended = driver.finish(*outcome.as_ref().unwrap_or(&Teardown::Keep)).await;
    drop(claim);
    // The error that ended the agent takes precedence over an error of the end.
    outcome.map(drop).and(ended)
}

/// Runs the start. If stopped meanwhile, carries out the teardown and returns `None`.
async fn begin(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    stop: Pin<&mut impl Future<Output = Teardown>>,
) -> Result<Option<Started>, OverlayError> {
    let progress = Progress::default();
    let mut starting = pin!(start::start(seams, settings, backends, &progress));
    let teardown = tokio::select! {
        biased;
        teardown = stop => teardown,
        started = &mut starting => return started.map(Some),
    };
    if let (Teardown::Remove, Some(claimed)) = (teardown, progress.claimed()) {
        let started = match progress.is_asking() {
            true => removal::in_time(seams, &mut starting).await.and_then(Result::ok),
            false => None,
        };
        let lease = started.as_ref().map(|started| started.lease.clone());
        removal::undo_start(seams, settings, &claimed, lease).await?;
        // The claim on the overlay's name is held until everything is removed.
        drop(started);
    }
    Ok(None)
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
        let overlay = builder.build(Arc::new(store), Arc::new(FakeKernel::new())).unwrap();
        let handle = overlay.handle();
        let (asker, mut questions) = mpsc::channel(QUESTIONS);
        overlay.0.shared.answer_at(Some(asker));
        let mut asked: Vec<_> = (0..QUESTIONS + 7).map(|_| Box::pin(handle.plan())).collect();
        assert!(asked.iter_mut().all(|asked| asked.now_or_never().is_none()));
        assert_eq!(questions.len(), QUESTIONS);
        // A waiting caller gets a place as soon as one is free.
        questions.try_recv().unwrap();
        assert!(asked.iter_mut().skip(QUESTIONS).all(|asked| asked.now_or_never().is_none()));
        assert_eq!(questions.len(), QUESTIONS);
    }
}
