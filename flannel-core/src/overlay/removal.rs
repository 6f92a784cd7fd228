//! Removes everything: at the end of an agent, or after an agent that has ended.

use crate::kernel::{ApplyReport, Device, KernelError, LinkNames, Op, OpText, Residence, RouteSlot, Scope, State};
use crate::plan::{Plan, plan as planned};
use futures_util::StreamExt;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::agent::Settings;
use crate::agent::inputs::{self, Evidence, First, Known, Owner};
use crate::backend::{Backend, NodeContext};
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseAttrs, LeaseEvent};
use crate::net::{Dual, Prefix};
use crate::overlay::builder::Factory;
use crate::overlay::former_networks::{self, Retention};
use crate::overlay::host_files::{self, Named};
use crate::overlay::run::{OverlayError, Seams};
use crate::overlay::start::Claimed;
use crate::overlay::survey;
use crate::subnet::{NodeIdentity, SubnetError, Want};
use crate::text::chain;

/// How long a removal waits for the store and for the disk: it has to work without them.
const PATIENCE: Duration = Duration::from_secs(3);
/// The number of rounds before a removal gives up.
const ROUNDS: usize = 5;
/// The wait before the next round, after an incomplete one.
const SPACING: Duration = Duration::from_millis(100);

/// The result of a removal, or what one would remove.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Removed {
    /// The number of deleted kernel objects.
    pub objects: usize,
    /// The deletions as text in the style of `ip`: the first [`MAX_LISTED`](Self::MAX_LISTED).
    pub deletions: Vec<String>,
    /// Whether a `subnet.env` existed and was deleted.
    pub subnet_env: bool,
    /// The released lease, if the store had one of this node.
    pub lease: Option<Box<Lease>>,
    /// Why the lease could not be found or released. It then expires by itself if the store's leases expire.
    pub store: Option<String>,
}

impl Removed {
    /// The maximum number of [`deletions`](Self::deletions).
    pub const MAX_LISTED: usize = 1000;
}

/// Whether to remove anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Remove,
    /// Only find out what would be removed.
    Preview,
}

/// Removes what an ended agent has left.
pub(crate) async fn remove(
    seams: &Seams,
    settings: &Settings,
    backends: &[(&'static str, Factory)],
    mode: Mode,
) -> Result<Removed, OverlayError> {
    let config = patiently(seams, "removing", seams.subnets.network_config()).await;
    let configured = config.as_ref().ok().map(|config| config.networks.map(|_, network| network.prefix));
    // The network may have changed since: all networks are cleared, the present one last.
    let named = host_files::read_in_time(seams, settings).await;
    // What only unread files name is neither removed nor forgotten.
    let is_unread = named.is_none();
    let Named { subnets: named, networks: mut remembered } = named.unwrap_or_default();
    remembered.retain(|networks| Some(*networks) != configured);
    let last = configured.or_else(|| remembered.pop()).unwrap_or_default();
    // A removal holds it to the end: nothing is changed while an agent runs, and an agent that started meanwhile would
    // lose its file and its lease. A preview only finds out whether an agent runs, and keeps none from starting.
    let held = |claim| (mode == Mode::Remove).then_some(claim);
    let claim = held(seams.kernel.claim(&settings.name, &last, Residence::Present).await?);
    let mut removed = Removed::default();
    let extent = match &config {
        Ok(config) => Extent::find(seams, settings, backends, config).await,
        Err(_) => Extent::default(),
    };
    // Read before the devices are deleted: they show which address of the host was published, and which node owns a
    // lease.
    let node = match config {
        Ok(config) => Node::find(seams, settings, backends, config, named).await,
        Err(error) => Err(chain(&error)),
    };
    let (mut former, mut claims) = (Vec::new(), Vec::new());
    for networks in remembered {
        match seams.kernel.claim(&settings.name, &networks, Residence::Former).await {
            Ok(claim) => {
                claims.extend(held(claim));
                former.extend(networks.iter().map(|(_, network)| *network));
            }
            // Another overlay claims the network now: its routes cannot be told apart.
            Err(KernelError::Conflict { other, .. }) => {
                tracing::info!(
                    target: "flannel::kernel",
                    other,
                    "keeping the routes of a former network, which another overlay uses now"
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
    let cleared = clear_marked(seams, settings, extent, last, former, mode).await?;
    (removed.objects, removed.deletions) = (cleared.objects, cleared.listed);
    let env = match (mode, &settings.subnet_env) {
        _ if is_unread => Err(files_hang(settings)),
        (Mode::Remove, _) => delete_env(seams, settings, Retention::Delete).await,
        (Mode::Preview, Some(file)) => {
            let (path, access) = (file.path.clone(), seams.files.access());
            let exists = access.run(move || path.exists());
            Ok(matches!(in_time(seams, exists).await, Some(Ok(true))))
        }
        (Mode::Preview, None) => Ok(false),
    };
    let gone = match node {
        _ if is_unread => Err("subnet.env cannot be read, and may name another lease".to_owned()),
        Ok(node) => node.give_back(seams, mode).await,
        Err(error) => Err(error),
    };
    match gone {
        Ok(lease) => removed.lease = lease.map(Box::new),
        Err(error) => removed.store = Some(error),
    }
    drop((claim, claims));
    removed.subnet_env = env?;
    Ok(removed)
}

/// Removes everything after a start that was cancelled while it acquired the lease. Whether the node has a lease is
/// then unknown.
pub(crate) async fn undo_start(
    seams: &Seams,
    settings: &Settings,
    claimed: &Claimed,
    lease: Option<Lease>,
) -> Result<(), OverlayError> {
    let Claimed { backend, context, want } = claimed;
    let extent = Extent::of(&**backend, context, want);
    let cleared = clear_marked(seams, settings, extent, context.networks(), Vec::new(), Mode::Remove).await.map(drop);
    // Networks of former runs are not cleared here.
    let is_here = |networks: &Dual<Prefix>| *networks == context.networks();
    let named = host_files::read_in_time(seams, settings).await;
    let only_here = named.is_some_and(|named| named.networks.iter().all(is_here));
    let retention = if cleared.is_ok() && only_here { Retention::Delete } else { Retention::Keep };
    let env = delete_env(seams, settings, retention).await.map(drop);
    let released = release(seams, context, want, lease.map_or(LastLease::Unknown(None), LastLease::Held)).await;
    cleared.and(env).and(released)
}

/// What the backend uses in the kernel, as far as it is known.
#[derive(Default)]
struct Extent {
    /// They show which marked devices another program makes. Unknown without the configuration or an uplink.
    devices: Vec<Device>,
    /// Unknown without the configuration.
    slots: Vec<RouteSlot>,
}

impl Extent {
    fn of(backend: &dyn Backend, context: &NodeContext, want: &Want) -> Self {
        let local = inputs::expected(context, want);
        Self { devices: backend.devices(&local), slots: backend.slots() }
    }

    async fn find(
        seams: &Seams,
        settings: &Settings,
        backends: &[(&'static str, Factory)],
        config: &NetworkConfig,
    ) -> Self {
        let Ok(backend) = survey::pick(backends, config) else { return Self::default() };
        match first_context(seams, settings, &*backend, config).await {
            Ok(First { context, .. }) => {
                let attrs = LeaseAttrs::new(context.public);
                Self::of(&*backend, &context, &Want::new(attrs))
            }
            Err(_) => Self { slots: backend.slots(), ..Self::default() },
        }
    }
}

/// The error of a removal that cannot read which former networks and which lease are this node's.
fn files_hang(settings: &Settings) -> OverlayError {
    let path = settings.subnet_env.as_ref().map(|file| file.path.clone()).unwrap_or_default();
    OverlayError::SubnetEnv { path, source: std::io::ErrorKind::TimedOut.into() }
}

/// Returns what a start would find out about this node before it asks for a lease.
async fn first_context(
    seams: &Seams,
    settings: &Settings,
    backend: &dyn Backend,
    config: &NetworkConfig,
) -> Result<First, String> {
    let host = seams.kernel.host_facts(&settings.uplink.reaches()).await.map_err(|error| chain(&error))?;
    let known = Known { settings, config: &Arc::new(config.clone()), backend, uplink: None };
    known.first_context(&Arc::new(host), &BTreeSet::new()).map_err(|error| chain(&error))
}

/// Deletes the overlay's objects in `networks` and `former` networks. No device is wanted, so each device with the
/// overlay's mark is deleted, under any name, except those that `extent` shows to be another program's.
async fn clear_marked(
    seams: &Seams,
    settings: &Settings,
    extent: Extent,
    networks: Dual<Prefix>,
    former: Vec<Prefix>,
    mode: Mode,
) -> Result<Cleared, OverlayError> {
    let slots = [&*settings.slots, &extent.slots].concat();
    let facts = seams.kernel.host_facts(&settings.uplink.reaches()).await;
    let names = facts.map(|facts| LinkNames::of(Arc::new(facts))).unwrap_or_default();
    let scope = Scope { former, devices: extent.devices, slots, names, ..Scope::new(settings.name.clone(), networks) };
    let removal = |seen: &State| planned(&State::default(), seen, &scope, &|_| None);
    match mode {
        Mode::Remove => clear(seams, &scope, removal).await,
        Mode::Preview => {
            let plan = removal(&seams.kernel.observe(&scope).await?);
            let mut cleared = Cleared { objects: plan.ops.len(), listed: Vec::new() };
            cleared.list(&scope, &plan.ops);
            Ok(cleared)
        }
    }
}

/// The deleted kernel objects.
#[derive(Debug, Default)]
pub(crate) struct Cleared {
    objects: usize,
    /// The first deletions, as text.
    listed: Vec<String>,
}

impl Cleared {
    fn list(&mut self, scope: &Scope, ops: &[Op]) {
        let room = Removed::MAX_LISTED.saturating_sub(self.listed.len());
        self.listed.extend(ops.iter().take(room).map(|op| OpText { op, scope }.to_string()));
    }
}

/// Observes the kernel and carries out the plan of `removal`, until the plan is empty.
pub(crate) async fn clear(
    seams: &Seams,
    scope: &Scope,
    removal: impl Fn(&State) -> Plan,
) -> Result<Cleared, OverlayError> {
    let mut cleared = Cleared::default();
    let mut trouble = None;
    let mut wait = false;
    for round in 0..=ROUNDS {
        if wait {
            seams.clock.sleep_until(seams.clock.now().after(SPACING)).await;
        }
        let seen = match seams.kernel.observe(scope).await {
            Ok(seen) => seen,
            Err(error) => {
                (trouble, wait) = (Some(OverlayError::Kernel(error)), true);
                continue;
            }
        };
        let plan = removal(&seen);
        if plan.is_empty() {
            return Ok(cleared);
        }
        if round == ROUNDS {
            trouble = trouble.or_else(|| Some(unfinished(scope, &plan.ops, &ApplyReport::default())));
            break;
        }
        let ops = Arc::new(plan.ops);
        let report = seams.kernel.apply(scope, Arc::clone(&ops)).await;
        cleared.objects += report.applied;
        wait = !report.is_complete();
        if wait {
            trouble = Some(unfinished(scope, &ops, &report));
        } else {
            trouble = None;
            cleared.list(scope, &ops);
        }
    }
    trouble.map_or(Ok(cleared), Err)
}

/// The error of a removal that gives up after this round.
fn unfinished(scope: &Scope, ops: &[Op], report: &ApplyReport) -> OverlayError {
    let refused = report.refused.first();
    let left = ops.len().saturating_sub(report.applied);
    let first = refused.map_or_else(|| ops.first(), |(place, _)| ops.get(*place));
    let first = first.map(|op| OpText { op, scope }.to_string()).unwrap_or_default();
    let source = refused.map(|(_, error)| error).or(report.lost.as_ref()).cloned();
    OverlayError::Teardown { left, first, source }
}

/// Deletes `subnet.env`, even if another agent wrote it, and the record of former networks beside it. If the record is
/// still needed, the networks of `subnet.env` are added to it instead. Returns whether there was a `subnet.env`.
pub(crate) async fn delete_env(seams: &Seams, settings: &Settings, retention: Retention) -> Result<bool, OverlayError> {
    let Some(file) = &settings.subnet_env else { return Ok(false) };
    let (path, access) = (file.path.clone(), seams.files.access());
    let deletion = access.run(move || {
        let known = former_networks::known(&path);
        let removed = std::fs::remove_file(&path);
        match (retention, known.split_last()) {
            (Retention::Keep, Some((last, others))) => {
                former_networks::remember(&path, others, *last).map_err(std::io::Error::other)?;
            }
            (Retention::Keep, None) => {}
            (Retention::Delete, _) => former_networks::forget(&path)?,
        }
        removed
    });
    let outcome = match in_time(seams, deletion).await {
        Some(outcome) => outcome.flatten(),
        None => Err(std::io::ErrorKind::TimedOut.into()),
    };
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(OverlayError::SubnetEnv { path: file.path.clone(), source }),
    }
}

/// The state of the lease at the end of an agent.
pub(crate) enum LastLease {
    Held(Lease),
    NotHeld,
    /// A call about the lease was dropped, or its answer was lost. The lease was held before, if any.
    Unknown(Option<Lease>),
}

/// Releases the lease, unless the store shows it as another node's. `want` says what this node publishes, and which
/// leases are other nodes' whatever they publish.
pub(crate) async fn release(
    seams: &Seams,
    context: &NodeContext,
    want: &Want,
    last: LastLease,
) -> Result<(), OverlayError> {
    let is_published =
        |lease: &Lease| lease.attrs.public_ip == context.public && lease.attrs.backend_data == want.attrs.backend_data;
    let lease = match last {
        LastLease::Held(lease) => Some(lease),
        LastLease::NotHeld => None,
        LastLease::Unknown(before) => {
            let previous = patiently(seams, "looking for the lease", seams.subnets.previous(&context.node)).await;
            let mut leases = previous.map_err(OverlayError::Release)?.into_iter();
            match before {
                // The store may have recorded it under an address that the node no longer has.
                Some(before) => match leases.find(|lease| lease.key == before.key) {
                    Some(lease) => Some(lease).filter(is_published),
                    None => Some(before),
                },
                None => {
                    // The one of the last run is this node's too, even if the configuration has changed since.
                    let last = context.previous.as_ref().map(|lease| &lease.key);
                    let is_own = |lease: &Lease| is_published(lease) || last == Some(&lease.key);
                    leases.find(|lease| is_own(lease) && !want.foreign.contains(&lease.key))
                }
            }
        }
    };
    let Some(lease) = lease else { return Ok(()) };
    patiently(seams, "releasing the lease", seams.subnets.release(lease)).await.map_err(OverlayError::Release)
}

/// This node's identity in the store, and the evidence for which leases are its own.
struct Node {
    id: NodeIdentity,
    /// The subnets that `subnet.env` names.
    named: Dual<Prefix>,
    /// If the store identifies nodes by address: the backend, and what the host shows.
    found: Option<(Arc<dyn Backend>, First)>,
}

impl Node {
    async fn find(
        seams: &Seams,
        settings: &Settings,
        backends: &[(&'static str, Factory)],
        config: NetworkConfig,
        named: Dual<Prefix>,
    ) -> Result<Self, String> {
        let this = patiently(seams, "reading this node's identity", seams.subnets.this_node()).await;
        let settings = &settings.for_node(this.map_err(|error| chain(&error))?);
        if let Some(node) = &settings.node {
            return Ok(Self { id: node.clone(), named, found: None });
        }
        let backend = survey::pick(backends, &config).map_err(|error| chain(&error))?;
        let first = first_context(seams, settings, &*backend, &config).await?;
        Ok(Self { id: first.context.node.clone(), named, found: Some((backend, first)) })
    }

    fn owns(&self, lease: &Lease) -> bool {
        let evidence = Evidence { so_far: None, former: self.named };
        let is_ours =
            |(backend, first): &(Arc<dyn Backend>, First)| first.owner(&**backend, lease, &evidence) == Owner::Us;
        self.found.as_ref().is_none_or(is_ours) && (self.named.is_empty() || self.named == lease.subnets)
    }

    /// Returns the lease of another network that `subnet.env` names. The network may have changed since the agent ran,
    /// and [`previous`](crate::subnet::SubnetManager::previous) returns only leases that fit the present one.
    async fn of_former_network(&self, seams: &Seams) -> Result<Vec<Lease>, String> {
        if self.named.is_empty() || self.found.is_none() {
            return Ok(Vec::new());
        }
        let list = async {
            let mut watch = seams.subnets.watch();
            while let Some(event) = watch.next().await {
                if let LeaseEvent::Reset(records) = event? {
                    return Ok(records);
                }
            }
            Ok(Vec::new())
        };
        let records = patiently(seams, "listing the leases", list).await.map_err(|error| chain(&error))?;
        let leases = records.iter().filter_map(|record| record.lease.as_ref().ok());
        let has_address = |lease: &Lease| {
            let public = lease.attrs.public_ip;
            public.v4.or(public.v6).is_some_and(|addr| addr.to_string() == self.id.as_str())
        };
        let own = leases.filter(|lease| lease.subnets == self.named && has_address(lease));
        Ok(own.map(|lease| Lease::clone(lease)).collect())
    }

    /// Releases the lease, unless it belongs to another node that has or had this address, or its subnets differ from
    /// those in `subnet.env`.
    async fn give_back(&self, seams: &Seams, mode: Mode) -> Result<Option<Lease>, String> {
        let previous = patiently(seams, "looking for the lease", seams.subnets.previous(&self.id)).await;
        let mut leases = previous.map_err(|error| chain(&error))?;
        if leases.is_empty() {
            leases = self.of_former_network(seams).await?;
        }
        let all: Vec<_> = leases.iter().map(|lease| lease.key.to_string()).collect();
        leases.retain(|lease| self.owns(lease));
        let lease = match (leases.pop(), all.is_empty()) {
            (None, true) => return Ok(None),
            (Some(lease), _) if leases.is_empty() => lease,
            (None, false) => {
                let all = all.join(", ");
                return Err(format!(
                    "{all} has the address of this node, but subnet.env or a device names another lease"
                ));
            }
            (Some(_), _) => {
                let all = all.join(", ");
                return Err(format!("{all} have the address of this node, and nothing shows which one is its own"));
            }
        };
        if mode == Mode::Preview {
            return Ok(Some(lease));
        }
        let released = patiently(seams, "releasing the lease", seams.subnets.release(lease.clone())).await;
        released.map(|()| Some(lease)).map_err(|error| chain(&error))
    }
}

/// Waits for the store's answer for at most [`PATIENCE`].
pub(crate) async fn patiently<T>(
    seams: &Seams,
    doing: &'static str,
    call: impl Future<Output = Result<T, SubnetError>>,
) -> Result<T, SubnetError> {
    let late = || SubnetError::Unavailable { doing, source: format!("no answer within {PATIENCE:?}").into() };
    in_time(seams, call).await.unwrap_or_else(|| Err(late()))
}

/// Returns the output of `work`, or `None` after [`PATIENCE`].
pub(crate) async fn in_time<T>(seams: &Seams, work: impl Future<Output = T>) -> Option<T> {
    let patience = seams.clock.sleep_until(seams.clock.now().after(PATIENCE));
    tokio::select! {
        biased;
        outcome = work => Some(outcome),
        () = patience => None,
    }
}
