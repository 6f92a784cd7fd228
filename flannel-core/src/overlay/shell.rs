//! The thin shell around the machine: it waits, and carries calls out and answers in.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, pending};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
use crate::kernel::{Hint, Kernel, KernelError, Scope};
use crate::lease::{Lease, LeaseEvent};
use crate::overlay::backoff::{Backoff, Jitter};
use crate::overlay::handle::{Preview, Question};
use crate::overlay::machine::{KernelCall, Machine, Wake};
use crate::overlay::removal::{self, LastLease};
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::status::{EnvFile, Phase};
use crate::overlay::tenure::StoreCall;
use crate::overlay::{Settings, Teardown, chain, explain, view};
use crate::state::State;
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager};
use crate::subnet_env::SubnetEnv;

/// How long an end waits for the round under way (faults.md, P3: an exit takes at most 2 s).
const GRACE: Duration = Duration::from_millis(1500);
/// How many store events are taken in before the machine is asked what to do: a burst becomes one round.
const INTAKE: usize = 4096;

type Slot<T> = Option<BoxFuture<'static, T>>;
/// What the store says to a call about the own lease.
type Answer = Result<Lease, SubnetError>;
type Previewed = (Result<State, KernelError>, oneshot::Sender<Result<Preview, KernelError>>);

/// The machine and what is under way on its behalf.
pub(crate) struct Shell<'a> {
    seams: &'a Seams,
    settings: Arc<Settings>,
    machine: Machine,
    questions: mpsc::Receiver<Question>,
    watch: BoxStream<'static, Result<LeaseEvent, SubnetError>>,
    hints: BoxStream<'static, Hint>,
    /// The scope that hints are about.
    hinted: Scope,
    kernel: Slot<Wake>,
    store: Slot<Answer>,
    preview: Slot<Previewed>,
    env: Slot<Result<SubnetEnv, String>>,
    /// What `subnet.env` says, as far as we wrote it.
    written: Option<SubnetEnv>,
    /// When a write that failed is tried again.
    env_again: Option<BootTime>,
    env_backoff: Backoff,
}

impl<'a> Shell<'a> {
    pub(crate) fn new(
        seams: &'a Seams,
        settings: Arc<Settings>,
        machine: Machine,
        questions: mpsc::Receiver<Question>,
    ) -> Self {
        let hinted = machine.scope().clone();
        Self {
            // A stream that ends against its contract must not be asked again: some panic then.
            watch: seams.subnets.watch().fuse().boxed(),
            hints: seams.kernel.hints(&hinted).fuse().boxed(),
            hinted,
            kernel: None,
            store: None,
            preview: None,
            env: None,
            written: None,
            env_again: None,
            env_backoff: Backoff::new(Jitter::random()),
            seams,
            settings,
            machine,
            questions,
        }
    }

    /// Carries wakes in and calls out until cancelled.
    pub(crate) async fn until(&mut self, cancel: &CancellationToken) -> Result<(), OverlayError> {
        loop {
            self.issue();
            self.publish();
            if let Some(error) = self.machine.take_fatal() {
                return Err(OverlayError::Kernel(error));
            }
            if self.machine.must_stop() {
                return Err(OverlayError::LeaseLost);
            }
            let deadline = [self.machine.deadline(), self.env_again].into_iter().flatten().min();
            let clock = Arc::clone(&self.seams.clock);
            let timer = async move {
                match deadline {
                    Some(deadline) => clock.sleep_until(deadline).await,
                    None => pending().await,
                }
            };
            let wake = tokio::select! {
                biased;
                () = cancel.cancelled() => return Ok(()),
                wake = finished(&mut self.kernel) => wake,
                answer = finished(&mut self.store) => Wake::Lease(answer),
                // Merged as they are, hints cannot keep the store waiting; a busy store could keep them.
                Some(hint) = self.hints.next() => Wake::Hint(hint),
                Some(event) = self.watch.next() => {
                    self.intake(event);
                    continue;
                }
                (seen, answer) = finished(&mut self.preview) => {
                    // Whoever asked may have gone: not an error.
                    let _ = answer.send(seen.map(|seen| self.previewed(&seen)));
                    continue;
                }
                env = finished(&mut self.env) => {
                    self.env_written(env);
                    continue;
                }
                // One look at a time: another would leave the first one's asker without an answer.
                Some(question) = self.questions.recv(), if self.preview.is_none() => {
                    self.question(question);
                    continue;
                }
                () = timer => Wake::Timer,
            };
            self.machine.handle(self.seams.clock.now(), wake);
        }
    }

    /// Ends in order: what is under way may finish within the grace, then the teardown policy is carried out.
    pub(crate) async fn finish(mut self) -> Result<(), OverlayError> {
        let grace = self.seams.clock.sleep_until(self.seams.clock.now().after(GRACE));
        let rest = async {
            if self.kernel.is_some() {
                let _ = finished(&mut self.kernel).await;
            }
            if self.env.is_some() {
                let _ = finished(&mut self.env).await;
            }
        };
        tokio::select! {
            () = rest => {}
            () = grace => tracing::warn!("what was under way was cut off"),
        }
        // What was cut off must not go on beside what follows.
        (self.kernel, self.env, self.preview) = (None, None, None);
        match self.settings.teardown {
            Teardown::Keep => Ok(()),
            Teardown::Remove => self.remove().await,
        }
    }

    /// Removes what is ours, then gives the lease back.
    async fn remove(&mut self) -> Result<(), OverlayError> {
        let scope = self.machine.scope().clone();
        let clearing = removal::clear(self.seams, &scope, |seen| self.machine.removal(seen));
        let (cleared, answer) = tokio::join!(clearing, last_answer(self.seams, self.store.take()));
        let env = removal::delete_env(self.seams, &self.settings).await;
        let unknown = matches!(answer, Some(Err(SubnetError::Unavailable { .. })));
        if let Some(answer) = answer {
            self.machine.handle(self.seams.clock.now(), Wake::Lease(answer));
        }
        let last = match self.machine.held_lease() {
            _ if unknown => LastLease::Unknown,
            Some(lease) => LastLease::Held((**lease).clone()),
            None => LastLease::NotHeld,
        };
        let released = removal::release(self.seams, &self.machine.local().situation, last).await;
        cleared.map(drop).and(env.map(drop)).and(released)
    }

    /// Takes in what the store has ready, so that a burst becomes one round.
    fn intake(&mut self, first: Result<LeaseEvent, SubnetError>) {
        let now = self.seams.clock.now();
        self.machine.handle(now, Wake::Store(first));
        for _ in 1..INTAKE {
            let Some(Some(event)) = self.watch.next().now_or_never() else { return };
            self.machine.handle(now, Wake::Store(event));
        }
    }

    /// Starts the calls the machine asks for.
    fn issue(&mut self) {
        let now = self.seams.clock.now();
        if self.kernel.is_none() {
            let kernel = Arc::clone(&self.seams.kernel);
            self.kernel = self.machine.kernel_call(now).map(|call| kernel_call(kernel, call).boxed());
        }
        if self.store.is_none() {
            let (subnets, node) = (Arc::clone(&self.seams.subnets), self.machine.local().situation.node.clone());
            self.store = self.machine.store_call(now).map(|call| store_call(subnets, node, call).boxed());
        }
        if *self.machine.scope() != self.hinted {
            self.hinted = self.machine.scope().clone();
            self.hints = self.seams.kernel.hints(&self.hinted).fuse().boxed();
        }
        self.issue_env();
    }

    /// Starts to write `subnet.env` if the devices are there and it does not say what is true.
    fn issue_env(&mut self) {
        let Some(file) = &self.settings.subnet_env else { return };
        let now = self.seams.clock.now();
        if self.env.is_some() || self.env_again.is_some_and(|again| again > now) {
            return;
        }
        // Its time has come, whether it can be written now or not: the timer must not wait for it again.
        self.env_again = None;
        if self.seams.status.borrow().phase < Phase::DeviceReady {
            return;
        }
        let local = self.machine.local();
        let wanted = view::subnet_env(&**self.machine.backend(), local, file.masquerade);
        if self.written.as_ref() == Some(&wanted) {
            return;
        }
        let path = file.path.clone();
        let write = tokio::task::spawn_blocking(move || wanted.write(&path).map(|()| wanted));
        self.env = Some(
            async move {
                match write.await {
                    Ok(outcome) => outcome.map_err(|error| chain(&error)),
                    Err(error) => Err(chain(&error)),
                }
            }
            .boxed(),
        );
    }

    fn env_written(&mut self, outcome: Result<SubnetEnv, String>) {
        match outcome {
            Ok(env) => {
                tracing::info!(subnet = ?env.subnets.v4, subnet6 = ?env.subnets.v6, "subnet.env written");
                self.env_backoff.reset();
                self.written = Some(env);
                self.seams.status.send_modify(|status| status.subnet_env = EnvFile::Settled);
            }
            Err(error) => {
                let now = self.seams.clock.now();
                self.env_again = Some(now.after(self.env_backoff.next()));
                let fresh = self.seams.status.borrow().last_error.as_ref() != Some(&error);
                if fresh {
                    tracing::warn!(error, "subnet.env was not written");
                }
                self.seams.status.send_modify(|status| {
                    (status.subnet_env, status.last_error) = (EnvFile::Pending, Some(error));
                });
            }
        }
    }

    fn publish(&mut self) {
        for event in self.machine.take_events() {
            tracing::debug!(?event);
            // Nobody listens: not an error.
            let _ = self.seams.events.send(event);
        }
    }

    fn question(&mut self, question: Question) {
        // Whoever asked may have gone: not an error.
        match question {
            Question::Explain(query, answer) => drop(answer.send(explain::explain(&self.machine, &query))),
            Question::Peers(answer) => drop(answer.send(self.machine.admission().peers().cloned().collect())),
            Question::Plan(answer) => {
                let (kernel, scope) = (Arc::clone(&self.seams.kernel), self.machine.scope().clone());
                self.preview = Some(async move { (kernel.observe(&scope).await, answer) }.boxed());
            }
        }
    }

    fn previewed(&self, seen: &State) -> Preview {
        let plan = self.machine.preview(seen, self.seams.clock.now());
        Preview { plan, scope: self.machine.scope().clone() }
    }
}

/// The result of what is under way in `slot`, which is then empty. Dropped midway it loses nothing.
async fn finished<T>(slot: &mut Slot<T>) -> T {
    match slot {
        Some(future) => {
            let value = future.await;
            *slot = None;
            value
        }
        None => pending().await,
    }
}

async fn kernel_call(kernel: Arc<dyn Kernel>, call: KernelCall) -> Wake {
    match call {
        KernelCall::Facts(reach) => Wake::Facts(kernel.host_facts(&reach).await),
        KernelCall::Observe(scope) => Wake::Seen(kernel.observe(&scope).await),
        KernelCall::Apply(scope, plan) => Wake::Applied(kernel.apply(&scope, plan).await),
    }
}

async fn store_call(subnets: Arc<dyn SubnetManager>, node: NodeIdentity, call: StoreCall) -> Answer {
    match call {
        StoreCall::Renew(lease) => subnets.renew(&lease).await,
        StoreCall::Acquire(want) => subnets.acquire(&node, want).await,
    }
}

/// The answer to a call that is under way at the end: it may give a lease, or another fence to release it by.
async fn last_answer(seams: &Seams, call: Slot<Answer>) -> Option<Answer> {
    Some(removal::patiently(seams, "waiting for a call under way", call?).await)
}
