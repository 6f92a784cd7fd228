//! The own lease over time: when to renew it, and when it is lost.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::lease::{BadRecord, Lease, LeaseAttrs, Record};
use crate::overlay::LossPolicy;
use crate::overlay::backoff::{Backoff, Jitter};
use crate::overlay::challenge::Challenges;
use crate::overlay::status::{Challenged, LossReason};
use crate::subnet::{SubnetError, Want};

/// Renewals are at least so far apart, however short a store's leases are.
const SHORTEST: Duration = Duration::from_secs(1);

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
    /// What the call under way is to publish.
    asked: Option<LeaseAttrs>,
    /// How the store last showed the own record while a call was under way: its answer may be older than that.
    shown: Option<Option<Arc<Lease>>>,
    /// Whether the store has yet to show our last write: what it shows before that may be older.
    unseen: bool,
    /// When to call the store next; `None` where nothing expires and nothing changed.
    due: Option<BootTime>,
    /// The next call comes no earlier: one failed, or the record is challenged.
    not_before: BootTime,
    /// Attributes to publish that the store does not have yet.
    publish: Option<LeaseAttrs>,
    challenges: Challenges,
    backoff: Backoff,
    jitter: Jitter,
}

impl Tenure {
    pub(crate) fn new(lease: Arc<Lease>, policy: LossPolicy, now: BootTime, jitter: Jitter) -> Self {
        let mut tenure = Self {
            due: None,
            not_before: now,
            lease,
            policy,
            lost: false,
            asked: None,
            shown: None,
            unseen: false,
            publish: None,
            challenges: Challenges::new(jitter.clone()),
            backoff: Backoff::new(jitter.clone()),
            jitter,
        };
        tenure.challenges.stand(now);
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

    /// Who else is at the record, for the status.
    pub(crate) fn challenged(&self) -> Option<Challenged> {
        self.challenges.show(self.due)
    }

    pub(crate) fn deadline(&self) -> Option<BootTime> {
        let expiry = self.lease.expires.filter(|_| !self.lost);
        let due = self.due.filter(|_| self.asked.is_none());
        [due, expiry, self.challenges.calms()].into_iter().flatten().min()
    }

    /// Publishes other attributes with the next call, which is now unless the store is being waited for.
    pub(crate) fn publish(&mut self, attrs: LeaseAttrs, now: BootTime) {
        // What a call under way writes is not known yet: the store may come to hold that.
        if attrs == self.lease.attrs && self.asked.is_none() {
            self.publish = None;
        } else {
            self.publish = Some(attrs);
            self.due = self.allowed(self.not_before.max(now));
        }
    }

    /// The lease ran out while the store was away: from then on it may be another's (faults.md, I3).
    pub(crate) fn expire(&mut self, now: BootTime) -> Outcome {
        self.challenges.calm(now);
        match self.lease.expires {
            Some(expires) if expires <= now && !self.lost => self.lose(LossReason::Expired, now),
            _ => Outcome::Same,
        }
    }

    /// The call that is due, if one is; it is then under way until [`answered`](Self::answered).
    pub(crate) fn call(&mut self, now: BootTime) -> Option<StoreCall> {
        if self.asked.is_some() || self.due.is_none_or(|due| due > now) {
            return None;
        }
        let attrs = self.publish.clone().unwrap_or_else(|| self.lease.attrs.clone());
        self.asked = Some(attrs.clone());
        self.challenges.call(now);
        Some(if self.lost {
            StoreCall::Acquire(Want { attrs, preferred: self.lease.subnets })
        } else {
            StoreCall::Renew(Arc::new(Lease { attrs, ..(*self.lease).clone() }))
        })
    }

    /// The store answered.
    pub(crate) fn answered(&mut self, answer: Result<Lease, SubnetError>, now: BootTime) -> (Outcome, Option<String>) {
        let (asked, shown) = (self.asked.take(), self.shown.take());
        match answer {
            Ok(lease) => (self.given(lease, asked, shown, now), None),
            Err(SubnetError::Lost(reason)) if !self.lost => (self.lose(LossReason::Refused(reason), now), None),
            Err(error) => {
                // Whatever was shown meanwhile, the next call will tell.
                self.not_before = now.after(self.backoff.next());
                self.due = self.allowed(self.not_before);
                (Outcome::Same, Some(crate::overlay::chain(&error)))
            }
        }
    }

    /// A list that lacks records lacks the own one: it may be there.
    pub(crate) fn not_listed(&mut self, now: BootTime) -> Outcome {
        if self.unseen && self.asked.is_none() && !self.lost {
            self.ask(now);
        }
        Outcome::Same
    }

    /// The store showed the own record, or that there is none.
    pub(crate) fn own_record(&mut self, record: Option<&Record>, now: BootTime) -> Outcome {
        let seen = record.and_then(|record| record.lease.as_ref().ok());
        if self.asked.is_some() {
            self.shown = Some(seen.cloned());
            return Outcome::Same;
        }
        if self.lost {
            return Outcome::Same;
        }
        if self.unseen && seen.is_some_and(|seen| is_shown(seen, &self.lease)) {
            self.unseen = false;
            if self.challenges.withdraw() {
                self.schedule(now);
            }
        }
        if self.unseen {
            if !seen.is_some_and(|seen| is_same(seen, &self.lease)) {
                self.ask(now);
            }
            return Outcome::Same;
        }
        let Some(seen) = seen else {
            let damage = record.and_then(|record| record.lease.as_ref().err());
            let damaged = |bad: &BadRecord| LossReason::Refused(format!("its record is damaged: {}", bad.reason));
            return self.lose(damage.map_or(LossReason::Deleted, |bad| damaged(bad)), now);
        };
        if self.publish.as_ref() == Some(&seen.attrs) && seen.subnets == self.lease.subnets {
            // Our own write, whose reply was lost.
            let expires = seen.expires.or(self.lease.expires);
            self.lease = Arc::new(Lease { expires, ..(**seen).clone() });
            self.publish = None;
            self.schedule(now);
            return Outcome::Renewed;
        }
        match seen {
            seen if seen.attrs.public_ip != self.lease.attrs.public_ip => self.lose(LossReason::Taken, now),
            seen if seen.subnets != self.lease.subnets => {
                let subnets: Vec<_> = seen.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
                self.lose(LossReason::Refused(format!("the record now names {}", subnets.join(", "))), now)
            }
            seen if seen.attrs == self.lease.attrs => {
                if seen.expires > self.lease.expires || seen.fence != self.lease.fence {
                    // A store that shows no expiry (etcd) does not say that there is none: ours goes on counting.
                    let expires = seen.expires.or(self.lease.expires);
                    self.lease = Arc::new(Lease { expires, ..(**seen).clone() });
                    self.schedule(now);
                }
                Outcome::Same
            }
            // Somebody edited our record: write it again, over what we have just read.
            seen => {
                self.publish.get_or_insert_with(|| self.lease.attrs.clone());
                self.lease = Arc::new(Lease { fence: seen.fence.clone(), ..(*self.lease).clone() });
                self.ask(now);
                Outcome::Same
            }
        }
    }

    /// The lease as the store gave it.
    fn given(
        &mut self,
        lease: Lease,
        asked: Option<LeaseAttrs>,
        shown: Option<Option<Arc<Lease>>>,
        now: BootTime,
    ) -> Outcome {
        self.backoff.reset();
        self.challenges.stand(now);
        let confirmed = matches!(&shown, Some(Some(seen)) if is_shown(seen, &lease));
        self.unseen = !confirmed && (self.unseen || !is_shown(&self.lease, &lease));
        // It may have been shown what was there before, or what is there now. All else may be newer than the answer.
        let doubtful =
            shown.is_some_and(|seen| !seen.is_some_and(|seen| is_same(&seen, &lease) || is_same(&seen, &self.lease)));
        if self.publish.as_ref() == Some(&lease.attrs) {
            self.publish = None;
        }
        let ignored = self.publish.is_some() && self.publish == asked;
        let replaced = self.lost || lease.subnets != self.lease.subnets || lease.key != self.lease.key;
        self.lost = false;
        self.lease = Arc::new(lease);
        self.schedule(now);
        if doubtful || ignored {
            self.ask(now);
        }
        if replaced { Outcome::Replaced } else { Outcome::Renewed }
    }

    fn lose(&mut self, reason: LossReason, now: BootTime) -> Outcome {
        self.lost = true;
        self.ask(now);
        Outcome::Lost(reason)
    }

    /// Somebody was at the record, or seems to have been: the store has to say whether it is ours.
    fn ask(&mut self, now: BootTime) {
        self.not_before = self.not_before.max(self.challenges.raise(now));
        // A rival must not keep us from renewing in time what is still ours.
        let half = self.lease.expires.filter(|_| !self.lost).map(|expires| now.after(expires.since(now) / 2));
        self.due = self.allowed(half.map_or(self.not_before, |half| half.min(self.not_before)));
    }

    /// `due`, unless the lease is lost and the policy leaves it so.
    fn allowed(&self, due: BootTime) -> Option<BootTime> {
        match self.policy {
            LossPolicy::Reacquire => Some(due),
            LossPolicy::Keep | LossPolicy::Stop => Some(due).filter(|_| !self.lost),
        }
    }

    /// Renewal is due at half of what is left, so that half is left for a store that is away.
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

/// Whether what the store shows is what was written. A fence alone does not tell where it stays the same over writes.
fn is_shown(seen: &Lease, written: &Lease) -> bool {
    seen.fence == written.fence && is_same(seen, written)
}

/// Whether two leases say the same, expiry and fence apart.
fn is_same(a: &Lease, b: &Lease) -> bool {
    a.attrs == b.attrs && a.subnets == b.subnets
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
    fn a_rival_does_not_make_a_short_lease_run_out() {
        let mut held = tenure(Some(20));
        let mut edited = lease(Some(20));
        edited.attrs.backend_type = "theirs".into();
        for n in 0..8 {
            edited.fence = Fence(Some(n.to_string().into()));
            let record = Record { key: edited.key.clone(), created: 1, lease: Ok(Arc::new(edited.clone())) };
            assert_eq!(held.own_record(Some(&record), at(1)), Outcome::Same);
        }
        assert!(held.deadline().is_some_and(|due| due <= at(11)), "{:?}", held.deadline());
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

    fn record(lease: Lease) -> Record {
        Record { key: lease.key.clone(), created: 1, lease: Ok(Arc::new(lease)) }
    }

    fn fenced(fence: &str) -> Lease {
        Lease { fence: Fence(Some(fence.into())), ..lease(None) }
    }

    fn edited(fence: &str) -> Lease {
        let mut lease = fenced(fence);
        lease.attrs.backend_type = "another".into();
        lease
    }

    fn taken() -> Record {
        let mut lease = fenced("another's");
        lease.attrs.public_ip.v4 = Some("192.0.2.9".parse().unwrap());
        record(lease)
    }

    /// The times, in milliseconds, of the calls in two minutes in which `rival` acts as soon as each was answered.
    fn calls(tenure: &mut Tenure, answer: Lease, rival: impl Fn(&mut Tenure, BootTime)) -> Vec<u128> {
        let mut times = Vec::new();
        let mut now = at(0);
        rival(tenure, now);
        while now < at(120) && times.len() < 1000 {
            tenure.expire(now);
            if tenure.call(now).is_some() {
                times.push(now.0.as_millis());
                assert!(tenure.answered(Ok(answer.clone()), now).1.is_none());
                rival(tenure, now);
            }
            now = tenure.deadline().map_or(at(120), |deadline| deadline.max(now));
        }
        times
    }

    fn assert_spaced(times: &[u128]) {
        assert_eq!(times.first(), Some(&0), "the first answer comes at once");
        assert!((9..=13).contains(&times.len()), "{times:?}");
        let waits: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(waits[0] >= 900 && waits.iter().skip(5).all(|wait| *wait >= 14_400), "{waits:?}");
    }

    #[test]
    fn a_lease_that_a_rival_keeps_taking_is_taken_back_ever_later() {
        let mut held = tenure(None);
        let times = calls(&mut held, lease(None), |held, now| {
            assert_eq!(held.own_record(Some(&taken()), now), Outcome::Lost(LossReason::Taken));
        });
        assert_spaced(&times);
        let challenged = held.challenged().unwrap();
        assert_eq!(challenged.times as usize, times.len());
        assert!(challenged.next.is_some_and(|next| next > at(110)), "{challenged:?}");
    }

    #[test]
    fn a_record_that_a_rival_keeps_editing_is_written_ever_later() {
        let mut held = tenure(None);
        let times = calls(&mut held, lease(None), |held, now| {
            for fence in ["7", "8", "9"] {
                assert_eq!(held.own_record(Some(&record(edited(fence))), now), Outcome::Same);
            }
        });
        assert_spaced(&times);
    }

    #[test]
    fn a_record_that_a_rival_edits_while_it_is_being_written_is_written_ever_later() {
        let mut held = tenure(None);
        let mut times = Vec::new();
        held.own_record(Some(&record(edited("7"))), at(0));
        while let Some(now) = held.deadline().filter(|due| *due < at(120) && times.len() < 1000) {
            held.call(now).unwrap();
            times.push(now.0.as_millis());
            held.own_record(Some(&record(edited("7"))), now);
            held.answered(Ok(lease(None)), now);
        }
        assert_spaced(&times);
    }

    #[test]
    fn a_lease_that_has_run_out_when_it_is_given_is_asked_for_ever_later() {
        for life in [0, 1, 150, 900] {
            let mut held = tenure(None);
            let mut times = Vec::new();
            let mut now = at(100);
            held.own_record(None, now);
            while now < at(220) && times.len() < 1000 {
                held.expire(now);
                if held.call(now).is_some() {
                    times.push(now.0.as_millis() - 100_000);
                    let expires = Some(now.after(Duration::from_millis(life)));
                    held.answered(Ok(Lease { expires, ..lease(None) }), now);
                }
                now = held.deadline().unwrap();
            }
            assert_spaced(&times);
        }
    }

    #[test]
    fn a_store_that_publishes_something_else_is_asked_ever_later() {
        let mut held = tenure(None);
        held.publish(edited("").attrs, at(0));
        let times = calls(&mut held, lease(None), |_, _| {});
        // The first call was the host's.
        assert_spaced(&times[1..]);
    }

    #[test]
    fn a_lease_that_stood_for_half_a_minute_is_taken_back_at_once() {
        let mut held = tenure(None);
        for now in [at(100), at(131)] {
            held.expire(now);
            held.own_record(None, now);
            assert!(matches!(held.call(now), Some(StoreCall::Acquire(_))), "at once");
            held.answered(Ok(lease(None)), now);
            assert_eq!(held.challenged().map(|challenged| (challenged.times, challenged.next)), Some((1, None)));
        }
        assert_eq!(held.deadline(), Some(at(161)), "to say that all is quiet");
        held.expire(at(161));
        assert_eq!((held.challenged(), held.deadline()), (None, None));
    }

    #[test]
    fn renewals_do_not_put_off_the_peace() {
        let mut held = tenure(Some(120));
        held.own_record(None, at(1));
        for now in [1, 10, 20, 30, 31] {
            held.publish(edited("").attrs, at(now));
            held.expire(at(now));
            held.call(at(now)).unwrap();
            held.answered(Ok(Lease { attrs: edited("").attrs, ..lease(Some(200)) }), at(now));
            held.publish(lease(None).attrs, at(now));
        }
        assert_eq!(held.challenged(), None);
    }

    #[test]
    fn what_the_host_publishes_does_not_undercut_the_waits() {
        let mut held = tenure(None);
        held.own_record(None, at(1));
        held.call(at(1)).unwrap();
        let away = SubnetError::Unavailable { doing: "acquiring", source: "down".into() };
        held.answered(Err(away), at(1));
        held.publish(edited("").attrs, at(1));
        assert_eq!(held.call(at(1)), None);
        assert!(held.call(at(3)).is_some());
    }

    #[test]
    fn a_late_record_does_not_undo_what_was_written_since() {
        let mut held = tenure(None);
        let other = LeaseAttrs { backend_type: "published".into(), ..lease(None).attrs };
        held.publish(other.clone(), at(1));
        held.call(at(1)).unwrap();
        held.answered(Ok(Lease { attrs: other.clone(), ..fenced("9") }), at(1));
        // The same with an older fence, which the store would refuse.
        let late = Lease { attrs: other.clone(), ..fenced("8") };
        held.own_record(Some(&record(late)), at(2));
        assert_eq!((&held.lease().fence, held.deadline()), (&Fence(Some("9".into())), None));
        // What differs may be older or newer: only the store can tell.
        for seen in [Some(record(fenced("7"))), Some(taken()), None] {
            assert_eq!(held.own_record(seen.as_ref(), at(2)), Outcome::Same);
            assert!(held.is_held() && held.deadline() == Some(at(2)));
        }
        // Once our own is shown it was older.
        held.own_record(Some(&record(Lease { attrs: other, ..fenced("9") })), at(2));
        assert_eq!((held.deadline(), held.challenged()), (None, None));
        // From then on all is newer.
        assert_eq!(held.own_record(Some(&taken()), at(3)), Outcome::Lost(LossReason::Taken));
    }

    #[test]
    fn an_earlier_own_write_that_is_shown_late_is_no_rivals_where_the_fence_stays() {
        let mut held = tenure(None);
        let at_address = |n: u8| {
            let mut lease = lease(None);
            lease.attrs.public_ip.v4 = Some([192, 0, 2, n].into());
            lease
        };
        for n in [7, 8] {
            held.publish(at_address(n).attrs, at(1));
            held.call(at(1)).unwrap();
            assert_eq!(held.answered(Ok(at_address(n)), at(1)).0, Outcome::Renewed);
        }
        assert_eq!(held.own_record(Some(&record(at_address(7))), at(1)), Outcome::Same);
        assert_eq!(held.own_record(Some(&record(at_address(8))), at(1)), Outcome::Same);
        assert!(held.is_held() && held.challenged().is_none());
        assert_eq!(held.own_record(Some(&record(at_address(9))), at(2)), Outcome::Lost(LossReason::Taken));
    }

    #[test]
    fn what_came_of_an_own_acquisition_is_no_challenge() {
        let mut held = tenure(None);
        held.own_record(None, at(1));
        held.call(at(1)).unwrap();
        let subnets = Dual { v4: Some("10.5.2.0/24".parse().unwrap()), v6: None };
        let other = Lease { subnets, ..fenced("9") };
        assert_eq!(held.own_record(None, at(1)), Outcome::Same);
        assert_eq!(held.own_record(Some(&record(other.clone())), at(1)), Outcome::Same);
        assert_eq!(held.answered(Ok(other), at(1)).0, Outcome::Replaced);
        assert_eq!(held.call(at(10)), None);
    }

    #[test]
    fn what_is_published_while_a_call_is_under_way_is_not_forgotten() {
        let mut held = tenure(None);
        let here = held.lease().attrs.clone();
        let there = LeaseAttrs { backend_type: "b".into(), ..here.clone() };
        held.publish(there.clone(), at(1));
        held.call(at(1)).unwrap();
        held.publish(here.clone(), at(1));
        held.answered(Ok(Lease { attrs: there, ..fenced("9") }), at(1));
        assert!(matches!(held.call(at(3)), Some(StoreCall::Renew(lease)) if lease.attrs == here));
    }

    #[test]
    fn an_own_write_whose_reply_was_lost_is_no_rivals() {
        let mut held = tenure(None);
        let mut moved = held.lease().attrs.clone();
        moved.public_ip.v4 = Some("192.0.2.77".parse().unwrap());
        held.publish(moved.clone(), at(1));
        held.call(at(1)).unwrap();
        held.answered(Err(SubnetError::Unavailable { doing: "renewing", source: "cut".into() }), at(1));
        let own = record(Lease { attrs: moved.clone(), ..fenced("9") });
        assert_eq!(held.own_record(Some(&own), at(1)), Outcome::Renewed);
        assert_eq!((&held.lease().attrs, held.challenged()), (&moved, None));
    }
}
