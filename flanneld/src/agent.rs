//! The agent: everything around [`Overlay::run`](flannel_core::overlay::Overlay::run).

use std::fs::{self, DirBuilder, OpenOptions};
use std::future::pending;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_udp::UdpDataPlane;
use flannel_core::firewall::FirewallError;
use flannel_core::overlay::{MissingUplink, Overlay, OverlayError, Teardown};
use flannel_subnet_cached::CachedSubnets;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::assemble::{AssembleError, assemble};
use crate::firewall::Keeper;
use crate::flags::UsageError;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::options::{Capabilities, Options, StateFile};
use crate::privileges::{self, PrivilegeError};
use crate::serve::{self, ListenError, Place, Shown};
use crate::status::Surroundings;
use crate::stores::{self, StoreError};
use crate::{chain, condition, exit, notify, signals};
use flannel_core::firewall_keeper::RulesState;

/// How long shutdown waits for pending HTTP answers, and then for pending file operations.
const GRACE: Duration = Duration::from_millis(100);
/// How long shutdown waits for the state file.
const SAVE: Duration = Duration::from_millis(500);

/// Why the agent ended by itself, or did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("{} cannot be written: make its directory writable for this program, or choose another -subnet-file", path.display())]
    SubnetFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be written: make its directory writable for this program, or choose another -state-file, or none", path.display())]
    StateFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("starting threads")]
    Threads(#[source] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error("keeping the firewall's rules")]
    Firewall(#[from] FirewallError),
    #[error(transparent)]
    Usage(#[from] UsageError),
}

impl AgentError {
    /// Returns the exit code of the process.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Overlay(OverlayError::LeaseLost) => exit::LEASE_LOST,
            Self::Usage(_) => exit::USAGE,
            _ => exit::FAILURE,
        }
    }
}

/// Runs until a signal. Steps that need privileges or can fail at once come first, so that a failure changes nothing.
pub(crate) fn run(options: &Options, warnings: &[String]) -> Result<(), AgentError> {
    privileges::check()?;
    options.cni.check()?;
    check_place(&options.subnet_file)
        .map_err(|source| AgentError::SubnetFile { path: options.subnet_file.clone(), source })?;
    check_state_file(options.state_file.as_ref())?;
    let places = Places::take(options)?;
    if options.capabilities == Capabilities::Drop {
        privileges::reduce()?;
    }
    let cancel = CancellationToken::new();
    signals::watch(cancel.clone()).map_err(AgentError::Threads)?;
    let log = Log::start(options.log).map_err(AgentError::Threads)?;
    for warning in warnings.iter().chain(&places.warning) {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AgentError::Threads)?;
    let outcome = runtime.block_on(supervise(options, places, &log, cancel));
    // A hanging disk must not delay shutdown.
    runtime.shutdown_timeout(GRACE);
    log.flush();
    outcome
}

/// The addresses at which pages are served.
struct Places {
    health: Option<Place>,
    operator: Option<Place>,
    warning: Option<String>,
}

impl Places {
    fn take(options: &Options) -> Result<Self, ListenError> {
        let health = options.healthz.map(|addr| Place::take(addr, "-healthz-ip and -healthz-port")).transpose()?;
        let mut places = Self { health, operator: None, warning: None };
        if let Some(metrics) = options.metrics {
            let place = Place::take(metrics.addr, "-metrics-ip and -metrics-port");
            let place = place.and_then(|place| {
                places.health.iter().try_for_each(|health| place.check_beside(health))?;
                Ok(place)
            });
            match place {
                Ok(place) => places.operator = Some(place),
                Err(error) if metrics.asked_for => return Err(error),
                Err(error) => {
                    places.warning = Some(format!("no metrics and no status: {}", chain(&error)));
                }
            }
        }
        Ok(places)
    }
}

async fn supervise(options: &Options, places: Places, log: &Log, cancel: CancellationToken) -> Result<(), AgentError> {
    let store = stores::open(&options.store).await?.kept_in(options.state_file.as_ref());
    let (kept, condition) = (store.state.clone(), store.condition.clone());
    let plane = UdpDataPlane::new();
    let carried = plane.observer();
    let overlay = assemble(options, &store, MissingUplink::Wait, plane)?;
    let handle = overlay.handle();
    let metrics = Metrics::default();
    let (state, rules) = watch::channel(RulesState::Pending);
    let keeper = Keeper { options: options.firewall, handle: handle.clone(), state };
    let shown = Arc::new(Shown {
        handle: handle.clone(),
        rules: rules.clone(),
        around: Surroundings {
            overlay: options.overlay.to_string(),
            store: store.name,
            subnet_file: options.subnet_file.display().to_string(),
            kept: kept.clone(),
            carried,
        },
        metrics: metrics.clone(),
        log: log.clone(),
    });
    // Pages are served until the agent has ended.
    let ended = CancellationToken::new();
    let pages = [
        places.health.map(|place| (place, serve::health(Arc::clone(&shown)))),
        places.operator.map(|place| (place, serve::operator(shown))),
    ];
    let mut servers = JoinSet::new();
    for (place, router) in pages.into_iter().flatten() {
        let ended = ended.clone();
        servers.spawn(async move {
            if let Err(error) = serve::serve(place, router, ended).await {
                tracing::error!(%error, "a page server has ended");
            }
        });
    }
    tokio::spawn(metrics.count(handle.clone()));
    tokio::spawn(options.cni.clone().keep(handle.clone(), rules.clone()));
    tokio::spawn(notify::follow(handle.clone(), rules.clone()));
    tokio::spawn(notify::watchdog());
    if let Some(store) = condition {
        tokio::spawn(condition::record(handle.clone(), rules, store.clone()));
        tokio::spawn(condition::tell(handle.clone(), store));
    }
    let stopping = cancel.clone();
    let stopping = tokio::spawn(async move {
        stopping.cancelled().await;
        notify::stopping().await;
    });
    let outcome = run_all(overlay, keeper, cancel.clone()).await;
    cancel.cancel();
    // The agent may end before the task has sent the notification.
    if !matches!(timeout(GRACE, stopping).await, Ok(Ok(()))) {
        tracing::warn!("the supervisor was not told of the end");
    }
    if let Some(kept) = kept {
        save(&kept).await;
    }
    ended.cancel();
    let _ = timeout(GRACE, servers.join_all()).await;
    outcome
}

/// Writes pending changes to the state file. A hanging disk must not delay shutdown.
async fn save(kept: &CachedSubnets) {
    match timeout(SAVE, kept.flush()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = chain(&error), "the state file was not written"),
        Err(_) => tracing::warn!("the state file was not written within {SAVE:?}"),
    }
}

/// Runs the agent with its firewall. Both end if the firewall is needed and cannot work.
async fn run_all(overlay: Overlay, keeper: Keeper, cancel: CancellationToken) -> Result<(), AgentError> {
    let stop = cancel.clone();
    let mut agent = pin!(overlay.run(async move {
        stop.cancelled().await;
        Teardown::Keep
    }));
    let error = tokio::select! {
        outcome = &mut agent => return outcome.map_err(AgentError::Overlay),
        error = failure(keeper) => AgentError::Firewall(error),
    };
    cancel.cancel();
    // The firewall's error is returned instead.
    let _ = agent.await;
    Err(error)
}

/// Returns the error with which the firewall ends; never returns if it ends without one.
async fn failure(keeper: Keeper) -> FirewallError {
    match keeper.keep().await {
        Ok(()) => pending().await,
        Err(error) => error,
    }
}

/// Checks that a file can be written later, so that an error is reported at start.
fn check_place(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    // Independent of the umask: no other user may write files that are read from there.
    DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    // Always the same name, so that the next start removes the file that a start killed here has left.
    let probe = dir.join(".flanneld-probe");
    clear(&probe)?;
    // Never an existing file: it may be a link to one of our files, made by another user.
    match OpenOptions::new().write(true).create_new(true).open(&probe) {
        // `AlreadyExists`: another start at the same time has created it.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    clear(&probe)
}

/// Removes a file that may not exist.
fn clear(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn check_state_file(file: Option<&StateFile>) -> Result<(), AgentError> {
    match file {
        Some(StateFile { path, asked_for: true }) => {
            check_place(path).map_err(|source| AgentError::StateFile { path: path.clone(), source })
        }
        // Errors of the default file are reported when it is written.
        Some(StateFile { asked_for: false, .. }) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_probe_of_a_place_empties_no_file_that_a_link_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, dir.path().join(".flanneld-probe")).unwrap();
        check_place(&dir.path().join("subnet.env")).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }
}
