//! The trait for packet filters: masquerade and forward rules, and a guard for the VXLAN port.
//!
//! It is optional: core never calls it on its own.

mod tool;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use async_trait::async_trait;

use crate::kernel::OverlayName;
use crate::net::{Dual, Prefix};
use crate::text::Plain;

pub use tool::{Answer, Call, Program, Tools};

/// All rules that one overlay needs on this node. [`Firewall::apply`] removes its other rules.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rules {
    /// The overlay: determines the names of tables and chains (docs/design.md, "Ownership").
    pub overlay: OverlayName,
    /// The pods that the rules apply to, per family. A family without pods gets no rules.
    pub pods: Dual<Pods>,
    /// Whether to masquerade: traffic from pods to outside the overlay, and from outside to remote pods, gets the
    /// node's address.
    pub masquerade: Option<Masquerade>,
    /// Whether packets from and to pods are accepted in a `FORWARD` chain whose policy is to drop.
    pub forward: Forward,
    /// Whether the VXLAN port accepts only packets from known peers.
    pub guard: Option<VxlanGuard>,
}

/// The pods of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pods {
    /// The pod network of the whole overlay (C in docs/compatibility.md, "Masquerade and forward rules").
    pub network: Prefix,
    /// This node's own lease in it (P in docs/compatibility.md, "Masquerade and forward rules").
    pub subnet: Prefix,
}

/// How to masquerade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Masquerade {
    /// How source ports are chosen.
    pub ports: SourcePorts,
}

/// How a masqueraded connection's source port is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourcePorts {
    /// At random (`--random-fully`, `fully-random`) if the tool and the kernel support it, so that two simultaneous
    /// connections do not compete for one port. Flannel's default.
    #[default]
    FullyRandom,
    /// The kernel's default (`--ip-masq-fully-random-disable`).
    Kernel,
}

/// The rules for forwarded packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Forward {
    /// Packets from and to the pod network are accepted. Flannel's default.
    #[default]
    Accept,
    /// No rule.
    Untouched,
}

/// Accepts UDP to the VXLAN port from these senders and drops it from all others (docs/faults.md, D10).
///
/// It applies to the whole network namespace, in the families that have [`Pods`]. Two overlays that use one port must
/// not both have a guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanGuard {
    /// The UDP port; the kernel's default is 8472.
    pub port: u16,
    /// The public addresses of the accepted peers, of both families.
    pub peers: BTreeSet<IpAddr>,
}

impl Rules {
    /// Returns flannel's default for these networks and this lease: forward rules, no masquerade, no guard. Families
    /// without a network or a subnet are left out.
    pub fn new(overlay: OverlayName, networks: &Dual<Prefix>, subnets: &Dual<Prefix>) -> Self {
        let mut pods = Dual::default();
        for (family, network) in networks.iter() {
            *pods.slot(family) = subnets.get(family).map(|subnet| Pods { network: *network, subnet: *subnet });
        }
        Self { overlay, pods, masquerade: None, forward: Forward::default(), guard: None }
    }

    /// Enables masquerade.
    #[must_use]
    pub fn masquerading(self, masquerade: Masquerade) -> Self {
        Self { masquerade: Some(masquerade), ..self }
    }

    /// Sets a guard.
    #[must_use]
    pub fn guarded(self, guard: VxlanGuard) -> Self {
        Self { guard: Some(guard), ..self }
    }
}

impl Masquerade {
    /// Sets how source ports are chosen.
    pub fn with_ports(ports: SourcePorts) -> Self {
        Self { ports }
    }
}

/// A difference between the wanted rules and those in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Drift {
    /// The table or chain, by the tool's name for it.
    pub place: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a table or chain of this overlay.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Problem {
    /// It does not exist.
    Missing,
    /// It exists but differs: a rule more or less, another order, another hook.
    Changed,
    /// It exists but should not: it belongs to a former network or to a disabled setting.
    Leftover,
}

impl Drift {
    /// Creates a difference in this table or chain.
    pub fn new(place: String, problem: Problem) -> Self {
        Self { place, problem }
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = match self.problem {
            Problem::Missing => "is missing",
            Problem::Changed => "was changed",
            Problem::Leftover => "is left over",
        };
        write!(f, "{} {problem}", self.place)
    }
}

/// Why an operation on the packet filter failed. Each table's rules are then unchanged or fully written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FirewallError {
    /// The tool is not installed, or the tool or the kernel lacks support. Final until that changes; `hint` says how.
    #[error("{} is not available: {}", Plain(what), Plain(hint))]
    Unsupported {
        /// What is not available.
        what: String,
        /// The remedy.
        hint: String,
    },
    /// The process lacks the privilege. Final; `hint` names it.
    #[error("no permission for {}: {}", Plain(doing), Plain(hint))]
    Denied {
        /// The operation that failed.
        doing: String,
        /// The remedy.
        hint: String,
    },
    /// The tool returned an error. Whether a retry helps depends on `text`; a retry with back-off does no harm.
    #[error("the packet filter refused {}: {}", Plain(doing), Plain(text))]
    Refused {
        /// The operation that failed.
        doing: String,
        /// The tool's error output, cut to 1024 characters.
        text: String,
    },
    /// The tool did not end in time and was killed. Each transaction is complete or has no effect: call
    /// [`Firewall::check`], and retry with back-off.
    #[error("{} did not end within {within:?}", Plain(doing))]
    Timeout {
        /// The operation that failed.
        doing: String,
        /// The deadline.
        within: Duration,
    },
    /// The tool could not be run, or its output was not understood. Retry with back-off.
    #[error("{} failed: {}", Plain(doing), Plain(reason))]
    Failed {
        /// The operation that failed.
        doing: String,
        /// The cause.
        reason: String,
    },
    /// The thread that runs the tool has ended. Final.
    #[error("the firewall's thread has stopped")]
    Stopped,
}

/// A packet filter: nftables, iptables, or a compatible implementation.
///
/// It does not watch the rules by itself. To keep rules in place, call [`check`](Firewall::check) every few seconds
/// (flannel: `--iptables-resync`, 5 s) and [`apply`](Firewall::apply) when it reports drift. Dropping the value removes
/// no rules: they stay when the process ends, so that a restart leaves no gap.
///
/// # Cancel safety
/// Any call may be dropped at any await. A transaction in progress is then completed or not started, never left half
/// done; the next [`check`](Firewall::check) shows which.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait Firewall: Send + Sync + 'static {
    /// Sets the overlay's rules to exactly these: adds, replaces, and removes rules of a former network, lease or
    /// setting. Uses one transaction per table, so rules that stay are never absent. Foreign rules are not changed.
    ///
    /// # Errors
    /// [`FirewallError`]; families that could be written have been. Retry with back-off unless the error is
    /// [`FirewallError::Unsupported`], [`FirewallError::Denied`] or [`FirewallError::Stopped`].
    async fn apply(&self, rules: &Rules) -> Result<(), FirewallError>;

    /// Returns the differences between the kernel's rules and these; empty if the rules are in place. Writes nothing.
    ///
    /// # Errors
    /// As [`apply`](Firewall::apply), when the rules could not be read.
    async fn check(&self, rules: &Rules) -> Result<Vec<Drift>, FirewallError>;

    /// Returns the addresses that the guard in the kernel accepts, of both families; empty if there is no guard. Only
    /// the kernel has the addresses that a former run admitted. Writes nothing.
    ///
    /// # Errors
    /// As [`apply`](Firewall::apply), when the guard could not be read.
    async fn let_in(&self, overlay: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError>;

    /// Removes all rules of this overlay in both families, whatever network they are for; for overlay `flannel` also
    /// those of Go flannel. Idempotent. Used for `cleanup`, and when another packet filter takes over: apply the new
    /// rules first, then remove the old ones, to leave no gap.
    ///
    /// # Errors
    /// As [`apply`](Firewall::apply). When another packet filter takes over, treat [`FirewallError::Unsupported`] as
    /// "nothing to remove".
    async fn remove(&self, overlay: &OverlayName) -> Result<(), FirewallError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_without_lease_gets_no_rules() {
        let networks = Dual { v4: Some("10.5.0.0/16".parse().unwrap()), v6: Some("fd00:5::/48".parse().unwrap()) };
        let subnets = Dual { v4: Some("10.5.1.0/24".parse().unwrap()), v6: None };
        let rules = Rules::new(OverlayName::default(), &networks, &subnets);
        assert_eq!(rules.pods.v4.map(|pods| pods.subnet), subnets.v4);
        assert_eq!(rules.pods.v6, None);
    }
}
