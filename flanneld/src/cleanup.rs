//! The command that removes everything of this overlay from the host.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use flannel_backend_udp::UdpDataPlane;
use flannel_core::files;
use flannel_core::kernel::{HostFacts, HostLink, Kernel, LinkId, LinkKind, Scope};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{MissingUplink, Removed};
use flannel_core::text::Plain;
use tokio::time::timeout;

use crate::assemble::assemble;
use crate::commands::CommandError;
use crate::doctor::routes;
use crate::options::{Cleanup, Options};
use crate::processes::{self, Agent};
use crate::stores::Opened;
use crate::{firewall, privileges, stores};

/// How long the store may take to return the configuration, which shows what another program may have left.
const PATIENCE: Duration = Duration::from_secs(3);

/// Agents of this overlay, or of Go flannel, run here.
#[derive(Debug, thiserror::Error)]
#[error(
    "running in this network namespace: {}; stop it first (-force ignores a running Go flannel, which then has to be \
     restarted)",
    listed(.0)
)]
pub(crate) struct AgentsRun(Vec<Agent>);

/// Removes everything of this overlay, or only returns what would be removed. Once the overlay itself is removed, every
/// further step is taken even if one before it failed: see [`Report::failed`].
pub(crate) async fn cleanup(options: &Options) -> Result<Report, CommandError> {
    privileges::check()?;
    let mut agents = processes::agents();
    // Go flannel has one overlay, with the names and files that this one has by default.
    agents.retain(|agent| agent.overlay == options.overlay.as_str() || !agent.is_this_program);
    if !agents.is_empty() && !options.cleanup.force {
        return Err(AgentsRun(agents).into());
    }
    // The operator may have removed certificates or the directory already.
    let store = stores::open(&options.store).await;
    let store = store.unwrap_or_else(|error| stores::unavailable(&options.store, error));
    let overlay = assemble(options, &store, MissingUplink::Fail, UdpDataPlane::new())?;
    let dry_run = options.cleanup.dry_run;
    let removed = if dry_run { overlay.preview_removal().await? } else { overlay.remove().await? };
    let (mode, files, left) = (options.cleanup, Vec::new(), Vec::new());
    let mut report = Report { mode, removed, rules: 0, files, left, failed: None };
    match firewall::present(&options.overlay).await {
        Ok(rules) => report.rules = rules,
        Err(error) => report.failed = Some(error.into()),
    }
    report.left = unmarked(options, &store).await;
    report.files.extend(report.removed.subnet_env.then(|| options.subnet_file.clone()));
    let state = options.state_file.as_ref().map(|file| file.path.clone()).filter(|path| path.exists());
    let (ours, others): (Vec<_>, Vec<_>) = options.cni.installed().into_iter().partition(|conflist| conflist.is_ours);
    report.left.extend(others.iter().map(|conflist| format!("rm {}", conflist.path.display())));
    let conflist = ours.into_iter().map(|conflist| conflist.path).next();
    if dry_run {
        report.files.extend(state.into_iter().chain(conflist));
        return Ok(report);
    }
    if let Err(error) = firewall::remove(&options.overlay).await {
        report.rules = 0;
        report.failed.get_or_insert(error.into());
    }
    let erased = store.with_state_file(options.state_file.as_ref()).state.map_or(Ok(()), |kept| kept.erase());
    let deleted = conflist.as_deref().map_or(Ok(()), files::remove);
    for (path, outcome) in [(state, erased), (conflist, deleted)] {
        match outcome {
            Ok(()) => report.files.extend(path),
            Err(error) => drop(report.failed.get_or_insert(error.into())),
        }
    }
    Ok(report)
}

/// What was or would be removed.
#[derive(Debug)]
pub(crate) struct Report {
    mode: Cleanup,
    removed: Removed,
    /// The number of firewall rules, chains and tables.
    rules: usize,
    files: Vec<PathBuf>,
    /// Objects that look like flannel's but do not have this overlay's mark, each with the command that deletes it.
    left: Vec<String>,
    /// The first error. What could not be removed is not in the rest of the report.
    pub(crate) failed: Option<CommandError>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, removed, rules, files, left, failed } = self;
        let (verb, release) = if mode.dry_run { ("would remove", "would release") } else { ("removed", "released") };
        for deletion in &removed.deletions {
            writeln!(f, "{verb}: {deletion}")?;
        }
        let more = removed.objects.saturating_sub(removed.deletions.len());
        if more > 0 {
            writeln!(f, "{verb}: {more} more kernel objects")?;
        }
        if *rules > 0 {
            writeln!(f, "{verb}: the overlay's firewall rules")?;
        }
        for file in files {
            writeln!(f, "{verb}: {}", file.display())?;
        }
        match (&removed.lease, &removed.store) {
            (Some(lease), _) => writeln!(f, "{release}: lease {} ({})", lease.key, lease.subnets)?,
            (None, Some(error)) => writeln!(f, "lease not released: {error}")?,
            (None, None) => {}
        }
        let nothing = removed.objects == 0 && *rules == 0 && files.is_empty() && removed.lease.is_none();
        if nothing && failed.is_none() {
            writeln!(f, "nothing to remove")?;
        }
        for left in left {
            writeln!(f, "not removed, may belong to another program: {left}")?;
        }
        Ok(())
    }
}

/// Returns what may be flannel's, but cannot be known to be this overlay's.
async fn unmarked(options: &Options, store: &Opened) -> Vec<String> {
    let Ok(kernel) = NetlinkKernel::new() else { return Vec::new() };
    let Ok(facts) = kernel.host_facts(&options.uplink.reaches()).await else { return Vec::new() };
    let mut left: Vec<_> = devices(&facts, options).collect();
    let Ok(Ok(config)) = timeout(PATIENCE, store.subnets.network_config()).await else { return left };
    let scope = Scope::new(options.overlay.clone(), config.networks.map(|_, network| network.prefix));
    let Ok(seen) = kernel.observe(&scope).await else { return left };
    let name = |link: LinkId| match link {
        LinkId::Other(index) => facts.links.get(&index).filter(|link| !is_flannels(link)).map(|link| &link.name),
        LinkId::Own(_) | LinkId::Uplink => None,
    };
    left.extend(routes::by_hand(&config, name, &seen.routes).map(|(_, way)| format!("ip route delete {way}")));
    left
}

/// Whether a device has the kind and the name of flannel's.
fn is_flannels(link: &HostLink) -> bool {
    matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Tun(_)) && link.name.as_str().starts_with("flannel")
}

/// Returns flannel's devices without this overlay's mark.
fn devices<'a>(facts: &'a HostFacts, options: &'a Options) -> impl Iterator<Item = String> + 'a {
    let links = facts
        .links
        .values()
        .filter(move |link| is_flannels(link) && !options.overlay.owns(link.group, link.alias.as_deref()));
    links.map(|link| format!("ip link delete {}", link.name))
}

fn listed(agents: &[Agent]) -> String {
    let shown = agents.iter().map(|agent| format!("{} (pid {})", Plain(agent.program.display()), agent.pid));
    shown.collect::<Vec<_>>().join(", ")
}
