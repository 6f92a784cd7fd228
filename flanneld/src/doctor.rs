//! What is wrong on this host, and how to correct it: findings as data.

mod host;
mod kubernetes;
pub(crate) mod routes;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use std::{fmt, fs, io};

use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{Kernel, Scope};
use flannel_core::lease::{LeaseEvent, Record};
use flannel_core::net::{Family, Prefix};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::subnet::SubnetManager;
use flannel_core::subnet_env::SubnetEnv;
use flannel_core::text::Plain;
use flannel_core::uplink::{self, InUse, Request};
use futures_util::StreamExt;
use serde::Serialize;
use tokio::time::timeout;

use crate::options::{Options, StateFile, StoreOptions};
use crate::{chain, client, privileges, stores};
use host::Host;

/// How long the store may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// All findings, in the order of the checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pub(crate) findings: Vec<Finding>,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) check: &'static str,
    pub(crate) severity: Severity,
    pub(crate) found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fix: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    /// As it should be.
    Ok,
    /// Useful to know if something does not work.
    Note,
    /// Likely to cause trouble.
    Warning,
    /// The overlay cannot work.
    Error,
}

impl Finding {
    pub(crate) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, severity: Severity::Ok, found: found.into(), fix: None }
    }

    pub(crate) fn new(
        check: &'static str,
        severity: Severity,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { check, severity, found: found.into(), fix: Some(fix.into()) }
    }
}

impl Report {
    /// Whether there is no error.
    pub(crate) fn is_healthy(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity < Severity::Error)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Finding { check, severity, found, fix } in &self.findings {
            let severity = match severity {
                Severity::Ok => "ok",
                Severity::Note => "note",
                Severity::Warning => "WARNING",
                Severity::Error => "ERROR",
            };
            writeln!(f, "{severity:<8} {check:<14} {}", Plain(found))?;
            if let Some(fix) = fix {
                writeln!(f, "{:<23} fix: {}", "", Plain(fix))?;
            }
        }
        Ok(())
    }
}

/// Runs all checks. Writes nothing, and needs no running agent.
pub(crate) async fn examine(options: &Options) -> Report {
    let mut findings = vec![agent(options), privilege()];
    let (told, finding) = store(options).await;
    findings.push(finding);
    findings.extend(kubernetes::ask(&options.store).await);
    if let Some(file) = &options.state_file {
        findings.push(state_file(&options.store, file).await);
    }
    let (config, leased) = told.map_or((None, None), |told| (Some(told.config), told.leased));
    let seen = match NetlinkKernel::new() {
        Ok(kernel) => kernel.host_facts(&options.uplink.reaches()).await.map(|facts| (kernel, facts)),
        Err(error) => Err(error),
    };
    let (kernel, facts) = match seen {
        Ok(seen) => seen,
        Err(error) => {
            let fix = "run this in the host's network namespace, with AF_NETLINK allowed";
            findings.push(Finding::new("kernel", Severity::Error, chain(&error), fix));
            return Report { findings };
        }
    };
    let families: Vec<Family> = match &config {
        Some(config) => config.networks.families().collect(),
        None => vec![Family::V4],
    };
    let request = Request::new(&options.uplink, &families, &options.public);
    let choice = match uplink::select(request, &facts, InUse::NOTHING) {
        Ok(choice) => {
            findings.push(Finding::ok("uplink", choice.rationale.to_string()));
            Some(choice)
        }
        Err(error) => {
            let fix = "name an interface with -iface, -iface-regex or -iface-can-reach";
            findings.push(Finding::new("uplink", Severity::Error, chain(&error), fix));
            None
        }
    };
    let (env, finding) = subnet_env(options);
    findings.push(finding);
    let host = Host {
        overlay: &options.overlay,
        config: config.as_ref(),
        facts: &facts,
        uplink: choice.as_ref().map(|choice| &choice.uplink),
        env: env.as_ref(),
    };
    findings.extend(host.judge(&host::Files));
    if config.as_ref().is_some_and(|config| options.firewall.guard.lacks_its_tool(config)) {
        let fix = "set \"EnableNFTables\": true in the network's configuration, or leave -vxlan-guard out";
        findings.push(Finding::new("guard", Severity::Error, "-vxlan-guard needs nftables", fix));
    }
    if let (Some(config), Some(leased), Some(choice)) = (&config, &leased, &choice) {
        let mut scope = Scope::new(options.overlay.clone(), config.networks.map(|_, network| network.prefix));
        scope.uplink = Some(choice.uplink.index);
        match kernel.observe(&scope).await {
            Ok(seen) => findings.extend(routes::judge(config, leased, &choice.uplink, &seen.routes)),
            Err(error) => findings.push(Finding::new("routes", Severity::Note, chain(&error), "try again")),
        }
    }
    Report { findings }
}

fn agent(options: &Options) -> Finding {
    let Some(metrics) = options.metrics else { return Finding::ok("agent", "not asked: -metrics-port is 0") };
    match client::is_ready(metrics.addr) {
        Ok(true) => Finding::ok("agent", "running and ready"),
        Ok(false) => Finding::new("agent", Severity::Warning, "running, not ready", "see: flanneld status"),
        Err(error) => Finding::new("agent", Severity::Note, chain(&error), "start it, if it should be running"),
    }
}

fn privilege() -> Finding {
    match privileges::check() {
        Ok(()) => Finding::ok("privilege", "CAP_NET_ADMIN is there"),
        Err(error) => Finding::new(
            "privilege",
            Severity::Warning,
            chain(&error),
            "the agent needs it; for doctor itself most checks work without",
        ),
    }
}

/// The content of the store.
struct Told {
    config: NetworkConfig,
    /// The subnets of all records, good or bad; `None` if the store did not list them in time.
    leased: Option<BTreeSet<Prefix>>,
}

async fn store(options: &Options) -> (Option<Told>, Finding) {
    let broken = |found: String, fix: &str| (None, Finding::new("store", Severity::Error, found, fix));
    let opened = match stores::open(&options.store).await {
        Ok(opened) => opened,
        Err(error) => return broken(chain(&error), "mend what the message names"),
    };
    match timeout(PATIENCE, opened.subnets.network_config()).await {
        Ok(Ok(config)) => {
            let networks: Vec<_> = config.networks.iter().map(|(_, network)| network.prefix.to_string()).collect();
            let found = format!("{}: {} over {}", opened.name, networks.join(" and "), config.backend.kind);
            let leased = timeout(PATIENCE, leased(&*opened.subnets)).await.ok().flatten();
            (Some(Told { config, leased }), Finding::ok("store", found))
        }
        Ok(Err(error)) => broken(format!("{}: {}", opened.name, chain(&error)), "mend what the message names"),
        Err(_) => broken(
            format!("{} did not answer within {PATIENCE:?}", opened.name),
            "check that it runs, and the way to it: address, firewall, certificates",
        ),
    }
}

/// Returns the subnets of the first list.
async fn leased(subnets: &dyn SubnetManager) -> Option<BTreeSet<Prefix>> {
    let mut watch = subnets.watch();
    while let Some(event) = watch.next().await {
        if let Ok(LeaseEvent::Reset(records)) = event {
            let subnets = |record: &Record| match &record.lease {
                Ok(lease) => lease.subnets,
                Err(bad) => bad.subnets,
            };
            return Some(
                records
                    .iter()
                    .flat_map(|record| subnets(record).iter().map(|(_, subnet)| *subnet).collect::<Vec<_>>())
                    .collect(),
            );
        }
    }
    None
}

async fn state_file(store: &StoreOptions, file: &StateFile) -> Finding {
    let path = &file.path;
    let shown = path.display();
    let note = |found: String, fix: &str| Finding::new("state file", Severity::Note, found, fix);
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => {
            Finding::new("state file", Severity::Warning, format!("{shown} is no file"), "choose another -state-file")
        }
        Ok(found) if found.permissions().mode() & 0o022 != 0 => {
            let fix = format!("chmod 0600 {shown}; until then it is ignored");
            Finding::new("state file", Severity::Warning, format!("others may write {shown}"), fix)
        }
        Ok(found) => {
            // Without a store it is unknown to which store the file belongs.
            let kept = stores::open(store).await.ok().and_then(|opened| opened.kept_in(Some(file)).state);
            if let Some(Err(reason)) = kept.map(|kept| kept.check()) {
                let found = format!("{shown} is of no use: {reason}");
                return Finding::new("state file", Severity::Warning, found, "delete it: the agent writes it anew");
            }
            #[expect(
                clippy::disallowed_methods,
                reason = "file times are of the wall clock, and this one is only shown"
            )]
            let age = found.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            Finding::ok("state file", format!("{shown} is there, last written {} min ago", age.as_secs() / 60))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let fix =
                "a boot while the store is away would wait for it; the agent writes it within a minute of its start";
            note(format!("there is no {shown}"), fix)
        }
        Err(error) => note(format!("{shown} cannot be looked at: {error}"), "run doctor as the user of the agent"),
    }
}

fn subnet_env(options: &Options) -> (Option<SubnetEnv>, Finding) {
    let path = options.subnet_file.display();
    match SubnetEnv::read(&options.subnet_file) {
        Ok(Some(env)) if env.mtu.is_some() && !env.subnets.is_empty() => {
            let found = format!("{path} is there and complete");
            (Some(env), Finding::ok("subnet file", found))
        }
        Ok(Some(_)) => {
            let fix = "delete it: the agent writes it anew when it starts";
            (None, Finding::new("subnet file", Severity::Warning, format!("{path} is not complete"), fix))
        }
        Ok(None) => {
            let fix = "pods cannot be attached before the agent has written it: see flanneld status";
            (None, Finding::new("subnet file", Severity::Note, format!("there is no {path}"), fix))
        }
        Err(error) => (None, Finding::new("subnet file", Severity::Warning, chain(&error), "make it readable")),
    }
}
