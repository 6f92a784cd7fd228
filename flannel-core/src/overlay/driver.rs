//! The loop around the decision core: it waits for inputs, passes them in, and carries out calls.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, pending};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::field::Empty;
use tracing::{Instrument, Span, debug_span};

use crate::agent::{
    Input, KernelCall, Machine, PeerList, Phase, Preview, Settings, StoreCall, Teardown, explain, inputs,
};
use crate::backoff::Backoff;
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::kernel::{Claim, Hint, Kernel, KernelError, Scope, State};
use crate::lease::{Lease, LeaseEvent, LeaseKey};
use crate::overlay::builder::Factory;
use crate::overlay::env_file::EnvKeeper;
use crate::overlay::former_networks::Retention;
use crate::overlay::handle::{HandleError, QUESTIONS, Question};
use crate::overlay::removal::{self, LastLease};
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::start::acquire;
use crate::overlay::survey;
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use crate::text::chain;
use crate::uplink::Select;

/// How long an orderly end waits for the round under way (docs/faults.md, P3).
const GRACE: Duration = Duration::from_millis(1500);
/// How many store events are handled before the machine is asked for calls: a burst becomes one round.
const INTAKE: usize = 4096;

type Slot<T> = Option<BoxFuture<'static, T>>;
/// The answer of the store to a call about this node's lease.
type Answer = Result<Lease, SubnetError>;

/// The shortest time between two observations for previews, so that repeated requests use a bounded share of a core.
const LOOK_SPACING: Duration = Duration::from_millis(200);

/// The sender for the answer to a request for a preview.
type Asker = oneshot::Sender<Result<Preview, HandleError>>;

/// The state seen in a scope, and the requests that came before the observation began.
struct Looked {
    scope: Scope,
    seen: Result<State, KernelError>,
    askers: Vec<Asker>,
}

/// The decision core and its calls under way.
pub(crate) struct Driver<'a> {
    seams: &'a Seams,
    backends: &'a [(&'static str, Factory)],
    settings: Arc<Settings>,
    machine: Machine,
    questions: mpsc::Receiver<Question>,
    /// How the uplink is chosen.
    uplink: watch::Receiver<Select>,
    watch: BoxStream<'static, Result<LeaseEvent, SubnetError>>,
    /// The back-off between watches that end, although a watch should not end.
    watch_backoff: Backoff,
    hints: BoxStream<'static, Hint>,
    /// The scope of the hints.
    hinted: Scope,
    kernel: Slot<Input>,
    store: Slot<Answer>,
    config: Slot<Result<NetworkConfig, SubnetError>>,
    /// Other nodes' leases under this node's identity, if the start found any.
    foreign: BTreeSet<LeaseKey>,
    preview: Slot<Looked>,
    /// Requests that wait for the next observation, at most as many as questions may wait.
    askers: Vec<Asker>,
    /// When the next observation for a preview may begin.
    next_look: BootTime,
    env: EnvKeeper,
    /// Claims on former networks, held until no objects of the overlay are left there.
    former: Vec<Claim>,
}

impl<'a> Driver<'a> {
    pub(crate) fn new(
        seams: &'a Seams,
        backends: &'a [(&'static str, Factory)],
        settings: Arc<Settings>,
        machine: Machine,
        questions: mpsc::Receiver<Question>,
        former: Vec<Claim>,
        foreign: BTreeSet<LeaseKey>,
    ) -> Self {
        let hinted = machine.scope().clone();
        let mut uplink = seams.uplink.clone();
        if *uplink.borrow_and_update() != settings.uplink {
            // The selection changed during the last step of the start.
            uplink.mark_changed();
        }
        Self {
            uplink,
            watch: seams.subnets.watch(),
            watch_backoff: Backoff::new(seams.jitter.clone()),
            hints: seams.kernel.hints(&hinted).fuse().boxed(),
            hinted,
            kernel: None,
            store: None,
            config: None,
            foreign,
            preview: None,
            askers: Vec::new(),
            next_look: seams.clock.now(),
            env: EnvKeeper::new(&settings, seams.jitter.clone(), seams.files.access()),
            seams,
            backends,
            settings,
            machine,
            questions,
            former,
        }
    }

    /// Returns an error for a configuration that no backend can run: an agent that restarted for it would not start.
    fn usable(&self, answer: Result<NetworkConfig, SubnetError>) -> Result<NetworkConfig, SubnetError> {
        let config = answer?;
        let picked = survey::pick(self.backends, &config);
        let reject = |error| SubnetError::Invalid { at: "network configuration".to_owned(), reason: chain(&error) };
        picked.map(|_| config).map_err(reject)
    }

    /// Handles inputs and carries out calls until stopped.
    pub(crate) async fn until(
        &mut self,
        mut stop: Pin<&mut impl Future<Output = Teardown>>,
    ) -> Result<Teardown, OverlayError> {
        loop {
            self.issue();
            self.publish();
            if let Some(error) = self.machine.take_fatal() {
                return Err(OverlayError::Kernel(error));
            }
            if self.machine.must_stop() {
                return Err(OverlayError::LeaseLost);
            }
            if self.machine.is_outdated() {
                return Err(OverlayError::Reconfigured);
            }
            let look = (self.preview.is_none() && !self.askers.is_empty()).then_some(self.next_look);
            let deadline = [self.machine.deadline(), self.env.deadline(), look].into_iter().flatten().min();
            let clock = Arc::clone(&self.seams.clock);
            let timer = async move {
                match deadline {
                    Some(deadline) => clock.sleep_until(deadline).await,
                    None => pending().await,
                }
            };
            let input = tokio::select! {
                biased;
                teardown = &mut stop => return Ok(teardown),
                Ok(()) = self.uplink.changed() => Input::Uplink(self.uplink.borrow_and_update().clone()),
                input = finished(&mut self.kernel) => input,
                answer = finished(&mut self.store) => Input::Lease(answer),
                answer = finished(&mut self.config) => Input::Config(self.usable(answer)),
                // Hints are merged, so polling them first cannot starve the store; a busy store could starve them.
                Some(hint) = self.hints.next() => Input::Hint(hint),
                event = self.watch.next() => {
                    self.intake(event);
                    continue;
                }
                looked = finished(&mut self.preview) => {
                    self.looked(looked);
                    continue;
                }
                outcome = self.env.finished() => {
                    Input::EnvFile(self.env.ended(self.seams.clock.now(), outcome))
                }
                () = timer => Input::Timer,
                // Polled last: questions may follow each other without a pause.
                Some(question) = self.questions.recv(), if self.askers.len() < QUESTIONS => {
                    self.question(question);
                    continue;
                }
            };
            self.machine.handle(self.seams.clock.now(), input);
        }
    }

    /// Ends in order: calls under way may finish within the grace period, then the teardown is carried out.
    pub(crate) async fn finish(mut self, teardown: Teardown) -> Result<(), OverlayError> {
        // Waiting questions, and those that wait for a place in the queue, fail at once.
        self.questions.close();
        while self.questions.try_recv().is_ok() {}
        let grace = self.seams.clock.sleep_until(self.seams.clock.now().after(GRACE));
        let rest = async {
            if self.kernel.is_some() {
                let _ = finished(&mut self.kernel).await;
            }
            if self.env.is_busy() {
                let _ = self.env.finished().await;
            }
        };
        tokio::select! {
            () = rest => {}
            () = grace => tracing::warn!(
                target: "flannel::agent",
                "stopped before a call to the kernel or the lease store was answered"
            ),
        }
        // Calls that did not finish are dropped, so that they do not run beside the teardown.
        (self.kernel, self.preview, self.config) = (None, None, None);
        self.askers.clear();
        self.env.cut();
        match teardown {
            Teardown::Keep => Ok(()),
            Teardown::Remove => self.remove().await,
        }
    }

    /// Releases the lease of a start that failed later. If the store does not answer, the lease expires by itself.
    pub(crate) async fn give_back(&mut self) {
        let Some(lease) = self.machine.held_lease() else { return };
        let last = LastLease::Held((**lease).clone());
        let (local, published) = (self.machine.local(), self.published());
        match removal::release(self.seams, &local.context, &published, last).await {
            Ok(()) => self.show_given_back(),
            Err(error) => {
                tracing::warn!(
                    target: "flannel::lease",
                    error = chain(&error),
                    "cannot release the lease; it expires by itself"
                )
            }
        }
    }

    fn show_given_back(&mut self) {
        self.machine.lease_given_back();
        self.publish();
    }

    /// What this node publishes, and the leases that belong to other nodes.
    fn published(&self) -> Want {
        Want::new(self.machine.local().lease.attrs.clone()).leaving_alone(self.foreign.clone())
    }

    /// Removes the overlay's objects, then releases the lease.
    async fn remove(&mut self) -> Result<(), OverlayError> {
        self.machine.include_all_former_networks();
        let scope = self.machine.scope().clone();
        let clearing = removal::clear(self.seams, &scope, |seen| self.machine.removal(seen));
        let (cleared, answer) = tokio::join!(clearing, last_answer(self.seams, self.store.take()));
        let retention = if cleared.is_ok() { Retention::Delete } else { Retention::Keep };
        let env = removal::delete_env(self.seams, &self.settings, retention).await;
        let unknown = matches!(answer, Some(Err(SubnetError::Unavailable { .. })));
        if let Some(answer) = answer {
            self.machine.handle(self.seams.clock.now(), Input::Lease(answer));
            self.publish();
        }
        let last = match self.machine.held_lease().map(|lease| Lease::clone(lease)) {
            held if unknown => LastLease::Unknown(held),
            Some(lease) => LastLease::Held(lease),
            None => LastLease::NotHeld,
        };
        let (local, published) = (self.machine.local(), self.published());
        let released = removal::release(self.seams, &local.context, &published, last).await;
        if released.is_ok() {
            self.show_given_back();
        }
        cleared.map(drop).and(env.map(drop)).and(released)
    }

    /// Handles all events that the watch has ready, so that a burst becomes one round.
    fn intake(&mut self, first: Option<Result<LeaseEvent, SubnetError>>) {
        let now = self.seams.clock.now();
        let mut next = Some(first);
        for left in (0..INTAKE).rev() {
            match next {
                Some(Some(event)) => {
                    if event.is_ok() {
                        self.watch_backoff.reset();
                    }
                    self.machine.handle(now, Input::Store(event));
                }
                Some(None) => return self.watch_again(),
                None => return,
            }
            // An event that was taken from the watch has to be handled.
            next = if left > 0 { self.watch.next().now_or_never() } else { None };
        }
    }

    /// Opens another watch after one has ended. A watch should not end, but otherwise the agent would never receive
    /// another event.
    fn watch_again(&mut self) {
        let ended = SubnetError::Unavailable { doing: "watching", source: "the watch ended".into() };
        self.machine.handle(self.seams.clock.now(), Input::Store(Err(ended)));
        let (clock, subnets) = (Arc::clone(&self.seams.clock), Arc::clone(&self.seams.subnets));
        let due = clock.now().after(self.watch_backoff.wait());
        let watch = async move {
            clock.sleep_until(due).await;
            subnets.watch()
        };
        self.watch = watch.flatten_stream().boxed();
    }

    /// Starts the calls that the machine asks for.
    fn issue(&mut self) {
        let now = self.seams.clock.now();
        if self.kernel.is_none() {
            let kernel = Arc::clone(&self.seams.kernel);
            self.kernel = self.machine.kernel_call(now).map(|call| kernel_call(kernel, call).boxed());
        }
        if self.store.is_none() {
            let (subnets, context) = (Arc::clone(&self.seams.subnets), &self.machine.local().context);
            let (node, config) = (context.node.clone(), Arc::clone(&context.config));
            self.store = self.machine.store_call(now).map(|call| {
                let call = match call {
                    StoreCall::Acquire(want) => StoreCall::Acquire(want.leaving_alone(self.foreign.clone())),
                    renewal @ StoreCall::Renew(_) => renewal,
                };
                store_call(subnets, node, config, call).boxed()
            });
        }
        if self.config.is_none() && self.machine.config_call(now) {
            let subnets = Arc::clone(&self.seams.subnets);
            self.config = Some(async move { subnets.network_config().await }.boxed());
        }
        if *self.machine.scope() != self.hinted {
            self.hinted = self.machine.scope().clone();
            self.hints = self.seams.kernel.hints(&self.hinted).fuse().boxed();
        }
        if self.machine.take_relist(now) {
            self.watch = self.seams.subnets.watch();
        }
        if !self.machine.has_former() {
            self.former.clear();
        }
        if self.preview.is_none() && self.next_look <= now {
            self.look();
        }
        self.keep_env();
    }

    /// Keeps `subnet.env` up to date once the devices exist.
    fn keep_env(&mut self) {
        let Some(masquerade) = self.env.file().map(|file| file.masquerade) else { return };
        if !self.machine.status().phase.has_reached(Phase::DeviceReady) {
            return self.env.wait();
        }
        let retention = if self.machine.has_former() { Retention::Keep } else { Retention::Delete };
        let wanted = inputs::subnet_env(&**self.machine.backend(), self.machine.local(), masquerade);
        self.env.keep(self.seams.clock.now(), wanted, retention);
    }

    /// Publishes the status, then the events: a reader of an event finds its effect in the status.
    fn publish(&mut self) {
        if let Some(status) = self.machine.take_status() {
            self.seams.status.set(status.clone());
        }
        for event in self.machine.take_events() {
            self.seams.tell(event);
        }
        self.seams.journal().settle(self.seams.clock.now());
    }

    fn question(&mut self, question: Question) {
        // Sending fails if the caller no longer waits: not an error.
        match question {
            Question::Explain(query, answer) => drop(answer.send(explain(&self.machine, &query))),
            Question::Peers(answer) if !self.machine.is_synced() => drop(answer.send(Err(HandleError::NotSynced))),
            Question::Records(answer) if !self.machine.is_synced() => drop(answer.send(Err(HandleError::NotSynced))),
            Question::Records(answer) => {
                self.machine.show_admitted(self.seams.clock.now());
                self.publish();
                drop(answer.send(Ok(PeerList::of(&self.machine))));
            }
            Question::Peers(answer) => {
                self.machine.show_admitted(self.seams.clock.now());
                // Publish first, so that the status is at least as new as the answer.
                self.publish();
                drop(answer.send(Ok(self.machine.admission().peers().cloned().collect())));
            }
            Question::Plan(answer) if !self.machine.is_synced() => drop(answer.send(Err(HandleError::NotSynced))),
            Question::Plan(answer) => self.askers.push(answer),
        }
    }

    /// Observes the kernel for waiting requests for a preview. They share one observation, which begins after all of
    /// them.
    fn look(&mut self) {
        let mut askers = std::mem::take(&mut self.askers);
        askers.retain(|asker| !asker.is_closed());
        if !askers.is_empty() {
            self.look_for(askers);
        }
    }

    fn look_for(&mut self, askers: Vec<Asker>) {
        let (kernel, scope) = (Arc::clone(&self.seams.kernel), self.machine.scope().clone());
        self.preview = Some(
            async move {
                let seen = kernel.observe(&scope).await;
                Looked { scope, seen, askers }
            }
            .boxed(),
        );
    }

    fn looked(&mut self, Looked { scope, seen, askers }: Looked) {
        if scope != *self.machine.scope() {
            // The scope has changed: ids in the observed state refer to the former one.
            return self.look_for(askers);
        }
        let now = self.seams.clock.now();
        self.next_look = now.after(LOOK_SPACING);
        let preview = seen.map(|seen| self.machine.preview(seen, now));
        for asker in askers {
            // Sending fails if the caller no longer waits: not an error.
            let _ = asker.send(preview.clone().map_err(HandleError::Kernel));
        }
    }
}

/// Waits for the call in `slot`, then empties the slot. Nothing is lost if the future is dropped.
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

async fn kernel_call(kernel: Arc<dyn Kernel>, call: KernelCall) -> Input {
    match call {
        KernelCall::Facts(reach) => Input::Facts(kernel.host_facts(&reach).instrument(debug_span!("facts")).await),
        KernelCall::Observe(scope) => {
            let span = debug_span!("look", routes = Empty, neighbours = Empty, fdb = Empty);
            let look = async {
                let seen = kernel.observe(&scope).await;
                if let Ok(State { routes, neighbours, fdb, .. }) = &seen {
                    let span = Span::current();
                    span.record("routes", routes.len()).record("neighbours", neighbours.len()).record("fdb", fdb.len());
                    tracing::debug!("looked at the kernel");
                }
                seen
            };
            Input::Seen(look.instrument(span).await)
        }
        KernelCall::Apply(scope, ops) => {
            let span = debug_span!("write", ops = ops.len(), applied = Empty, refused = Empty);
            let write = async {
                let report = kernel.apply(&scope, ops).await;
                Span::current().record("applied", report.applied).record("refused", report.refused.len());
                tracing::debug!("wrote to the kernel");
                report
            };
            Input::Applied(write.instrument(span).await)
        }
    }
}

async fn store_call(
    subnets: Arc<dyn SubnetManager>,
    node: NodeIdentity,
    config: Arc<NetworkConfig>,
    call: StoreCall,
) -> Answer {
    match call {
        StoreCall::Renew(lease) => subnets.renew(&lease).await,
        StoreCall::Acquire(want) => {
            // An error is left to `acquire`, which asks the store itself: the configuration may be a file of this host.
            match subnets.network_config().await {
                Ok(stored) if !config.is_same_overlay(&stored) => return Err(SubnetError::Reconfigured),
                Ok(_) | Err(_) => {}
            }
            acquire(&*subnets, &node, &config, want).await
        }
    }
}

/// Waits for the answer to a call under way at the end: it may contain a lease, or another fence to release it by.
async fn last_answer(seams: &Seams, call: Slot<Answer>) -> Option<Answer> {
    Some(removal::patiently(seams, "waiting for a call under way", call?).await)
}
