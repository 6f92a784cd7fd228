//! What is wrong on this host, and how to correct it: findings as data.

mod config;
mod files;
mod host;
mod kubernetes;
pub(crate) mod routes;
mod rules;
mod running;
mod source;
mod store;

use std::fmt;

use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{HostFacts, Kernel, KernelError, Scope, State};
use flannel_core::net::Family;
use flannel_core::netlink::NetlinkKernel;
use flannel_core::text::Plain;
use flannel_core::uplink::{self, Choice, InUse, Request, UplinkError};
use serde::Serialize;

use crate::options::Options;
use crate::{chain, privileges};
use host::Host;

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

    /// A finding whose text contains the remedy, or that has none.
    pub(crate) fn alone(check: &'static str, severity: Severity, found: impl Into<String>) -> Self {
        Self { check, severity, found: found.into(), fix: None }
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
        writeln!(f, "{:<8} {:<14} FINDING", "LEVEL", "CHECK")?;
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

/// Runs all checks. Changes no object and no record, and needs no running agent. `warnings` are those of the
/// environment's variables.
pub(crate) async fn examine(options: &Options, warnings: &[String]) -> Report {
    let variable = |found: &String| Finding::new("environment", Severity::Warning, found, "correct or remove it");
    let mut findings: Vec<_> = warnings.iter().map(variable).collect();
    let (running, finding) = running::ask(options).await;
    findings.extend([finding, privilege()]);
    findings.extend(running::others(options, running.as_ref()));
    findings.extend(running.as_ref().map(running::identity));
    let agents = running::agents(options, running.as_ref());
    let (store, found) = store::examine(options).await;
    findings.extend(found);
    findings.extend(kubernetes::ask(&options.store).await);
    findings.extend(files::directories(options));
    if let Some(file) = &options.state_file {
        findings.push(files::state(&options.store, file).await);
    }
    let config = store.as_ref().map(|store| &store.config);
    if let Some(config) = config {
        findings.extend(config::judge(config));
        findings.push(rules::examine(options, config).await);
    }
    let in_force = running.and_then(|running| running.in_force);
    findings.extend(config.zip(in_force.as_ref()).map(|(config, in_force)| running::change(in_force, config)));
    let KernelView { facts, choice, objects } = match kernel_view(options, config).await {
        Ok(view) => view,
        Err(error) => {
            let fix = "run this in the host's network namespace, with AF_NETLINK allowed";
            findings.push(Finding::new("kernel", Severity::Error, chain(&error), fix));
            return Report { findings };
        }
    };
    let choice = match choice {
        Ok(choice) => {
            findings.push(Finding::ok("uplink", choice.rationale.to_string()));
            Some(choice)
        }
        Err(error) => {
            let fix = "bring the network up (ip link, ip route), or name an interface with -iface";
            findings.push(Finding::new("uplink", Severity::Error, chain(&error), fix));
            None
        }
    };
    let (env, finding) = files::subnet_env(options);
    findings.push(finding);
    let host = Host {
        overlay: &options.overlay,
        config,
        facts: &facts,
        uplink: choice.as_ref().map(|choice| &choice.uplink),
        env: env.as_ref(),
        agents,
    };
    if in_force.is_none() {
        findings.extend(host.change());
    }
    findings.extend(host.judge(&source::Files));
    match (&store, &choice, objects) {
        (Some(store), Some(choice), Some(Ok(objects))) => {
            findings.extend(routes::judge(&store.config, &choice.uplink, &objects.routes, store.leased()).await);
        }
        (.., Some(Err(error))) => {
            findings.push(Finding::new("routes", Severity::Note, chain(&error), "run doctor again"));
        }
        _ => {}
    }
    Report { findings }
}

/// What the kernel shows of the host and of the overlay.
struct KernelView {
    facts: HostFacts,
    choice: Result<Choice, UplinkError>,
    /// The objects in the scope of the overlay, if configuration and uplink are known.
    objects: Option<Result<State, KernelError>>,
}

async fn kernel_view(options: &Options, config: Option<&NetworkConfig>) -> Result<KernelView, KernelError> {
    let kernel = NetlinkKernel::new()?;
    let facts = kernel.host_facts(&options.uplink.reaches()).await?;
    let families: Vec<Family> = match config {
        Some(config) => config.networks.families().collect(),
        None => vec![Family::V4],
    };
    let request = Request::new(&options.uplink, &families, &options.public);
    let choice = uplink::select(request, &facts, InUse::NOTHING);
    let objects = match (config, &choice) {
        (Some(config), Ok(choice)) => {
            let mut scope = Scope::new(options.overlay.clone(), config.networks.map(|_, network| network.prefix));
            scope.uplink = Some(choice.uplink.index);
            Some(kernel.observe(&scope).await)
        }
        _ => None,
    };
    Ok(KernelView { facts, choice, objects })
}

fn privilege() -> Finding {
    match privileges::check() {
        Ok(()) => Finding::ok("privilege", "this user has CAP_NET_ADMIN"),
        Err(error) => Finding::new(
            "privilege",
            Severity::Warning,
            format!("{}; doctor itself does most checks without", chain(&error)),
            "run doctor as the agent's user, for example: sudo flanneld doctor",
        ),
    }
}
