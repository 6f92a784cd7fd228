//! The start of a run, up to the lease: everything that happens once, before the machine runs.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::agent::inputs::{self, SETTLE, Settling};
use crate::agent::{Settings, Wait};
use crate::backend::{Backend, NodeContext};
use crate::backoff::Backoff;
use crate::config::NetworkConfig;
use crate::kernel::{Claim, KernelError, Residence};
use crate::lease::Lease;
use crate::net::{Dual, Family, Prefix};
use crate::overlay::builder::Factory;
use crate::overlay::former_networks;
use crate::overlay::host_files;
use crate::overlay::removal::in_time;
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::survey::{
    Surveyed, ask_kernel, configuration, identified, settle, store_answers, store_fails, survey,
};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use crate::text::chain;

/// The result of a start: everything that an agent runs on.
pub(crate) struct Started {
    pub(crate) surveyed: Surveyed,
    pub(crate) claims: Claims,
    pub(crate) lease: Lease,
}

/// How far a start has come, for an end during the start.
#[derive(Default)]
pub(crate) struct Progress {
    claimed: Mutex<Option<Claimed>>,
    asking: AtomicBool,
}

/// The node, while the overlay's name is claimed.
#[derive(Clone)]
pub(crate) struct Claimed {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) context: NodeContext,
    /// The requested lease: what is published with it, and which leases are other nodes'.
    pub(crate) want: Want,
}

impl Progress {
    /// Returns the node while the overlay's name is claimed; before that there is nothing to undo.
    pub(crate) fn claimed(&self) -> Option<Claimed> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns whether a request for a lease is under way, which may give a lease that is not returned yet.
    pub(crate) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Relaxed)
    }

    fn set(&self, claimed: Option<Claimed>) {
        *self.claimed.lock().unwrap_or_else(PoisonError::into_inner) = claimed;
    }
}

/// Claims the overlay's name and acquires a lease, retrying for as long as it takes.
///
/// Configuration and host are read again before each try: while a node waits for a free subnet, an operator may widen
/// the pool, and another node may take over this node's address.
pub(crate) async fn start(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    progress: &Progress,
) -> Result<Started, OverlayError> {
    let settings = identified(seams, settings).await?;
    let mut backoff = Backoff::new(seams.jitter.clone());
    let mut claimed: Option<(Surveyed, Claims)> = None;
    let mut settling = None;
    loop {
        let config = configuration(seams).await?;
        if backoff.is_fresh() {
            store_answers(seams);
        }
        let so_far = claimed.as_ref().map(|(surveyed, _)| surveyed);
        let surveyed = survey(seams, &settings, backends, config, so_far).await?;
        let Surveyed { context, rationale, before, .. } = &surveyed;
        let waits = settling.is_some();
        settling = Settling::of(settling, before, &context.uplink.addrs, seams.clock.now());
        if let Some(Settling { until, .. }) = settling {
            if !waits {
                // If the store identifies nodes by address, a wrong address gives another node's lease.
                let (name, addrs) = (context.uplink.name.as_str(), &context.uplink.addrs);
                tracing::info!(
                    target: "flannel::uplink",
                    interface = name,
                    %before,
                    %addrs,
                    "waiting {SETTLE:?} for the addresses used before"
                );
            }
            settle(seams, &settings, &surveyed, so_far, until).await?;
            continue;
        }
        if so_far.is_none_or(|so_far| so_far.context.uplink != context.uplink) {
            tracing::info!(
                target: "flannel::uplink",
                interface = context.uplink.name.as_str(),
                reason = %rationale,
                "uplink selected"
            );
        }
        let claims = match claimed.take() {
            Some((before, claims)) if before.context.config.is_same_overlay(&context.config) => claims,
            other => {
                // Only one claim per name is possible: the former one is dropped first.
                progress.set(None);
                drop(other);
                let claims = claim(seams, &settings, &surveyed).await?;
                probe(seams, &surveyed).await?;
                claims
            }
        };
        let (backend, want) = (Arc::clone(&surveyed.backend), surveyed.want.clone());
        progress.set(Some(Claimed { backend, context: context.clone(), want }));
        progress.asking.store(true, Ordering::Relaxed);
        seams.show_step(Wait::Lease { error: None });
        let answer = acquire(&*seams.subnets, &context.node, &context.config, surveyed.want.clone()).await;
        if answer.is_ok() {
            // Before the first route, and only once there may be one.
            remember(seams, &settings, &surveyed, &claims).await;
        }
        progress.asking.store(false, Ordering::Relaxed);
        match answer {
            Ok(lease) => {
                store_answers(seams);
                return Ok(Started { surveyed, claims, lease });
            }
            Err(error) => {
                let is_lacking = matches!(error, SubnetError::Unconfigured { .. });
                store_fails(seams, error)?;
                claimed = Some((surveyed, claims));
                pause(seams, backoff.wait(), is_lacking).await;
            }
        }
    }
}

/// The shortest time between two tries of a start.
const SHORTEST: Duration = Duration::from_millis(100);

/// Waits for `wait`, or, if the store lacks something, until it may have it; at least [`SHORTEST`].
async fn pause(seams: &Seams, wait: Duration, is_lacking: bool) {
    let (now, clock) = (seams.clock.now(), &seams.clock);
    // Limits the rate of tries if the store reports a change every time.
    clock.sleep_until(now.after(wait.min(SHORTEST))).await;
    let changed = async {
        match is_lacking {
            true => seams.subnets.changed().await,
            false => std::future::pending().await,
        }
    };
    tokio::select! {
        () = clock.sleep_until(now.after(wait)) => {}
        () = changed => {}
    }
}

/// How long an ended agent may still hold a claim of the same name or network: a program that was forked from its
/// process keeps its file descriptors open until it calls `exec`.
const HANDOVER: Duration = Duration::from_secs(1);
/// The interval of tries meanwhile.
const HANDOVER_STEP: Duration = Duration::from_millis(100);

/// The claims of an agent: on the present network while it runs, and on former networks until no objects are left
/// there.
pub(crate) struct Claims {
    pub(crate) present: Claim,
    pub(crate) former: Vec<(Dual<Prefix>, Claim)>,
}

/// Claims the name and the present network, and the former networks that differ from it. A former network that another
/// overlay claims now is skipped, because its routes can no longer be told apart.
async fn claim(seams: &Seams, settings: &Settings, surveyed: &Surveyed) -> Result<Claims, OverlayError> {
    let networks = surveyed.context.networks();
    let claim = async |networks: &Dual<Prefix>, residence| {
        ask_kernel(seams, || seams.kernel.claim(&settings.name, networks, residence)).await
    };
    let until = seams.clock.now().after(HANDOVER);
    let present = loop {
        match claim(&networks, Residence::Present).await {
            Err(OverlayError::Kernel(KernelError::Conflict { .. })) if seams.clock.now() < until => {
                seams.clock.sleep_until(seams.clock.now().after(HANDOVER_STEP)).await;
            }
            claimed => break claimed?,
        }
    };
    let mut former = Vec::new();
    let named = host_files::read(seams, settings).await;
    for others in named.networks.into_iter().filter(|others| *others != networks) {
        match claim(&others, Residence::Former).await {
            Ok(claim) => former.push((others, claim)),
            Err(OverlayError::Kernel(error @ KernelError::Conflict { .. })) => {
                tracing::info!(
                    target: "flannel::kernel",
                    error = chain(&error),
                    "keeping the routes of a former network"
                );
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Claims { present, former })
}

/// Records the networks in which the overlay's routes may be from now on. A failed write does not stop the start: the
/// record is needed only if the network changes and the agent is killed during that.
async fn remember(seams: &Seams, settings: &Settings, surveyed: &Surveyed, claims: &Claims) {
    let Some(file) = &settings.subnet_env else { return };
    let former: Vec<_> = claims.former.iter().map(|(networks, _)| *networks).collect();
    let (path, present) = (file.path.clone(), surveyed.context.networks());
    let access = seams.files.access();
    let written = access.run(move || former_networks::remember(&path, &former, present));
    let error = match in_time(seams, written).await {
        Some(Ok(Ok(()))) => return,
        Some(Ok(Err(error))) => chain(&error),
        Some(Err(error)) => chain(&error),
        None => chain(&io::Error::from(io::ErrorKind::TimedOut)),
    };
    tracing::warn!(
        target: "flannel::kernel",
        error,
        "cannot save the former networks; stale routes may remain after a crash"
    );
}

/// Checks, before a lease is acquired, whether the kernel can do what the backend needs.
async fn probe(seams: &Seams, surveyed: &Surveyed) -> Result<(), OverlayError> {
    let Surveyed { backend, context, want, .. } = surveyed;
    if !backend.writes() {
        return Ok(());
    }
    let devices = backend.devices(&inputs::expected(context, want));
    ask_kernel(seams, || seams.kernel.probe(&devices)).await
}

/// Acquires a lease, and releases it again if it is not in this configuration's networks: an agent in another network
/// would reach no peer.
pub(crate) async fn acquire(
    subnets: &dyn SubnetManager,
    node: &NodeIdentity,
    config: &NetworkConfig,
    want: Want,
) -> Result<Lease, SubnetError> {
    let lease = subnets.acquire(node, want).await?;
    let inside = |family| match (config.networks.get(family), lease.subnets.get(family)) {
        (Some(network), Some(subnet)) => network.prefix.covers(subnet),
        (network, subnet) => network.is_none() && subnet.is_none(),
    };
    if Family::BOTH.into_iter().all(inside) {
        return Ok(lease);
    }
    subnets.release(lease).await?;
    Err(SubnetError::Reconfigured)
}

impl From<KernelError> for OverlayError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}
