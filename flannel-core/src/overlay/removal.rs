//! The clean-up after an agent that is gone.

use std::sync::Arc;
use std::time::Duration;

use crate::config::NetworkConfig;
use crate::kernel::Scope;
use crate::lease::Lease;
use crate::net::{Dual, Prefix};
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::{Settings, chain, view};
use crate::plan::{Op, plan as planned};
use crate::state::State;
use crate::subnet::SubnetError;
use crate::subnet_env::SubnetEnv;

/// How long a removal waits for the store: it has to work without it.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it looks again at what is left before it gives up.
const ROUNDS: usize = 5;

/// What a removal found and did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Removed {
    /// Kernel objects deleted.
    pub objects: usize,
    /// Whether there was a `subnet.env`, which is gone now.
    pub subnet_env: bool,
    /// The lease given back, if the store had one of this node.
    pub lease: Option<Box<Lease>>,
    /// Why the lease could not be looked for or given back. It then runs out by itself where leases expire.
    pub store: Option<String>,
}

pub(crate) async fn remove(seams: &Seams, settings: &Settings) -> Result<Removed, OverlayError> {
    let config = patiently(seams, seams.subnets.network_config()).await;
    let env = settings.subnet_env.as_ref().and_then(|file| SubnetEnv::read(&file.path).ok().flatten());
    let configured = config.as_ref().ok().map(|config| config.networks.map(|_, network| network.prefix));
    let former = env.map(|env| env.networks);
    // The network may have changed since: both are looked at.
    let mut places: Vec<Dual<Prefix>> = [configured, former].into_iter().flatten().collect();
    places.dedup();
    if places.is_empty() {
        places.push(Dual::default());
    }
    let mut removed = Removed::default();
    for networks in places {
        let claim = seams.kernel.claim(&settings.name, &networks).await?;
        removed.objects += clear(seams, settings, networks).await?;
        drop(claim);
    }
    removed.subnet_env = delete_env(settings);
    let gone = match &config {
        Ok(config) => give_back(seams, settings, config).await,
        Err(error) => Err(error.clone()),
    };
    match gone {
        Ok(lease) => removed.lease = lease.map(Box::new),
        Err(error) => removed.store = Some(error),
    }
    Ok(removed)
}

/// Deletes what is ours in and around `networks`, as seen by complete looks. No device is wanted, so each of ours goes,
/// under whatever name.
async fn clear(seams: &Seams, settings: &Settings, networks: Dual<Prefix>) -> Result<usize, OverlayError> {
    let scope = Scope { overlay: settings.name.clone(), networks, devices: Vec::new(), uplink: None };
    let mut deleted = 0;
    let mut left = 0;
    for _ in 0..ROUNDS {
        let seen = seams.kernel.observe(&scope).await?;
        let plan = planned(&State::default(), &seen, &scope, &|_| None);
        left = plan.ops.iter().filter(|op| Op::is_delete(op)).count();
        if plan.is_empty() {
            return Ok(deleted);
        }
        deleted += seams.kernel.apply(&scope, Arc::new(plan)).await.applied;
    }
    Err(OverlayError::Teardown(left))
}

/// Deletes `subnet.env`, whoever wrote it. Returns whether there was one.
pub(crate) fn delete_env(settings: &Settings) -> bool {
    let Some(file) = &settings.subnet_env else { return false };
    match std::fs::remove_file(&file.path) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(path = %file.path.display(), %error, "subnet.env was not removed");
            false
        }
    }
}

async fn give_back(seams: &Seams, settings: &Settings, config: &NetworkConfig) -> Result<Option<Lease>, String> {
    let host = seams.kernel.host_facts().await.map_err(|error| chain(&error))?;
    let choice = view::choose(settings, config, &host).map_err(|error| chain(&error))?;
    let node = view::identity(settings, &choice.public);
    let Some(lease) = patiently(seams, seams.subnets.previous(&node)).await? else { return Ok(None) };
    patiently(seams, seams.subnets.release(lease.clone())).await?;
    Ok(Some(lease))
}

async fn patiently<T>(seams: &Seams, call: impl Future<Output = Result<T, SubnetError>>) -> Result<T, String> {
    let patience = seams.clock.sleep_until(seams.clock.now().after(PATIENCE));
    tokio::select! {
        answer = call => answer.map_err(|error| chain(&error)),
        () = patience => Err(format!("the lease store did not answer within {PATIENCE:?}")),
    }
}
