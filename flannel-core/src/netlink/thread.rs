//! The thread that owns the sockets.

use crate::backoff::{Backoff, Jitter};
use crate::kernel::{
    ApplyReport, Claim, DataPlane, Device, Hint, HostFacts, KernelError, LinkId, Op, OverlayName, Residence, Scope,
    State,
};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};

use super::apply::Applier;
use super::claim::claim;
use super::codec::Batch;
use super::facts::host_facts;
use super::monitor::Monitor;
use super::observe::{Seen, observe};
use super::pending_hints::PendingHints;
use super::plane::Plane;
use super::probe::probe;
use super::wire::Wire;
use crate::net::{Dual, Prefix};

/// The number of requests that can wait. Each has a caller that waits for it, so there are never many.
const QUEUE: usize = 16;

/// How long to wait before a failed read after an overrun is retried.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause: each subscription that fails soon doubles the pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

type Reply<T> = oneshot::Sender<Result<T, KernelError>>;

pub(crate) enum Command {
    Claim { overlay: OverlayName, networks: Dual<Prefix>, residence: Residence, reply: Reply<Claim> },
    Probe { devices: Vec<Device>, reply: Reply<()> },
    HostFacts { reach: Vec<IpAddr>, reply: Reply<HostFacts> },
    Observe { scope: Scope, reply: Reply<State> },
    Attach(Box<dyn DataPlane>),
    Apply { scope: Scope, ops: Arc<Vec<Op>>, reply: Reply<ApplyReport> },
}

/// A listener that the monitor does not have yet.
struct Subscription {
    scope: Scope,
    pending: Arc<PendingHints>,
    /// Whether it received the hint that there are no notifications for now.
    told: bool,
}

/// The state shared by both sides.
struct Shared {
    wake: EventFd,
    /// Whether the data plane's state has changed by itself.
    plane_changed: AtomicBool,
    /// `None` once the thread has ended.
    subscriptions: Mutex<Option<Vec<Subscription>>>,
}

/// The handle of the thread. Dropping it ends the thread after the current request.
pub(crate) struct Thread {
    commands: Option<mpsc::Sender<Command>>,
    shared: Arc<Shared>,
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts a thread in the caller's network namespace, or in the given one.
    pub(crate) fn start(namespace: Option<OwnedFd>) -> Result<Self, KernelError> {
        let failed = |reason: String| KernelError::Lost { doing: "starting the netlink thread".to_owned(), reason };
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| failed(errno.to_string()))?;
        let shared = Arc::new(Shared::new(wake, Some(Vec::new())));
        let (commands, receiver) = queue();
        let (started, ready) = std::sync::mpsc::channel();
        let theirs = Arc::clone(&shared);
        let handle = std::thread::Builder::new()
            .name("netlink".to_owned())
            .spawn(move || {
                let entered = namespace.map_or(Ok(()), |namespace| enter(&namespace));
                let go_on = entered.is_ok();
                // If this fails, the caller has gone, and the command channel is closed.
                let _ = started.send(entered);
                if go_on {
                    Worker::new(receiver, theirs).run();
                }
            })
            .map_err(|error| failed(error.to_string()))?;
        let thread = Self { commands: Some(commands), shared, handle: Some(handle) };
        match ready.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(KernelError::Stopped),
        }
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, KernelError> {
        let (reply, answer) = oneshot::channel();
        let commands = self.commands.as_ref().ok_or(KernelError::Stopped)?;
        commands.send(command(reply)).await.map_err(|_| KernelError::Stopped)?;
        self.shared.wake();
        answer.await.map_err(|_| KernelError::Stopped)?
    }

    /// Attaches a data plane. Call it before any request.
    pub(crate) fn attach(&self, plane: Box<dyn DataPlane>) -> Result<(), KernelError> {
        let commands = self.commands.as_ref().ok_or(KernelError::Stopped)?;
        commands.try_send(Command::Attach(plane)).map_err(|_| KernelError::Stopped)?;
        self.shared.wake();
        Ok(())
    }

    /// Subscribes `pending` to hints about `scope`.
    pub(crate) fn subscribe(&self, scope: Scope, pending: Arc<PendingHints>) {
        match &mut *self.shared.subscriptions.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(waiting) => waiting.push(Subscription { scope, pending, told: false }),
            None => pending.close(),
        }
        self.shared.wake();
    }
}

fn queue() -> (mpsc::Sender<Command>, mpsc::Receiver<Command>) {
    mpsc::channel(QUEUE)
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.commands = None;
        self.shared.wake();
        if let Some(handle) = self.handle.take() {
            // A panic on the thread was already reported; nothing else can be done here.
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn new(wake: EventFd, subscriptions: Option<Vec<Subscription>>) -> Self {
        Self { wake, plane_changed: AtomicBool::new(false), subscriptions: Mutex::new(subscriptions) }
    }

    fn wake(&self) {
        // It fails only if the counter is full, and then the thread is awake.
        let _ = self.wake.write(1);
    }
}

fn enter(namespace: &OwnedFd) -> Result<(), KernelError> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
        nix::errno::Errno::EPERM => KernelError::Denied {
            doing: "entering the network namespace".to_owned(),
            hint: "CAP_SYS_ADMIN is needed, here and in the user namespace that owns it".to_owned(),
        },
        errno => KernelError::Refused {
            doing: "entering the network namespace".to_owned(),
            errno: errno as i32,
            message: String::new(),
        },
    })
}

/// The state of the thread.
struct Worker {
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    wire: Wire,
    batch: Batch,
    monitor: Option<Monitor>,
    plane: Plane,
    /// Listeners without a monitor.
    unserved: Vec<Subscription>,
    /// When a monitor may be opened again.
    retry: Instant,
    backoff: Backoff,
    overlays: BTreeMap<OverlayName, Known>,
}

/// What is known of an overlay from its last observation.
#[derive(Default)]
struct Known {
    /// The devices that the IDs refer to.
    devices: Vec<Device>,
    /// The interface index of each ID.
    indices: BTreeMap<LinkId, u32>,
    /// The number of IPv4 routes in its territory.
    routes: usize,
}

impl Worker {
    fn new(commands: mpsc::Receiver<Command>, shared: Arc<Shared>) -> Self {
        let (wire, batch, overlays) = (Wire::new(), Batch::default(), BTreeMap::new());
        let (retry, backoff) = (Instant::now(), Backoff::up_to(LONGEST_PAUSE, Jitter::random()));
        Self {
            commands,
            shared,
            wire,
            batch,
            monitor: None,
            plane: Plane::default(),
            unserved: Vec::new(),
            retry,
            backoff,
            overlays,
        }
    }

    fn run(mut self) {
        loop {
            // Read this first: the poll below sees any later wake.
            let _ = self.shared.wake.read();
            self.take_subscriptions();
            self.listen();
            self.tell_of_plane();
            match self.commands.try_recv() {
                Ok(command) => self.serve(command),
                Err(TryRecvError::Empty) => self.wait(),
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.monitor.as_ref().map(|monitor| PollFd::new(monitor.as_fd(), PollFlags::POLLIN)));
        let stale = self.monitor.as_ref().is_some_and(Monitor::is_stale).then_some(RETRY_PAUSE);
        let unserved = (!self.unserved.is_empty()).then(|| self.retry.saturating_duration_since(Instant::now()));
        let timeout = match stale.into_iter().chain(unserved).min() {
            // Rounded up, so that it does not wake just before the time.
            Some(pause) => PollTimeout::try_from(pause + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        // The result does not matter: the loop checks everything.
        let _ = poll(&mut fds, timeout);
    }

    fn take_subscriptions(&mut self) {
        let new = match &mut *self.shared.subscriptions.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(waiting) => std::mem::take(waiting),
            None => return,
        };
        self.unserved.extend(new);
        self.unserved.retain(|subscription| Arc::strong_count(&subscription.pending) > 1);
        if self.unserved.is_empty() {
            return;
        }
        if self.monitor.is_none() && Instant::now() < self.retry {
            return self.tell_unserved();
        }
        let monitor = match self.monitor.take().map_or_else(Monitor::open, Ok) {
            Ok(monitor) => self.monitor.insert(monitor),
            Err(error) => {
                tracing::debug!(%error, "no kernel notifications");
                self.pause();
                return self.tell_unserved();
            }
        };
        for Subscription { scope, pending, told } in self.unserved.drain(..) {
            monitor.watch(scope, &pending);
            if told {
                // Changes in the meantime were missed.
                pending.raise(Hint::Lost);
            }
        }
        resync(monitor, &mut self.wire, &mut self.batch);
    }

    /// Sets a pause before the next monitor is opened. It grows while monitors keep failing.
    fn pause(&mut self) {
        let now = Instant::now();
        if now.saturating_duration_since(self.retry) > LONGEST_PAUSE {
            self.backoff.reset();
        }
        self.retry = now + self.backoff.wait();
    }

    fn tell_unserved(&mut self) {
        for subscription in self.unserved.iter_mut().filter(|subscription| !subscription.told) {
            subscription.told = true;
            subscription.pending.raise(Hint::SubscriptionBroken);
        }
    }

    fn tell_of_plane(&mut self) {
        if self.shared.plane_changed.swap(false, Ordering::AcqRel)
            && let Some(monitor) = &mut self.monitor
        {
            monitor.changed();
        }
    }

    fn listen(&mut self) {
        let Some(monitor) = &mut self.monitor else { return };
        if !monitor.is_wanted() {
            self.monitor = None;
            return;
        }
        monitor.drain(self.wire.port());
        if monitor.is_broken() {
            return self.give_up();
        }
        resync(monitor, &mut self.wire, &mut self.batch);
    }

    /// Drops the monitor, whose socket is broken, until the next one may be opened.
    fn give_up(&mut self) {
        let listeners = self.monitor.take().map(Monitor::dismiss).unwrap_or_default();
        self.unserved.extend(listeners.into_iter().map(|(scope, pending)| Subscription {
            scope,
            pending,
            told: false,
        }));
        self.pause();
        self.tell_unserved();
    }

    /// Executes a command, unless the caller has gone.
    fn serve(&mut self, command: Command) {
        match command {
            Command::Claim { overlay, networks, residence, reply } => {
                answer(reply, || claim(&overlay, &networks, residence));
            }
            Command::Probe { devices, reply } => {
                answer(reply, || probe(&mut self.wire, &mut self.batch, &mut self.plane, &devices));
            }
            Command::Attach(mut plane) => {
                let shared = Arc::downgrade(&self.shared);
                plane.on_change(Arc::new(move || {
                    if let Some(shared) = shared.upgrade() {
                        shared.plane_changed.store(true, Ordering::Release);
                        shared.wake();
                    }
                }));
                self.plane.attach(plane);
            }
            Command::HostFacts { reach, reply } => {
                answer(reply, || host_facts(&mut self.wire, &mut self.batch, &reach));
            }
            Command::Observe { scope, reply } => answer(reply, || {
                let expected = self.overlays.get(&scope.overlay).map_or(0, |known| known.routes);
                let Seen { mut state, indices, routes } = observe(&mut self.wire, &mut self.batch, &scope, expected)?;
                self.plane.observe(&mut state, &indices);
                self.overlays.insert(scope.overlay, Known { devices: scope.devices, indices, routes });
                Ok(state)
            }),
            Command::Apply { scope, ops, reply } => {
                if reply.is_closed() {
                    return;
                }
                let known = self.overlays.entry(scope.overlay.clone()).or_default();
                if known.devices != scope.devices {
                    *known = Known { devices: scope.devices.clone(), ..Known::default() };
                }
                let mut applier = Applier {
                    wire: &mut self.wire,
                    batch: &mut self.batch,
                    monitor: self.monitor.as_mut(),
                    plane: &mut self.plane,
                    indices: &mut known.indices,
                    routes: &mut known.routes,
                    scope: &scope,
                };
                let report = applier.run(&ops, || reply.is_closed());
                // The caller is then the last owner, and frees it.
                drop(ops);
                let _ = reply.send(Ok(report));
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let waiting = self.shared.subscriptions.lock().unwrap_or_else(PoisonError::into_inner).take();
        for subscription in waiting.into_iter().flatten().chain(self.unserved.drain(..)) {
            subscription.pending.close();
        }
    }
}

fn answer<T>(reply: Reply<T>, make: impl FnOnce() -> Result<T, KernelError>) {
    if !reply.is_closed() {
        // If the caller has gone in the meantime, it has to observe the outcome.
        let _ = reply.send(make());
    }
}

/// Reads what the monitor is missing.
fn resync(monitor: &mut Monitor, wire: &mut Wire, batch: &mut Batch) {
    let read = if monitor.is_stale() { monitor.resync(wire, batch) } else { monitor.complete(wire, batch) };
    if let Err(error) = read {
        tracing::debug!(%error, "links and addresses could not be read");
        monitor.lost();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};

    use super::*;

    #[test]
    fn so_many_requests_wait_for_a_thread_that_is_busy_and_further_callers_wait_for_a_place() {
        let (commands, mut receiver) = queue();
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let shared = Arc::new(Shared::new(wake, None));
        let thread = Thread { commands: Some(commands), shared, handle: None };
        let call = || thread.call(|reply| Command::HostFacts { reach: Vec::new(), reply });
        let mut calls: Vec<_> = (0..QUEUE + 7).map(|_| Box::pin(call())).collect();
        assert!(calls.iter_mut().all(|call| call.now_or_never().is_none()));
        assert_eq!(receiver.len(), QUEUE);
        // A waiting caller gets a place as soon as there is one.
        receiver.try_recv().unwrap();
        assert!(calls.iter_mut().skip(QUEUE).all(|call| call.now_or_never().is_none()));
        assert_eq!(receiver.len(), QUEUE);
    }

    #[test]
    fn a_monitor_that_breaks_is_told_of_opened_again_after_a_growing_pause_and_read_anew() {
        let (_commands, receiver) = mpsc::channel(1);
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let shared = Arc::new(Shared::new(wake, Some(Vec::new())));
        let mut worker = Worker::new(receiver, Arc::clone(&shared));
        let networks = Dual { v4: Some("10.0.0.0/8".parse().unwrap()), v6: None };
        let scope = Scope::new(OverlayName::default(), networks);
        let pending = Arc::new(PendingHints::default());
        worker.unserved.push(Subscription { scope, pending: Arc::clone(&pending), told: false });
        worker.take_subscriptions();
        let mut hints = Box::pin(Arc::clone(&pending).hints());
        for pause in [1, 2, 4] {
            worker.monitor.as_mut().expect("a netlink socket").break_socket();
            let broken = Instant::now();
            worker.listen();
            assert!(worker.monitor.is_none() && worker.unserved.len() == 1);
            assert_eq!(hints.next().now_or_never().flatten(), Some(Hint::SubscriptionBroken));
            assert!(worker.retry >= broken + Duration::from_millis(900 * pause));
            worker.take_subscriptions();
            assert!(worker.monitor.is_none(), "not before its time");
            worker.retry = Instant::now();
            assert_eq!(hints.next().now_or_never(), None, "it is not heard yet");
            worker.take_subscriptions();
            assert!(worker.monitor.is_some() && worker.unserved.is_empty());
            assert_eq!(hints.next().now_or_never().flatten(), Some(Hint::Lost));
        }
    }
}
