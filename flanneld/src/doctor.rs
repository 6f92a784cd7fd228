//! What is wrong on this host, and how to correct it: findings as data.

mod config;
mod files;
mod host;
mod kubernetes;
pub(crate) mod routes;
mod rules;
mod running;
mod store;

use std::fmt;

use flannel_core::kernel::{Kernel, Scope};
use flannel_core::net::Family;
use flannel_core::netlink::NetlinkKernel;
use flannel_core::text::Plain;
use flannel_core::uplink::{self, InUse, Request};
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

/// Runs all checks. Writes nothing, and needs no running agent. `warnings` are those of the environment's variables.
pub(crate) async fn examine(options: &Options, warnings: &[String]) -> Report {
    let variable = |found: &String| Finding::new("environment", Severity::Warning, found, "correct or remove it");
    let mut findings: Vec<_> = warnings.iter().map(variable).collect();
    let (running, finding) = running::ask(options);
    findings.extend([finding, privilege()]);
    findings.extend(running::others(options, running.as_ref()));
    findings.extend(running.as_ref().map(running::identity));
    let (content, found) = store::examine(options).await;
    findings.extend(found);
    findings.extend(kubernetes::ask(&options.store).await);
    findings.extend(files::directories(options));
    if let Some(file) = &options.state_file {
        findings.push(files::state(&options.store, file).await);
    }
    let (config, leased) = content.map_or((None, None), |content| (Some(content.config), content.leased));
    if let Some(config) = &config {
        findings.extend(config::judge(config));
        findings.push(rules::examine(options, config).await);
    }
    let in_force = running.and_then(|running| running.in_force);
    findings.extend(config.as_ref().zip(in_force.as_ref()).map(|(config, in_force)| running::change(in_force, config)));
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
            let fix = "bring the network up (ip link, ip route), or name an interface with -iface";
            findings.push(Finding::new("uplink", Severity::Error, chain(&error), fix));
            None
        }
    };
    let (env, finding) = files::subnet_env(options);
    findings.push(finding);
    let host = Host {
        overlay: &options.overlay,
        config: config.as_ref(),
        facts: &facts,
        uplink: choice.as_ref().map(|choice| &choice.uplink),
        env: env.as_ref(),
    };
    if in_force.is_none() {
        findings.extend(host.change());
    }
    findings.extend(host.judge(&host::Files));
    if let (Some(config), Some(leased), Some(choice)) = (&config, &leased, &choice) {
        let mut scope = Scope::new(options.overlay.clone(), config.networks.map(|_, network| network.prefix));
        scope.uplink = Some(choice.uplink.index);
        match kernel.observe(&scope).await {
            Ok(seen) => findings.extend(routes::judge(config, leased, &choice.uplink, &seen.routes)),
            Err(error) => findings.push(Finding::new("routes", Severity::Note, chain(&error), "run doctor again")),
        }
    }
    Report { findings }
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
