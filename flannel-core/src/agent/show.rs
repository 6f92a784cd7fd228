//! Keeps the status up to date, and emits the events for its changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::admit::Change;
use crate::agent::status::{Contact, EnvFile, Event, PeerCounts, Phase, Status, SubscriptionState, WithheldBecause};
use crate::agent::wanted;
use crate::backend::Skip;
use crate::clock::BootTime;
use crate::kernel::{Limitation, LinkId, LinkName, Object, State};
use crate::lease::LeaseKey;
use crate::plan::Conflict;

use super::{Cause, Machine, SPACING};

impl Machine {
    /// Changes the status and marks it as changed.
    pub(super) fn show(&mut self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status);
        self.status_changed = true;
    }

    pub(super) fn show_env_file(&mut self, file: EnvFile) {
        if self.status.subnet_env != file {
            self.show(|status| status.subnet_env = file);
        }
    }

    pub(super) fn show_contact(&mut self) {
        let contact = self.health.contact();
        let was = self.status.store.clone();
        match (&was, &contact) {
            (Contact::Lost { .. }, Contact::Lost { .. }) => {}
            (_, Contact::Lost { error, .. }) => self.events.push(Event::StoreLost(error.clone())),
            (Contact::Lost { .. }, _) => self.events.push(Event::StoreBack),
            _ => {}
        }
        if was != contact {
            match contact {
                Contact::Live => self.reconfiguration.ask(),
                Contact::Never | Contact::Lost { .. } => self.reconfiguration.wait(),
            }
            self.show(|status| status.store = contact);
        }
    }

    pub(super) fn show_refused_lease(&mut self, reason: Option<String>) {
        if self.status.lease_refused != reason {
            self.events.extend(reason.clone().map(Event::LeaseRefused));
            self.show(|status| status.lease_refused = reason);
        }
    }

    pub(super) fn show_subscription(&mut self, state: SubscriptionState) {
        if self.status.notifications == state {
            return;
        }
        self.events.push(match state {
            SubscriptionState::Active => Event::NotificationsBack,
            SubscriptionState::Broken => Event::NotificationsLost,
        });
        self.show(|status| status.notifications = state);
    }

    pub(super) fn show_peer(&mut self, change: &Change) {
        self.events.extend(match (&change.old, &change.new) {
            (None, Some(new)) => Some(Event::PeerAdded(Arc::clone(new))),
            (Some(_), Some(new)) => Some(Event::PeerChanged(Arc::clone(new))),
            (Some(old), None) => Some(Event::PeerRemoved(Arc::clone(old))),
            (None, None) => None,
        });
    }

    pub(super) fn show_error(&mut self, error: String) {
        if self.status.last_error.as_ref() != Some(&error) {
            self.events.push(Event::KernelTrouble(error.clone()));
            self.show(|status| status.last_error = Some(error));
        }
    }

    pub(super) fn show_round(&mut self, phase: Phase, error: Option<String>, failed_writes: usize) {
        let was = self.status.phase;
        if let Some(error) = error.as_ref().filter(|error| self.status.last_error.as_ref() != Some(error)) {
            self.events.push(Event::KernelTrouble(error.clone()));
        }
        // Without a lease the overlay is not ready, whatever the kernel's state (docs/faults.md, I16).
        let phase = if self.renewal.is_held() { phase } else { Phase::Starting };
        if phase == Phase::Ready && was != Phase::Ready {
            self.events.push(Event::Ready);
        }
        self.show(|status| {
            (status.phase, status.failed_writes, status.last_error) = (phase, failed_writes, error);
        });
    }

    pub(super) fn show_peers(&mut self) {
        if !std::mem::take(&mut self.stale.peers) {
            return;
        }
        let quarantined: BTreeMap<_, _> = self.admission.quarantined().take(Status::MAX_QUARANTINED).collect();
        let (dropped, own_trouble) = (self.admission.dropped(), self.admission.own_trouble());
        let unprotected = self.admission.withheld_overflow();
        {
            let status = &self.status;
            let fresh = quarantined.iter().filter(|(key, reason)| status.quarantined.get(*key) != Some(*reason));
            self.events.extend(fresh.map(|(key, reason)| Event::PeerQuarantined(key.clone(), reason.clone())));
            if dropped > 0 && status.peers.dropped == 0 {
                self.events.push(Event::RecordsDropped(dropped));
            }
            if own_trouble != status.own_trouble {
                self.events.push(Event::OwnTrouble(own_trouble.clone()));
            }
        }
        let (accepted, skipped) = (self.accepted, self.status.peers.skipped);
        let peers = PeerCounts { accepted, skipped, quarantined: self.admission.quarantined_count(), dropped };
        self.show(|status| {
            if *status.quarantined != quarantined {
                status.quarantined = Arc::new(quarantined);
            }
            (status.own_trouble, status.peers, status.unprotected) = (own_trouble, peers, unprotected);
        });
    }

    /// Updates the status for the current peers, whatever call is under way.
    pub(crate) fn show_admitted(&mut self, now: BootTime) {
        self.judge_removals(now);
        self.show_peers();
        self.show_withheld(now);
    }

    pub(super) fn show_skips(&mut self, skips: wanted::Skips) {
        self.report_skips(&skips);
        self.show(|status| {
            status.peers.skipped = skipped_peers(&skips);
            if *status.skipped != skips {
                status.skipped = Arc::new(skips);
            }
        });
    }

    pub(super) fn show_changed_skips<'a>(&mut self, keys: impl Iterator<Item = &'a LeaseKey>, skips: wanted::Skips) {
        if skips.is_empty() && self.status.skipped.is_empty() {
            return;
        }
        self.report_skips(&skips);
        self.show(|status| {
            let skipped = Arc::make_mut(&mut status.skipped);
            for key in keys {
                let former = crate::net::Family::BOTH.map(|family| skipped.remove(&(key.clone(), family)));
                status.peers.skipped -= usize::from(former.iter().any(Option::is_some));
            }
            status.peers.skipped += skipped_peers(&skips);
            skipped.extend(skips);
        });
    }

    fn report_skips(&mut self, skips: &wanted::Skips) {
        let known = &self.status.skipped;
        let fresh = skips.iter().filter(|(place, skip)| known.get(place) != Some(skip));
        let fresh = fresh.filter(|(_, skip)| !matches!(skip, Skip::Unprogrammed(_)));
        self.events.extend(fresh.map(|((key, family), skip)| Event::PeerSkipped(key.clone(), *family, skip.clone())));
    }

    pub(super) fn show_conflicts<'a>(&mut self, conflicts: impl Iterator<Item = &'a Conflict> + Clone) {
        let count = conflicts.clone().count();
        let conflicts: Vec<_> = conflicts.take(Status::MAX_CONFLICTS).cloned().collect();
        let fresh = conflicts.iter().filter(|conflict| !self.status.conflicts.contains(conflict));
        self.events.extend(fresh.cloned().map(Event::ConflictFound));
        if *self.status.conflicts != conflicts || self.status.conflict_count != count {
            self.show(|status| (status.conflicts, status.conflict_count) = (Arc::new(conflicts), count));
        }
    }

    pub(super) fn show_refused(&mut self) {
        let refused = self.refused.objects();
        if *self.status.refused == *refused {
            return;
        }
        let fresh = refused.iter().filter(|(object, _)| !self.status.refused.contains_key(*object));
        self.events.extend(fresh.map(|(object, refusal)| Event::Refused(object.clone(), refusal.clone())));
        let refused = Arc::new(refused.clone());
        self.show(|status| status.refused = refused);
    }

    pub(super) fn show_flapping(&mut self) {
        if self.guard.flapping.take_changed() {
            let flapping: Vec<Object> = self.guard.flapping.objects().cloned().collect();
            self.show(|status| status.flapping = Arc::new(flapping));
        }
    }

    pub(super) fn show_limitations(&mut self, seen: &State) {
        let named = |(id, limitations): (&LinkId, &Vec<Limitation>)| {
            let name = seen.links.get(id).map(|link| link.name.clone())?;
            Some(limitations.clone().into_iter().map(move |limitation| (name.clone(), limitation)))
        };
        let limitations: Vec<_> = seen.limitations.iter().filter_map(named).flatten().collect();
        let before = Arc::clone(&self.status.limitations);
        if *before == limitations {
            return;
        }
        let is_in = |list: &[(LinkName, Limitation)], (name, limitation): &(LinkName, Limitation)| {
            list.iter().any(|(device, known)| device == name && known.what == limitation.what)
        };
        let gone = before.iter().filter(|known| !is_in(&limitations, known)).cloned();
        self.events.extend(gone.map(|(name, limitation)| Event::LimitationGone(name, limitation)));
        let fresh = limitations.iter().filter(|found| !is_in(&before, found)).cloned();
        self.events.extend(fresh.map(|(name, limitation)| Event::Limited(name, limitation)));
        self.show(|status| status.limitations = Arc::new(limitations));
    }

    pub(super) fn show_contended(&mut self) {
        let contended = self.renewal.contended();
        if self.status.contended != contended {
            match (self.status.contended, contended) {
                (None, Some(contended)) => self.events.push(Event::LeaseContended(contended)),
                (Some(_), None) => self.events.push(Event::LeaseUncontended),
                _ => {}
            }
            self.show(|status| status.contended = contended);
        }
    }

    pub(super) fn show_withheld(&mut self, now: BootTime) {
        let mut prefixes = std::mem::take(&mut self.stale.prefixes);
        if std::mem::take(&mut self.stale.all_prefixes) {
            prefixes.extend(self.status.withheld.keys());
            prefixes.extend(self.guard.prefixes());
        }
        let changes: Vec<_> = {
            let withheld = &self.status.withheld;
            let fresh = prefixes.into_iter().map(|prefix| (prefix, self.guard.why_withheld(&prefix, now)));
            fresh.filter(|(prefix, because)| withheld.get(prefix) != because.as_ref()).collect()
        };
        if changes.is_empty() {
            return;
        }
        let mut freed = false;
        self.show(|status| {
            let withheld = Arc::make_mut(&mut status.withheld);
            for (prefix, because) in changes {
                let before = match because {
                    Some(because) => withheld.insert(prefix, because),
                    None => withheld.remove(&prefix),
                };
                freed |= because.is_none() && before == Some(WithheldBecause::BadRecord);
            }
        });
        if freed {
            // The objects that a bad record protected belong to no node now, or to another one.
            self.audit_at(self.audit.last.map_or(now, |last| last.after(SPACING)).max(now), Cause::Expected);
        }
        self.events.extend(self.guard.protected.take_mass_to_tell().map(Event::DeletionsWithheld));
    }
}

fn skipped_peers(skips: &wanted::Skips) -> usize {
    skips.keys().map(|(key, _)| key).collect::<BTreeSet<_>>().len()
}
