//! Events of the store: leases that are added, changed and removed, lists of all records, and errors.

use std::collections::BTreeSet;

use crate::admit;
use crate::agent::protected::Reason;
use crate::agent::renewal::Shown;
use crate::agent::status::{Contact, Event};
use crate::agent::store_health::Source;
use crate::clock::BootTime;
use crate::lease::{LeaseEvent, is_complete};
use crate::net::Prefix;

use super::{Cause, Change, Machine, SPACING, prefixes_of};

impl Machine {
    pub(super) fn store_event(&mut self, now: BootTime, event: LeaseEvent) {
        if event == LeaseEvent::ConfigChanged {
            // It may come from a file of this host: it does not show that the store answers. Once the store does, it is
            // asked in any case.
            if self.status.store == Contact::Live {
                self.reconfiguration.ask();
            }
            return;
        }
        self.store_well(Source::Watch);
        let own = self.local.lease.key.clone();
        let (changes, reset) = match event {
            LeaseEvent::Reset(records) => {
                let record = records.iter().find(|record| record.key == own);
                let outcome = match record {
                    None if !is_complete(&records) => self.renewal.not_listed(now),
                    record => self.renewal.own_record(record, Shown::List, now),
                };
                self.renewal_outcome(now, outcome);
                let before = self.prefixes;
                let changes = self.admission.reset(records);
                (changes, Some(before))
            }
            LeaseEvent::Upsert(record) => {
                if record.key == own {
                    let outcome = self.renewal.own_record(Some(&record), Shown::Event, now);
                    self.renewal_outcome(now, outcome);
                }
                (self.admission.upsert(record), None)
            }
            LeaseEvent::Remove(key) => {
                if key == own {
                    let outcome = self.renewal.own_record(None, Shown::Event, now);
                    self.renewal_outcome(now, outcome);
                }
                (self.admission.remove(&key), None)
            }
            LeaseEvent::Resumed | LeaseEvent::ConfigChanged => return,
            LeaseEvent::ThisNode(public) => return self.this_node(now, public),
        };
        if reset.is_some() && self.guard.protected.confirm() {
            self.audit.judged = false;
            self.stale.all_prefixes = true;
            self.audit_at(now, Cause::Expected);
        }
        let first = !std::mem::replace(&mut self.synced, true);
        if first {
            self.show(|status| status.listed = true);
            // The configuration was read before the lease was acquired, possibly from a state file.
            self.reconfiguration.ask();
        }
        match reset {
            Some(before) if !first => {
                let gone = changes.iter().flat_map(|change| prefixes_of(change.old.as_deref()));
                let gone: BTreeSet<Prefix> =
                    gone.filter(|prefix| self.admission.peer_by_subnet(prefix).is_none()).collect();
                self.guard.protected.judge_reset(now, before, gone);
                self.stale.all_prefixes = true;
            }
            _ => {}
        }
        for change in changes {
            self.count(&change);
            let removed = change.old.clone().filter(|_| reset.is_none() && change.new.is_none());
            for prefix in prefixes_of(change.new.as_deref()) {
                if !first && prefixes_of(change.old.as_deref()).all(|old| old != prefix) {
                    self.guard.protected.note_joined(now, prefix);
                }
                self.prefix_in_use(now, &prefix);
            }
            // After the first list, the first audit covers all peers anyway.
            if !first {
                self.show_peer(&change);
                self.note(change);
            }
            for prefix in prefixes_of(removed.as_deref()) {
                if self.admission.peer_by_subnet(&prefix).is_none() {
                    self.guard.protected.note_left(now, prefix);
                }
            }
        }
        self.stale.peers = true;
        self.protect_named();
        if reset.is_some() {
            self.relist.listed(self.admission.has_room_again());
            self.show_peers();
            self.events.push(Event::Snapshot(self.status.peers));
        }
    }

    /// Judges the peers that left one by one since the last call. Called once for all of them, because many may leave
    /// in one burst.
    pub(super) fn judge_removals(&mut self, now: BootTime) {
        let pending = self.changes.values().filter(|change| change.new.is_none());
        let waiting = || pending.flat_map(|change| prefixes_of(change.old.as_deref())).collect();
        self.stale.all_prefixes |= self.guard.protected.judge_removals(now, self.prefixes, waiting);
    }

    /// Protects the prefixes that bad records name now, and only those.
    pub(super) fn protect_named(&mut self) {
        for prefix in self.admission.changed_withheld() {
            self.stale.prefixes.insert(*prefix);
            if self.admission.withheld().contains(prefix) {
                self.guard.protected.protect([*prefix], Reason::BadRecord);
            } else {
                self.guard.protected.release(*prefix, Reason::BadRecord);
            }
        }
    }

    /// Notes that a peer or this node has the prefix now: deletions there no longer wait.
    pub(super) fn prefix_in_use(&mut self, now: BootTime, prefix: &Prefix) {
        self.stale.prefixes.insert(*prefix);
        if self.guard.protected.in_use(prefix) {
            // The objects to delete are not part of a peer's change: only an audit finds them.
            self.audit.comes_first = true;
            self.stale.all_prefixes = true;
            self.audit_at(self.audit.last.map_or(now, |last| last.after(SPACING)).max(now), Cause::Expected);
        }
    }

    /// Notes a peer for the next lease round. An addition followed by a removal cancels out.
    pub(super) fn note(&mut self, change: admit::Change) {
        let noted = self.changes.entry(change.key.clone()).or_insert_with(|| Change { old: change.old, new: None });
        noted.new = change.new;
        if noted.old.is_none() && noted.new.is_none() {
            self.changes.remove(&change.key);
        }
    }

    pub(super) fn count(&mut self, change: &admit::Change) {
        self.accepted += usize::from(change.new.is_some());
        self.accepted -= usize::from(change.old.is_some());
        self.prefixes += prefixes_of(change.new.as_deref()).count();
        self.prefixes -= prefixes_of(change.old.as_deref()).count();
    }

    pub(super) fn store_well(&mut self, source: Source) {
        self.health.well(source);
        self.show_contact();
    }

    pub(super) fn store_trouble(&mut self, source: Source, now: BootTime, error: String) {
        self.health.trouble(source, now, error);
        self.show_contact();
    }
}
