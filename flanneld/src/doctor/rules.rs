//! The packet filter: whether its tool is installed and works.

use flannel_core::config::NetworkConfig;
use flannel_core::firewall::{FirewallError, Forward};

use super::{Finding, Severity};
use crate::options::Options;
use crate::{chain, firewall};

/// Checks the tool that the configuration selects.
pub(super) async fn examine(options: &Options, config: &NetworkConfig) -> Finding {
    let rules = options.firewall;
    if rules.guard.lacks_its_tool(config) {
        let fix = "set \"EnableNFTables\": true in the network configuration, or leave -vxlan-guard out";
        return Finding::new("guard", Severity::Error, "-vxlan-guard needs nftables", fix);
    }
    let name = if config.enable_nftables { "nft" } else { "iptables" };
    let needed = rules.needed_for(config);
    if needed.is_none() && rules.forward == Forward::Untouched {
        return Finding::ok("firewall", "no rules are wanted");
    }
    let error = match firewall::try_tool(options, config).await {
        Ok(()) => return Finding::ok("firewall", format!("{name} works")),
        Err(error) => error,
    };
    let (what, fix) = match &error {
        FirewallError::Denied { .. } => {
            let fix = "run doctor as root, for example: sudo flanneld doctor";
            return Finding::new("firewall", Severity::Note, format!("not checked: {}", chain(&error)), fix);
        }
        FirewallError::Unsupported { what, hint } => (format!("{what} is missing"), hint.clone()),
        other => (chain(other), format!("look for the cause: {name} --version; dmesg | tail")),
    };
    match needed {
        Some(flag) => {
            Finding::new("firewall", Severity::Error, format!("{what}, and {flag} needs it: the agent ends"), fix)
        }
        None => {
            let found = format!("{what}: no forward rules, so pods are cut off where the FORWARD policy is DROP");
            Finding::new("firewall", Severity::Warning, found, fix)
        }
    }
}
