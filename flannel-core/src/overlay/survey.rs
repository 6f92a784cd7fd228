//! What a start finds out first: the configuration, the host, and this node's identity in the store. Writes nothing.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::agent::inputs::{Evidence, First, Known, Owner, SETTLE};
use crate::agent::{Contact, Event, MissingUplink, Settings, Status, UplinkState, Wait};
use crate::backend::{Backend, BackendError, NodeContext, Uplink};
use crate::backoff::Backoff;
use crate::clock::BootTime;
use crate::config::{ConfigError, NetworkConfig};
use crate::kernel::KernelError;
use crate::lease::Lease;
use crate::net::{Dual, Prefix};
use crate::overlay::builder::Factory;
use crate::overlay::host_files;
use crate::overlay::run::{OverlayError, Seams};
use crate::subnet::{OwnLeases, SubnetError, Want};
use crate::text::chain;
use crate::uplink::{Problem, Rationale, Select, UplinkError};

/// The interval of reads of the host while its addresses settle: a start receives no notifications.
const GLANCE: Duration = Duration::from_millis(250);

/// What is known before a claim, a lease or a write.
pub(crate) struct Surveyed {
    /// The settings, with the uplink selection at that time.
    pub(crate) settings: Arc<Settings>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) context: NodeContext,
    /// Why the uplink was chosen.
    pub(crate) rationale: Rationale,
    /// The local addresses that were used before.
    pub(crate) before: Dual<IpAddr>,
    /// Addresses that were ruled out because another node publishes them.
    others: BTreeSet<IpAddr>,
    /// When the host was read.
    pub(crate) read: BootTime,
    pub(crate) want: Want,
}

/// Returns the settings with this node's identity, as soon as the store answers.
pub(crate) async fn identified(seams: &Seams, settings: &Settings) -> Result<Arc<Settings>, OverlayError> {
    let node = ask_store(seams, || seams.subnets.this_node()).await?;
    Ok(Arc::new(settings.for_node(node)))
}

/// Returns the configuration, as soon as the store answers.
pub(crate) async fn configuration(seams: &Seams) -> Result<Arc<NetworkConfig>, OverlayError> {
    ask_store(seams, || seams.subnets.network_config()).await.map(Arc::new)
}

/// Reads the host and the previous lease, waiting for an uplink if that is the policy. `so_far` is the survey with
/// which this start last asked for a lease.
pub(crate) async fn survey(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    config: Arc<NetworkConfig>,
    so_far: Option<&Surveyed>,
) -> Result<Surveyed, OverlayError> {
    let backend = pick(backends, &config)?;
    let uplink = so_far.map(|so_far| &so_far.context.uplink);
    let mut missing = Missing::new(seams, settings);
    let (own, named, read, settings) = loop {
        let settings = seams.up_to_date(settings);
        let reach = settings.uplink.reaches();
        let host = Arc::new(ask_kernel(seams, || seams.kernel.host_facts(&reach)).await?);
        let read = seams.clock.now();
        let known = Known { settings: &settings, config: &config, backend: &*backend, uplink };
        let find = |others: &_| known.first_context(&host, others);
        // The `subnet.env` of another agent names the subnet that pods here still use (docs/compatibility.md,
        // "Acquiring a lease").
        let named = host_files::read(seams, &settings).await.subnets;
        match own_lease(seams, &settings, &*backend, named, so_far, find).await? {
            Ok(own) => {
                missing.found(&own.first.context.uplink);
                break (own, named, read, Arc::new(settings));
            }
            Err(error) => missing.wait(error).await?,
        }
    };
    let Own { first, lease, foreign, others } = own;
    let left = first.left_subnets();
    let First { mut context, rationale, before, .. } = first;
    context.previous = lease.map(Arc::new);
    // Decided before the first request for a lease: a lease found later may be this start's own, whose answer was lost.
    let foreign = match so_far.filter(|so_far| so_far.context.node == context.node) {
        Some(so_far) => {
            context.taken.clone_from(&so_far.context.taken);
            so_far.want.foreign.clone()
        }
        None => {
            context.taken.extend(foreign.iter().flat_map(|lease| First::macs(&*backend, &lease.attrs)));
            foreign.into_iter().map(|lease| lease.key).collect()
        }
    };
    let attrs = backend.advertise(&context).map_err(OverlayError::Backend)?;
    let previous = context.previous.as_ref().map(|lease| lease.subnets).unwrap_or_default();
    let told = [previous, named, left];
    let preferred = told.into_iter().find(|subnets| !subnets.is_empty()).unwrap_or_default();
    let own = match (&settings.node, &context.previous) {
        (Some(_), _) => OwnLeases::Every,
        (None, Some(lease)) => OwnLeases::Key(lease.key.clone()),
        (None, None) => OwnLeases::Unheld,
    };
    let want = Want::new(attrs).preferring(preferred).owning(own).leaving_alone(foreign);
    Ok(Surveyed { settings, backend, context, rationale, before, others, read, want })
}

/// Waits until the host yields other addresses than in the survey, or until `until`.
pub(crate) async fn settle(
    seams: &Seams,
    settings: &Settings,
    surveyed: &Surveyed,
    so_far: Option<&Surveyed>,
    until: BootTime,
) -> Result<(), OverlayError> {
    let Surveyed { backend, context, others, .. } = surveyed;
    let uplink = so_far.map(|so_far| &so_far.context.uplink);
    while seams.clock.now() < until {
        seams.show_wait(Wait::Uplink {
            error: Some(format!("for {SETTLE:?}, for the addresses that were used before")),
        });
        seams.clock.sleep_until(until.min(seams.clock.now().after(GLANCE))).await;
        let settings = &seams.up_to_date(settings);
        let known = Known { settings, config: &context.config, backend: &**backend, uplink };
        let reach = settings.uplink.reaches();
        let host = Arc::new(ask_kernel(seams, || seams.kernel.host_facts(&reach)).await?);
        let found = known.first_context(&host, others);
        if !found.is_ok_and(|found| found.context.uplink.addrs == context.uplink.addrs) {
            break;
        }
    }
    seams.show_wait(Wait::Uplink { error: None });
    Ok(())
}

/// This node in the store.
struct Own {
    first: First,
    lease: Option<Lease>,
    /// Other nodes' leases under the same identity.
    foreign: Vec<Lease>,
    /// Addresses that were ruled out.
    others: BTreeSet<IpAddr>,
}

/// Looks for the uplink and this node's previous lease. For a node that the store identifies by address, only leases of
/// other nodes may be found; it then uses an address that no other node publishes, unless it published this address
/// before. `named` are the subnets in `subnet.env`; `so_far` is the survey with which this start last asked for a lease.
async fn own_lease(
    seams: &Seams,
    settings: &Settings,
    backend: &dyn Backend,
    named: Dual<Prefix>,
    so_far: Option<&Surveyed>,
    find: impl Fn(&BTreeSet<IpAddr>) -> Result<First, UplinkError>,
) -> Result<Result<Own, UplinkError>, OverlayError> {
    let mut others = BTreeSet::new();
    let so_far = so_far.map(|so_far| (&so_far.context, &so_far.want));
    let evidence = Evidence { so_far, former: named };
    // Each iteration rules out one address of the host.
    loop {
        let first = match find(&others) {
            Ok(first) => first,
            Err(error) => return Ok(Err(error)),
        };
        let (mut ours, mut foreign) = (Vec::new(), Vec::new());
        let mut has_holder = false;
        for lease in ask_store(seams, || seams.subnets.previous(&first.context.node)).await? {
            let owner = match settings.node {
                None => first.owner(backend, &lease, &evidence),
                Some(_) => Owner::Us,
            };
            has_holder |= owner == Owner::Holder;
            if owner == Owner::Us { ours.push(lease) } else { foreign.push(lease) }
        }
        let address = first.context.public.v4.or(first.context.public.v6);
        let is_ruled_out = ours.is_empty() && has_holder && address.is_some_and(|addr| others.insert(addr));
        if !is_ruled_out {
            let lease = first.likeliest(backend, ours, &evidence);
            return Ok(Ok(Own { first, lease, foreign, others }));
        }
    }
}

/// Waits for an uplink, if that is the policy.
struct Missing<'a> {
    seams: &'a Seams,
    settings: &'a Settings,
    selected: watch::Receiver<Select>,
    told: Option<Problem>,
    backoff: Backoff,
}

impl<'a> Missing<'a> {
    fn new(seams: &'a Seams, settings: &'a Settings) -> Self {
        let mut selected = seams.uplink.clone();
        selected.mark_unchanged();
        Self { seams, settings, selected, told: None, backoff: Backoff::new(seams.jitter.clone()) }
    }

    async fn wait(&mut self, error: UplinkError) -> Result<(), OverlayError> {
        let Self { seams, settings, selected, told, backoff } = self;
        // An address of the wrong family is an error on every host.
        let final_anyway = matches!(error.problem, Problem::WrongFamily { .. });
        if settings.missing_uplink == MissingUplink::Fail || final_anyway {
            return Err(OverlayError::Uplink(error));
        }
        let text = chain(&error);
        if told.as_ref() != Some(&error.problem) {
            seams.status.send_modify(|status| status.last_error = Some(text.clone()));
            lose_uplink(seams, &text);
            *told = Some(error.problem);
        }
        seams.show_wait(Wait::Uplink { error: Some(text) });
        tokio::select! {
            () = seams.clock.sleep_until(seams.clock.now().after(backoff.wait())) => {}
            Ok(()) = selected.changed() => backoff.reset(),
        }
        Ok(())
    }

    fn found(&self, uplink: &Uplink) {
        if self.told.is_some() {
            self.seams.show_wait(Wait::Uplink { error: None });
            // Another uplink may be chosen before the lease is acquired.
            self.seams.status.send_modify(|status| status.uplink = UplinkState::Unknown);
            self.seams.tell(Event::UplinkBack(uplink.clone()));
        }
    }
}

fn lose_uplink(seams: &Seams, text: &str) {
    let now = seams.clock.now();
    let is_new = |status: &Status| !matches!(&status.uplink, UplinkState::Lost { error, .. } if error == text);
    if seams.status.send_if(is_new, |status| status.uplink = status.uplink.lost(None, now, text.to_owned())) {
        seams.tell(Event::UplinkLost(text.to_owned()));
    }
}

/// Retries a kernel call until it succeeds. Returns errors that no retry can fix.
pub(crate) async fn ask_kernel<T, F>(seams: &Seams, mut ask: impl FnMut() -> F) -> Result<T, OverlayError>
where
    F: Future<Output = Result<T, KernelError>>,
{
    let mut backoff = Backoff::new(seams.jitter.clone());
    seams.show_step(Wait::Kernel { error: None });
    loop {
        let error = match ask().await {
            Ok(answer) => {
                if !backoff.is_fresh() {
                    seams.show_wait(Wait::Kernel { error: None });
                }
                return Ok(answer);
            }
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
            seams.status.send_modify(|status| status.last_error = Some(text.clone()));
            seams.tell(Event::KernelTrouble(text.clone()));
        }
        seams.show_wait(Wait::Kernel { error: Some(text) });
        seams.clock.sleep_until(seams.clock.now().after(backoff.wait())).await;
    }
}

pub(crate) fn pick(
    backends: &[(&'static str, Factory)],
    config: &NetworkConfig,
) -> Result<Arc<dyn Backend>, OverlayError> {
    let Some((_, make)) = backends.iter().find(|(kind, _)| *kind == config.backend.kind) else {
        let known: Vec<_> = backends.iter().map(|(kind, _)| *kind).collect();
        let problem = format!("{:?} is not available here", config.backend.kind);
        let remedy = format!("available: {}", known.join(", "));
        return Err(OverlayError::Backend(ConfigError::new("$.Backend.Type", problem, remedy).into()));
    };
    let backend = make(config).map_err(OverlayError::Backend)?;
    let (kind, name) = (config.backend.kind.clone(), backend.name());
    if kind == name { Ok(backend) } else { Err(OverlayError::Backend(BackendError::Misnamed { kind, name })) }
}

/// Retries a store call until it succeeds. Returns errors that no retry can fix.
async fn ask_store<T, F>(seams: &Seams, mut ask: impl FnMut() -> F) -> Result<T, OverlayError>
where
    F: Future<Output = Result<T, SubnetError>>,
{
    let mut backoff = Backoff::new(seams.jitter.clone());
    seams.show_step(Wait::Store { error: None });
    loop {
        match ask().await {
            Ok(value) => {
                if !backoff.is_fresh() {
                    seams.show_wait(Wait::Store { error: None });
                    seams.status.send_if(|status| status.lease_refused.is_some(), |status| status.lease_refused = None);
                }
                return Ok(value);
            }
            Err(error) => store_fails(seams, error)?,
        }
        seams.clock.sleep_until(seams.clock.now().after(backoff.wait())).await;
    }
}

/// Shows in the status that the store answers.
pub(crate) fn store_answers(seams: &Seams) {
    let mut back = false;
    seams.status.send_if(
        |status| status.store != Contact::Live,
        |status| back = matches!(std::mem::replace(&mut status.store, Contact::Live), Contact::Lost { .. }),
    );
    if back {
        seams.tell(Event::StoreBack);
    }
}

/// Shows in the status why a store call failed. Returns the error if an operator has to correct the data in the store.
/// A store that is unavailable, denies access or is full may give another answer later.
pub(crate) fn store_fails(seams: &Seams, error: SubnetError) -> Result<(), OverlayError> {
    match error {
        SubnetError::Unavailable { .. } | SubnetError::Denied { .. } => lose_store(seams, chain(&error)),
        SubnetError::Unconfigured { .. }
        | SubnetError::Reconfigured
        | SubnetError::Exhausted(_)
        | SubnetError::Lost(_) => refuse_lease(seams, chain(&error)),
        SubnetError::Invalid { .. } | SubnetError::Unsupported(_) => return Err(OverlayError::Store(error)),
    }
    Ok(())
}

/// Shows in the status that the store answered, but that there is no lease.
fn refuse_lease(seams: &Seams, text: String) {
    store_answers(seams);
    seams.show_wait(Wait::Lease { error: Some(text.clone()) });
    let mut fresh = false;
    seams.status.send_if(
        |status| status.lease_refused.as_ref() != Some(&text) || status.last_error.as_ref() != Some(&text),
        |status| {
            fresh = status.lease_refused.as_ref() != Some(&text);
            (status.lease_refused, status.last_error) = (Some(text.clone()), Some(text.clone()));
        },
    );
    if fresh {
        seams.tell(Event::LeaseRefused(text));
    }
}

/// Shows in the status that the store does not answer.
fn lose_store(seams: &Seams, text: String) {
    seams.show_wait(Wait::Store { error: Some(text.clone()) });
    let now = seams.clock.now();
    let mut fresh = false;
    seams.status.send_if(
        |status| !matches!(status.store, Contact::Lost { .. }) || status.last_error.as_ref() != Some(&text),
        |status| {
            fresh = !matches!(status.store, Contact::Lost { .. });
            if fresh {
                status.store = Contact::Lost { since: now, error: text.clone() };
            }
            status.last_error = Some(text.clone());
        },
    );
    if fresh {
        seams.tell(Event::StoreLost(text));
    }
}
