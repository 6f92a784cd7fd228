//! Why a peer is, or is not, programmed.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::admit::{Claim, Reason};
use crate::agent::{Machine, wanted};
use crate::backend::Skip;
use crate::kernel::{Object, PeerState, RouteSlot};
use crate::lease::{Lease, LeaseKey};
use crate::net::{Family, Prefix};

/// Why a peer is, or is not, programmed. The `Display` output is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Explanation {
    /// The key of the record in the store.
    pub key: LeaseKey,
    /// What became of the record.
    pub verdict: Verdict,
    /// The lease in force: the accepted one, which is the last good version if the record is bad now.
    pub lease: Option<Arc<Lease>>,
    /// The peer's objects in each family, or why it is skipped.
    pub states: Vec<(Family, Result<PeerState, Skip>)>,
    /// The objects among those that are not as wanted: refused, conflicting, flapping or withheld.
    pub unsettled: Vec<Object>,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The record is accepted as a peer.
    Accepted,
    /// The record is not accepted as a peer, for this reason.
    Quarantined(Reason),
    /// The record of this node.
    Own,
}

impl Explanation {
    /// The most records that are explained at a time. Any number of records may name one address.
    pub const MOST: usize = 100;
}

/// Explains the records that `query` matches.
pub(crate) fn explain(machine: &Machine, query: &str) -> Vec<Explanation> {
    meant(machine, query).into_iter().map(|key| explain_record(machine, key)).collect()
}

fn explain_record(machine: &Machine, key: LeaseKey) -> Explanation {
    let own = &machine.local().lease;
    let admission = machine.admission();
    if key == own.key {
        return Explanation {
            key,
            verdict: Verdict::Own,
            lease: Some(Arc::clone(own)),
            states: Vec::new(),
            unsettled: Vec::new(),
        };
    }
    let lease = admission.peer(&key).cloned();
    let why_not = admission.why_not(&key);
    let states: Vec<_> = match &lease {
        Some(lease) => wanted::states(&**machine.backend(), machine.local(), lease).collect(),
        None => Vec::new(),
    };
    let objects: Vec<_> =
        states.iter().filter_map(|(_, state)| state.as_ref().ok()).flat_map(wanted::objects).collect();
    let unsettled = machine.divergence().unsettled().filter(|object| objects.contains(object)).cloned().collect();
    let verdict = match why_not {
        Some(reason) => Verdict::Quarantined(reason),
        None => Verdict::Accepted,
    };
    Explanation { key, verdict, lease, states, unsettled }
}

/// The keys of the records that `query` matches. Tried in this order: the key itself; an address or a subnet, where
/// this node's and accepted records precede others; the part of a key before a dot, if only one record has it.
fn meant(machine: &Machine, query: &str) -> Vec<LeaseKey> {
    let query = query.trim();
    let (own, admission) = (&machine.local().lease, machine.admission());
    let ours = Claim { key: &own.key, subnets: own.subnets, public: own.attrs.public_ip };
    let claims = || std::iter::once(Claim { ..ours }).chain(admission.claims());
    if let Some(claim) = claims().find(|claim| claim.key.as_str() == query) {
        return vec![claim.key.clone()];
    }
    let addr: Option<IpAddr> = query.parse().ok();
    let subnet: Option<Prefix> = query.parse().ok();
    if addr.is_some() || subnet.is_some() {
        let means = |claim: &Claim<'_>| {
            let mut subnets = claim.subnets.iter().map(|(_, prefix)| *prefix);
            let by_public = claim.public.iter().any(|(_, public)| Some(*public) == addr);
            by_public || subnets.any(|held| addr.is_some_and(|addr| held.contains(addr)) || subnet == Some(held))
        };
        let is_refused = |key: &LeaseKey| *key != own.key && admission.peer(key).is_none();
        // A record may claim the same twice: by its current version, and by the one in force.
        let found: BTreeSet<_> = claims().filter(means).map(|claim| (is_refused(claim.key), claim.key)).collect();
        return found.into_iter().take(Explanation::MOST).map(|(_, key)| key.clone()).collect();
    }
    let is_part = |key: &str| key.strip_prefix(query).is_some_and(|rest| rest.starts_with('.'));
    let mut named: Vec<_> = claims().map(|claim| claim.key).filter(|key| is_part(key.as_str())).collect();
    named.sort_unstable();
    named.dedup();
    match named.as_slice() {
        [only] => vec![(*only).clone()],
        _ => Vec::new(),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Accepted => writeln!(f, "{}: accepted as a peer", self.key)?,
            Verdict::Own => writeln!(f, "{}: this node's own lease", self.key)?,
            Verdict::Quarantined(reason) => {
                writeln!(f, "{}: quarantined: {reason}: {}", self.key, reason.remedy())?;
                if self.lease.is_some() {
                    writeln!(f, "  the last good version of the record stays in force")?;
                }
            }
        }
        if let Some(lease) = &self.lease {
            for (family, subnet) in lease.subnets.iter() {
                write!(f, "  {family}: subnet {subnet}")?;
                match lease.attrs.public_ip.get(family) {
                    Some(addr) => writeln!(f, " at {addr}")?,
                    None => writeln!(f, " without a public address")?,
                }
            }
        }
        for (family, state) in &self.states {
            match state {
                Err(skip) => writeln!(f, "  {family}: skipped: {skip}")?,
                Ok(state) => {
                    for (prefix, route) in &state.routes {
                        write!(f, "  {family}: route {prefix}")?;
                        if let Some(gateway) = route.gateway {
                            write!(f, " via {gateway}")?;
                        }
                        if route.slot() != RouteSlot::MAIN {
                            write!(f, " table {} metric {}", route.slot().table, route.slot().metric)?;
                        }
                        writeln!(f)?;
                    }
                    if let Some((key, forward)) = &state.forward {
                        writeln!(f, "  {family}: forward {} to {forward}", key.prefix)?;
                    }
                    if let Some((key, mac)) = &state.neighbour {
                        writeln!(f, "  {family}: neighbour {} lladdr {mac}", key.addr)?;
                    }
                    if let Some((key, dst)) = &state.fdb {
                        writeln!(f, "  {family}: fdb {} dst {dst}", key.mac)?;
                    }
                }
            }
        }
        match self.unsettled.len() {
            0 => Ok(()),
            1 => writeln!(f, "  1 entry is missing from the kernel, or differs; see `status`"),
            count => writeln!(f, "  {count} entries are missing from the kernel, or differ; see `status`"),
        }
    }
}
