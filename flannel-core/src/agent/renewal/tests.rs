//! The renewal of a lease, call by call.

use super::*;
use crate::lease::Fence;
use crate::net::{Dual, Family};
use crate::testing::samples::{self, at};

fn lease(expires: Option<u64>) -> Lease {
    samples::lease(1, &[Family::V4], "").expiring(expires.map(at))
}

fn with_lease(expires: Option<u64>) -> Renewal {
    Renewal::new(Arc::new(lease(expires)), LossPolicy::Reacquire, KnownBy::Address, at(0), Jitter::seeded(1))
}

/// The lease of a named node.
fn named(policy: LossPolicy) -> Renewal {
    Renewal::new(Arc::new(lease(Some(120))), policy, KnownBy::Name, at(0), Jitter::seeded(1))
}

#[test]
fn a_lease_is_renewed_at_about_half_of_what_is_left() {
    let mut renewal = with_lease(Some(120));
    assert_eq!(renewal.call(at(50)), None);
    assert!(matches!(renewal.call(at(67)), Some(StoreCall::Renew(_))));
    assert_eq!(renewal.call(at(67)), None, "one call at a time");
    assert_eq!(renewal.answered(Ok(lease(Some(187))), at(67)).0, Outcome::Renewed);
    assert_eq!(renewal.call(at(110)), None);
}

#[test]
fn a_rival_does_not_make_a_short_lease_run_out() {
    let mut held = with_lease(Some(20));
    let mut edited = lease(Some(20));
    edited.attrs.backend_type = "theirs".into();
    for n in 0..8 {
        edited.fence = Fence::new(&n.to_string());
        assert_eq!(held.own_record(Some(&record(edited.clone())), Shown::Event, at(1)), Outcome::Same);
    }
    assert!(held.deadline().is_some_and(|due| due <= at(11)), "{:?}", held.deadline());
}

#[test]
fn what_does_not_expire_is_not_renewed() {
    assert_eq!(with_lease(None).deadline(), None);
}

#[test]
fn after_the_deadline_there_is_no_renewal_but_a_new_acquisition() {
    let mut renewal = with_lease(Some(120));
    assert_eq!(renewal.expire(at(119)), Outcome::Same);
    assert_eq!(renewal.expire(at(120)), Outcome::Lost(LossReason::Expired));
    let Some(StoreCall::Acquire(want)) = renewal.call(at(120)) else { panic!("no acquisition") };
    assert_eq!(want.preferred, lease(None).subnets);
}

#[test]
fn an_edited_record_is_written_again_and_a_deleted_one_is_lost() {
    let mut held = with_lease(None);
    let mut edited = lease(None);
    edited.attrs.backend_type = "vxlan".into();
    edited.fence = Fence::new("7");
    assert_eq!(held.own_record(Some(&record(edited)), Shown::Event, at(1)), Outcome::Same);
    let Some(StoreCall::Renew(renewed)) = held.call(at(1)) else { panic!("no renewal") };
    assert_eq!((&renewed.attrs, &renewed.fence), (&lease(None).attrs, &Fence::new("7")));
    let mut held = with_lease(None);
    assert_eq!(held.own_record(None, Shown::Event, at(1)), Outcome::Lost(LossReason::Deleted));
    assert!(!held.is_held());
}

#[test]
fn a_record_shown_without_expiry_does_not_end_renewal() {
    let mut held = with_lease(Some(120));
    let touched = Lease { fence: Fence::new("8"), ..lease(None) };
    assert_eq!(held.own_record(Some(&record(touched)), Shown::Event, at(1)), Outcome::Same);
    let Some(StoreCall::Renew(renewed)) = held.call(at(70)) else { panic!("no renewal") };
    assert_eq!((renewed.expires, &renewed.fence), (Some(at(120)), &Fence::new("8")));
}

#[test]
fn a_store_that_is_away_is_asked_with_back_off() {
    let mut renewal = with_lease(Some(120));
    renewal.call(at(67)).unwrap();
    let away = SubnetError::Unavailable { doing: "renewing", source: "down".into() };
    let (outcome, error) = renewal.answered(Err(away), at(67));
    assert_eq!(outcome, Outcome::Same);
    assert!(crate::text::chain(&error.unwrap()).contains("down"));
    assert_eq!(renewal.call(at(67)), None);
    assert!(renewal.call(at(69)).is_some());
}

fn record(lease: Lease) -> Record {
    Record::of(lease, 1)
}

fn fenced(fence: &str) -> Lease {
    Lease { fence: Fence::new(fence), ..lease(None) }
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
fn calls(renewal: &mut Renewal, answer: Lease, rival: impl Fn(&mut Renewal, BootTime)) -> Vec<u128> {
    let mut times = Vec::new();
    let mut now = at(0);
    rival(renewal, now);
    while now < at(120) && times.len() < 1000 {
        renewal.expire(now);
        if renewal.call(now).is_some() {
            times.push(now.0.as_millis());
            assert!(renewal.answered(Ok(answer.clone()), now).1.is_none());
            rival(renewal, now);
        }
        now = renewal.deadline().map_or(at(120), |deadline| deadline.max(now));
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
    let mut held = with_lease(None);
    let times = calls(&mut held, lease(None), |held, now| {
        assert_eq!(held.own_record(Some(&taken()), Shown::Event, now), Outcome::Lost(LossReason::Taken));
    });
    assert_spaced(&times);
    let contended = held.contended().unwrap();
    assert_eq!(contended.times as usize, times.len());
    assert!(contended.next.is_some_and(|next| next > at(110)), "{contended:?}");
}

#[test]
fn a_record_that_a_rival_keeps_editing_is_written_ever_later() {
    let mut held = with_lease(None);
    let times = calls(&mut held, lease(None), |held, now| {
        for fence in ["7", "8", "9"] {
            assert_eq!(held.own_record(Some(&record(edited(fence))), Shown::Event, now), Outcome::Same);
        }
    });
    assert_spaced(&times);
}

#[test]
fn a_record_that_a_rival_edits_while_it_is_being_written_is_written_ever_later() {
    let mut held = with_lease(None);
    let mut times = Vec::new();
    held.own_record(Some(&record(edited("7"))), Shown::Event, at(0));
    while let Some(now) = held.deadline().filter(|due| *due < at(120) && times.len() < 1000) {
        held.call(now).unwrap();
        times.push(now.0.as_millis());
        held.own_record(Some(&record(edited("7"))), Shown::Event, now);
        held.answered(Ok(lease(None)), now);
    }
    assert_spaced(&times);
}

#[test]
fn a_lease_that_has_run_out_when_it_is_given_is_asked_for_ever_later() {
    for life in [0, 1, 150, 900] {
        let mut held = with_lease(None);
        let mut times = Vec::new();
        let mut now = at(100);
        held.own_record(None, Shown::Event, now);
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
    let mut held = with_lease(None);
    held.publish(edited("").attrs, at(0));
    let times = calls(&mut held, lease(None), |_, _| {});
    // The first call is due to the host, not to the rival.
    assert_spaced(&times[1..]);
}

#[test]
fn a_lease_that_stood_for_half_a_minute_is_taken_back_at_once() {
    let mut held = with_lease(None);
    for now in [at(100), at(131)] {
        held.expire(now);
        held.own_record(None, Shown::Event, now);
        assert!(matches!(held.call(now), Some(StoreCall::Acquire(_))), "at once");
        held.answered(Ok(lease(None)), now);
        assert_eq!(held.contended(), None, "a deleted record is nobody's contention");
    }
    assert_eq!(held.deadline(), Some(at(161)), "to forget the loss");
    held.expire(at(161));
    assert_eq!((held.contended(), held.deadline()), (None, None));
}

#[test]
fn another_agent_that_publishes_the_same_is_noticed_and_answered() {
    let mut held = with_lease(None);
    assert_eq!(held.own_record(Some(&record(fenced("1"))), Shown::Event, at(1)), Outcome::Same);
    let Some(StoreCall::Renew(renewed)) = held.call(at(1)) else { panic!("no answer") };
    assert_eq!((&renewed.attrs, &renewed.fence), (&lease(None).attrs, &Fence::new("1")));
    assert_eq!(held.contended().map(|contended| contended.times), Some(1));
    held.answered(Ok(fenced("2")), at(1));
    // The other agent does the same.
    held.own_record(Some(&record(fenced("2"))), Shown::Event, at(1));
    held.own_record(Some(&record(fenced("3"))), Shown::Event, at(1));
    assert!(held.contended().unwrap().next.is_some_and(|next| next > at(1)), "{:?}", held.contended());
    // A list may be that of a restored store, or show what a former run wrote: the record is written once more.
    let mut held = with_lease(None);
    held.own_record(Some(&record(fenced("1"))), Shown::List, at(1));
    assert!(matches!(held.call(at(1)), Some(StoreCall::Renew(_))) && held.contended().is_none());
    // In a store that knows nodes by name, it is this node's own record in any case.
    let mut held = named(LossPolicy::Reacquire);
    held.own_record(Some(&record(fenced("1"))), Shown::Event, at(1));
    assert_eq!((held.call(at(1)), held.contended()), (None, None));
}

#[test]
fn a_renewal_of_a_lease_that_is_gone_is_no_rivals() {
    let mut held = with_lease(Some(120));
    held.call(at(67)).unwrap();
    let (outcome, _) = held.answered(Err(SubnetError::Lost("the record is gone".to_owned())), at(67));
    assert!(matches!(outcome, Outcome::Lost(LossReason::Refused(_))));
    assert!(matches!(held.call(at(67)), Some(StoreCall::Acquire(_))) && held.contended().is_none());
}

#[test]
fn an_own_renewal_whose_reply_was_lost_is_no_rivals() {
    let mut held = with_lease(Some(120));
    held.call(at(67)).unwrap();
    held.answered(Err(SubnetError::Unavailable { doing: "renewing", source: "cut".into() }), at(67));
    held.own_record(Some(&record(fenced("9"))), Shown::Event, at(67));
    held.expire(at(100));
    assert_eq!((held.contended(), &held.lease().fence), (None, &Fence::new("9")));
}

#[test]
fn renewals_do_not_put_off_the_peace() {
    let mut held = with_lease(Some(120));
    held.own_record(None, Shown::Event, at(1));
    for now in [1, 10, 20, 30, 31] {
        held.publish(edited("").attrs, at(now));
        held.expire(at(now));
        held.call(at(now)).unwrap();
        held.answered(Ok(Lease { attrs: edited("").attrs, ..lease(Some(200)) }), at(now));
        held.publish(lease(None).attrs, at(now));
    }
    assert_eq!(held.contended(), None);
}

#[test]
fn what_the_host_publishes_does_not_undercut_the_waits() {
    let mut held = with_lease(None);
    held.own_record(None, Shown::Event, at(1));
    held.call(at(1)).unwrap();
    let away = SubnetError::Unavailable { doing: "acquiring", source: "down".into() };
    held.answered(Err(away), at(1));
    held.publish(edited("").attrs, at(1));
    assert_eq!(held.call(at(1)), None);
    assert!(held.call(at(3)).is_some());
}

#[test]
fn a_late_record_does_not_undo_what_was_written_since() {
    let mut held = with_lease(None);
    let other = LeaseAttrs { backend_type: "published".into(), ..lease(None).attrs };
    held.publish(other.clone(), at(1));
    held.call(at(1)).unwrap();
    held.answered(Ok(Lease { attrs: other.clone(), ..fenced("9") }), at(1));
    // The same with an older fence, which the store would refuse.
    let late = Lease { attrs: other.clone(), ..fenced("8") };
    held.own_record(Some(&record(late)), Shown::Event, at(2));
    assert_eq!((&held.lease().fence, held.deadline()), (&Fence::new("9"), None));
    // A different record may be older or newer: only the store can tell.
    for seen in [Some(record(fenced("7"))), Some(taken()), None] {
        assert_eq!(held.own_record(seen.as_ref(), Shown::Event, at(2)), Outcome::Same);
        assert!(held.is_held() && held.deadline() == Some(at(2)));
    }
    // Once this node's write is shown, the other record is known to be older.
    held.own_record(Some(&record(Lease { attrs: other, ..fenced("9") })), Shown::Event, at(2));
    assert_eq!((held.deadline(), held.contended()), (None, None));
    // From then on every record is newer.
    assert_eq!(held.own_record(Some(&taken()), Shown::Event, at(3)), Outcome::Lost(LossReason::Taken));
}

#[test]
fn an_earlier_own_write_that_is_shown_late_is_no_rivals_where_the_fence_stays() {
    let mut held = with_lease(None);
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
    assert_eq!(held.own_record(Some(&record(at_address(7))), Shown::Event, at(1)), Outcome::Same);
    assert_eq!(held.own_record(Some(&record(at_address(8))), Shown::Event, at(1)), Outcome::Same);
    assert!(held.is_held() && held.contended().is_none());
    assert_eq!(held.own_record(Some(&record(at_address(9))), Shown::Event, at(2)), Outcome::Lost(LossReason::Taken));
}

#[test]
fn what_came_of_an_own_acquisition_is_no_contention() {
    let mut held = with_lease(None);
    held.own_record(None, Shown::Event, at(1));
    held.call(at(1)).unwrap();
    let subnets = Dual { v4: Some("10.5.2.0/24".parse().unwrap()), v6: None };
    let other = Lease { subnets, ..fenced("9") };
    assert_eq!(held.own_record(None, Shown::Event, at(1)), Outcome::Same);
    assert_eq!(held.own_record(Some(&record(other.clone())), Shown::Event, at(1)), Outcome::Same);
    assert_eq!(held.answered(Ok(other), at(1)).0, Outcome::Replaced);
    assert_eq!(held.call(at(10)), None);
}

#[test]
fn what_is_published_while_a_call_is_under_way_is_not_forgotten() {
    let mut held = with_lease(None);
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
    let mut held = with_lease(None);
    let mut moved = held.lease().attrs.clone();
    moved.public_ip.v4 = Some("192.0.2.77".parse().unwrap());
    held.publish(moved.clone(), at(1));
    held.call(at(1)).unwrap();
    held.answered(Err(SubnetError::Unavailable { doing: "renewing", source: "cut".into() }), at(1));
    let own = record(Lease { attrs: moved.clone(), ..fenced("9") });
    assert_eq!(held.own_record(Some(&own), Shown::Event, at(1)), Outcome::Renewed);
    assert_eq!((&held.lease().attrs, held.contended()), (&moved, None));
}

/// Changes by other programs to the record of a named node, and how the record is then written again.
#[test]
fn the_record_of_a_named_node_is_written_again_and_the_lease_kept() {
    let own = lease(Some(120));
    let damaged = Record { lease: Err(Box::new(BadRecord::new("not JSON", Dual::default()))), ..record(own.clone()) };
    for (what, shown, acquires) in [
        ("removed", None, true),
        ("damaged", Some(damaged), true),
        ("edited", Some(record(edited("7"))), false),
        ("edited to say another address", Some(taken()), false),
    ] {
        for policy in [LossPolicy::Reacquire, LossPolicy::Keep, LossPolicy::Stop] {
            let mut held = named(policy);
            assert_eq!(held.own_record(shown.as_ref(), Shown::Event, at(1)), Outcome::Same, "{what}");
            match held.call(at(1)).expect(what) {
                StoreCall::Acquire(want) => {
                    assert!(acquires, "{what}");
                    assert_eq!((&want.attrs, want.preferred), (&own.attrs, own.subnets), "{what}");
                }
                StoreCall::Renew(call) => {
                    assert!(!acquires, "{what}");
                    let read = shown.as_ref().and_then(|record| record.lease.as_ref().ok()).expect(what);
                    assert_eq!((&call.attrs, &call.fence), (&own.attrs, &read.fence), "{what}");
                }
            }
            let written = Lease { expires: Some(at(121)), ..fenced("8") };
            assert_eq!(held.answered(Ok(written.clone()), at(1)).0, Outcome::Renewed, "{what}");
            assert_eq!(held.own_record(Some(&record(written)), Shown::Event, at(1)), Outcome::Same, "{what}");
            assert!(held.is_held() && held.call(at(30)).is_none(), "{what}");
        }
    }
}

#[test]
fn a_named_node_whose_subnets_were_taken_meanwhile_follows_its_policy() {
    let mut elsewhere = lease(Some(120));
    elsewhere.subnets.v4 = Some("10.5.2.0/24".parse().unwrap());
    for (policy, outcome) in [
        (LossPolicy::Reacquire, Outcome::Replaced),
        (LossPolicy::Stop, Outcome::Lost(LossReason::Refused("another node has its subnets".into()))),
    ] {
        let mut held = named(policy);
        held.own_record(None, Shown::Event, at(1));
        held.call(at(1)).unwrap();
        assert_eq!(held.answered(Ok(elsewhere.clone()), at(1)).0, outcome);
    }
}

#[test]
fn a_named_nodes_record_is_written_again_also_where_the_renewal_hears_of_it_first() {
    let mut held = named(LossPolicy::Stop);
    held.call(at(67)).unwrap();
    let (outcome, error) = held.answered(Err(SubnetError::Lost("no record".into())), at(67));
    assert_eq!((outcome, error.is_none(), held.is_held()), (Outcome::Same, true, true));
    assert!(matches!(held.call(at(67)), Some(StoreCall::Acquire(_))));
    let written = Lease { expires: Some(at(187)), ..fenced("8") };
    assert_eq!(held.answered(Ok(written), at(67)).0, Outcome::Renewed);
}

#[test]
fn a_named_nodes_record_that_goes_while_it_is_renewed_is_written_again() {
    let refused = || Err(SubnetError::Lost("no record".into()));
    for answer in [refused(), Ok(fenced("8"))] {
        let mut held = named(LossPolicy::Reacquire);
        held.call(at(67)).unwrap();
        assert_eq!(held.own_record(None, Shown::Event, at(68)), Outcome::Same);
        let (outcome, error) = held.answered(answer, at(68));
        assert!(matches!(outcome, Outcome::Same | Outcome::Renewed), "{outcome:?}");
        assert!(error.is_none() && held.is_held());
        assert!(matches!(held.call(at(69)), Some(StoreCall::Acquire(_))));
    }
}

#[test]
fn a_named_nodes_record_that_is_kept_from_it_is_written_ever_later() {
    let mut held = Renewal::new(Arc::new(lease(None)), LossPolicy::Reacquire, KnownBy::Name, at(0), Jitter::seeded(1));
    let times = calls(&mut held, lease(None), |held, now| {
        held.own_record(None, Shown::Event, now);
    });
    assert_spaced(&times);
}
