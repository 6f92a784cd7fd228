//! The state that the threads of a path share with its owner.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::narrow::NarrowPaths;
use super::offload::{Offload, Offloads};
use super::socket::{Socket, Sockets};
use super::table::Table;

/// A callback for when the device or a socket is lost, or the path becomes slower than possible. Default: none.
#[derive(Clone, Default)]
pub struct Notify(Option<Arc<dyn Fn() + Send + Sync>>);

impl Notify {
    /// Sets a callback. It must not block.
    pub fn call(callback: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self(Some(callback))
    }

    fn call_back(&self) {
        if let Some(callback) = &self.0 {
            callback();
        }
    }
}

impl fmt::Debug for Notify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notify")
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    is_stopping: AtomicBool,
    /// Readable once the threads have to end.
    pub(crate) stopped: EventFd,
    /// Readable if the receiving thread has to look at its commands and sockets, or has to end.
    pub(crate) wake: EventFd,
    is_tun_gone: AtomicBool,
    pub(crate) table: Arc<ArcSwap<Table>>,
    bound: ArcSwap<Bound>,
    pub(crate) offloads: Offloads,
    pub(crate) narrow_paths: NarrowPaths,
    notify: Notify,
    /// The number that [`overflowed`](Self::overflowed) returned last. It outlives the path.
    pub(crate) overflowed: Arc<AtomicU64>,
}

/// The sockets in use. Replaced as one value, so that no datagram is counted for a closed socket and for an open one.
#[derive(Debug, Default)]
pub(crate) struct Bound {
    pub(crate) sockets: Sockets,
    /// The number of messages that were dropped at sockets that are now closed.
    overflowed: u64,
}

impl Shared {
    pub(crate) fn new(table: Table, offloads: Offloads, notify: Notify) -> Result<Self, Errno> {
        Ok(Self {
            is_stopping: AtomicBool::new(false),
            stopped: event()?,
            wake: event()?,
            is_tun_gone: AtomicBool::new(false),
            table: Arc::new(ArcSwap::from_pointee(table)),
            bound: ArcSwap::default(),
            offloads,
            narrow_paths: NarrowPaths::default(),
            notify,
            overflowed: Arc::default(),
        })
    }

    /// Makes the threads end.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        // The write fails only if the counter is full, and then it is readable.
        let _ = self.stopped.write(1);
        self.wake();
    }

    /// Makes the receiving thread close a socket that another process destroyed.
    pub(crate) fn lose(&self, socket: &Socket) {
        socket.set_lost();
        self.wake();
    }

    /// Wakes the receiving thread.
    pub(crate) fn wake(&self) {
        // As above.
        let _ = self.wake.write(1);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// Whether the error means that the device is gone. If so, records that and calls the callback.
    pub(crate) fn is_tun_gone(&self, error: &io::Error) -> bool {
        let is_gone = error.raw_os_error() == Some(Errno::EBADFD as i32);
        if is_gone && !self.is_tun_gone.swap(true, Ordering::AcqRel) {
            self.notify.call_back();
        }
        is_gone
    }

    /// Stops using an offload, and calls the callback.
    pub(crate) fn degrade(&self, what: Offload, because: impl fmt::Display) {
        if self.offloads.degrade(what, because) {
            self.notify.call_back();
        }
    }

    /// Records that the kernel refused a run of datagrams of this size because the path to the peer carries less.
    pub(crate) fn refuse_run(&self, to: SocketAddr, size: usize, now: Instant) {
        if self.narrow_paths.refuse(to, size, now) {
            self.notify.call_back();
        }
    }

    /// Returns the sockets in use.
    pub(crate) fn bound(&self) -> Guard<Arc<Bound>> {
        self.bound.load()
    }

    /// Replaces the sockets. Only the receiving thread does.
    pub(crate) fn set_sockets(&self, sockets: Sockets) {
        let former = self.bound.load();
        let is_kept = |family, old| sockets.get(family).is_some_and(|new| Arc::ptr_eq(new, old));
        let closed = former.sockets.iter().filter(|(family, old)| !is_kept(*family, old));
        let overflowed = former.overflowed + closed.map(|(_, old)| old.overflowed()).sum::<u64>();
        self.bound.store(Arc::new(Bound { sockets, overflowed }));
    }

    /// Uses only the sockets that are left when another process destroyed one, and calls the callback.
    pub(crate) fn drop_lost(&self, left: &Sockets) {
        self.set_sockets(left.clone());
        self.notify.call_back();
    }

    /// Whether the device exists, as far as is known.
    pub(crate) fn has_tun(&self) -> bool {
        !self.is_tun_gone.load(Ordering::Acquire)
    }

    /// Returns the number of messages that the kernel dropped at the sockets, as in
    /// [`Counters::overflowed`](super::Counters::overflowed).
    pub(crate) fn overflowed(&self) -> u64 {
        let bound = self.bound.load();
        let open: u64 = bound.sockets.iter().map(|(_, socket)| socket.overflowed()).sum();
        let now = bound.overflowed + open;
        // A replaced socket may drop more before it is closed, which the next value lacks.
        self.overflowed.fetch_max(now, Ordering::Relaxed).max(now)
    }

    /// Waits for some time, or until the threads have to end.
    pub(crate) fn pause(&self, time: Duration) {
        wait([], &self.stopped, Some(time));
    }
}

/// Creates an event counter that a thread can wait for.
pub(crate) fn event() -> Result<EventFd, Errno> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
}

/// The descriptors that are ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready<const N: usize> {
    pub(crate) event: bool,
    pub(crate) fds: [bool; N],
}

/// Waits for one of these descriptors or for the event, up to the given time.
pub(crate) fn wait<const N: usize>(
    fds: [(BorrowedFd<'_>, PollFlags); N],
    event: &EventFd,
    time: Option<Duration>,
) -> Ready<N> {
    let mut all: [_; WAITED] = std::array::from_fn(|_| PollFd::new(event.as_fd(), PollFlags::POLLIN));
    let [_, others @ ..] = &mut all;
    others.iter_mut().zip(fds).for_each(|(place, (fd, flags))| *place = PollFd::new(fd, flags));
    // Rounded up: it must not wake before the time is over.
    let time = time.map(|time| PollTimeout::try_from(time + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX));
    let waited = all.get_mut(..=N.min(WAITED - 1)).unwrap_or_default();
    match poll(waited, time.unwrap_or(PollTimeout::NONE)) {
        Ok(_) => {}
        // In this case poll(2) has not written the results.
        Err(Errno::EINTR) => return Ready { event: false, fds: [false; N] },
        Err(_) => {
            // The kernel is out of memory; a loop that waits must not spin.
            std::thread::sleep(FAILED);
            return Ready { event: true, fds: [false; N] };
        }
    }
    let mut ready = waited.iter().map(|fd| fd.any().unwrap_or(true));
    let event = ready.next().unwrap_or(false);
    Ready { event, fds: std::array::from_fn(|_| ready.next().unwrap_or(false)) }
}

/// The most descriptors in one wait: the event, and a socket of each family.
const WAITED: usize = 3;
/// How long to sleep if waiting fails.
const FAILED: Duration = Duration::from_millis(50);
