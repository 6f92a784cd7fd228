//! From nothing to a lease: everything that happens once, before the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::agent::inputs::{self, SETTLE, Settling};
use crate::agent::{Settings, Wait};
use crate::backend::NodeContext;
use crate::backoff::Backoff;
use crate::config::NetworkConfig;
use crate::kernel::{Claim, KernelError, Residence};
use crate::lease::Lease;
use crate::net::{Dual, Family, Prefix};
use crate::overlay::builder::Factory;
use crate::overlay::former_networks;
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::survey::{
    Surveyed, ask_kernel, configuration, identified, settle, store_answers, store_fails, survey,
};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use crate::text::chain;

/// What a start has taken: everything an agent runs on.
pub(crate) struct Started {
    pub(crate) surveyed: Surveyed,
    pub(crate) claims: Claims,
    pub(crate) lease: Lease,
}

/// How far a start has come, for whoever cuts it short.
#[derive(Default)]
pub(crate) struct Progress {
    claimed: Mutex<Option<Claimed>>,
    asking: AtomicBool,
}

/// The node under the overlay's name, which is held.
#[derive(Clone)]
pub(crate) struct Claimed {
    pub(crate) context: NodeContext,
    /// What is asked for: what is published with a lease, and which ones are other nodes'.
    pub(crate) want: Want,
}

impl Progress {
    /// The node, while the overlay's name is held: only then is there anything to undo.
    pub(crate) fn claimed(&self) -> Option<Claimed> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the store is being asked for a lease, and may give one that nobody here has seen yet.
    pub(crate) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Relaxed)
    }

    fn set(&self, claimed: Option<Claimed>) {
        *self.claimed.lock().unwrap_or_else(PoisonError::into_inner) = claimed;
    }
}

/// Takes the overlay's name and a lease, for as long as it takes.
///
/// Configuration and host are read again before each try: while a node waits for a free subnet, its pool may be widened,
/// and its address may become another node's.
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
                // Where the store goes by addresses a wrong one would be another node's lease.
                let (name, addrs) = (context.uplink.name.as_str(), &context.uplink.addrs);
                tracing::info!(uplink = name, ?before, ?addrs, "waiting {SETTLE:?} for the addresses used before");
            }
            settle(seams, &settings, &surveyed, so_far, until).await?;
            continue;
        }
        if so_far.is_none_or(|so_far| so_far.context.uplink != context.uplink) {
            tracing::info!(uplink = context.uplink.name.as_str(), explanation = %rationale, "uplink chosen");
        }
        let claims = match claimed.take() {
            Some((before, claims)) if before.context.config.is_same_overlay(&context.config) => claims,
            other => {
                // One claim a name: the former one has to go first.
                progress.set(None);
                drop(other);
                let claims = claim(seams, &settings, &surveyed).await?;
                probe(seams, &surveyed).await?;
                claims
            }
        };
        progress.set(Some(Claimed { context: context.clone(), want: surveyed.want.clone() }));
        progress.asking.store(true, Ordering::Relaxed);
        seams.show_step(Wait::Lease { error: None });
        let answer = acquire(&*seams.subnets, &context.node, &context.config, surveyed.want.clone()).await;
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

/// Waits for `wait`, or until the store may have what it lacks, but at least [`SHORTEST`].
async fn pause(seams: &Seams, wait: Duration, is_lacking: bool) {
    let (now, clock) = (seams.clock.now(), &seams.clock);
    // Bounds the tries where the store reports a change every time.
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

/// How long a claim of the same name or network may still be held by an agent that has ended: a program that was forked
/// beside it holds its descriptors until it is executed.
const HANDOVER: Duration = Duration::from_secs(1);
/// How often that is looked at.
const HANDOVER_STEP: Duration = Duration::from_millis(100);

/// What an agent holds for as long as it runs, and for as long as something may be left in its former networks.
pub(crate) struct Claims {
    pub(crate) present: Claim,
    pub(crate) former: Vec<(Dual<Prefix>, Claim)>,
}

/// Takes the name, and the networks of former runs if they are others than now. Where another overlay has moved in
/// meanwhile, nothing can be told from its routes, so nothing is looked for.
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
    for others in former_networks::all(settings).into_iter().filter(|others| *others != networks) {
        match claim(&others, Residence::Former).await {
            Ok(claim) => former.push((others, claim)),
            Err(OverlayError::Kernel(error @ KernelError::Conflict { .. })) => {
                tracing::info!(error = chain(&error), "a former network is left alone");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Claims { present, former })
}

/// Remembers where routes of ours may be from now on. A memory that cannot be written keeps nobody from starting: it is
/// needed only if the network changes and the agent is killed amid that.
pub(crate) async fn remember(settings: &Settings, surveyed: &Surveyed, former: &[Dual<Prefix>]) {
    let Some(file) = &settings.subnet_env else { return };
    let (path, former, present) = (file.path.clone(), former.to_vec(), surveyed.context.networks());
    let written = tokio::task::spawn_blocking(move || former_networks::remember(&path, &former, present)).await;
    let error = match written {
        Ok(Ok(())) => return,
        Ok(Err(error)) => chain(&error),
        Err(error) => chain(&error),
    };
    tracing::warn!(error, "a change of network amid a crash could leave routes behind");
}

/// Asks the kernel whether it can do what the backend needs, before a lease is taken.
async fn probe(seams: &Seams, surveyed: &Surveyed) -> Result<(), OverlayError> {
    let Surveyed { backend, context, want, .. } = surveyed;
    if !backend.writes() {
        return Ok(());
    }
    let devices = backend.devices(&inputs::expected(context, want));
    ask_kernel(seams, || seams.kernel.probe(&devices)).await
}

/// Takes a lease, of this configuration's networks only: half an agent in another network would reach nobody.
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
