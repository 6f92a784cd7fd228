//! Tests of the store itself.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};

use super::{Fault, MemorySubnets};
use crate::clock::SystemClock;
use crate::config::{Allocation, NetworkConfig};
use crate::lease::{Lease, LeaseAttrs, LeaseEvent, LeaseKey};
use crate::net::Dual;
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use crate::testing::store_contract::{self, InMemory, Nodes};

fn store(network: &str) -> MemorySubnets {
    let json = format!("{{\"Network\":\"{network}\"}}");
    MemorySubnets::new(NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap())
}

fn want() -> Want {
    Want::new(LeaseAttrs::default())
}

#[tokio::test]
async fn a_lost_reply_leaves_the_lease_that_the_next_try_adopts() {
    let store = store("10.5.0.0/16");
    let node = NodeIdentity::new("a").unwrap();
    store.fail_next([Fault::LostReply]);
    assert!(matches!(store.acquire(&node, want()).await, Err(SubnetError::Unavailable { .. })));
    let first = store.previous(&node).await.unwrap().remove(0);
    assert_eq!(store.acquire(&node, want()).await.unwrap().subnets, first.subnets);
    assert_eq!(store.records().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract_of_lease_stores() {
    for nodes in [Nodes::Named, Nodes::ByAddress, Nodes::Assigned] {
        store_contract::all(&mut InMemory::new(nodes, |store| Arc::new(store))).await;
    }
}

#[tokio::test]
async fn a_cut_watch_reports_trouble_then_everything() {
    let store = store("10.5.0.0/16");
    let mut watch = store.watch();
    assert_eq!(watch.next().await.unwrap().unwrap(), LeaseEvent::Reset(Vec::new()));
    store.cut_watches();
    store.acquire(&NodeIdentity::new("a").unwrap(), want()).await.unwrap();
    assert!(watch.next().await.unwrap().is_err());
    let LeaseEvent::Reset(records) = watch.next().await.unwrap().unwrap() else { panic!("no reset") };
    assert_eq!(records, store.records());
}

#[tokio::test]
async fn a_store_that_was_away_answers_with_everything_once_it_is_back() {
    let store = store("10.5.0.0/16");
    let mut before = store.watch();
    assert!(before.next().await.unwrap().is_ok());
    store.outage();
    let node = NodeIdentity::new("a").unwrap();
    assert!(matches!(store.acquire(&node, want()).await, Err(SubnetError::Unavailable { .. })));
    let mut during = store.watch();
    for watch in [&mut before, &mut during] {
        assert!(watch.next().await.unwrap().is_err());
        assert!(watch.next().now_or_never().is_none(), "a store that is away says nothing");
    }
    store.recover();
    store.acquire(&node, want()).await.unwrap();
    for watch in [&mut before, &mut during] {
        assert_eq!(watch.next().await.unwrap().unwrap(), LeaseEvent::Reset(store.records()));
    }
}

#[tokio::test]
async fn a_node_known_by_its_address_keeps_its_record_under_its_subnet() {
    let config = NetworkConfig::parse(b"{\"Network\":\"10.5.0.0/16\"}", Allocation::Pool).unwrap();
    let store = MemorySubnets::by_address(config, None, Arc::new(SystemClock::default()));
    let publishing = |addr: &str| {
        Want::new(LeaseAttrs { public_ip: Dual { v4: addr.parse().ok(), v6: None }, ..LeaseAttrs::default() })
    };
    let node = NodeIdentity::new("192.0.2.1").unwrap();
    let first = store.acquire(&node, publishing("192.0.2.1")).await.unwrap();
    assert_eq!(first.key.as_str(), first.subnets.v4.unwrap().to_string().replace('/', "-"));
    assert_eq!(store.acquire(&node, publishing("192.0.2.1")).await.unwrap().key, first.key);
    let moved = Lease { attrs: publishing("192.0.2.2").attrs, ..first.clone() };
    store.renew(&moved).await.unwrap();
    assert_eq!(store.previous(&node).await.unwrap(), []);
    let node = NodeIdentity::new("192.0.2.2").unwrap();
    assert_eq!(store.previous(&node).await.unwrap().remove(0).key, first.key);
}

#[tokio::test(start_paused = true)]
async fn an_expired_lease_is_removed_and_its_subnet_free() {
    let config = NetworkConfig::parse(b"{\"Network\":\"10.5.0.0/28\",\"SubnetLen\":30}", Allocation::Pool).unwrap();
    let clock = Arc::new(crate::clock::TokioClock::new());
    let store = MemorySubnets::with_ttl(config, Some(Duration::from_secs(60)), clock);
    let node = |n: u8| NodeIdentity::new(&format!("n{n}")).unwrap();
    for n in 0..3 {
        store.acquire(&node(n), want()).await.unwrap();
    }
    assert!(matches!(store.acquire(&node(3), want()).await, Err(SubnetError::Exhausted(_))));
    let mut watch = store.watch();
    watch.next().await.unwrap().unwrap();
    for _ in 0..3 {
        assert!(matches!(watch.next().await.unwrap().unwrap(), LeaseEvent::Remove(_)));
    }
    store.acquire(&node(3), want()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_fits_no_longer_is_left_to_the_operator() {
    let network = |text: &str| NetworkConfig::parse(text.as_bytes(), Allocation::Pool).unwrap();
    let clock = Arc::new(crate::clock::TokioClock::new());
    let ttl = Some(Duration::from_secs(60));
    let store = MemorySubnets::by_address(network("{\"Network\":\"10.5.0.0/16\"}"), ttl, clock);
    let attrs = LeaseAttrs { public_ip: Dual { v4: "192.0.2.1".parse().ok(), v6: None }, ..LeaseAttrs::default() };
    let subnets = Dual { v4: "10.6.1.0/24".parse().ok(), v6: None };
    let reservation = Lease::new(LeaseKey::new("10.6.1.0-24"), subnets, attrs.clone());
    store.insert([reservation.clone()]);
    let node = NodeIdentity::new("192.0.2.1").unwrap();
    let lease = store.acquire(&node, Want::new(attrs)).await.unwrap();
    let left: Vec<_> = store.records().into_iter().map(|record| record.lease.unwrap()).collect();
    assert_eq!(left, [Arc::new(lease), Arc::new(reservation)]);
}
