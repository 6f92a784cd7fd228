//! The cached data and its state file.

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

/// How long changes are collected before they are written.
pub(crate) const SETTLE: Duration = Duration::from_secs(5);
/// The shortest time between two writes, also after a failed one: a large, busy network must not wear out a disk.
pub(crate) const PACE: Duration = Duration::from_secs(30);

/// The same after a write that failed because the data was too large, until the data is clearly smaller.
pub(crate) const PACE_TOO_LARGE: Duration = Duration::from_secs(3600);

pub(crate) struct Keeper {
    path: PathBuf,
    origin: String,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Held while the file is written.
    turn: Mutex<()>,
    /// Set once the file was read.
    recalled: OnceCell<()>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    known: Known,
    /// When the oldest change that is not in the file was made.
    unsaved: Option<BootTime>,
    /// The earliest time of the next write.
    not_before: BootTime,
    /// The weight of the records when they were too large to write. A write is tried again once it is an eighth
    /// smaller.
    too_large: Option<usize>,
    trouble: Option<String>,
    /// Whether answers come from the cache instead of the store.
    standing_in: bool,
    /// The watch that last delivered an event of the inner store, as long as that watch has no error.
    live: Option<u64>,
    /// The watch whose events are recorded. Events of two watches at different positions would undo each other.
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

    pub(crate) fn is_in_use(&self) -> bool {
        self.state().standing_in
    }

    pub(crate) fn known<T>(&self, read: impl FnOnce(&Known) -> T) -> T {
        read(&self.state().known)
    }

    /// Records an answer of the store itself.
    pub(crate) fn learn(&self, learn: impl FnOnce(&mut Known) -> Changed) {
        if std::mem::take(&mut self.state().standing_in) {
            tracing::info!(
                target: "flannel::store",
                path = %self.path.display(),
                "lease store reachable again: no longer using the state file"
            );
        }
        self.note(learn);
    }

    /// Records an answer that a store can give while it is unavailable: the configuration of Kubernetes is a file.
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

    /// Called before the store is asked to publish this lease.
    pub(crate) fn asks(&self, lease: &Lease) {
        self.state().known.renewing(lease);
    }

    /// Returns the number of a new watch.
    pub(crate) fn open(&self) -> u64 {
        let mut state = self.state();
        state.watches += 1;
        state.watches
    }

    /// Whether events of `watch` are recorded. A watch can only start recording with a complete list.
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

    /// The inner store delivered an event on this watch.
    pub(crate) fn heard(&self, watch: u64) {
        self.state().live = Some(watch);
    }

    /// This watch had an error or was dropped.
    pub(crate) fn unheard(&self, watch: u64) {
        self.state().live.take_if(|live| *live == watch);
    }

    /// Whether a watch on the inner store works.
    pub(crate) fn is_live(&self) -> bool {
        self.state().live.is_some()
    }

    /// Logs once that the cache replaces an unavailable store.
    pub(crate) fn standing_in(&self, error: &SubnetError) {
        if !std::mem::replace(&mut self.state().standing_in, true) {
            let error = chain(error);
            tracing::warn!(
                target: "flannel::store",
                path = %self.path.display(),
                error,
                "lease store unreachable: using the lease and peers of the state file"
            );
        }
    }

    /// Reads the file once, if it can add anything.
    pub(crate) async fn recall(self: &Arc<Self>) {
        if self.known(Known::is_whole) {
            return;
        }
        self.recalled
            .get_or_init(|| async {
                let keeper = Arc::clone(self);
                // Fails if the runtime shuts down: then there is no caller to answer.
                let _ = tokio::task::spawn_blocking(move || keeper.read()).await;
            })
            .await;
    }

    /// Returns the contents of the file, or `None` if there is no file. The error is the reason why the file is
    /// unusable.
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
                tracing::warn!(target: "flannel::store", path = %self.path.display(), reason, "state file ignored");
            }
        }
    }

    /// Waits for a change of [`write_due`](Self::write_due).
    pub(crate) fn changes(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    /// Returns when to write, if there is something to write.
    pub(crate) fn write_due(&self) -> Option<BootTime> {
        let state = self.state();
        let since = state.unsaved.filter(|_| state.known.is_whole())?;
        Some(since.after(SETTLE).max(state.not_before))
    }

    /// Writes the file if it is not up to date. Blocks on the disk.
    pub(crate) fn write(&self) -> Result<(), FileError> {
        // A panicked holder left nothing incomplete: it only replaces the file as a whole.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let (known, since) = {
            let mut state = self.state();
            let Some(since) = state.unsaved.filter(|_| state.known.is_whole()) else { return Ok(()) };
            state.unsaved = None;
            (state.not_before, state.too_large) = (now.after(PACE), None);
            // Leases are shared: the copy costs some ten bytes per record until the write ends.
            (state.known.clone(), since)
        };
        let weight = known.weight();
        let written = files::replace(&self.path, Mode::Private, MAX_BYTES, |to| {
            wire::write(to, &known, &self.origin, now, wall_clock())
        });
        let mut state = self.state();
        let was = std::mem::replace(&mut state.trouble, written.as_ref().err().map(|error| chain(error)));
        match &written {
            Ok(()) if was.is_some() => {
                tracing::info!(target: "flannel::store", path = %self.path.display(), "state file written again")
            }
            Ok(()) => {}
            Err(error) => {
                state.unsaved = Some(since);
                if error.source.kind() == io::ErrorKind::FileTooLarge {
                    state.not_before = now.after(PACE_TOO_LARGE);
                    state.too_large = Some(weight);
                }
                // A waiting watch has to learn the time of the next try.
                self.changed.notify_waiters();
                if was.is_none() {
                    let error = chain(error);
                    tracing::warn!(
                        target: "flannel::store",
                        error,
                        "cannot write the state file; a boot without the lease store may lack peers"
                    );
                }
            }
        }
        written
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one call that leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock that also runs while a machine is off. It can be set, so a running agent does not depend on it: if the
/// file's time lies in the future, its lease is not used.
#[expect(clippy::disallowed_methods, reason = "a boot-time clock says nothing of the time before the boot")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}
