//! What is cached of the own lease.

use super::*;
use crate::known::Changed;

fn moved(lease: &Lease, fence: &str) -> Lease {
    let public_ip = Dual { v4: Some("192.0.2.77".parse().unwrap()), v6: None };
    let mut lease = lease.clone().fenced(Fence::new(fence));
    lease.attrs.public_ip = public_ip;
    lease
}

fn shown(lease: &Lease) -> LeaseEvent {
    LeaseEvent::Upsert(Record::of(lease.clone(), 1))
}

#[test]
fn a_change_of_address_leaves_the_own_lease_known() {
    let mut known = held(None);
    let Own::Held(_, before) = known.own.clone() else { unreachable!() };
    let after = moved(&before, "9");
    let own = |known: &Known, node: &NodeIdentity| known.own_lease(node, BootTime::default());
    let is_kept = |known: &Known| {
        let new = NodeIdentity::new("192.0.2.77").unwrap();
        assert_eq!(own(known, &node()).as_ref(), Some(&after));
        assert_eq!(own(known, &new).as_ref(), Some(&after), "by the address that it has now");
        assert_eq!(own(known, &NodeIdentity::new("192.0.2.1").unwrap()), None);
    };
    // Either the reply or the watch event comes first; an older event may come late.
    for before_reply in [vec![], vec![&after], vec![&before, &after]] {
        for after_reply in [vec![], vec![&before, &after]] {
            let mut known = known.clone();
            known.renewing(&after);
            before_reply.iter().for_each(|lease| {
                known.event(&shown(lease));
            });
            known.renewed(&after);
            after_reply.iter().for_each(|lease| {
                known.event(&shown(lease));
            });
            is_kept(&known);
        }
    }
    // The reply is lost.
    known.renewing(&after);
    known.event(&shown(&after));
    is_kept(&known);
}

#[test]
fn what_the_store_shows_as_anothers_is_no_own_lease_until_a_renewal_says_so() {
    let mut known = held(None);
    let Own::Held(_, ours) = known.own.clone() else { unreachable!() };
    let own = |known: &Known| known.own_lease(&node(), BootTime::default());
    for event in [shown(&moved(&ours, "9")), LeaseEvent::Remove(ours.key.clone()), LeaseEvent::Reset(Vec::new())] {
        assert_eq!(known.event(&event), Changed::Yes);
        assert_eq!(own(&known), None, "{event:?}");
        assert_eq!(known.renewed(&ours), Changed::Yes);
        assert_eq!(own(&known), Some(ours.clone()));
        known.event(&event);
        known.event(&shown(&ours));
        assert_eq!(own(&known), Some(ours.clone()), "what was shown was older");
    }
    known.lost(&ours.key);
    known.renewed(&ours);
    known.event(&shown(&ours));
    assert_eq!(own(&known), None);
}

#[tokio::test(start_paused = true)]
async fn the_file_holds_the_own_lease_under_the_new_address() {
    let bed = Bed::new();
    let cached = bed.open();
    cached.network_config().await.unwrap();
    let old = NodeIdentity::new("192.0.2.1").unwrap();
    let lease = cached.acquire(&old, want()).await.unwrap();
    let mut watch = cached.watch();
    watch.next().await.unwrap().unwrap();
    bed.store.fail_next([Fault::LostReply]);
    cached.renew(&moved(&lease, &lease.fence.text().unwrap())).await.unwrap_err();
    watch.next().await.unwrap().unwrap();
    cached.flush().await.unwrap();
    bed.store.outage();
    let found = bed.open().previous(&NodeIdentity::new("192.0.2.77").unwrap()).await.unwrap().remove(0);
    assert_eq!(found.subnets, lease.subnets);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_fits_the_network_no_longer_is_not_used() {
    let bed = Bed::new();
    bed.saved().await;
    let moved = NetworkConfig::parse(br#"{"Network":"10.99.0.0/16"}"#, Allocation::Pool).unwrap();
    bed.store.set_config(moved);
    let cached = bed.open();
    cached.network_config().await.unwrap();
    bed.store.outage();
    assert!(cached.previous(&node()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lease_given_back_or_refused_is_forgotten() {
    for refused in [true, false] {
        let bed = Bed::new();
        let lease = bed.saved().await;
        let cached = bed.open();
        let _watch = begun(&cached).await;
        if refused {
            bed.store.delete(&lease.key);
            assert!(matches!(cached.renew(&lease).await, Err(SubnetError::Lost(_))));
        } else {
            cached.release(lease).await.unwrap();
        }
        cached.flush().await.unwrap();
        bed.store.outage();
        assert!(cached.previous(&node()).await.is_err());
        assert!(bed.open().previous(&node()).await.is_err());
    }
}
