//! The network configuration: what has no effect, and what is not configured.

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::NetworkConfig;

use super::{Finding, Severity};
use crate::config_keys;

/// Returns the findings about the document itself.
pub(super) fn judge(config: &NetworkConfig) -> Vec<Finding> {
    let fix = "correct its spelling in the store, or remove it; then restart the agents";
    let ignored = config_keys::ignored(config).into_iter();
    let mut findings: Vec<_> =
        ignored.map(|found| Finding::new("config keys", Severity::Warning, found, fix)).collect();
    if config.backend.is_default {
        let found = "the network configuration has no Backend, so Go flannel's default is used: udp, the slowest";
        let fix = format!("to use VXLAN, add to it: \"Backend\": {{\"Type\": \"{}\"}}", Vxlan::TYPE);
        findings.push(Finding::new("backend", Severity::Warning, found, fix));
    }
    findings
}
