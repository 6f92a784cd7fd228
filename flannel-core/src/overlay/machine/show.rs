//! What the machine shows of itself: the status, and the events that go with its changes.

use std::collections::{BTreeMap, BTreeSet};

use crate::clock::BootTime;
use crate::lease::LeaseKey;
use crate::net::Prefix;
use crate::overlay::status::{Event, PeerCounts, Phase, WithheldBecause};
use crate::overlay::wanted;
use crate::plan::{Conflict, Object};

use super::{Cause, Machine, SPACING};

impl Machine {
    pub(super) fn show_error(&mut self, error: String) {
        if self.status.borrow().last_error.as_ref() != Some(&error) {
            self.events.push(Event::KernelTrouble(error.clone()));
            self.status.send_modify(|status| status.last_error = Some(error));
        }
    }

    pub(super) fn show_round(&mut self, phase: Phase, error: Option<String>, undone: usize) {
        let (was, old_error) = {
            let status = self.status.borrow();
            (status.phase, status.last_error.clone())
        };
        if let Some(error) = error.as_ref().filter(|error| old_error.as_ref() != Some(error)) {
            self.events.push(Event::KernelTrouble(error.clone()));
        }
        // Whatever the kernel is like, nobody is ready without a lease (faults.md, I16).
        let phase = if self.tenure.is_held() { phase } else { Phase::Starting };
        if phase == Phase::Ready && was != Phase::Ready {
            self.events.push(Event::Ready);
        }
        self.status.send_modify(|status| {
            (status.phase, status.undone, status.last_error) = (phase, undone, error);
        });
    }

    pub(super) fn show_peers(&mut self) {
        let quarantined: BTreeMap<_, _> = self.admission.quarantined().into_iter().collect();
        let old = self.status.borrow().quarantined.clone();
        for (key, reason) in &quarantined {
            if old.get(key) != Some(reason) {
                self.events.push(Event::PeerQuarantined(key.clone(), reason.clone()));
            }
        }
        let accepted = self.accepted;
        let own_trouble = self.admission.own_trouble();
        self.status.send_modify(|status| {
            status.own_trouble = own_trouble;
            status.peers = PeerCounts { accepted, quarantined: quarantined.len(), ..status.peers };
            status.quarantined = quarantined;
        });
    }

    pub(super) fn show_skips(&mut self, skips: wanted::Skips) {
        self.status.send_modify(|status| {
            status.skipped = skips;
            status.peers.skipped = skipped_peers(&status.skipped);
        });
    }

    pub(super) fn show_changed_skips<'a>(&mut self, keys: impl Iterator<Item = &'a LeaseKey>, skips: wanted::Skips) {
        if skips.is_empty() && self.status.borrow().skipped.is_empty() {
            return;
        }
        self.status.send_modify(|status| {
            for key in keys {
                for family in crate::net::Family::BOTH {
                    status.skipped.remove(&(key.clone(), family));
                }
            }
            status.skipped.extend(skips);
            status.peers.skipped = skipped_peers(&status.skipped);
        });
    }

    pub(super) fn show_conflicts(&mut self, conflicts: Vec<Conflict>) {
        let old = self.status.borrow().conflicts.clone();
        let fresh = conflicts.iter().filter(|conflict| !old.contains(conflict));
        self.events.extend(fresh.cloned().map(Event::ConflictFound));
        if old != conflicts {
            self.status.send_modify(|status| status.conflicts = conflicts);
        }
    }

    pub(super) fn show_contested(&mut self) {
        let contested: Vec<Object> = self.guard.contested().cloned().collect();
        if self.status.borrow().contested != contested {
            self.status.send_modify(|status| status.contested = contested);
        }
    }

    pub(super) fn show_challenged(&mut self) {
        let challenged = self.tenure.challenged();
        if self.status.borrow().challenged != challenged {
            self.status.send_modify(|status| status.challenged = challenged);
        }
    }

    pub(super) fn show_withheld(&mut self, now: BootTime) {
        let bad = self.admission.withheld().into_iter().map(|prefix| (prefix, WithheldBecause::BadRecord));
        let mass =
            self.guard.mass().into_iter().flat_map(|mass| {
                mass.prefixes.iter().map(|prefix| (*prefix, WithheldBecause::MassRemoval(mass.until)))
            });
        let unconfirmed = self.guard.unconfirmed().iter().map(|prefix| (*prefix, WithheldBecause::Unconfirmed));
        let withheld: BTreeMap<_, _> = bad.chain(unconfirmed).chain(mass).collect();
        if self.status.borrow().withheld == withheld {
            return;
        }
        let bad = |(_, because): &(&Prefix, &WithheldBecause)| **because == WithheldBecause::BadRecord;
        let freed = self.status.borrow().withheld.iter().filter(bad).any(|(prefix, _)| !withheld.contains_key(prefix));
        if freed {
            // What a bad record protected is nobody's now, or another's.
            self.audit_at(self.audit.last.map_or(now, |last| last.after(SPACING)).max(now), Cause::Expected);
        }
        if self.guard.mass().is_some() {
            self.events.push(Event::DeletionsWithheld(withheld.len()));
        }
        self.status.send_modify(|status| status.withheld = withheld);
    }
}

fn skipped_peers(skips: &wanted::Skips) -> usize {
    skips.keys().map(|(key, _)| key).collect::<BTreeSet<_>>().len()
}
