//! The status as one line, which systemd shows.

use flannel_core::firewall_keeper::RulesState;
use flannel_core::overlay::{Contact, Status, Wait};

use super::waits_for;

/// Returns the most important fact: the end, else what readiness waits for, else the number of peers.
pub(crate) fn summary(status: &Status, rules: &RulesState) -> String {
    let peers = status.peers;
    let store = match &status.store {
        Contact::Lost { .. } => "; the lease store is unavailable",
        _ => "",
    };
    let refused = match (&status.lease, &status.lease_refused) {
        (Some(_), Some(reason)) => format!("; the lease store does not renew the lease: {reason}"),
        _ => String::new(),
    };
    let bad = if peers.quarantined > 0 { format!(", quarantined={}", peers.quarantined) } else { String::new() };
    let own = match &status.own_trouble {
        Some(reason) => format!("; other nodes do not accept this node's record: {reason}"),
        None => String::new(),
    };
    if let Some(end) = &status.ended {
        return format!("stopped: {end}");
    }
    match waits_for(status, rules, Wait::to_string).first() {
        None => format!("ready (peers={}{bad}){own}{refused}{store}", peers.accepted),
        Some(reason) => format!("not ready: waiting for {reason}{own}{refused}{store}"),
    }
}
