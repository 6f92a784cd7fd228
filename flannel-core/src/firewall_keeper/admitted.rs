//! The addresses that a guard admits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tokio::time::sleep;

use crate::backoff::Backoff;
use crate::firewall::{Firewall, Rules};
use crate::kernel::{Op, OverlayName};
use crate::net::Prefix;
use crate::overlay::{Handle, Held, HeldBecause, WithheldBecause};
use crate::text::chain;

use super::{KeepOptions, RulesState, is_final};

/// How often to try to read the guard of a former run: within about 16 s, then the rules are written without it.
pub(super) const READS: u32 = 5;

/// The addresses that the guard has admitted.
#[derive(Debug, Default)]
pub(super) struct Admitted {
    /// Those admitted by a former run, as read from the kernel at the start.
    pub(super) formerly: BTreeSet<IpAddr>,
    /// Those admitted until now.
    pub(super) so_far: BTreeSet<IpAddr>,
    /// What bad records keep. `None` if they keep nothing, or if it could not be read yet.
    pub(super) kept: Option<Kept>,
}

/// Former peers whose kernel entries stay because an unreadable record names their subnet.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) prefixes: BTreeSet<Prefix>,
    pub(super) addresses: BTreeSet<IpAddr>,
}

impl Admitted {
    /// Reads which peers the guard of a former run admitted.
    ///
    /// Without them, a peer whose removal is withheld is blocked until its record is valid again. That is better than a
    /// node without any rules, so after [`READS`] failures the rules are written without them.
    pub(super) async fn by_former_run(firewall: &dyn Firewall, overlay: &OverlayName, options: &KeepOptions) -> Self {
        let mut backoff = Backoff::default();
        for nth in 1..=READS {
            let error = match firewall.let_in(overlay).await {
                Ok(formerly) => return Self { so_far: formerly.clone(), formerly, kept: None },
                // Writing will fail as well, and reports the error.
                Err(error) if is_final(&error) => break,
                Err(error) => chain(&error),
            };
            if nth == 1 {
                tracing::warn!(
                    target: "flannel::firewall",
                    error,
                    "cannot read the guard of a former run; writing a new one after {READS} tries"
                );
            }
            (options.on_state)(RulesState::Failed(error));
            sleep(backoff.wait()).await;
        }
        Self::default()
    }

    /// Records that these rules are in place.
    pub(super) fn wrote(&mut self, rules: &Rules) {
        if let Some(guard) = &rules.guard {
            self.so_far.clone_from(&guard.peers);
        }
    }

    /// Returns the addresses to admit now; `None` while the peers or the routes of a former run are not known.
    pub(super) async fn now(&mut self, handle: &Handle) -> Option<BTreeSet<IpAddr>> {
        let peers = match handle.peers().await {
            Ok(peers) => peers,
            Err(error) => {
                tracing::debug!(error = chain(&error), "the guard waits for the peers");
                return None;
            }
        };
        let peers = peers.iter().flat_map(|peer| peer.attrs.public_ip.iter().map(|(_, addr)| *addr)).collect();
        // Read after the peers: a peer missing from the list is withheld by then.
        let status = handle.status();
        if status.audits == 0 {
            // The first audit finds the routes of a former run.
            return None;
        }
        self.update_kept(&status.withheld, handle).await;
        Some(self.with(peers, status.withheld.values()))
    }

    /// Determines which former peers bad records keep. Reads the kernel only if the withheld prefixes have changed. A
    /// record that becomes bad later belongs to a peer of this run, which is admitted by its last valid record.
    async fn update_kept(&mut self, withheld: &BTreeMap<Prefix, WithheldBecause>, handle: &Handle) {
        let bad = withheld.iter().filter(|(_, because)| **because == WithheldBecause::BadRecord);
        let prefixes: BTreeSet<_> = bad.map(|(prefix, _)| *prefix).collect();
        if prefixes.is_empty() || self.formerly.is_empty() {
            self.kept = None;
        } else if self.kept.as_ref().is_none_or(|kept| kept.prefixes != prefixes) {
            match handle.plan().await {
                Ok(preview) => self.kept = Some(Kept { prefixes, addresses: kept_by_bad_records(&preview.held) }),
                Err(error) => tracing::debug!(error = chain(&error), "what bad records keep cannot be read yet"),
            }
        }
    }

    /// Returns the addresses to admit, including these peers. While the agent keeps routes to former peers, these peers
    /// are admitted too; otherwise the routes would be useless.
    pub(super) fn with<'a>(
        &self,
        mut peers: BTreeSet<IpAddr>,
        mut withheld: impl Iterator<Item = &'a WithheldBecause>,
    ) -> BTreeSet<IpAddr> {
        if withheld.any(|because| matches!(because, WithheldBecause::MassRemoval(_) | WithheldBecause::Unconfirmed)) {
            peers.extend(&self.so_far);
        }
        // A bad record may stay forever, so it keeps no other peers.
        if let Some(kept) = &self.kept {
            peers.extend(kept.addresses.intersection(&self.formerly));
        }
        peers
    }
}

/// Returns the destinations of FDB entries that are kept together with a neighbour whose prefix a bad record names.
pub(super) fn kept_by_bad_records(held: &[Held]) -> BTreeSet<IpAddr> {
    let neighbours: BTreeSet<_> = held
        .iter()
        .filter(|held| held.because == HeldBecause::Withheld(WithheldBecause::BadRecord))
        .filter_map(|held| match held.op {
            Op::DeleteNeighbour { key, mac } => Some((key.link, mac)),
            _ => None,
        })
        .collect();
    let entries = held.iter().filter_map(|held| match held.op {
        Op::DeleteFdb { key, dst } => neighbours.contains(&(key.link, key.mac)).then_some(dst),
        _ => None,
    });
    entries.collect()
}
