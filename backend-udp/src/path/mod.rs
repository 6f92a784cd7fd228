//! The packet path from the TUN to peers and back, on its own threads.
//!
//! One thread per TUN queue reads packets, finds the peer, splits super-packets, and sends the datagrams in runs that
//! the kernel cuts again. One thread receives, checks, merges packets of the same flow and writes them to the TUN.
//! For each packet, these threads neither allocate nor take a lock, and none waits for another. They do either only when
//! the table or a socket is replaced, and when the kernel refuses a run of datagrams or an offload. Nothing in this
//! module depends on leases.
//!
//! Sockets are opened in the network namespace of the thread that calls [`Path::start`]: the path's threads inherit it.
//! The device's addresses, MTU, state, routes and later names are managed elsewhere.
//!
//! ```no_run
//! use flannel_backend_udp::path::{OpenMode, Path, Settings, Table, Tun};
//! use flannel_core::net::Dual;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let own = Dual { v4: Some("10.5.1.0/24".parse()?), v6: None };
//! let tun = Tun::open("flannel0", OpenMode::Create, 1)?;
//! let path = Path::start(tun, Settings::default(), Table::new(own))?;
//! path.set_sockets(Dual { v4: Some("192.0.2.1:8285".parse()?), v6: None })?;
//! path.change(&[("10.5.2.0/24".parse()?, Some("192.0.2.2:8285".parse()?))]);
//! println!("{} packets were sent", path.counters().sent.packets);
//! # Ok(())
//! # }
//! ```

mod admit;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod checks;
mod checksum;
mod coalesce;
mod counters;
#[cfg(test)]
mod golden;
mod header;
mod icmp;
mod narrow;
mod offload;
mod outbox;
#[cfg(test)]
mod packets;
#[cfg(test)]
mod properties;
mod rx;
mod shared;
mod socket;
mod split;
mod sys;
mod table;
#[cfg(test)]
mod tests;
mod tun;
mod tx;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flannel_core::kernel::Limitation;
use flannel_core::net::{Dual, Prefix};

use coalesce::Merging;
use counters::Cells;
use offload::{Degraded, Offload, Offloads};
use rx::{Command, Rx};
use shared::Shared;
use tx::Tx;

pub(crate) use sys::device_name;

pub use counters::{Counters, Reason, Traffic};
pub use shared::Notify;
pub use socket::{Buffers, SocketError};
pub use table::Table;
pub use tun::{OpenMode, Tun, TunError};

/// The most queued requests. Each has a caller that waits for it.
const QUEUE: usize = 16;
/// How often opening something in use is tried, and the pause between tries: a tenth of a second in total. A send on a
/// full socket may hold a closed address for longer.
const TRIES: usize = 10;
const PAUSE: Duration = Duration::from_millis(10);

/// A running packet path. Dropping it ends its threads and closes its sockets and the device. The device stays if it
/// was [kept](Tun::keep).
#[derive(Debug)]
pub struct Path {
    tun: Tun,
    shared: Arc<Shared>,
    commands: SyncSender<Command>,
    buffers: Buffers,
    /// The counters of the threads that send.
    sending: Vec<Arc<Cells>>,
    receiving: Arc<Cells>,
    threads: Vec<JoinHandle<()>>,
    /// Held while the table is replaced.
    changing: Mutex<()>,
}

/// A view of a path's counters for other threads. It does not keep the path alive.
#[derive(Debug, Clone)]
pub struct Watch {
    shared: Weak<Shared>,
    sending: Vec<Arc<Cells>>,
    receiving: Arc<Cells>,
    overflowed: Arc<AtomicU64>,
}

impl Watch {
    /// Returns the counters since the path was started.
    pub fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        self.sending.iter().for_each(|cells| cells.add_to(&mut counters, |counters| &mut counters.sent));
        self.receiving.add_to(&mut counters, |counters| &mut counters.received);
        let last = || self.overflowed.load(Ordering::Relaxed);
        counters.overflowed = self.shared.upgrade().map_or_else(last, |shared| shared.overflowed());
        counters
    }

    /// Returns what makes the path slower than possible: unavailable offloads, and the first 64 peers to which the
    /// kernel refused runs of datagrams within the last minute. Empty once the path has ended.
    pub fn limitations(&self) -> Vec<Limitation> {
        let Some(shared) = self.shared.upgrade() else { return Vec::new() };
        let offload = |Degraded { what, because }| Limitation::new(what.to_string(), because);
        let narrow = |(to, size)| {
            let cause = format!(
                "it carries less than the link, so that datagrams of {size} bytes are sent one by one or in fragments: \
                 raise the MTU on the way there, or lower that of the uplink"
            );
            Limitation::new(format!("path to {to}"), cause)
        };
        let paths = shared.narrow_paths.list(Instant::now()).into_iter().map(narrow);
        shared.offloads.list().into_iter().map(offload).chain(paths).collect()
    }

    /// Returns the number of peers' subnets that the path forwards to. Zero once the path has ended.
    pub fn forwards(&self) -> usize {
        self.shared.upgrade().map_or(0, |shared| shared.table.load().len())
    }
}

/// The settings of a path.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Settings {
    /// The sizes of the socket buffers.
    pub buffers: Buffers,
    /// Called by a thread of the path when the device or a socket is lost, or a [limitation](Watch::limitations) is
    /// found.
    pub notify: Notify,
}

impl Settings {
    /// Sets the sizes of the socket buffers.
    pub fn with_buffers(self, buffers: Buffers) -> Self {
        Self { buffers, ..self }
    }

    /// Sets the callback for a lost device or socket, or a new [limitation](Watch::limitations).
    pub fn with_notify(self, notify: Notify) -> Self {
        Self { notify, ..self }
    }
}

/// Checks whether these sockets can be bound in the calling thread's network namespace, and closes them again. Call it
/// before a device is created for them.
///
/// # Errors
/// [`SocketError`]. [`NotHere`](SocketError::NotHere) and [`InUse`](SocketError::InUse) may be temporary: retry with
/// back-off.
pub fn check_sockets(wanted: Dual<SocketAddr>) -> Result<(), SocketError> {
    wanted.iter().try_for_each(|(family, local)| socket::check(*local, family))
}

/// Opens a device or socket again while it is in use. What was just closed may stay open for a moment: a send may still
/// be in progress on a socket, and a forked child of this process holds all descriptors until it executes its program.
pub(crate) fn retry<T, E>(mut open: impl FnMut() -> Result<T, E>, is_in_use: impl Fn(&E) -> bool) -> Result<T, E> {
    for _ in 1..TRIES {
        match open() {
            Err(error) if is_in_use(&error) => thread::sleep(PAUSE),
            opened => return opened,
        }
    }
    open()
}

/// An error from starting or changing a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// The system is out of threads or descriptors.
    #[error("the packet path cannot be started")]
    Start(#[source] io::Error),
    /// A socket could not be opened.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The threads have ended.
    #[error("the packet path has ended")]
    Ended,
}

impl Path {
    /// Starts the threads with this table and without sockets.
    ///
    /// # Errors
    /// [`PathError::Start`] if the system is out of threads or descriptors. Retry with back-off.
    pub fn start(tun: Tun, settings: Settings, table: Table) -> Result<Self, PathError> {
        let start = |errno: nix::Error| PathError::Start(errno.into());
        let shared = Arc::new(Shared::new(table, Offloads::new(tun.degraded()), settings.notify).map_err(start)?);
        let queues =
            tun.queues().iter().map(File::try_clone).collect::<Result<Vec<_>, _>>().map_err(PathError::Start)?;
        let queues: Vec<_> = queues.into_iter().map(Arc::new).collect();
        let (commands, receiver) = sync_channel(QUEUE);
        let mut path = Self {
            shared: Arc::clone(&shared),
            commands,
            buffers: settings.buffers,
            sending: queues.iter().map(|_| Arc::default()).collect(),
            receiving: Arc::default(),
            threads: Vec::new(),
            changing: Mutex::new(()),
            tun,
        };
        let header = path.tun.header();
        let merging = match (path.tun.has(Offload::TunTcp), path.tun.has(Offload::TunUdp)) {
            _ if header == 0 => Merging::Nothing,
            (true, true) => Merging::TcpAndUdp,
            (true, false) => Merging::Tcp,
            (false, _) => Merging::Nothing,
        };
        for (queue, cells) in queues.iter().zip(path.sending.clone()) {
            let (shared, queue) = (Arc::clone(&shared), Arc::clone(queue));
            path.spawn("flannel-tx", move || Tx::new(shared, cells, queue, header).run())?;
        }
        let cells = Arc::clone(&path.receiving);
        let rx = Rx { shared, cells, queues, header, merging, commands: receiver };
        path.spawn("flannel-rx", move || rx.run())?;
        Ok(path)
    }

    /// Replaces the sockets: datagrams are sent from and received at exactly these addresses and ports. A new socket is
    /// bound before the old one is closed; a socket that is already bound is not touched.
    ///
    /// Blocks until the receiving thread answers, some milliseconds; a tenth of a second if an address is in use.
    ///
    /// # Errors
    /// [`PathError::Socket`] if a socket cannot be bound; the sockets stay as they were. Retry with back-off.
    /// [`PathError::Ended`] if the threads have ended. Final for this path.
    pub fn set_sockets(&self, wanted: Dual<SocketAddr>) -> Result<(), PathError> {
        let is_in_use = |error: &PathError| matches!(error, PathError::Socket(error) if error.is_in_use());
        retry(|| self.try_sockets(wanted), is_in_use)
    }

    fn try_sockets(&self, wanted: Dual<SocketAddr>) -> Result<(), PathError> {
        let (reply, answer) = sync_channel(1);
        let command = Command::Sockets { wanted, buffers: self.buffers, reply };
        self.commands.send(command).map_err(|_| PathError::Ended)?;
        self.shared.wake();
        Ok(answer.recv().map_err(|_| PathError::Ended)??)
    }

    /// Returns the addresses and ports of the sockets.
    pub fn sockets(&self) -> Dual<SocketAddr> {
        self.shared.bound().sockets.map(|_, socket| socket.local())
    }

    /// Changes the table in one step. Each change is a subnet and its new endpoint, or `None` to remove the subnet.
    pub fn change(&self, changes: &[(Prefix, Option<SocketAddr>)]) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = self.shared.table.load().with(changes);
        self.shared.table.store(Arc::new(changed));
    }

    /// Sets the subnets that received packets are accepted for.
    pub fn set_own(&self, own: Dual<Prefix>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = self.shared.table.load().with_own(own);
        self.shared.table.store(Arc::new(changed));
    }

    /// Returns the table in effect.
    pub fn table(&self) -> Arc<Table> {
        self.shared.table.load_full()
    }

    /// Returns the device.
    pub fn tun(&self) -> &Tun {
        &self.tun
    }

    /// Returns a view of the counters for other threads. It does not keep the path alive.
    pub fn watch(&self) -> Watch {
        Watch {
            shared: Arc::downgrade(&self.shared),
            sending: self.sending.clone(),
            receiving: Arc::clone(&self.receiving),
            overflowed: Arc::clone(&self.shared.overflowed),
        }
    }

    /// Returns the counters since the start.
    pub fn counters(&self) -> Counters {
        self.watch().counters()
    }

    /// Whether packets can pass: the device exists and the threads run. An unhealthy path does not recover; start a new
    /// one.
    pub fn is_healthy(&self) -> bool {
        self.shared.has_tun() && !self.threads.iter().any(JoinHandle::is_finished)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), PathError> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run).map_err(PathError::Start)?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // The runtime has reported a panic of the thread; there is no caller to report it to.
            let _ = thread.join();
        }
        // For those who still watch.
        self.shared.overflowed();
    }
}
