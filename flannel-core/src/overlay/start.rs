//! From nothing to a lease: everything that happens once, before the machine.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::backend::{Backend, Situation, Uplink};
use crate::clock::BootTime;
use crate::config::{ConfigError, NetworkConfig};
use crate::kernel::{Claim, KernelError, Residence};
use crate::lease::Lease;
use crate::net::{Dual, Prefix};
use crate::overlay::backoff::Backoff;
use crate::overlay::builder::Factory;
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::status::{Contact, Event};
use crate::overlay::view::{self, First, SETTLE, Settling};
use crate::overlay::{Identity, MissingUplink, Settings, chain, places};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use crate::uplink::{Explanation, Problem, UplinkError};

/// How often a start looks at the host while its addresses settle.
const GLANCE: Duration = Duration::from_millis(250);

/// What is known before anything is taken or written.
pub(crate) struct Surveyed {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) situation: Situation,
    /// Why the uplink is the one to use.
    explanation: Explanation,
    /// The local addresses that were used before.
    before: Dual<IpAddr>,
    /// When the host was read.
    pub(crate) read: BootTime,
    pub(crate) want: Want,
}

/// What a start has taken: everything an agent runs on.
pub(crate) struct Started {
    pub(crate) surveyed: Surveyed,
    pub(crate) claims: Claims,
    pub(crate) lease: Lease,
}

/// How far a start has come, for whoever cuts it short.
#[derive(Default)]
pub(crate) struct Progress {
    claimed: Mutex<Option<Situation>>,
    asking: AtomicBool,
}

impl Progress {
    /// The node as it is, once the overlay's name was taken: there may be something to undo from then on.
    pub(crate) fn claimed(&self) -> Option<Situation> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the store is being asked for a lease, and may give one that nobody here has seen yet.
    pub(crate) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Relaxed)
    }

    fn claim(&self, situation: &Situation) {
        *self.claimed.lock().unwrap_or_else(PoisonError::into_inner) = Some(situation.clone());
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
    let mut backoff = Backoff::new(seams.jitter.clone());
    let mut claimed: Option<(Arc<NetworkConfig>, Claims)> = None;
    let mut uplink = None;
    let mut settling = None;
    loop {
        let surveyed = survey(seams, settings, backends, uplink.as_ref()).await?;
        if backoff.is_fresh() {
            store_answers(seams);
        }
        let Surveyed { situation, explanation, before, .. } = &surveyed;
        let waits = settling.is_some();
        settling = Settling::of(settling, before, &situation.uplink.addrs, seams.clock.now());
        if let Some(Settling { until, .. }) = settling {
            if !waits {
                // Where the store goes by addresses a wrong one would be another node's lease.
                let (name, addrs) = (situation.uplink.name.as_str(), &situation.uplink.addrs);
                tracing::info!(uplink = name, ?before, ?addrs, "waiting {SETTLE:?} for the addresses used before");
            }
            // Nobody tells a start of a change.
            seams.clock.sleep_until(until.min(seams.clock.now().after(GLANCE))).await;
            continue;
        }
        if uplink.as_ref() != Some(&situation.uplink) {
            tracing::info!(uplink = situation.uplink.name.as_str(), %explanation, "uplink chosen");
            uplink = Some(situation.uplink.clone());
        }
        let claims = match claimed.take() {
            Some((config, claims)) if config == situation.config => claims,
            other => {
                // One claim a name: the former one has to go first.
                drop(other);
                let claims = claim(seams, settings, &surveyed).await?;
                probe(seams, &surveyed).await?;
                claims
            }
        };
        progress.claim(situation);
        progress.asking.store(true, Ordering::Relaxed);
        let answer = acquire(&*seams.subnets, &situation.node, &situation.config, surveyed.want.clone()).await;
        progress.asking.store(false, Ordering::Relaxed);
        match answer {
            Ok(lease) => {
                store_answers(seams);
                return Ok(Started { surveyed, claims, lease });
            }
            Err(error) => store_fails(seams, error)?,
        }
        claimed = Some((Arc::clone(&surveyed.situation.config), claims));
        seams.clock.sleep_until(seams.clock.now().after(backoff.next())).await;
    }
}

/// Reads configuration, host and previous lease. Writes nothing.
///
/// `uplink` is what this start used so far.
pub(crate) async fn survey(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    uplink: Option<&Uplink>,
) -> Result<Surveyed, OverlayError> {
    let config = Arc::new(ask_store(seams, || seams.subnets.network_config()).await?);
    let backend = pick(backends, &config)?;
    let reach = settings.uplink.reaches();
    let mut missing = Missing { seams, settings, told: None, backoff: Backoff::new(seams.jitter.clone()) };
    let (first, previous, read) = loop {
        let host = Arc::new(ask_kernel(seams, || seams.kernel.host_facts(&reach)).await?);
        let read = seams.clock.now();
        let find = |others: &_| {
            view::first_situation(settings, Arc::clone(&config), Arc::clone(&host), &*backend, uplink, others)
        };
        match own_lease(seams, settings, &*backend, find).await? {
            Ok((first, previous)) => break (first, previous, read),
            Err(error) => missing.wait(error).await?,
        }
    };
    let First { mut situation, explanation, before, .. } = first;
    missing.found(&situation.uplink);
    situation.previous = previous.map(Arc::new);
    let attrs = backend.advertise(&situation).map_err(OverlayError::Backend)?;
    let preferred = situation.previous.as_ref().map(|lease| lease.subnets).unwrap_or_default();
    // Another agent's last words in subnet.env name the subnet that pods here still use (contract 6.4, step 3).
    let preferred = if preferred.is_empty() { view::former_subnets(settings) } else { preferred };
    Ok(Surveyed { backend, situation, explanation, before, read, want: Want { attrs, preferred } })
}

/// Looks for the uplink and this node's previous lease. A node that the store knows by its address, and that does not
/// have the address any more that it had, may find another node's lease: then it uses an address that nobody publishes.
async fn own_lease(
    seams: &Seams,
    settings: &Settings,
    backend: &dyn Backend,
    find: impl Fn(&BTreeSet<IpAddr>) -> Result<First, UplinkError>,
) -> Result<Result<(First, Option<Lease>), UplinkError>, OverlayError> {
    let mut others = BTreeSet::new();
    // Each turn rules out an address of the host.
    loop {
        let first = match find(&others) {
            Ok(first) => first,
            Err(error) => return Ok(Err(error)),
        };
        let lease = ask_store(seams, || seams.subnets.previous(&first.situation.node)).await?;
        let addrs = &first.situation.public;
        let is_others = lease
            .as_ref()
            .is_some_and(|lease| settings.identity == Identity::PublicIp && first.is_others(backend, lease));
        if !is_others || addrs.iter().all(|(_, addr)| others.contains(addr)) {
            return Ok(Ok((first, lease)));
        }
        others.extend(addrs.iter().map(|(_, addr)| *addr));
    }
}

/// Waits for an uplink, if that is the policy.
struct Missing<'a> {
    seams: &'a Seams,
    settings: &'a Settings,
    told: Option<Problem>,
    backoff: Backoff,
}

impl Missing<'_> {
    async fn wait(&mut self, error: UplinkError) -> Result<(), OverlayError> {
        let Self { seams, settings, told, backoff } = self;
        // No host can mend an address of the wrong family.
        let final_anyway = matches!(error.problem, Problem::WrongFamily { .. });
        if settings.missing_uplink == MissingUplink::Fail || final_anyway {
            return Err(OverlayError::Uplink(error));
        }
        if told.as_ref() != Some(&error.problem) {
            let text = chain(&error);
            seams.tell(Event::UplinkLost(text.clone()));
            seams.status.send_modify(|status| status.last_error = Some(text));
            *told = Some(error.problem);
        }
        seams.clock.sleep_until(seams.clock.now().after(backoff.next())).await;
        Ok(())
    }

    fn found(self, uplink: &Uplink) {
        if self.told.is_some() {
            self.seams.tell(Event::UplinkBack(uplink.clone()));
        }
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
async fn claim(seams: &Seams, settings: &Settings, surveyed: &Surveyed) -> Result<Claims, OverlayError> {
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
async fn probe(seams: &Seams, surveyed: &Surveyed) -> Result<(), OverlayError> {
    let Surveyed { backend, situation, want, .. } = surveyed;
    if !backend.writes() {
        return Ok(());
    }
    let devices = backend.scope(&view::expected(situation, want)).devices;
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
    let networks = &config.networks;
    if lease.subnets.iter().all(|(family, subnet)| networks.get(family).is_some_and(|it| it.prefix.covers(subnet))) {
        return Ok(lease);
    }
    subnets.release(lease).await?;
    Err(SubnetError::Reconfigured)
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

/// Asks the store until it answers.
async fn ask_store<T, F>(seams: &Seams, mut ask: impl FnMut() -> F) -> Result<T, OverlayError>
where
    F: Future<Output = Result<T, SubnetError>>,
{
    let mut backoff = Backoff::new(seams.jitter.clone());
    loop {
        match ask().await {
            Ok(value) => return Ok(value),
            Err(error) => store_fails(seams, error)?,
        }
        seams.clock.sleep_until(seams.clock.now().after(backoff.next())).await;
    }
}

/// Shows that the store does what it is asked for.
fn store_answers(seams: &Seams) {
    let mut back = false;
    seams.status.send_if_modified(|status| {
        let before = std::mem::replace(&mut status.store, Contact::Live);
        back = matches!(before, Contact::Lost { .. });
        before != Contact::Live
    });
    if back {
        seams.tell(Event::StoreBack);
    }
}

/// Shows why the store does not do what it is asked for. What only an operator can mend in what the store *holds* is
/// final; a store that is away, denies or is full may answer later.
fn store_fails(seams: &Seams, error: SubnetError) -> Result<(), OverlayError> {
    match error {
        SubnetError::Unavailable { .. }
        | SubnetError::Denied { .. }
        | SubnetError::Unconfigured { .. }
        | SubnetError::Reconfigured
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
    Ok(())
}

impl From<KernelError> for OverlayError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}
