//! The thin shell around the machine: it waits, and carries calls out and answers in.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, pending};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use crate::kernel::{Hint, Kernel, KernelError, Scope};
use crate::lease::LeaseEvent;
use crate::overlay::env::EnvKeeper;
use crate::overlay::handle::{HandleError, Preview, Question};
use crate::overlay::machine::{KernelCall, Machine, Wake};
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::status::Phase;
use crate::overlay::tenure::StoreCall;
use crate::overlay::{Settings, Teardown, chain, explain, removal, view};
use crate::state::State;
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager};

/// How long an end waits for the round under way (faults.md, P3: an exit takes at most 2 s).
const GRACE: Duration = Duration::from_millis(1500);
/// How many store events are taken in before the machine is asked what to do: a burst becomes one round.
const INTAKE: usize = 4096;
/// How often a removal looks again at what is left before it gives up.
const REMOVALS: usize = 5;
/// How long it waits before it does.
const REMOVAL_SPACING: Duration = Duration::from_millis(100);

type Slot<T> = Option<BoxFuture<'static, T>>;

/// What was seen in a scope, for whoever asked for a preview.
struct Looked {
    scope: Scope,
    seen: Result<State, KernelError>,
    answer: oneshot::Sender<Result<Preview, HandleError>>,
}

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
    store: Slot<Wake>,
    preview: Slot<Looked>,
    env: EnvKeeper,
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
            env: EnvKeeper::new(&settings),
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
            let deadline = [self.machine.deadline(), self.env.deadline()].into_iter().flatten().min();
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
                wake = finished(&mut self.store) => wake,
                // Merged as they are, hints cannot keep the store waiting; a busy store could keep them.
                Some(hint) = self.hints.next() => Wake::Hint(hint),
                Some(event) = self.watch.next() => {
                    self.intake(event);
                    continue;
                }
                looked = finished(&mut self.preview) => {
                    self.looked(looked);
                    continue;
                }
                outcome = self.env.finished() => {
                    let file = self.env.ended(self.seams.clock.now(), outcome);
                    self.seams.status.send_if_modified(|status| {
                        let before = std::mem::replace(&mut status.subnet_env, file);
                        before != status.subnet_env
                    });
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

    /// Ends in order: the round under way may finish within the grace, then the teardown policy is carried out.
    pub(crate) async fn finish(mut self) -> Result<(), OverlayError> {
        if self.kernel.is_some() {
            let grace = self.seams.clock.sleep_until(self.seams.clock.now().after(GRACE));
            tokio::select! {
                _ = finished(&mut self.kernel) => {}
                () = grace => tracing::warn!("the round under way was cut off"),
            }
        }
        if self.env.is_busy() {
            // It runs in a thread of its own: what it writes must not come after what follows.
            let _ = self.env.finished().await;
        }
        match self.settings.teardown {
            Teardown::Keep => Ok(()),
            Teardown::Remove => self.remove().await,
        }
    }

    /// Gives the lease back, if the store answers soon. Where it does not the lease runs out by itself.
    pub(crate) async fn give_back(&mut self) {
        let Some(lease) = self.machine.held_lease() else { return };
        let patience = self.seams.clock.sleep_until(self.seams.clock.now().after(GRACE));
        let trouble = tokio::select! {
            released = self.seams.subnets.release((**lease).clone()) => released.err().map(|error| chain(&error)),
            () = patience => Some(format!("the lease store did not answer within {GRACE:?}")),
        };
        if let Some(error) = trouble {
            tracing::warn!(error, "the lease was not given back");
        }
    }

    /// Removes what is ours, as seen by complete looks, then gives the lease back.
    async fn remove(&mut self) -> Result<(), OverlayError> {
        let cleared = self.clear().await;
        removal::delete_env(&self.settings);
        let released = match self.machine.held_lease() {
            Some(lease) => self.seams.subnets.release((**lease).clone()).await.map_err(OverlayError::Store),
            None => Ok(()),
        };
        cleared.and(released)
    }

    async fn clear(&mut self) -> Result<(), OverlayError> {
        let scope = self.machine.scope().clone();
        let mut outcome = Ok(());
        for round in 0..REMOVALS {
            if round > 0 {
                self.seams.clock.sleep_until(self.seams.clock.now().after(REMOVAL_SPACING)).await;
            }
            let seen = match self.seams.kernel.observe(&scope).await {
                Ok(seen) => seen,
                Err(error) => {
                    outcome = Err(error.into());
                    continue;
                }
            };
            let plan = self.machine.removal(&seen);
            if plan.is_empty() {
                return Ok(());
            }
            outcome = Err(OverlayError::Teardown(plan.ops.len()));
            if self.seams.kernel.apply(&scope, Arc::new(plan)).await.is_complete() {
                return Ok(());
            }
        }
        outcome
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
        self.keep_env();
    }

    /// Has `subnet.env` say what is true, once the devices are there.
    fn keep_env(&mut self) {
        let Some(masquerade) = self.env.file().map(|file| file.masquerade) else { return };
        if self.seams.status.borrow().phase < Phase::DeviceReady {
            return self.env.wait();
        }
        let wanted = view::subnet_env(&**self.machine.backend(), self.machine.local(), masquerade);
        self.env.keep(self.seams.clock.now(), wanted);
    }

    fn publish(&mut self) {
        for event in self.machine.take_events() {
            self.seams.tell(event);
        }
        self.seams.journal().settle(self.seams.clock.now());
    }

    fn question(&mut self, question: Question) {
        // Whoever asked may have gone: not an error.
        match question {
            Question::Explain(query, answer) => drop(answer.send(explain::explain(&self.machine, &query))),
            Question::Peers(answer) => drop(answer.send(self.machine.admission().peers().cloned().collect())),
            Question::Plan(answer) if !self.machine.is_synced() => drop(answer.send(Err(HandleError::NotSynced))),
            Question::Plan(answer) => self.look(answer),
        }
    }

    fn look(&mut self, answer: oneshot::Sender<Result<Preview, HandleError>>) {
        let (kernel, scope) = (Arc::clone(&self.seams.kernel), self.machine.scope().clone());
        self.preview = Some(
            async move {
                let seen = kernel.observe(&scope).await;
                Looked { scope, seen, answer }
            }
            .boxed(),
        );
    }

    fn looked(&mut self, Looked { scope, seen, answer }: Looked) {
        if scope != *self.machine.scope() {
            // What was seen is in the words of another scope.
            return self.look(answer);
        }
        let preview = seen.map(|seen| self.machine.preview(&seen, self.seams.clock.now()));
        // Whoever asked may have gone: not an error.
        let _ = answer.send(preview.map_err(HandleError::Kernel));
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
        KernelCall::Facts => Wake::Facts(kernel.host_facts().instrument(tracing::debug_span!("facts")).await),
        KernelCall::Observe(scope) => {
            let span = tracing::debug_span!("look", routes = Empty, neighbours = Empty, fdb = Empty);
            let look = async {
                let seen = kernel.observe(&scope).await;
                if let Ok(State { routes, neighbours, fdb, .. }) = &seen {
                    let span = Span::current();
                    span.record("routes", routes.len()).record("neighbours", neighbours.len()).record("fdb", fdb.len());
                    tracing::debug!("looked at the kernel");
                }
                seen
            };
            Wake::Seen(look.instrument(span).await)
        }
        KernelCall::Apply(scope, plan) => {
            let span = tracing::debug_span!("write", ops = plan.ops.len(), applied = Empty, refused = Empty);
            let write = async {
                let report = kernel.apply(&scope, plan).await;
                Span::current().record("applied", report.applied).record("refused", report.refused.len());
                tracing::debug!("wrote to the kernel");
                report
            };
            Wake::Applied(write.instrument(span).await)
        }
    }
}

async fn store_call(subnets: Arc<dyn SubnetManager>, node: NodeIdentity, call: StoreCall) -> Wake {
    Wake::Lease(match call {
        StoreCall::Renew(lease) => subnets.renew(&lease).await,
        StoreCall::Acquire(want) => subnets.acquire(&node, want).await,
    })
}
