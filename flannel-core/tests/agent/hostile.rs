//! More records than there should be, and what they say: the good ones that were there before go on as they were.

use flannel_core::lease::{BadRecord, Json, Lease, LeaseKey, MAX_RECORDS, RECORD_BYTES};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::{Event, Phase, Status};

use crate::log::Log;
use crate::node::{Node, eventually, peer, public, subnet};
use crate::tunnel::{data, mac_of};

/// Hostile record `n`: good in itself, and as large as a record may be.
fn large(n: u16) -> Lease {
    let name = format!("hostile-{n}");
    let mut lease = peer(1);
    lease.key = LeaseKey::new(&name);
    let [high, low] = n.to_be_bytes();
    lease.subnets.v4 = Prefix::masked([10, 42, 64 + high, low].into(), 30).ok();
    lease.attrs.public_ip.v4 = Some(public(Family::V4, 250));
    lease.attrs.backend_data.v4 = Some(data(mac_of(&name, Family::V4)));
    lease.attrs.backend_data.v6 = Json::parse(&format!("\"{}\"", "x".repeat(15 * RECORD_BYTES))).ok();
    lease
}

#[tokio::test(start_paused = true)]
async fn of_too_many_records_the_youngest_are_dropped_and_come_back_once_there_is_room() {
    let log = Log::listen();
    let (node, mut agent) = Node::ready_beside([1, 2]).await;
    let hostile: Vec<_> = (0..MAX_RECORDS / 16 + 100).map(|n| large(4 * n as u16)).collect();
    node.store.insert(hostile.clone());
    node.join([9]);
    let status = agent.until(|status| status.peers.dropped > 100).await;
    assert_eq!((status.own_trouble, status.phase), (None, Phase::Ready));
    agent.event(|event| matches!(event, Event::RecordsDropped(_))).await;
    assert!(node.has_route(subnet(1)) && node.has_route(subnet(2)) && !node.has_route(subnet(9)));
    let told = log.take().iter().filter(|line| line.contains("too many records")).count();
    assert_eq!(told, 1);
    // A restart finds the same.
    agent.cancelled().await.unwrap();
    let agent = node.run();
    let status = agent.ready().await;
    assert!(status.peers.dropped > 100 && node.has_route(subnet(1)) && !node.has_route(subnet(9)), "{status:?}");
    // Nobody writes the good one that was dropped again: the store is asked for it.
    let keys: Vec<_> = hostile.iter().take(4000).map(|lease| lease.key.clone()).collect();
    node.store.delete_all(&keys);
    eventually("the dropped peer is there", || node.has_route(subnet(9))).await;
    agent.until(|status| status.peers.dropped == 0).await;
}

#[tokio::test(start_paused = true)]
async fn the_status_lists_so_many_bad_records_and_counts_all() {
    let node = Node::alone();
    node.join([1]);
    let count = Status::MAX_QUARANTINED + 500;
    for n in 0..count {
        let bad = BadRecord { reason: "é".repeat(5000), subnets: Dual::default() };
        node.store.insert_bad(&LeaseKey::new(&format!("bad-{n:05}")), bad);
    }
    node.store.insert_bad(&LeaseKey::new(&"x".repeat(1 << 20)), BadRecord::new("long", Dual::default()));
    let agent = node.run();
    let status = agent.ready().await;
    assert_eq!((status.quarantined.len(), status.peers.quarantined), (Status::MAX_QUARANTINED, count));
    assert_eq!((status.peers.accepted, status.peers.dropped), (1, 1));
    let longest = status.quarantined.values().map(|reason| reason.to_string().chars().count()).max();
    assert!(longest.is_some_and(|longest| longest < 300), "{longest:?}");
    // One that is not listed is explained all the same.
    let last = format!("bad-{:05}", count - 1);
    assert!(agent.handle.explain(&last).await.unwrap()[0].to_string().contains("unreadable"));
    for n in 0..count {
        assert!(node.store.delete(&LeaseKey::new(&format!("bad-{n:05}"))));
    }
    agent.until(|status| status.quarantined.is_empty() && status.peers.quarantined == 0).await;
}
