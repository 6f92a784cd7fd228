//! The agent: everything around [`Overlay::run`](flannel_core::overlay::Overlay::run).

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_udp::UdpDataPlane;
use flannel_core::firewall::FirewallError;
use flannel_core::overlay::{Contact, Handle, MissingUplink, Overlay, OverlayError, Teardown, Wait};
use flannel_core::text::Plain;
use flannel_subnet_cached::CachedSubnets;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::assemble::{AssembleError, assemble};
use crate::cni::ConfigurationError;
use crate::directories::{self, DirectoryError};
use crate::firewall::Keeper;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::options::{Capabilities, Options, StoreLocation};
use crate::privileges::{self, PrivilegeError};
use crate::serve::{self, ListenError, ServeAddress, Shown};
use crate::status::ProgramInfo;
use crate::stores::{self, NodeStatus, StoreError};
use crate::{chain, condition, config_keys, credentials, exit, notify, signals};
use flannel_core::firewall_keeper::RulesState;

/// How long shutdown waits for pending HTTP answers, and then for pending file operations.
const GRACE: Duration = Duration::from_millis(100);
/// How long shutdown waits for the state file.
const SAVE: Duration = Duration::from_millis(500);
/// How long the store may take for its first answer before the log says that it is waited for.
const SILENCE: Duration = Duration::from_secs(1);

/// Why the agent ended by itself, or did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
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
    Cni(#[from] ConfigurationError),
}

impl AgentError {
    /// Returns the exit code of the process.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Overlay(OverlayError::LeaseLost) => exit::LEASE_LOST,
            Self::Overlay(OverlayError::Reconfigured) => exit::CONFIG_CHANGED,
            _ => exit::FAILURE,
        }
    }
}

/// Runs until a signal. Steps that need privileges or can fail at once come first, so that a failure changes nothing.
/// `flags` are those given, for the log.
pub(crate) fn run(options: &Options, flags: &str, warnings: &[String]) -> Result<(), AgentError> {
    privileges::check()?;
    options.cni.check()?;
    directories::prepare(options)?;
    let addresses = ServeAddresses::take(options)?;
    if options.capabilities == Capabilities::Drop {
        privileges::reduce()?;
    }
    let cancel = CancellationToken::new();
    signals::watch(cancel.clone()).map_err(AgentError::Threads)?;
    let log = Log::start(options.log).map_err(AgentError::Threads)?;
    let (version, pid) = (env!("CARGO_PKG_VERSION"), std::process::id());
    tracing::info!(target: "flannel::agent", version, pid, overlay = %options.overlay, flags, "starting flanneld");
    for warning in warnings.iter().chain(&addresses.warning) {
        tracing::warn!(target: "flannel::agent", "{warning}");
    }
    if let StoreLocation::Etcd(config) = &options.store.location {
        credentials::warnings(config).iter().for_each(|warning| tracing::warn!(target: "flannel::store", "{warning}"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AgentError::Threads)?;
    let outcome = runtime.block_on(supervise(options, addresses, &log, cancel));
    // A hanging disk must not delay shutdown.
    runtime.shutdown_timeout(GRACE);
    log.flush();
    outcome
}

/// The addresses at which pages are served.
struct ServeAddresses {
    health: Option<ServeAddress>,
    operator: Option<ServeAddress>,
    warning: Option<String>,
}

impl ServeAddresses {
    fn take(options: &Options) -> Result<Self, ListenError> {
        let health =
            options.healthz.map(|addr| ServeAddress::take(addr, "-healthz-ip and -healthz-port")).transpose()?;
        let mut addresses = Self { health, operator: None, warning: None };
        if let Some(metrics) = options.metrics {
            let address = ServeAddress::take(metrics.addr, "-metrics-ip and -metrics-port");
            let address = address.and_then(|address| {
                addresses.health.iter().try_for_each(|health| address.check_beside(health))?;
                Ok(address)
            });
            match address {
                Ok(address) => addresses.operator = Some(address),
                Err(error) if metrics.asked_for => return Err(error),
                Err(error) => {
                    addresses.warning = Some(format!("no metrics and no status: {}", chain(&error)));
                }
            }
        }
        Ok(addresses)
    }
}

async fn supervise(
    options: &Options,
    addresses: ServeAddresses,
    log: &Log,
    cancel: CancellationToken,
) -> Result<(), AgentError> {
    let store = stores::open(&options.store).await?.with_state_file(options.state_file.as_ref());
    let (kept, node) = (store.state.clone(), store.node.clone());
    let plane = UdpDataPlane::new();
    let carried = plane.observer();
    tracing::info!(target: "flannel::store", store = %Plain(&store.name), "using this lease store");
    let overlay = assemble(options, &store, MissingUplink::Wait, plane)?;
    let handle = overlay.handle();
    tokio::spawn(report_silence(handle.clone()));
    let metrics = Metrics::default();
    let (state, rules) = watch::channel(RulesState::Pending);
    let keeper = Keeper { options: options.firewall, handle: handle.clone(), state };
    let shown = Arc::new(Shown {
        handle: handle.clone(),
        rules: rules.clone(),
        info: ProgramInfo {
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
        addresses.health.map(|address| (address, serve::health(Arc::clone(&shown)))),
        addresses.operator.map(|address| (address, serve::operator(shown))),
    ];
    let mut servers = JoinSet::new();
    for (address, router) in pages.into_iter().flatten() {
        let ended = ended.clone();
        servers.spawn(async move {
            if let Err(error) = serve::serve(address, router, ended).await {
                tracing::error!(target: "flannel::agent", %error, "an HTTP server has stopped");
            }
        });
    }
    tokio::spawn(metrics.count(handle.clone()));
    tokio::spawn(options.cni.clone().keep(handle.clone(), rules.clone()));
    tokio::spawn(config_keys::warn(handle.clone()));
    tokio::spawn(notify::follow(handle.clone(), rules.clone()));
    tokio::spawn(notify::watchdog());
    if let Some(NodeStatus { store, sets_condition }) = node {
        tokio::spawn(condition::record(handle.clone(), rules, store.clone()));
        if sets_condition {
            tokio::spawn(condition::tell(handle.clone(), store));
        }
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
        tracing::warn!(target: "flannel::agent", "cannot notify the supervisor of the stop");
    }
    if let Some(kept) = kept {
        save(&kept).await;
    }
    ended.cancel();
    let _ = timeout(GRACE, servers.join_all()).await;
    outcome
}

/// Logs that the store has not answered within [`SILENCE`]; errors are logged when they occur.
async fn report_silence(handle: Handle) {
    sleep(SILENCE).await;
    let status = handle.status();
    let waits = matches!(status.starting, Some(Wait::Store { error: None } | Wait::Lease { error: None }));
    if waits && status.store == Contact::Never {
        tracing::info!(target: "flannel::store", "no answer from the lease store yet; waiting");
    }
}

/// Writes pending changes to the state file. A hanging disk must not delay shutdown.
async fn save(kept: &CachedSubnets) {
    match timeout(SAVE, kept.flush()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(target: "flannel::store", error = chain(&error), "cannot write the state file")
        }
        Err(_) => tracing::warn!(target: "flannel::store", "the state file was not written within {SAVE:?}"),
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
