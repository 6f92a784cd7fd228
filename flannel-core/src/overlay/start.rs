//! From nothing to a lease: everything that happens once, before the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{Backend, Local, Situation};
use crate::clock::BootTime;
use crate::config::{ConfigError, NetworkConfig};
use crate::kernel::{Claim, KernelError, Residence};
use crate::lease::{Fence, Lease, LeaseKey};
use crate::net::{Dual, Prefix};
use crate::overlay::backoff::Backoff;
use crate::overlay::builder::Factory;
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::status::{Contact, Event};
use crate::overlay::{MissingUplink, Settings, chain, places, view};
use crate::subnet::{SubnetError, Want};
use crate::uplink::Problem;

/// What is known before anything is taken or written.
pub(crate) struct Surveyed {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) situation: Situation,
    /// When the host was read.
    pub(crate) read: BootTime,
    pub(crate) want: Want,
}

/// Reads configuration, host and previous lease. Writes nothing.
pub(crate) async fn survey(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
) -> Result<Surveyed, OverlayError> {
    let config = Arc::new(retry(seams, || seams.subnets.network_config()).await?);
    let backend = pick(backends, &config)?;
    let mut situation = situate(seams, settings, &config).await?;
    let read = seams.clock.now();
    let previous = retry(seams, || seams.subnets.previous(&situation.node)).await?;
    situation.previous = previous.map(Arc::new);
    let attrs = backend.advertise(&situation).map_err(OverlayError::Backend)?;
    let preferred = situation.previous.as_ref().map(|lease| lease.subnets).unwrap_or_default();
    // Another agent's last words in subnet.env name the subnet that pods here still use (contract 6.4, step 3).
    let preferred = if preferred.is_empty() { view::former_subnets(settings) } else { preferred };
    Ok(Surveyed { backend, situation, read, want: Want { attrs, preferred } })
}

/// Reads the host and chooses the uplink, waiting for one if that is the policy.
async fn situate(seams: &Seams, settings: &Settings, config: &Arc<NetworkConfig>) -> Result<Situation, OverlayError> {
    let mut backoff = Backoff::new(seams.jitter.clone());
    let (mut told, reach) = (None, settings.uplink.reaches());
    loop {
        let host = Arc::new(ask_kernel(seams, || seams.kernel.host_facts(&reach)).await?);
        let error = match view::first_situation(settings, Arc::clone(config), host) {
            Ok(situation) => {
                if told.is_some() {
                    seams.tell(Event::UplinkBack(situation.uplink.clone()));
                }
                return Ok(situation);
            }
            Err(error) => error,
        };
        // No host can mend an address of the wrong family.
        let final_anyway = matches!(error.problem, Problem::WrongFamily { .. });
        if settings.missing_uplink == MissingUplink::Fail || final_anyway {
            return Err(OverlayError::Uplink(error));
        }
        if told.as_ref() != Some(&error.problem) {
            let text = chain(&error);
            seams.tell(Event::UplinkLost(text.clone()));
            seams.status.send_modify(|status| status.last_error = Some(text));
            told = Some(error.problem);
        }
        seams.clock.sleep_until(seams.clock.now().after(backoff.next())).await;
    }
}

/// Asks the kernel until it answers. What no retry helps is final.
async fn ask_kernel<T, F>(seams: &Seams, mut ask: impl FnMut() -> F) -> Result<T, OverlayError>
where
    F: Future<Output = Result<T, KernelError>>,
{
    let mut backoff = Backoff::new(seams.jitter.clone());
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        match error {
            KernelError::Timeout { .. } | KernelError::Lost { .. } | KernelError::Refused { .. } => {}
            KernelError::Unsupported { .. }
            | KernelError::Denied { .. }
            | KernelError::Conflict { .. }
            | KernelError::Stopped => return Err(OverlayError::Kernel(error)),
        }
        let text = chain(&error);
        if seams.status.borrow().last_error.as_ref() != Some(&text) {
            seams.tell(Event::KernelTrouble(text.clone()));
            seams.status.send_modify(|status| status.last_error = Some(text));
        }
        seams.clock.sleep_until(seams.clock.now().after(backoff.next())).await;
    }
}

/// What an agent holds for as long as it runs, and for as long as something may be left in its former networks.
pub(crate) struct Claims {
    pub(crate) present: Claim,
    pub(crate) former: Vec<(Dual<Prefix>, Claim)>,
}

/// Takes the name, and the networks of former runs if they are others than now. Where another overlay has moved in
/// meanwhile, nothing can be told from its routes, so nothing is looked for.
pub(crate) async fn claim(seams: &Seams, settings: &Settings, surveyed: &Surveyed) -> Result<Claims, OverlayError> {
    let networks = surveyed.situation.networks();
    let claim = async |networks: &Dual<Prefix>, residence| {
        ask_kernel(seams, || seams.kernel.claim(&settings.name, networks, residence)).await
    };
    let present = claim(&networks, Residence::Present).await?;
    let mut former = Vec::new();
    for others in view::former_networks(settings).into_iter().filter(|others| *others != networks) {
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
    let (path, former, present) = (file.path.clone(), former.to_vec(), surveyed.situation.networks());
    let written = tokio::task::spawn_blocking(move || places::remember(&path, &former, present)).await;
    let error = match written {
        Ok(Ok(())) => return,
        Ok(Err(error)) => chain(&error),
        Err(error) => chain(&error),
    };
    tracing::warn!(error, "a change of network amid a crash could leave routes behind");
}

/// Asks the kernel whether it can do what the backend needs, before a lease is taken.
pub(crate) async fn probe(seams: &Seams, surveyed: &Surveyed) -> Result<(), OverlayError> {
    let Surveyed { backend, situation, want, .. } = surveyed;
    if !backend.writes() {
        return Ok(());
    }
    let local = Local { lease: Arc::new(expected(situation, want)), situation: situation.clone() };
    let devices = backend.scope(&local).devices;
    ask_kernel(seams, || seams.kernel.probe(&devices)).await
}

/// The lease as far as it is known before it is taken: enough to tell which devices there will be.
fn expected(situation: &Situation, want: &Want) -> Lease {
    Lease {
        key: LeaseKey::new(situation.node.as_str()),
        subnets: want.preferred,
        attrs: want.attrs.clone(),
        expires: None,
        fence: Fence::default(),
    }
}

/// Takes the lease. `asking` says whether the store is being asked just now, and may take what is not known here yet.
pub(crate) async fn acquire(seams: &Seams, surveyed: &Surveyed, asking: &AtomicBool) -> Result<Lease, OverlayError> {
    let Surveyed { situation, want, .. } = surveyed;
    retry(seams, || async {
        asking.store(true, Ordering::Relaxed);
        let answer = seams.subnets.acquire(&situation.node, want.clone()).await;
        asking.store(false, Ordering::Relaxed);
        answer
    })
    .await
}

fn pick(backends: &[(&'static str, Factory)], config: &NetworkConfig) -> Result<Arc<dyn Backend>, OverlayError> {
    let Some((_, make)) = backends.iter().find(|(kind, _)| *kind == config.backend.kind) else {
        let known: Vec<_> = backends.iter().map(|(kind, _)| *kind).collect();
        let problem = format!("{:?} is not available here", config.backend.kind);
        let remedy = format!("available: {}", known.join(", "));
        return Err(OverlayError::Backend(ConfigError::new("$.Backend.Type", problem, remedy).into()));
    };
    make(config).map_err(OverlayError::Backend)
}

/// Asks the store until it answers. What only an operator can mend in what the store *holds* is final; a store that is
/// away, denies or is full may answer later.
async fn retry<T, F>(seams: &Seams, mut ask: impl FnMut() -> F) -> Result<T, OverlayError>
where
    F: Future<Output = Result<T, SubnetError>>,
{
    let mut backoff = Backoff::new(seams.jitter.clone());
    loop {
        let error = match ask().await {
            Ok(value) => {
                let mut back = false;
                seams.status.send_if_modified(|status| {
                    let before = std::mem::replace(&mut status.store, Contact::Live);
                    back = matches!(before, Contact::Lost { .. });
                    before != Contact::Live
                });
                if back {
                    seams.tell(Event::StoreBack);
                }
                return Ok(value);
            }
            Err(error) => error,
        };
        match error {
            SubnetError::Unavailable { .. }
            | SubnetError::Denied { .. }
            | SubnetError::Unconfigured { .. }
            | SubnetError::Exhausted(_)
            | SubnetError::Lost(_) => {}
            SubnetError::Invalid { .. } | SubnetError::Unsupported(_) => return Err(OverlayError::Store(error)),
        }
        let text = chain(&error);
        let now = seams.clock.now();
        let fresh = seams.status.send_if_modified(|status| {
            let fresh = !matches!(status.store, Contact::Lost { .. });
            if fresh {
                status.store = Contact::Lost { since: now, error: text.clone() };
            }
            status.last_error = Some(text.clone());
            fresh
        });
        if fresh {
            seams.tell(Event::StoreLost(text));
        }
        seams.clock.sleep_until(now.after(backoff.next())).await;
    }
}

impl From<KernelError> for OverlayError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}
