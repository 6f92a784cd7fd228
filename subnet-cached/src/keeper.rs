//! What is known, and the file it is kept in.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use flannel_core::clock::{BootTime, Clock};
use flannel_core::files::{self, FileError, Mode, Trust};
use flannel_core::lease::Lease;
use flannel_core::subnet::SubnetError;
use flannel_core::text::chain;
use tokio::sync::{Notify, OnceCell};

use crate::MAX_BYTES;
use crate::known::{Changed, Known};
use crate::wire;

/// How long changes are gathered before they are written.
pub(crate) const SETTLE: Duration = Duration::from_secs(5);
/// How far apart writes are at least, also after one that failed: a large and restless network must not wear a disk
/// out.
pub(crate) const PACE: Duration = Duration::from_secs(30);

/// The same after a write that failed because there is too much to keep, as long as it does not become clearly less.
pub(crate) const PACE_TOO_LARGE: Duration = Duration::from_secs(3600);

pub(crate) struct Keeper {
    path: PathBuf,
    origin: String,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Held by who writes.
    turn: Mutex<()>,
    /// Whether the file was read.
    recalled: OnceCell<()>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    known: Known,
    /// Since when the file lacks something.
    unsaved: Option<BootTime>,
    /// When the next write may be.
    not_before: BootTime,
    /// What the records counted as when there was too much to keep. Once it is an eighth less, a write may do.
    too_large: Option<usize>,
    trouble: Option<String>,
    /// Whether the cache stands in for the store.
    standing_in: bool,
    /// The watch that last brought something of the inner store's, as long as it has no trouble.
    live: Option<u64>,
    /// The watch whose events are taken in: two that are not equally far would undo each other's.
    recorder: Option<u64>,
    watches: u64,
}

impl Keeper {
    pub(crate) fn new(path: PathBuf, origin: String, clock: Arc<dyn Clock>) -> Self {
        Self {
            path,
            origin,
            clock,
            state: Mutex::default(),
            turn: Mutex::default(),
            recalled: OnceCell::new(),
            changed: Notify::new(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    pub(crate) fn now(&self) -> BootTime {
        self.clock.now()
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    pub(crate) fn stands_in(&self) -> bool {
        self.state().standing_in
    }

    pub(crate) fn known<T>(&self, read: impl FnOnce(&Known) -> T) -> T {
        read(&self.state().known)
    }

    /// Takes in what the store itself has just said.
    pub(crate) fn learn(&self, learn: impl FnOnce(&mut Known) -> Changed) {
        if std::mem::take(&mut self.state().standing_in) {
            tracing::info!(path = %self.path.display(), "the lease store is back: the state file is not needed");
        }
        self.note(learn);
    }

    /// Takes in what a store may know that is away: Kubernetes' configuration is a file.
    pub(crate) fn note(&self, learn: impl FnOnce(&mut Known) -> Changed) {
        let now = self.now();
        let mut state = self.state();
        if learn(&mut state.known) == Changed::Yes {
            state.unsaved.get_or_insert(now);
        }
        let weight = state.known.weight();
        if state.too_large.take_if(|too_large| weight < *too_large - *too_large / 8).is_some() {
            state.not_before = state.not_before.min(now.after(PACE));
        }
        let unsaved = state.unsaved.is_some();
        drop(state);
        if unsaved {
            self.changed.notify_waiters();
        }
    }

    /// The store is about to be asked to publish this.
    pub(crate) fn asks(&self, lease: &Lease) {
        self.state().known.renewing(lease);
    }

    /// The number of a new watch.
    pub(crate) fn open(&self) -> u64 {
        let mut state = self.state();
        state.watches += 1;
        state.watches
    }

    /// Whether events of `watch` are to be taken in. Only one that has just said what is everything can begin.
    pub(crate) fn records(&self, watch: u64, begins: impl FnOnce() -> bool) -> bool {
        let mut state = self.state();
        if state.recorder.is_none() && begins() {
            state.recorder = Some(watch);
        }
        state.recorder == Some(watch)
    }

    pub(crate) fn close(&self, watch: u64) {
        self.state().recorder.take_if(|recorder| *recorder == watch);
        self.unheard(watch);
    }

    /// The inner store has said something on this watch.
    pub(crate) fn heard(&self, watch: u64) {
        self.state().live = Some(watch);
    }

    /// This watch is in trouble, or dropped.
    pub(crate) fn unheard(&self, watch: u64) {
        self.state().live.take_if(|live| *live == watch);
    }

    /// Whether the inner store speaks on a watch.
    pub(crate) fn is_live(&self) -> bool {
        self.state().live.is_some()
    }

    /// Says once that the cache stands in for a store that is away.
    pub(crate) fn standing_in(&self, error: &SubnetError) {
        if !std::mem::replace(&mut self.state().standing_in, true) {
            let error = chain(error);
            tracing::warn!(path = %self.path.display(), error, "going by the state file while the lease store is away");
        }
    }

    /// Reads the file, once, if it can add anything.
    pub(crate) async fn recall(self: &Arc<Self>) {
        if self.known(Known::is_whole) {
            return;
        }
        self.recalled
            .get_or_init(|| async {
                let keeper = Arc::clone(self);
                // Fails where the runtime ends: then there is nobody to answer.
                let _ = tokio::task::spawn_blocking(move || keeper.read()).await;
            })
            .await;
    }

    /// What the file says; `None` where there is none. The error says in words why it is of no use.
    pub(crate) fn load(&self) -> Result<Option<Known>, String> {
        let Some(bytes) = files::read(&self.path, Trust::OwnersAlone, MAX_BYTES).map_err(|error| error.to_string())?
        else {
            return Ok(None);
        };
        wire::parse(&bytes, &self.origin, self.clock.now(), wall_clock()).map(Some)
    }

    fn read(&self) {
        match self.load() {
            Ok(None) => {}
            Ok(Some(before)) => self.state().known.recall(before),
            Err(reason) => {
                tracing::warn!(path = %self.path.display(), reason, "the state file is of no use and ignored");
            }
        }
    }

    /// A change of what [`write_due`](Self::write_due) says.
    pub(crate) fn changes(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    /// When to write, if there is something to write.
    pub(crate) fn write_due(&self) -> Option<BootTime> {
        let state = self.state();
        let since = state.unsaved.filter(|_| state.known.is_whole())?;
        Some(since.after(SETTLE).max(state.not_before))
    }

    /// Writes the file if it lacks something. Blocks on the disk.
    pub(crate) fn write(&self) -> Result<(), FileError> {
        // Nothing is left half-done by a holder that panicked: it only ever replaces the file.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let (known, since) = {
            let mut state = self.state();
            let Some(since) = state.unsaved.filter(|_| state.known.is_whole()) else { return Ok(()) };
            state.unsaved = None;
            (state.not_before, state.too_large) = (now.after(PACE), None);
            // Leases are shared: this costs some ten bytes a record, for as long as the write takes.
            (state.known.clone(), since)
        };
        let weight = known.weight();
        let written = files::replace(&self.path, Mode::Private, MAX_BYTES, |to| {
            wire::write(to, &known, &self.origin, now, wall_clock())
        });
        let mut state = self.state();
        let was = std::mem::replace(&mut state.trouble, written.as_ref().err().map(|error| chain(error)));
        match &written {
            Ok(()) if was.is_some() => tracing::info!(path = %self.path.display(), "the state file is written again"),
            Ok(()) => {}
            Err(error) => {
                state.unsaved = Some(since);
                if error.source.kind() == io::ErrorKind::FileTooLarge {
                    state.not_before = now.after(PACE_TOO_LARGE);
                    state.too_large = Some(weight);
                }
                // A watch that sleeps has to know of the next try.
                self.changed.notify_waiters();
                if was.is_none() {
                    let error = chain(error);
                    tracing::warn!(error, "the state file was not written: a boot without the store may lack peers");
                }
            }
        }
        written
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one call that leaves it consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock that goes on while a machine is off. It can be set, so that nothing of a running agent goes by it: a state
/// file that it says is from the future names no lease.
#[expect(clippy::disallowed_methods, reason = "a boot-time clock says nothing of the time before the boot")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}
