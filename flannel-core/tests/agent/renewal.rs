//! The lease over time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flannel_core::clock::TokioClock;
use flannel_core::lease::{BadRecord, Fence, Lease, LeaseKey};
use flannel_core::net::{Dual, Family};
use flannel_core::overlay::{Contact, Event, LossPolicy, LossReason, OverlayError, Phase};
use flannel_core::testing::MemorySubnets;
use tokio::time::Instant;

use crate::node::{Agent, Node, config, eventually, parse, pass, public, subnet};
use crate::storms::Away;

const TTL: Duration = Duration::from_secs(100);

fn losses(events: &[Event]) -> Vec<LossReason> {
    let reason = |event: &Event| match event {
        Event::LeaseLost(reason) => Some(reason.clone()),
        _ => None,
    };
    events.iter().filter_map(reason).collect()
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_at_half_its_life_for_ever() {
    let node = Node::with_ttl(TTL);
    let mut agent = node.run_ready().await;
    for _ in 0..20 {
        let begun = Instant::now();
        agent.event(|event| matches!(event, Event::LeaseRenewed(_))).await;
        let waited = begun.elapsed().as_secs_f64();
        assert!((44.0..=56.0).contains(&waited), "{waited}");
    }
    assert!(losses(&agent.drain()).is_empty());
    let writes = node.kernel.writes();
    pass(1000.0).await;
    assert_eq!(node.kernel.writes(), writes, "a renewal is nothing to the kernel");
}

fn run_away(node: &Node, policy: LossPolicy) -> (Agent, Away) {
    let store = Away::new(&node.store);
    let builder = node.builder().on_loss(policy);
    (node.run_as_over(builder, &store), store)
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ran_out_is_lost_and_taken_again_when_the_store_is_back() {
    let node = Node::with_ttl(TTL);
    node.join([1]);
    let (mut agent, store) = run_away(&node, LossPolicy::Reacquire);
    let before = agent.ready().await.lease.unwrap();
    let writes = node.kernel.writes();
    store.leave();
    let lost = agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    assert_eq!(lost, Event::LeaseLost(LossReason::Expired));
    let status = agent.until(|status| status.lease.is_none()).await;
    assert!(!status.phase.has_reached(Phase::LeaseHeld), "ready without a lease: {status:?}");
    pass(100.0).await;
    assert!(!agent.status().phase.has_reached(Phase::LeaseHeld), "an audit does not make a lease");
    assert_eq!(node.kernel.writes(), writes, "the data plane stays");
    store.come_back();
    let after = agent.ready().await.lease.unwrap();
    assert_eq!(before.subnets, after.subnets);
    assert!(agent.drain().iter().any(|event| matches!(event, Event::LeaseAcquired(_))));
}

#[tokio::test(start_paused = true)]
async fn policy_keep_takes_no_other_lease_and_leaves_the_data_plane() {
    let node = Node::with_ttl(TTL);
    node.join([1]);
    let (mut agent, store) = run_away(&node, LossPolicy::Keep);
    agent.ready().await;
    store.leave();
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    store.come_back();
    // The uplink's change makes the agent publish, were it to hold a lease.
    node.kernel.add_address("eth0", "192.0.2.77/24".parse().unwrap()).unwrap();
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    pass(300.0).await;
    assert_eq!(node.record(), None);
    let status = agent.status();
    assert!(status.lease.is_none() && !status.phase.has_reached(Phase::LeaseHeld), "{status:?}");
    assert!(node.has_route(subnet(1)));
}

#[tokio::test(start_paused = true)]
async fn policy_stop_ends_the_agent() {
    let node = Node::with_ttl(TTL);
    let (agent, store) = run_away(&node, LossPolicy::Stop);
    agent.ready().await;
    store.leave();
    assert!(matches!(agent.ended().await, Err(OverlayError::LeaseLost)));
}

#[tokio::test(start_paused = true)]
async fn a_record_taken_by_another_node_is_lost() {
    let node = Node::alone().known_by_address();
    let mut agent = node.run();
    let mut taken = Lease::clone(&*agent.ready().await.lease.unwrap());
    taken.attrs.public_ip.v4 = Some(public(Family::V4, 99));
    taken.fence = Fence::new("another");
    node.store.insert([taken]);
    let lost = agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    assert_eq!(lost, Event::LeaseLost(LossReason::Taken));
    agent.ready().await;
    assert_eq!(node.record().unwrap().attrs.public_ip.v4, Some(public(Family::V4, 200)));
}

#[tokio::test(start_paused = true)]
async fn the_record_of_a_named_node_is_written_again_whatever_is_done_to_it() {
    let node = Node::alone();
    let mut agent = node.run();
    let held = agent.ready().await.lease.unwrap();
    let edited = |edit: fn(&mut Lease)| {
        let mut lease = Lease::clone(&held);
        edit(&mut lease);
        lease
    };
    let no_data = edited(|lease| lease.attrs.backend_data.v4 = None);
    let other_address = edited(|lease| {
        lease.attrs.public_ip.v4 = Some(public(Family::V4, 99));
        lease.fence = Fence::new("another");
    });
    let acts: [(&str, &dyn Fn()); 4] = [
        ("removed", &|| assert!(node.store.delete(&node.key()))),
        ("damaged", &|| node.store.insert_bad(&node.key(), BadRecord::new("torn", Dual::default()))),
        ("edited", &|| node.store.insert([no_data.clone()])),
        ("edited to say another address", &|| node.store.insert([other_address.clone()])),
    ];
    for (what, act) in acts {
        // The answers come at once again.
        pass(60.0).await;
        agent.drain();
        act();
        let event = agent.event(|event| matches!(event, Event::LeaseRenewed(_) | Event::LeaseLost(_))).await;
        assert!(matches!(event, Event::LeaseRenewed(_)), "{what}: {event:?}");
        let record = node.record().expect(what);
        assert_eq!((record.attrs, record.subnets), (held.attrs.clone(), held.subnets), "{what}");
        assert_eq!(agent.status().phase, Phase::Ready, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_assigned_its_subnets_waits_for_them_and_follows_them() {
    let clock = Arc::new(TokioClock::new());
    let store = MemorySubnets::assigned(config(), None, Arc::clone(&clock) as _);
    let node = Node::new(200, &store, &clock);
    let mut agent = node.run();
    let waits = "node node-200: no subnets were assigned to it yet";
    let status = agent.until(|status| status.lease_refused.as_deref() == Some(waits)).await;
    assert_eq!(status.store, Contact::Live);
    for n in [5, 6] {
        node.store.assign(&node.identity(), Dual { v4: Some(subnet(n)), v6: None });
        agent.until(|status| status.lease.as_ref().is_some_and(|lease| lease.subnets.v4 == Some(subnet(n)))).await;
        agent.ready().await;
        let addresses = node.kernel.snapshot().matching("dev tun4.1").join("\n");
        assert!(addresses.contains(&format!("addr 10.42.{n}.0/32")), "{addresses}");
    }
    let lost = losses(&agent.drain());
    assert!(matches!(&lost[..], [LossReason::Refused(reason)] if reason.contains("10.42.6.0/24")), "{lost:?}");
}

#[tokio::test(start_paused = true)]
async fn subnets_that_come_late_are_taken_as_soon_as_they_are_assigned() {
    let clock = Arc::new(TokioClock::new());
    let store = MemorySubnets::assigned(config(), None, Arc::clone(&clock) as _);
    let node = Node::new(200, &store, &clock);
    let assign = |n: u8| node.store.assign(&node.identity(), Dual { v4: Some(subnet(n)), v6: None });
    let mut agent = node.run();
    // The waits between two tries are long by then.
    pass(100.0).await;
    assign(5);
    pass(0.2).await;
    assert_eq!(node.record().unwrap().subnets.v4, Some(subnet(5)));
    // The same with a lease that is lost.
    agent.ready().await;
    node.store.assign(&node.identity(), Dual { v4: None, v6: None });
    node.store.delete(&node.key());
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    pass(100.0).await;
    assign(6);
    pass(0.2).await;
    assert_eq!(node.record().unwrap().subnets.v4, Some(subnet(6)));
}

#[tokio::test(start_paused = true)]
async fn no_lease_is_taken_of_another_network_than_the_one_in_force() {
    let other_network = r#"{"Network":"10.91.0.0/16","Backend":{"Type":"tunnel"}}"#;
    let other_settings = r#"{"Network":"10.42.0.0/16","Backend":{"Type":"tunnel","Other":1}}"#;
    for other in [other_network, other_settings].map(parse) {
        let node = Node::alone().known_by_address();
        let mut agent = node.run();
        let before = agent.ready().await.lease.unwrap();
        node.store.set_config(other.clone());
        node.store.delete(&node.key());
        agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
        pass(60.0).await;
        let status = agent.status();
        assert_eq!((status.phase, &status.lease, node.record()), (Phase::Starting, &None, None));
        assert_eq!(status.reconfigured.as_deref(), Some(&other));
        assert!(status.lease_refused.is_some_and(|reason| reason.contains("restart")));
        assert_eq!(status.store, Contact::Live);
        node.store.set_config(config());
        let ready = agent.ready().await;
        assert_eq!((ready.lease.unwrap().subnets, ready.reconfigured), (before.subnets, None));
        assert_eq!(ready.lease_refused, None);
        let events = agent.drain();
        let is_refusal = |event: &&Event| matches!(event, Event::LeaseRefused(_));
        assert_eq!(events.iter().filter(is_refusal).count(), 1, "{events:?}");
        assert!(!events.iter().any(|event| matches!(event, Event::StoreLost(_))), "{events:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_known_by_its_address_acquires_by_the_one_it_has_now() {
    let node = Node::alone().known_by_address();
    let agent = node.run();
    let before = agent.ready().await.lease.unwrap();
    assert_eq!(before.key, LeaseKey::new("192.0.2.200"));
    node.kernel.add_address("eth0", "192.0.2.77/24".parse().unwrap()).unwrap();
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    let moved = |lease: &Lease| lease.attrs.public_ip.v4 == Some(public(Family::V4, 77));
    agent.until(|status| status.lease.as_ref().is_some_and(|lease| moved(lease))).await;
    node.store.delete(&before.key);
    agent.until(|status| status.lease.as_ref().is_some_and(|lease| lease.key != before.key)).await;
    let after = agent.ready().await.lease.unwrap();
    assert_eq!((&after.key, after.subnets), (&LeaseKey::new("192.0.2.77"), before.subnets));
}

#[tokio::test(start_paused = true)]
async fn a_record_deleted_while_it_was_being_renewed_is_noticed_too() {
    let node = Node::alone().known_by_address();
    let store = Away::new(&node.store);
    let mut agent = node.run_over(&store);
    let lease = agent.ready().await.lease.unwrap();
    store.delay(Duration::from_secs(2));
    // Somebody edits the record, so it is written again; while the answer is on its way it is deleted.
    let mut edited = Lease::clone(&lease);
    edited.attrs.backend_type = "other".into();
    node.store.insert([edited]);
    eventually("the record is mended", || node.record().is_some_and(|record| record.attrs == lease.attrs)).await;
    node.store.delete(&node.key());
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    eventually("the record is back", || node.record().is_some_and(|record| record.subnets == lease.subnets)).await;
}

#[tokio::test(start_paused = true)]
async fn a_record_that_moves_to_another_subnet_moves_the_node() {
    let node = Node::alone();
    let mut agent = node.run();
    let mut moved = Lease::clone(&*agent.ready().await.lease.unwrap());
    // A Kubernetes node made anew: same name and address, another podCIDR.
    moved.subnets.v4 = Some(subnet(250));
    moved.fence = Fence::new("uid-2");
    node.store.insert([moved]);
    agent.event(|event| matches!(event, Event::LeaseLost(LossReason::Refused(_)))).await;
    let status = agent.until(|status| status.phase == Phase::Ready && status.lease.is_some()).await;
    assert_eq!(status.lease.unwrap().subnets.v4, Some(subnet(250)));
    eventually("the device has the new address", || {
        node.kernel.snapshot().matching("addr 10.42.250.0/32 dev tun4.1").len() == 1
    })
    .await;
}

/// Two agents that both believe to be node 200: on hosts of their own, with addresses of their own.
#[tokio::test(start_paused = true)]
async fn two_agents_of_one_name_take_turns_ever_more_slowly_and_say_so() {
    let node = Node::alone();
    let mut twin = Node::new(201, &node.store, &node.clock);
    twin.name.clone_from(&node.name);
    twin.store.clone_from(&node.store);
    let stores = [Away::new(&node.store), Away::new(&node.store)];
    let [one, two] = &stores;
    let agent = node.run_over(one).once_ready().await;
    let rival = twin.run_over(two);
    pass(60.0).await;
    let calls = |stores: &[Away; 2]| stores.iter().map(|store| store.calls.load(Ordering::Relaxed)).sum::<u64>();
    let before = calls(&stores);
    // Four calls of each to start with, and nine answers where each wait is a tenth shorter.
    assert!(before <= 2 * 4 + 2 * 9, "{before} calls in a minute");
    pass(600.0).await;
    assert!(calls(&stores) - before <= 2 * 42, "{} calls in ten minutes", calls(&stores) - before);
    let status = agent.until(|status| status.contended.is_some_and(|contended| contended.next.is_some())).await;
    assert!(status.contended.unwrap().times > 30, "{status:?}");
    // The rival is gone: the lease is taken once more, and after half a minute all is forgotten.
    rival.cancelled().await.unwrap();
    let begun = Instant::now();
    agent.ready().await;
    assert!(begun.elapsed() <= Duration::from_secs(18), "{:?}", begun.elapsed());
    agent.until(|status| status.contended.is_none()).await;
    assert_eq!(node.record().unwrap().attrs.public_ip.v4, Some(public(Family::V4, 200)));
}
