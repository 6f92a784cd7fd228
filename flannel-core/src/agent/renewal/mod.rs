//! The renewal of this node's lease, and its loss.

use std::sync::Arc;
use std::time::Duration;

use crate::agent::LossPolicy;
use crate::agent::contention::{Contention, Disturbance};
use crate::agent::status::{Contended, LossReason};
use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;
use crate::lease::{BadRecord, Lease, LeaseAttrs, Record};
use crate::subnet::{OwnLeases, SubnetError, Want};

#[cfg(test)]
mod tests;

/// The minimum interval of renewals, however short a store's leases are.
const SHORTEST: Duration = Duration::from_secs(1);

/// A call to the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoreCall {
    Renew(Arc<Lease>),
    Acquire(Want),
}

/// The effect of an answer or a record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No change that matters outside of this module.
    Same,
    /// The lease was extended or published again.
    Renewed,
    /// The lease was replaced by another one.
    Replaced,
    /// The lease was lost.
    Lost(LossReason),
}

#[derive(Debug)]
pub(crate) struct Renewal {
    lease: Arc<Lease>,
    policy: LossPolicy,
    known_by: KnownBy,
    lost: bool,
    /// Whether the record is missing or damaged: it is written again by acquiring the held lease.
    rewrite: bool,
    /// The attributes that the call under way publishes.
    asked: Option<LeaseAttrs>,
    /// Whether a call failed, after which the store may show a write of this node that was not acknowledged.
    unacknowledged: bool,
    /// Whether the store has reported a change since the call under way began.
    repeat: bool,
    /// How the store last showed this node's record while a call was under way. The answer to the call may be older.
    shown: Option<Option<Arc<Lease>>>,
    /// Whether the store has yet to show the last write: a record that it shows before that may be older.
    unseen: bool,
    /// When to call the store next; `None` if nothing expires and nothing changed.
    due: Option<BootTime>,
    /// The earliest time of the next call, because one failed or the record is contended.
    not_before: BootTime,
    /// Attributes to publish that the store does not have yet.
    publish: Option<LeaseAttrs>,
    address: Address,
    contention: Contention,
    backoff: Backoff,
    jitter: Jitter,
}

/// How the store shows a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// In a list, as after a gap.
    List,
    /// As a change that was just made.
    Event,
}

/// What identifies this node to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KnownBy {
    /// A name that no other node has: whatever happens to the record, the lease is kept and the record written again.
    Name,
    /// The published address, which another node may have later: the lease is lost with the record.
    Address,
}

/// Whether this node has the address that identifies it to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Address {
    /// The host has it, or the store does not identify nodes by their address.
    Held,
    /// The host may have lost it. No lease is acquired until that is known.
    Unknown,
    /// The host has lost it, and another node may have it. No lease is acquired, and a changed record is taken for
    /// another node's.
    Lost,
}

impl Renewal {
    pub(crate) fn new(lease: Arc<Lease>, policy: LossPolicy, known_by: KnownBy, now: BootTime, jitter: Jitter) -> Self {
        let mut renewal = Self {
            due: None,
            not_before: now,
            lease,
            policy,
            known_by,
            lost: false,
            rewrite: false,
            repeat: false,
            asked: None,
            unacknowledged: false,
            shown: None,
            unseen: false,
            publish: None,
            address: Address::Held,
            contention: Contention::new(jitter.clone()),
            backoff: Backoff::new(jitter.clone()),
            jitter,
        };
        renewal.contention.stand(now);
        renewal.schedule(now);
        renewal
    }

    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Whether this node holds the lease.
    pub(crate) fn is_held(&self) -> bool {
        !self.lost
    }

    /// The contention for the record, for the status.
    pub(crate) fn contended(&self) -> Option<Contended> {
        self.contention.show(self.due.filter(|_| self.may_call()))
    }

    pub(crate) fn deadline(&self) -> Option<BootTime> {
        let expiry = self.lease.expires.filter(|_| !self.lost);
        let due = self.due.filter(|_| self.asked.is_none() && self.may_call());
        [due, expiry, self.contention.calms()].into_iter().flatten().min()
    }

    /// Sets what is known of the address that identifies this node.
    pub(crate) fn identified_by(&mut self, address: Address) {
        self.address = address;
    }

    fn may_call(&self) -> bool {
        !self.lost || self.address == Address::Held
    }

    /// Publishes other attributes with the next call, which is due now unless a call or a wait is pending.
    pub(crate) fn publish(&mut self, attrs: LeaseAttrs, now: BootTime) {
        // The outcome of a call under way is unknown: the store may have its attributes afterwards.
        if attrs == self.lease.attrs && self.asked.is_none() {
            self.publish = None;
        } else {
            self.publish = Some(attrs);
            self.due = self.allowed(self.not_before.max(now));
        }
    }

    /// Notes that the lease expired while the store was away. From then on it may be another node's (docs/faults.md,
    /// I3).
    pub(crate) fn expire(&mut self, now: BootTime) -> Outcome {
        self.contention.calm(now);
        match self.lease.expires {
            Some(expires) if expires <= now && !self.lost => self.lose(LossReason::Expired, Disturbance::Loss, now),
            _ => Outcome::Same,
        }
    }

    /// Returns the call that is due. It is then under way until [`answered`](Self::answered).
    pub(crate) fn call(&mut self, now: BootTime) -> Option<StoreCall> {
        if self.asked.is_some() || !self.may_call() || self.due.is_none_or(|due| due > now) {
            return None;
        }
        let attrs = self.publish.clone().unwrap_or_else(|| self.lease.attrs.clone());
        self.asked = Some(attrs.clone());
        self.contention.call(now);
        Some(if self.lost || self.rewrite {
            let own = OwnLeases::Key(self.lease.key.clone());
            StoreCall::Acquire(Want::new(attrs).preferring(self.lease.subnets).owning(own))
        } else {
            StoreCall::Renew(Arc::new(Lease { attrs, ..(*self.lease).clone() }))
        })
    }

    /// Handles the answer of the store. Also returns the error if the call will be repeated because of it.
    pub(crate) fn answered(
        &mut self,
        answer: Result<Lease, SubnetError>,
        now: BootTime,
    ) -> (Outcome, Option<SubnetError>) {
        let (asked, shown) = (self.asked.take(), self.shown.take());
        match answer {
            Ok(lease) => (self.given(lease, asked, shown, now), None),
            Err(SubnetError::Lost(_)) if !self.lost && self.known_by == KnownBy::Name => {
                // Another node cannot have the name: acquiring returns this node's lease.
                self.rewrite = true;
                self.ask(Disturbance::Loss, now);
                (Outcome::Same, None)
            }
            Err(SubnetError::Lost(reason)) if !self.lost => {
                // The record is gone or another node's. In the latter case the store shows it.
                (self.lose(LossReason::Refused(reason), Disturbance::Loss, now), None)
            }
            Err(error) => {
                // A record that was shown meanwhile is ignored: the next call determines the state.
                self.unacknowledged = true;
                self.not_before = now.after(self.backoff.wait());
                self.due = self.allowed(self.not_before);
                (Outcome::Same, Some(error).filter(|_| self.due.is_some()))
            }
        }
    }

    /// Handles a change in the store for this node: something that was missing for a lease, or other addresses to
    /// publish. The next call is due now, or follows the one under way.
    pub(crate) fn store_changed(&mut self, now: BootTime) {
        self.backoff.reset();
        self.repeat = self.asked.is_some();
        if self.lost || self.rewrite {
            // The back-off of earlier failures no longer applies.
            self.not_before = now;
        }
        if !self.repeat {
            self.due = self.allowed(self.not_before.max(now));
        }
    }

    /// Handles an incomplete list without this node's record, which may exist.
    pub(crate) fn not_listed(&mut self, now: BootTime) -> Outcome {
        if self.unseen && self.asked.is_none() && !self.lost {
            self.ask(Disturbance::Loss, now);
        }
        Outcome::Same
    }

    /// Handles this node's record as the store shows it, or its absence.
    pub(crate) fn own_record(&mut self, record: Option<&Record>, shown: Shown, now: BootTime) -> Outcome {
        let seen = record.and_then(|record| record.lease.as_ref().ok());
        self.rewrite = self.known_by == KnownBy::Name && seen.is_none() && !self.lost;
        if self.asked.is_some() {
            self.shown = Some(seen.cloned());
            return Outcome::Same;
        }
        if self.lost {
            return Outcome::Same;
        }
        if self.unseen && seen.is_some_and(|seen| is_shown(seen, &self.lease)) {
            self.unseen = false;
            if self.contention.withdraw() {
                self.schedule(now);
            }
        }
        if self.unseen {
            if !seen.is_some_and(|seen| is_same(seen, &self.lease)) {
                self.ask(Disturbance::Loss, now);
            }
            return Outcome::Same;
        }
        if self.rewrite {
            self.ask(Disturbance::Loss, now);
            return Outcome::Same;
        }
        let Some(seen) = seen else {
            let damage = record.and_then(|record| record.lease.as_ref().err());
            let damaged = |bad: &BadRecord| LossReason::Refused(format!("its record is damaged: {}", bad.reason));
            let disturbance = if damage.is_some() { Disturbance::Write } else { Disturbance::Loss };
            return self.lose(damage.map_or(LossReason::Deleted, |bad| damaged(bad)), disturbance, now);
        };
        if self.publish.as_ref() == Some(&seen.attrs) && seen.subnets == self.lease.subnets {
            // This node's write, whose reply was lost.
            let expires = seen.expires.or(self.lease.expires);
            self.lease = Arc::new(Lease { expires, ..(**seen).clone() });
            self.publish = None;
            self.schedule(now);
            return Outcome::Renewed;
        }
        match seen {
            seen if self.known_by == KnownBy::Address && seen.attrs.public_ip != self.lease.attrs.public_ip => {
                self.lose(LossReason::Taken, Disturbance::Write, now)
            }
            seen if seen.subnets != self.lease.subnets => {
                let subnets: Vec<_> = seen.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
                let reason = LossReason::Refused(format!("the record now names {}", subnets.join(", ")));
                self.lose(reason, Disturbance::Write, now)
            }
            seen if seen.attrs == self.lease.attrs => {
                let is_written = seen.fence != self.lease.fence;
                if is_written || seen.expires > self.lease.expires {
                    // A record without an expiry (as in etcd) does not mean that the lease has none: the known expiry
                    // stays.
                    let expires = seen.expires.or(self.lease.expires);
                    self.lease = Arc::new(Lease { expires, ..(**seen).clone() });
                    self.schedule(now);
                }
                let is_own = is_written && std::mem::take(&mut self.unacknowledged);
                if is_written && !is_own && self.known_by == KnownBy::Address {
                    // Another agent publishes the same: it has the same address. Writing the record once more shows it
                    // that there are two, and its answer is an event. A list may be that of a restored store, or show
                    // what a former run wrote.
                    self.ask(if shown == Shown::Event { Disturbance::Write } else { Disturbance::Loss }, now);
                }
                Outcome::Same
            }
            // The node that has the address now has taken over the record.
            _ if self.address == Address::Lost => self.lose(LossReason::Taken, Disturbance::Write, now),
            // Another program edited the record: write it again, over the version just read.
            seen => {
                self.publish.get_or_insert_with(|| self.lease.attrs.clone());
                self.lease = Arc::new(Lease { fence: seen.fence.clone(), ..(*self.lease).clone() });
                self.ask(Disturbance::Write, now);
                Outcome::Same
            }
        }
    }

    /// Takes over the lease from an answer of the store.
    fn given(
        &mut self,
        lease: Lease,
        asked: Option<LeaseAttrs>,
        shown: Option<Option<Arc<Lease>>>,
        now: BootTime,
    ) -> Outcome {
        self.backoff.reset();
        self.contention.stand(now);
        self.unacknowledged = false;
        let confirmed = matches!(&shown, Some(Some(seen)) if is_shown(seen, &lease));
        self.unseen = !confirmed && (self.unseen || !is_shown(&self.lease, &lease));
        let vanished = matches!(shown, Some(None));
        // A record shown meanwhile may equal the former or the new one. Any other may be newer than the answer.
        let doubtful =
            shown.is_some_and(|seen| !seen.is_some_and(|seen| is_same(&seen, &lease) || is_same(&seen, &self.lease)));
        if self.publish.as_ref() == Some(&lease.attrs) {
            self.publish = None;
        }
        let ignored = self.publish.is_some() && self.publish == asked;
        let elsewhere = lease.subnets != self.lease.subnets || lease.key != self.lease.key;
        let replaced = self.lost || elsewhere;
        if elsewhere && !self.lost && self.known_by == KnownBy::Name && self.policy != LossPolicy::Reacquire {
            let reason = LossReason::Refused("another node has its subnets".to_owned());
            return self.lose(reason, Disturbance::Write, now);
        }
        (self.lost, self.rewrite) = (false, doubtful && vanished && self.known_by == KnownBy::Name);
        self.lease = Arc::new(lease);
        self.schedule(now);
        if doubtful || ignored {
            self.ask(Disturbance::Loss, now);
        }
        if std::mem::take(&mut self.repeat) {
            self.due = self.allowed(now);
        }
        if replaced { Outcome::Replaced } else { Outcome::Renewed }
    }

    fn lose(&mut self, reason: LossReason, disturbance: Disturbance, now: BootTime) -> Outcome {
        (self.lost, self.rewrite) = (true, false);
        self.ask(disturbance, now);
        Outcome::Lost(reason)
    }

    /// The record changed, or seems to have: the store is asked whether this node still holds it.
    fn ask(&mut self, disturbance: Disturbance, now: BootTime) {
        self.not_before = self.not_before.max(self.contention.raise(disturbance, now));
        // The wait must not delay the renewal of a held lease beyond half of its remaining time.
        let half = self.lease.expires.filter(|_| !self.lost).map(|expires| now.after(expires.since(now) / 2));
        self.due = self.allowed(half.map_or(self.not_before, |half| half.min(self.not_before)));
    }

    /// `due`, unless the lease is lost and the policy is not to acquire it again.
    fn allowed(&self, due: BootTime) -> Option<BootTime> {
        match self.policy {
            LossPolicy::Reacquire => Some(due),
            LossPolicy::Keep | LossPolicy::Stop => Some(due).filter(|_| !self.lost),
        }
    }

    /// Schedules the renewal at half of the remaining time, so that the other half is left for a store that is away.
    fn schedule(&mut self, now: BootTime) {
        self.due = match (&self.publish, self.lease.expires) {
            (Some(_), _) => Some(now),
            (None, None) => None,
            (None, Some(expires)) => {
                let half = expires.since(now) / 2;
                Some(now.after(self.jitter.around(half).max(SHORTEST)))
            }
        };
    }
}

/// Whether the store shows the written record. A fence alone does not prove it, since some stores keep it over writes.
fn is_shown(seen: &Lease, written: &Lease) -> bool {
    seen.fence == written.fence && is_same(seen, written)
}

/// Whether two leases are equal, except for expiry and fence.
fn is_same(a: &Lease, b: &Lease) -> bool {
    a.attrs == b.attrs && a.subnets == b.subnets
}
