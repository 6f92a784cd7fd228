//! What the agent does not do at once: mass deletions, what bad records name, what somebody else keeps changing.

use std::time::Duration;

use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::kernel::Object;
use flannel_core::lease::{BadRecord, Lease, LeaseKey};
use flannel_core::net::{Dual, Family, MacAddr};
use flannel_core::overlay::{Event, Phase, WithheldBecause};
use flannel_core::testing::fake_kernel::FakeRoute;
use tokio::time::Instant;

use crate::node::{Agent, Node, config, eventually, pass, peer, subnet};
use crate::tunnel::mac_of;

/// A node at rest with one peer, and that one's MAC address.
async fn beside_one_peer() -> (Node, Agent, MacAddr) {
    let (node, agent) = Node::ready_beside([1]).await;
    pass(1.0).await;
    (node, agent, mac_of("peer-1", Family::V4))
}

#[tokio::test(start_paused = true)]
async fn an_object_that_somebody_keeps_changing_is_backed_off_from_and_forgiven() {
    let (node, mut agent) = Node::ready_beside([1, 2]).await;
    pass(1.0).await;
    agent.drain();
    let mac = mac_of("peer-1", Family::V4);
    let kernel = node.kernel.clone();
    // Somebody who flushes it as soon as it is back.
    let other = tokio::spawn(async move {
        let mut deleted = Vec::new();
        loop {
            if kernel.delete_fdb("tun4.1", mac, "192.0.2.1".parse().unwrap()).is_ok() {
                deleted.push(Instant::now());
            }
            if deleted.last().is_some_and(|last| last.elapsed() > Duration::from_secs(100)) || deleted.len() > 40 {
                return deleted;
            }
            pass(0.01).await;
        }
    });
    pass(300.0).await;
    let status = agent.status();
    assert!(!status.flapping.is_empty() && status.failed_writes == 0, "{status:?}");
    let flaps = |events: &[Event]| events.iter().filter(|event| matches!(event, Event::Flapping(_))).count();
    let events = agent.drain();
    // The entry, and the neighbour that is written with it.
    assert!((1..=2).contains(&flaps(&events)), "{}", flaps(&events));
    other.abort();
    let _ = other.await;
    let writes = node.kernel.writes();
    pass(31.0).await;
    assert!(node.kernel.writes() > writes, "the entry is put back when the wait is over");
    pass(65.0).await;
    let status = agent.status();
    assert!(status.flapping.is_empty(), "{:?}", status.flapping);
    assert!(agent.handle.plan().await.unwrap().plan.is_empty());
    assert_eq!(flaps(&agent.drain()), 0);
}

#[tokio::test(start_paused = true)]
async fn peers_that_come_and_go_hide_no_fight_over_another() {
    let (node, agent, mac) = beside_one_peer().await;
    for n in 2..32 {
        node.kernel.stall();
        let _ = node.kernel.delete_fdb("tun4.1", mac, "192.0.2.1".parse().unwrap());
        pass(0.25).await;
        // In the midst of the look.
        node.join([n]);
        pass(0.01).await;
        node.kernel.resume();
        pass(0.05).await;
    }
    let status = agent.status();
    assert!(!status.flapping.is_empty() && status.drift_repaired >= 10, "{status:?}");
    // What a peer's own coming and going had written is nobody's drift.
    let of_the_first = |object: &Object| match object {
        Object::Fdb(key) => key.mac == mac,
        Object::Neighbour(key) => key.addr == subnet(1).addr(),
        Object::Route(prefix) => *prefix == subnet(1),
        Object::Link(_) | Object::LinkPart(..) | Object::Address(_) | Object::Forward(_) => false,
    };
    assert!(status.flapping.iter().all(of_the_first), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_without_most_peers_waits_a_minute_before_it_deletes() {
    let (node, mut agent) = Node::ready_beside(1..=20).await;
    // Gone between two snapshots: the watch was cut, so nobody was told of each.
    node.leave(1..=16);
    node.join([30]);
    node.store.cut_watches();
    let begun = Instant::now();
    agent.event(|event| matches!(event, Event::DeletionsWithheld(16))).await;
    eventually("the new peer is there", || node.has_route(subnet(30))).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "additions do not wait");
    pass(55.0).await;
    assert!((1..=20).all(|n| node.has_route(subnet(n))));
    assert_eq!(agent.status().withheld.len(), 16);
    // One comes back, and one leaves in the ordinary way: that does not wait.
    node.join([1]);
    node.leave([20]);
    eventually("a single one goes", || !node.has_route(subnet(20))).await;
    assert!(begun.elapsed() < Duration::from_secs(58));
    eventually("the others go", || (2..=16).all(|n| !node.has_route(subnet(n)))).await;
    let took = begun.elapsed();
    assert!((60.0..62.0).contains(&took.as_secs_f64()), "{took:?}");
    assert!([1, 17, 18, 19, 30].into_iter().all(|n| node.has_route(subnet(n))));
    assert!(agent.status().withheld.is_empty());
    pass(1.0).await;
    assert!(agent.handle.plan().await.unwrap().plan.is_empty());
}

#[tokio::test(start_paused = true)]
async fn whoever_is_told_of_the_peers_finds_in_the_status_who_is_missing_for_now() {
    let (node, agent) = Node::ready_beside(1..=20).await;
    // A look that takes its time is under way when the snapshot comes.
    node.kernel.stall();
    pass(40.0).await;
    node.leave(1..=16);
    node.store.cut_watches();
    while agent.handle.peers().await.unwrap().len() != 4 {
        pass(0.01).await;
    }
    assert_eq!(agent.status().withheld.len(), 16);
    node.kernel.resume();
    agent.ready().await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_finds_most_peers_gone_waits_a_minute_before_it_deletes() {
    let (node, agent) = Node::ready_beside(1..=20).await;
    agent.cancelled().await.unwrap();
    node.leave(1..=20);
    let begun = Instant::now();
    let agent = node.run();
    agent.until(|status| status.withheld.len() == 20).await;
    agent.ready().await;
    assert!((1..=20).all(|n| node.has_route(subnet(n))));
    eventually("they go", || (1..=20).all(|n| !node.has_route(subnet(n)))).await;
    let took = begun.elapsed();
    assert!((60.0..62.0).contains(&took.as_secs_f64()), "{took:?}");
    assert!(node.kernel.snapshot().matching("fdb").is_empty() && node.kernel.snapshot().matching("neigh").is_empty());
}

fn bad(n: u8) -> BadRecord {
    BadRecord::new("torn", Dual { v4: Some(subnet(n)), v6: None })
}

#[tokio::test(start_paused = true)]
async fn what_a_bad_record_names_is_not_deleted_not_even_by_the_next_run() {
    let (node, agent) = Node::ready_beside([1, 2, 3]).await;
    node.store.insert_bad(&peer(1).key, bad(1));
    agent.until(|status| status.quarantined.contains_key(&peer(1).key)).await;
    agent.audited().await;
    assert!(node.has_route(subnet(1)), "the last good version stays");
    agent.cancelled().await.unwrap();
    let before = node.kernel.snapshot();
    let agent = node.run();
    let status = agent.ready().await;
    assert_eq!(status.withheld.get(&subnet(1)), Some(&WithheldBecause::BadRecord));
    agent.audited().await;
    assert_eq!(node.kernel.snapshot(), before);
    // Once the record is gone, so is what it protected.
    let begun = Instant::now();
    node.store.delete(&peer(1).key);
    eventually("the route goes", || !node.has_route(subnet(1))).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(node.has_route(subnet(2)) && node.has_route(subnet(3)));
}

#[tokio::test(start_paused = true)]
async fn a_foreign_route_is_a_conflict_that_ends_with_it() {
    let node = Node::alone();
    let eth0 = node.kernel.link_index("eth0").unwrap();
    let foreign = FakeRoute::via(subnet(1), "192.0.2.99".parse().unwrap(), eth0);
    node.kernel.add_route(foreign.clone(), flannel_core::testing::fake_kernel::Placement::Exclusive).unwrap();
    node.join([1, 2]);
    let mut agent = node.run();
    agent.event(|event| matches!(event, Event::ConflictFound(_))).await;
    let status = agent.ready().await;
    assert_eq!(status.conflicts.len(), 1);
    // Its own lease round is of no use to it either.
    node.leave([1]);
    node.join([1]);
    pass(1.0).await;
    assert_eq!(node.kernel.snapshot().matching("route 10.42.1.0/24").len(), 1);
    assert_eq!(agent.status().conflicts.len(), 1);
    node.kernel.delete_route(&foreign).unwrap();
    agent.until(|status| status.conflicts.is_empty()).await;
    eventually("ours is there", || !node.kernel.snapshot().matching("route 10.42.1.0/24 via 10.42.1.0").is_empty())
        .await;
}

/// A node that waits before it deletes the routes to twenty peers.
async fn amid_a_mass_deletion() -> (Node, Agent) {
    let (node, agent) = Node::ready_beside(1..=20).await;
    node.leave(1..=20);
    node.store.cut_watches();
    agent.until(|status| status.withheld.len() == 20).await;
    (node, agent)
}

#[tokio::test(start_paused = true)]
async fn a_mass_deletion_waits_on_while_the_store_is_away() {
    let (node, agent) = amid_a_mass_deletion().await;
    pass(30.0).await;
    node.store.outage();
    pass(300.0).await;
    assert!((1..=20).all(|n| node.has_route(subnet(n))), "nobody took a second look");
    assert_eq!(agent.status().withheld.len(), 20);
    // It was away because it was being mended.
    node.join(1..=19);
    node.store.recover();
    eventually("what is still gone is deleted", || !node.has_route(subnet(20))).await;
    assert!((1..=19).all(|n| node.has_route(subnet(n))));
    agent.until(|status| status.withheld.is_empty()).await;
}

/// A peer's lease of another subnet than it usually has.
fn peer_of(n: u8, subnet: &str) -> Lease {
    let mut lease = peer(n);
    (lease.key, lease.subnets.v4) = (LeaseKey::new(subnet), subnet.parse().ok());
    lease
}

#[tokio::test(start_paused = true)]
async fn amid_a_mass_deletion_a_subnet_that_is_given_out_anew_has_one_route() {
    let (node, agent) = amid_a_mass_deletion().await;
    node.store.insert([peer_of(30, "10.42.3.128/25")]);
    eventually("the newcomer is there", || node.has_route("10.42.3.128/25".parse().unwrap())).await;
    assert!(!node.has_route(subnet(3)), "{}", node.kernel.snapshot());
    assert_eq!(agent.status().withheld.len(), 19);
    agent.killed().await;
    // An agent that starts finds both.
    node.store.insert([peer_of(31, "10.42.4.0/23")]);
    let agent = node.run_ready().await;
    assert!(node.has_route("10.42.4.0/23".parse().unwrap()));
    assert!(![4, 5].into_iter().any(|n| node.has_route(subnet(n))), "{}", node.kernel.snapshot());
    assert_eq!(agent.status().withheld.len(), 17);
}

#[tokio::test(start_paused = true)]
async fn amid_a_mass_deletion_a_peer_that_the_host_kept_out_has_one_route_too() {
    let (node, agent) = amid_a_mass_deletion().await;
    node.kernel.add_address("eth0", "192.0.2.77/32".parse().unwrap()).unwrap();
    pass(1.0).await;
    let mut lease = peer_of(30, "10.42.3.128/25");
    lease.attrs.public_ip.v4 = Some("192.0.2.77".parse().unwrap());
    node.store.insert([lease]);
    agent.until(|status| status.peers.quarantined == 1).await;
    assert!(node.has_route(subnet(3)));
    node.kernel.remove_address("eth0", "192.0.2.77/32".parse().unwrap()).unwrap();
    eventually("the peer is there", || node.has_route("10.42.3.128/25".parse().unwrap())).await;
    assert!(!node.has_route(subnet(3)), "{}", node.kernel.snapshot());
}

#[tokio::test(start_paused = true)]
async fn amid_a_mass_deletion_the_own_new_subnet_has_no_route() {
    let (node, agent) = amid_a_mass_deletion().await;
    let pool = br#"{"Network":"10.42.0.0/16","SubnetLen":25,"SubnetMin":"10.42.3.128","SubnetMax":"10.42.3.128"}"#;
    let mut changed = config();
    changed.networks = NetworkConfig::parse(pool, Allocation::Pool).unwrap().networks;
    node.store.set_config(changed);
    node.store.delete(&node.key());
    let own = "10.42.3.128/25".parse().unwrap();
    agent.until(|status| status.lease.as_ref().is_some_and(|lease| lease.subnets.v4 == Some(own))).await;
    agent.ready().await;
    assert!(!node.has_route(subnet(3)), "{}", node.kernel.snapshot());
}

#[tokio::test(start_paused = true)]
async fn who_joins_amid_a_look_is_no_drift() {
    let (node, mut agent) = Node::ready_beside([1]).await;
    pass(5.0).await;
    agent.drain();
    node.kernel.stall();
    node.kernel.carrier_change("tun4.1").unwrap();
    // The look is under way, and what it will be held against changes.
    pass(1.0).await;
    node.join([2]);
    pass(1.0).await;
    node.kernel.resume();
    eventually("the newcomer is there", || node.has_route(subnet(2))).await;
    agent.audited().await;
    assert_eq!(agent.status().drift_repaired, 0);
    assert!(!agent.drain().iter().any(|event| matches!(event, Event::DriftRepaired { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_single_refusal_amid_a_lease_round_leaves_the_agent_ready() {
    let (node, agent) = Node::ready_beside([1]).await;
    pass(5.0).await;
    // The look that follows takes its time.
    let kernel = node.kernel.clone();
    node.kernel.refuse_if(move |_| {
        kernel.stall();
        Some(17)
    });
    node.join([2]);
    pass(5.0).await;
    let status = agent.status();
    assert_eq!((status.phase, status.failed_writes, status.peers.accepted), (Phase::Ready, 0, 2));
    node.kernel.obey();
    node.kernel.resume();
    eventually("it is written after all", || node.has_route(subnet(2))).await;
    pass(1.0).await;
    assert_eq!((agent.status().phase, agent.status().failed_writes), (Phase::Ready, 0));
}
