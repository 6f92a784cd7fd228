//! The own lease over time: when to renew it, and when it is lost.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::lease::{Lease, LeaseAttrs, Record};
use crate::overlay::LossPolicy;
use crate::overlay::backoff::{Backoff, Jitter};
use crate::overlay::status::LossReason;
use crate::subnet::{SubnetError, Want};

/// Something to ask of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoreCall {
    Renew(Arc<Lease>),
    Acquire(Want),
}

/// What came of an answer or a record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing that matters to others.
    Same,
    /// The lease was extended or published again.
    Renewed,
    /// Another lease than before.
    Replaced,
    /// It is not ours any more.
    Lost(LossReason),
}

#[derive(Debug)]
pub(crate) struct Tenure {
    lease: Arc<Lease>,
    policy: LossPolicy,
    lost: bool,
    busy: bool,
    /// Whether the store showed the own record while a call was under way: its answer may be older than that.
    recheck: bool,
    /// When to call the store next; `None` where nothing expires and nothing changed.
    due: Option<BootTime>,
    /// Attributes to publish that the store does not have yet.
    publish: Option<LeaseAttrs>,
    backoff: Backoff,
    jitter: Jitter,
}

impl Tenure {
    pub(crate) fn new(lease: Arc<Lease>, policy: LossPolicy, now: BootTime, jitter: Jitter) -> Self {
        let mut tenure = Self {
            due: None,
            lease,
            policy,
            lost: false,
            busy: false,
            recheck: false,
            publish: None,
            backoff: Backoff::new(jitter.clone()),
            jitter,
        };
        tenure.schedule(now);
        tenure
    }

    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Whether the store says that the lease is ours.
    pub(crate) fn is_held(&self) -> bool {
        !self.lost
    }

    pub(crate) fn deadline(&self) -> Option<BootTime> {
        let expiry = self.lease.expires.filter(|_| !self.lost);
        let due = self.due.filter(|_| !self.busy);
        [due, expiry].into_iter().flatten().min()
    }

    /// Publishes other attributes with the next call, which is now.
    pub(crate) fn publish(&mut self, attrs: LeaseAttrs, now: BootTime) {
        if attrs == self.lease.attrs {
            self.publish = None;
        } else {
            self.publish = Some(attrs);
            self.due = self.allowed(now);
        }
    }

    /// The lease ran out while the store was away: from then on it may be another's (faults.md, I3).
    pub(crate) fn expire(&mut self, now: BootTime) -> Outcome {
        match self.lease.expires {
            Some(expires) if expires <= now && !self.lost => self.lose(LossReason::Expired, now),
            _ => Outcome::Same,
        }
    }

    /// The call that is due, if one is; it is then under way until [`answered`](Self::answered).
    pub(crate) fn call(&mut self, now: BootTime) -> Option<StoreCall> {
        if self.busy || self.due.is_none_or(|due| due > now) {
            return None;
        }
        self.busy = true;
        let attrs = self.publish.clone().unwrap_or_else(|| self.lease.attrs.clone());
        Some(if self.lost {
            StoreCall::Acquire(Want { attrs, preferred: self.lease.subnets })
        } else {
            StoreCall::Renew(Arc::new(Lease { attrs, ..(*self.lease).clone() }))
        })
    }

    /// The store answered.
    pub(crate) fn answered(&mut self, answer: Result<Lease, SubnetError>, now: BootTime) -> (Outcome, Option<String>) {
        self.busy = false;
        match answer {
            Ok(lease) => {
                self.backoff.reset();
                if self.publish.as_ref() == Some(&lease.attrs) {
                    self.publish = None;
                }
                let replaced = self.lost || lease.subnets != self.lease.subnets || lease.key != self.lease.key;
                self.lost = false;
                self.lease = Arc::new(lease);
                self.schedule(now);
                if std::mem::take(&mut self.recheck) {
                    self.due = Some(now);
                }
                (if replaced { Outcome::Replaced } else { Outcome::Renewed }, None)
            }
            Err(SubnetError::Lost(reason)) if !self.lost => (self.lose(LossReason::Refused(reason), now), None),
            Err(error) => {
                let again = now.after(self.backoff.next());
                self.due = self.allowed(again);
                (Outcome::Same, Some(crate::overlay::chain(&error)))
            }
        }
    }

    /// The store showed the own record, or that there is none.
    pub(crate) fn own_record(&mut self, record: Option<&Record>, now: BootTime) -> Outcome {
        if self.busy {
            // The answer may have been given before this came about: ask once more then.
            let same = |record: &Record| record.lease.as_ref().is_ok_and(|seen| self.is_same(seen));
            self.recheck |= !record.is_some_and(same);
            return Outcome::Same;
        }
        if self.lost {
            return Outcome::Same;
        }
        let Some(record) = record else { return self.lose(LossReason::Deleted, now) };
        match &record.lease {
            Ok(seen) if seen.attrs.public_ip != self.lease.attrs.public_ip => self.lose(LossReason::Taken, now),
            Ok(seen) if seen.subnets != self.lease.subnets => {
                let subnets: Vec<_> = seen.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
                self.lose(LossReason::Refused(format!("the record now names {}", subnets.join(", "))), now)
            }
            Ok(seen) if seen.attrs == self.lease.attrs => {
                if seen.expires > self.lease.expires || seen.fence != self.lease.fence {
                    // A store that shows no expiry (etcd) does not say that there is none: ours goes on counting.
                    let expires = seen.expires.or(self.lease.expires);
                    self.lease = Arc::new(Lease { expires, ..(**seen).clone() });
                    self.schedule(now);
                }
                Outcome::Same
            }
            // Somebody edited our record: write it again, over what we have just read.
            Ok(seen) => {
                let attrs = self.lease.attrs.clone();
                self.lease = Arc::new(Lease { fence: seen.fence.clone(), ..(*self.lease).clone() });
                self.publish = Some(attrs);
                self.due = Some(now);
                Outcome::Same
            }
            Err(_) => self.lose(LossReason::Deleted, now),
        }
    }

    fn lose(&mut self, reason: LossReason, now: BootTime) -> Outcome {
        self.lost = true;
        self.due = self.allowed(now);
        Outcome::Lost(reason)
    }

    /// `due`, unless the lease is lost and the policy leaves it so.
    fn allowed(&self, due: BootTime) -> Option<BootTime> {
        match self.policy {
            LossPolicy::Reacquire => Some(due),
            LossPolicy::Keep | LossPolicy::Stop => Some(due).filter(|_| !self.lost),
        }
    }

    /// Whether a record says what we hold, expiry and fence apart; what we are about to publish counts too.
    fn is_same(&self, seen: &Lease) -> bool {
        let published = seen.attrs == self.lease.attrs || Some(&seen.attrs) == self.publish.as_ref();
        published && seen.subnets == self.lease.subnets
    }

    /// Renewal is due at half of what is left, so that half is left for a store that is away.
    fn schedule(&mut self, now: BootTime) {
        self.due = match (&self.publish, self.lease.expires) {
            (Some(_), _) => Some(now),
            (None, None) => None,
            (None, Some(expires)) => {
                let half = expires.since(now) / 2;
                Some(now.after(self.jitter.around(half).max(Duration::from_millis(100))))
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Fence, LeaseKey};
    use crate::net::Dual;

    fn at(secs: u64) -> BootTime {
        BootTime(Duration::from_secs(secs))
    }

    fn lease(expires: Option<u64>) -> Lease {
        Lease {
            key: LeaseKey::new("node-a"),
            subnets: Dual { v4: Some("10.5.1.0/24".parse().unwrap()), v6: None },
            attrs: LeaseAttrs {
                public_ip: Dual { v4: Some("192.0.2.1".parse().unwrap()), v6: None },
                ..LeaseAttrs::default()
            },
            expires: expires.map(at),
            fence: Fence::default(),
        }
    }

    fn tenure(expires: Option<u64>) -> Tenure {
        Tenure::new(Arc::new(lease(expires)), LossPolicy::Reacquire, at(0), Jitter::seeded(1))
    }

    #[test]
    fn a_lease_is_renewed_at_about_half_of_what_is_left() {
        let mut tenure = tenure(Some(120));
        assert_eq!(tenure.call(at(50)), None);
        assert!(matches!(tenure.call(at(67)), Some(StoreCall::Renew(_))));
        assert_eq!(tenure.call(at(67)), None, "one call at a time");
        assert_eq!(tenure.answered(Ok(lease(Some(187))), at(67)).0, Outcome::Renewed);
        assert_eq!(tenure.call(at(110)), None);
    }

    #[test]
    fn what_does_not_expire_is_not_renewed() {
        assert_eq!(tenure(None).deadline(), None);
    }

    #[test]
    fn after_the_deadline_there_is_no_renewal_but_a_new_acquisition() {
        let mut tenure = tenure(Some(120));
        assert_eq!(tenure.expire(at(119)), Outcome::Same);
        assert_eq!(tenure.expire(at(120)), Outcome::Lost(LossReason::Expired));
        let Some(StoreCall::Acquire(want)) = tenure.call(at(120)) else { panic!("no acquisition") };
        assert_eq!(want.preferred, lease(None).subnets);
    }

    #[test]
    fn an_edited_record_is_written_again_and_a_deleted_one_is_lost() {
        let mut held = tenure(None);
        let mut edited = lease(None);
        edited.attrs.backend_type = "vxlan".into();
        edited.fence = Fence(Some("7".into()));
        let record = Record { key: edited.key.clone(), created: 1, lease: Ok(Arc::new(edited)) };
        assert_eq!(held.own_record(Some(&record), at(1)), Outcome::Same);
        let Some(StoreCall::Renew(renewed)) = held.call(at(1)) else { panic!("no renewal") };
        assert_eq!((&renewed.attrs, &renewed.fence), (&lease(None).attrs, &Fence(Some("7".into()))));
        let mut held = tenure(None);
        assert_eq!(held.own_record(None, at(1)), Outcome::Lost(LossReason::Deleted));
        assert!(!held.is_held());
    }

    #[test]
    fn a_record_shown_without_expiry_does_not_end_renewal() {
        let mut held = tenure(Some(120));
        let touched = Lease { fence: Fence(Some("8".into())), ..lease(None) };
        let record = Record { key: touched.key.clone(), created: 1, lease: Ok(Arc::new(touched)) };
        assert_eq!(held.own_record(Some(&record), at(1)), Outcome::Same);
        let Some(StoreCall::Renew(renewed)) = held.call(at(70)) else { panic!("no renewal") };
        assert_eq!((renewed.expires, &renewed.fence), (Some(at(120)), &Fence(Some("8".into()))));
    }

    #[test]
    fn a_store_that_is_away_is_asked_with_back_off() {
        let mut tenure = tenure(Some(120));
        tenure.call(at(67)).unwrap();
        let away = SubnetError::Unavailable { doing: "renewing", source: "down".into() };
        let (outcome, error) = tenure.answered(Err(away), at(67));
        assert_eq!(outcome, Outcome::Same);
        assert!(error.unwrap().contains("down"));
        assert_eq!(tenure.call(at(67)), None);
        assert!(tenure.call(at(69)).is_some());
    }
}
