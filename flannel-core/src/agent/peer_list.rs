//! The records of all other nodes, and what became of each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::admit::Reason;
use crate::agent::status::{Refusal, WithheldBecause};
use crate::agent::{Machine, wanted};
use crate::backend::Skip;
use crate::kernel::Object;
use crate::lease::{Lease, LeaseKey};
use crate::net::{Dual, Family, Prefix};
use crate::plan::Conflict;

/// The records of all other nodes, and prefixes whose deletion waits. Peers that are programmed as wanted need no more
/// memory than their lease: [`rows`](Self::rows) makes the rows one by one.
#[derive(Debug, Clone)]
pub struct PeerList {
    /// In the order of keys.
    accepted: Vec<Arc<Lease>>,
    /// Those among the accepted that are not simply programmed.
    standings: BTreeMap<LeaseKey, Standing>,
    /// Records without a version in force, in the order of keys.
    rejected: Vec<PeerRow>,
    withheld: Vec<(Prefix, WithheldBecause)>,
}

/// A record of another node, or a prefix without a record, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerRow {
    /// The key of the record; `None` for a prefix without a record.
    pub key: Option<LeaseKey>,
    /// The subnets: those in force, else those that the record names.
    pub subnets: Dual<Prefix>,
    /// The public addresses: those in force, else those that the record names.
    pub public_ip: Dual<IpAddr>,
    /// The lease in force, which is the last good version if the record is bad now.
    pub lease: Option<Arc<Lease>>,
    /// What became of the record.
    pub standing: Standing,
}

/// What became of a record. The `Display` output is the reason; empty for a peer that is programmed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Standing {
    /// The kernel has all objects of the peer.
    Programmed,
    /// The backend skips the peer in this family.
    Skipped(Family, Skip),
    /// The current version of the record is not accepted.
    Quarantined(Reason),
    /// The kernel refused an object of the peer.
    Refused(Refusal),
    /// An object of another program is in the place of one of the peer's.
    Conflict(Conflict),
    /// Another program keeps changing an object of the peer.
    Flapping(Object),
    /// An object of the peer is not written yet.
    Pending(Object),
    /// There is no record, and the deletion of the prefix waits.
    Withheld(WithheldBecause),
}

impl Standing {
    /// Returns the state as one word, as status pages show it. Stable.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Programmed => "programmed",
            Self::Skipped(..) => "skipped",
            Self::Quarantined(_) => "quarantined",
            Self::Refused(_) => "refused",
            Self::Conflict(_) => "conflict",
            Self::Flapping(_) => "flapping",
            Self::Pending(_) => "pending",
            Self::Withheld(_) => "withheld",
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Programmed => Ok(()),
            Self::Skipped(family, skip) => write!(f, "{family}: {skip}"),
            Self::Quarantined(reason) => write!(f, "{reason}: {}", reason.remedy()),
            Self::Refused(refusal) => write!(f, "{}: {}", refusal.error, refusal.remedy()),
            Self::Conflict(conflict) => write!(f, "{conflict}"),
            Self::Flapping(object) => write!(f, "another program keeps changing {object}"),
            Self::Pending(object) => write!(f, "{object} is not written yet"),
            Self::Withheld(because) => write!(f, "{because}"),
        }
    }
}

impl PeerList {
    pub(crate) fn of(machine: &Machine) -> Self {
        let (admission, status) = (machine.admission(), machine.status());
        let mut standings = unsettled(machine);
        let skipped = status.skipped.iter();
        standings.extend(skipped.map(|((key, family), skip)| (key.clone(), Standing::Skipped(*family, skip.clone()))));
        let mut rejected = BTreeMap::new();
        let own = &machine.local().lease.key;
        for claim in admission.claims().filter(|claim| claim.key != own) {
            let Some(reason) = admission.why_not(claim.key) else { continue };
            let (key, standing) = (claim.key.clone(), Standing::Quarantined(reason));
            if admission.peer(&key).is_some() {
                standings.insert(key, standing);
                continue;
            }
            // The first claim of a record is that of its current version.
            rejected.entry(key.clone()).or_insert(PeerRow {
                key: Some(key),
                subnets: claim.subnets,
                public_ip: claim.public,
                lease: None,
                standing,
            });
        }
        let rejected: Vec<_> = rejected.into_values().collect();
        let named: BTreeSet<_> =
            rejected.iter().flat_map(|row| row.subnets.iter().map(|(_, subnet)| *subnet)).collect();
        let withheld = status.withheld.iter().filter(|(prefix, _)| !named.contains(*prefix));
        Self {
            accepted: admission.peers().cloned().collect(),
            standings,
            withheld: withheld.map(|(prefix, because)| (*prefix, *because)).collect(),
            rejected,
        }
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.accepted.len() + self.rejected.len() + self.withheld.len()
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the rows: accepted records, then others, each in the order of keys, then prefixes without a record.
    pub fn rows(&self) -> impl Iterator<Item = PeerRow> + '_ {
        (0..self.len()).filter_map(|nth| self.row(nth))
    }

    /// Returns the row of this number, from 0. `None` after the last one.
    pub fn row(&self, nth: usize) -> Option<PeerRow> {
        if let Some(lease) = self.accepted.get(nth) {
            return Some(PeerRow {
                key: Some(lease.key.clone()),
                subnets: lease.subnets,
                public_ip: lease.attrs.public_ip,
                standing: self.standings.get(&lease.key).cloned().unwrap_or(Standing::Programmed),
                lease: Some(Arc::clone(lease)),
            });
        }
        let nth = nth - self.accepted.len();
        if let Some(row) = self.rejected.get(nth) {
            return Some(row.clone());
        }
        let (prefix, because) = self.withheld.get(nth - self.rejected.len())?;
        let mut subnets = Dual::default();
        *subnets.slot(prefix.family()) = Some(*prefix);
        Some(PeerRow {
            key: None,
            subnets,
            public_ip: Dual::default(),
            lease: None,
            standing: Standing::Withheld(*because),
        })
    }
}

/// A list of peers that are all programmed.
impl FromIterator<Arc<Lease>> for PeerList {
    fn from_iter<T: IntoIterator<Item = Arc<Lease>>>(peers: T) -> Self {
        let accepted = peers.into_iter().collect();
        Self { accepted, standings: BTreeMap::new(), rejected: Vec::new(), withheld: Vec::new() }
    }
}

/// The accepted peers of which an object is not as wanted.
fn unsettled(machine: &Machine) -> BTreeMap<LeaseKey, Standing> {
    let (divergence, status) = (machine.divergence(), machine.status());
    // Devices and addresses belong to no peer.
    let is_peers = |object: &Object| !matches!(object, Object::Link(_) | Object::LinkPart(..) | Object::Address(_));
    if !divergence.unsettled().any(is_peers) {
        return BTreeMap::new();
    }
    let conflicts: BTreeMap<_, _> = status.conflicts.iter().map(|conflict| (&conflict.object, conflict)).collect();
    let flapping: BTreeSet<_> = status.flapping.iter().collect();
    let standing = |object: Object| {
        if let Some(refusal) = status.refused.get(&object) {
            Standing::Refused(refusal.clone())
        } else if let Some(conflict) = conflicts.get(&object) {
            Standing::Conflict((*conflict).clone())
        } else if flapping.contains(&object) {
            Standing::Flapping(object)
        } else {
            Standing::Pending(object)
        }
    };
    let of_peer = |peer: &Arc<Lease>| {
        let states = wanted::states(&**machine.backend(), machine.local(), peer);
        let mut states = states.filter_map(|(_, state)| state.ok());
        let object = states.find_map(|state| wanted::objects(&state).find(|object| divergence.is_unsettled(object)))?;
        Some((peer.key.clone(), standing(object)))
    };
    machine.admission().peers().filter_map(of_peer).collect()
}
