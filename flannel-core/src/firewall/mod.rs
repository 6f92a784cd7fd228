//! The seam to the packet filter: masquerade and forward rules, and who may speak to the VXLAN port.
//!
//! An embedder that wants none of it uses none of it: nothing in core calls this on its own.

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

/// Every rule that one overlay wants on this node. What is not wanted here is removed by [`Firewall::apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rules {
    /// Whose rules: decides the names of tables and chains (docs/design.md, "Ownership").
    pub overlay: OverlayName,
    /// What the rules speak of, one value a family. A family without one gets no rules.
    pub pods: Dual<Pods>,
    /// Whether pods that speak to the world, and the world that speaks to remote pods, get the node's address.
    pub masquerade: Option<Masquerade>,
    /// Whether packets from and to pods are let through a `FORWARD` chain that drops by policy.
    pub forward: Forward,
    /// Whether the VXLAN port answers known peers only.
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
    /// Which source ports connections get.
    pub ports: SourcePorts,
}

/// How a masqueraded connection's source port is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourcePorts {
    /// At random (`--random-fully`, `fully-random`), where tool and kernel know it: two connections made at once then
    /// do not fight for one port. Flannel's default.
    #[default]
    FullyRandom,
    /// As the kernel likes (`--ip-masq-fully-random-disable`).
    Kernel,
}

/// What is done for forwarded packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Forward {
    /// Packets from and to the pod network are accepted. Flannel's default.
    #[default]
    Accept,
    /// No rule.
    Untouched,
}

/// UDP to the VXLAN port is accepted from these senders and dropped from all others (docs/faults.md, D10).
///
/// It holds for the whole network namespace, in the families that have [`Pods`]: two overlays on one port must not both
/// have one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanGuard {
    /// The UDP port; the kernel's default is 8472.
    pub port: u16,
    /// The accepted peers' public addresses, of either family.
    pub peers: BTreeSet<IpAddr>,
}

impl Rules {
    /// What flannel wants by default for these networks and this lease: forward rules, no masquerade, no guard.
    /// Families that lack a network or a subnet are left out.
    pub fn new(overlay: OverlayName, networks: &Dual<Prefix>, subnets: &Dual<Prefix>) -> Self {
        let mut pods = Dual::default();
        for (family, network) in networks.iter() {
            *pods.slot(family) = subnets.get(family).map(|subnet| Pods { network: *network, subnet: *subnet });
        }
        Self { overlay, pods, masquerade: None, forward: Forward::default(), guard: None }
    }

    /// The same with masquerade.
    #[must_use]
    pub fn masquerading(self, masquerade: Masquerade) -> Self {
        Self { masquerade: Some(masquerade), ..self }
    }

    /// The same with a guard.
    #[must_use]
    pub fn guarded(self, guard: VxlanGuard) -> Self {
        Self { guard: Some(guard), ..self }
    }
}

impl Masquerade {
    /// With source ports that are chosen like this.
    pub fn with_ports(ports: SourcePorts) -> Self {
        Self { ports }
    }
}

/// A difference between the rules wanted and those in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Drift {
    /// The table or chain, as its tool names it.
    pub place: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a table or chain of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Problem {
    /// It is not there.
    Missing,
    /// It is there, but not as we write it: a rule less or more, another order, another hook.
    Changed,
    /// It is there, and should not be: of a former network, or of something switched off.
    Leftover,
}

impl Drift {
    /// What is wrong with this table or chain.
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

/// Why the packet filter did not do what was asked. The rules are then as they were, family by family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FirewallError {
    /// The tool is not installed, or tool or kernel cannot do it. Final until that changes; `hint` says how.
    #[error("{} is not available: {}", Plain(what), Plain(hint))]
    Unsupported {
        /// What.
        what: String,
        /// The remedy.
        hint: String,
    },
    /// No privilege. Final; `hint` says which.
    #[error("no permission for {}: {}", Plain(doing), Plain(hint))]
    Denied {
        /// What was being done.
        doing: String,
        /// The remedy.
        hint: String,
    },
    /// The tool refused. Whether a retry helps depends on `text`; one with back-off does no harm.
    #[error("the packet filter refused {}: {}", Plain(doing), Plain(text))]
    Refused {
        /// What was being done.
        doing: String,
        /// The tool's own words, cut to a kibibyte.
        text: String,
    },
    /// The tool did not end in time and was killed. Each transaction is done whole or not at all: check, and retry with
    /// back-off.
    #[error("{} did not end within {within:?}", Plain(doing))]
    Timeout {
        /// What was being done.
        doing: String,
        /// The deadline.
        within: Duration,
    },
    /// The tool could not be run, or said something nobody understands. Retry with back-off.
    #[error("{} failed: {}", Plain(doing), Plain(reason))]
    Failed {
        /// What was being done.
        doing: String,
        /// Why.
        reason: String,
    },
    /// The thread that runs the tool is gone. Final.
    #[error("the firewall's thread has stopped")]
    Stopped,
}

/// A packet filter: nftables, iptables, or something that behaves like them.
///
/// Nothing is watched behind the caller's back: whoever wants rules that last calls [`check`](Firewall::check) every
/// few seconds (flannel: `--iptables-resync`, 5 s) and [`apply`](Firewall::apply) when it reports drift. Nothing is
/// removed when the value is dropped: rules outlive the process, so that a restart has no moment without them.
///
/// # Cancel safety
/// Any call may be dropped at any await. A transaction under way is finished or not begun, never cut in half; which of
/// the two, the next [`check`](Firewall::check) tells.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait Firewall: Send + Sync + 'static {
    /// Makes the overlay's rules exactly these: adds, replaces, and removes what a former network, lease or setting
    /// left. One transaction a table, so there is no moment at which a rule that stays is absent. Rules of others are
    /// not touched.
    ///
    /// # Errors
    /// [`FirewallError`]; families that could be written have been. Retry with back-off unless
    /// [`FirewallError::Unsupported`], [`FirewallError::Denied`] or [`FirewallError::Stopped`].
    async fn apply(&self, rules: &Rules) -> Result<(), FirewallError>;

    /// How the kernel's rules differ from these; empty when they are in place. Writes nothing.
    ///
    /// # Errors
    /// As [`apply`](Firewall::apply), when they could not be read.
    async fn check(&self, rules: &Rules) -> Result<Vec<Drift>, FirewallError>;

    /// Whom the guard in the kernel lets in, of either family; nobody where there is none. What a former run let in is
    /// known to the kernel alone. Writes nothing.
    ///
    /// # Errors
    /// As [`apply`](Firewall::apply), when it could not be read.
    async fn let_in(&self, overlay: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError>;

    /// Removes all that is this overlay's, of both families, whatever network it was for; also what Go flannel left,
    /// for overlay `flannel`. Idempotent. Used for `cleanup`, and to clear the way when another packet filter takes
    /// over: apply the new one first, then remove the old, and there is no moment without.
    ///
    /// # Errors
    /// As [`apply`](Firewall::apply). Whoever only clears the way takes [`FirewallError::Unsupported`] as "nothing to
    /// remove".
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
