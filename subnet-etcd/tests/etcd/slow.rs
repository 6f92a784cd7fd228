//! A watch that is slower than the changes.

use etcd_client::{Client, CompactionOptions};
use flannel_core::lease::LeaseKey;
use flannel_core::subnet::SubnetManager;
use flannel_core::testing::store_contract::Watcher;
use flannel_subnet_etcd::{Config, EtcdSubnets};
use testkit::etcd::Version;

use crate::common::{BASE, node, raw, single, watching};
use crate::proxy::Proxy;

/// Changes of each record, one after the other: more in number and bytes than fit into any buffer on the path.
const ROUNDS: u16 = 8;
const RECORDS: u16 = 200;
const SIZE: usize = 3000;

/// Writes each record in each round, and deletes every third of them in the last round.
async fn churn(client: &mut Client) {
    for round in 1..=ROUNDS {
        for n in 0..RECORDS {
            match round == ROUNDS && n % 3 == 0 {
                true => drop(client.delete(key(n), None).await.unwrap()),
                false => drop(client.put(key(n), value(n, round), None).await.unwrap()),
            }
        }
    }
}

fn key(n: u16) -> String {
    format!("{BASE}/subnets/10.5.{n}.0-24")
}

/// Returns what node `n` publishes in this round.
fn value(n: u16, round: u16) -> String {
    let json = node(n).attrs.to_json().replace("\"VNI\":1", &format!("\"VNI\":{round}"));
    json.replacen('{', &format!("{{\"Pad\":\"{}\",", "x".repeat(SIZE)), 1)
}

/// Whether the watch shows exactly the last round.
fn has_all(watcher: &Watcher) -> bool {
    let last = format!("\"VNI\":{ROUNDS},");
    (0..RECORDS).all(|n| {
        let key = LeaseKey::new(&format!("10.5.{n}.0-24"));
        match watcher.good(&key) {
            Some(lease) => n % 3 != 0 && lease.attrs.to_json().contains(&last),
            None => n % 3 == 0 && !watcher.seen.contains_key(&key),
        }
    })
}

async fn behind(version: Version) -> (testkit::etcd::Etcd, EtcdSubnets, Proxy, Watcher) {
    let (etcd, store) = single(version).await;
    let proxy = Proxy::start(&etcd.endpoint(0)).await;
    let watcher = watching(&EtcdSubnets::new(Config::new([proxy.endpoint()])).unwrap(), &store).await;
    (etcd, store, proxy, watcher)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_held_back_catches_up_without_a_listing_and_misses_nothing() {
    for version in Version::ALL {
        let (etcd, store, proxy, mut watcher) = behind(version).await;
        proxy.hold();
        churn(&mut raw(&etcd).await).await;
        proxy.let_go();
        watcher.until(20, "the last round", has_all).await;
        assert_eq!((watcher.resets, watcher.errors.as_slice()), (1, [].as_slice()));
        let late = node(1000).acquire(&store).await;
        watcher.until(20, "events after it", |watcher| watcher.good(&late.key).is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_was_held_back_past_a_compaction_lists_anew_and_misses_nothing() {
    for version in Version::ALL {
        let (etcd, store, proxy, mut watcher) = behind(version).await;
        proxy.hold();
        let mut client = raw(&etcd).await;
        churn(&mut client).await;
        let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
        proxy.let_go();
        watcher.until(20, "the last round", has_all).await;
        assert_eq!(watcher.resets, 2);
        let late = node(1000).acquire(&store).await;
        watcher.until(20, "events after it", |watcher| watcher.good(&late.key).is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_come_in_small_pieces_are_events_all_the_same() {
    let (_etcd, store, proxy, mut watcher) = behind(Version::Current).await;
    proxy.trickle(7);
    let mut leases = Vec::new();
    for n in 0..40 {
        leases.push(node(n).acquire(&store).await);
    }
    for lease in leases.split_off(20) {
        store.release(lease).await.unwrap();
    }
    let left = |watcher: &Watcher| leases.iter().all(|lease| watcher.good(&lease.key).is_some());
    // Including the record that it began with.
    watcher.until(20, "what is left", |watcher| left(watcher) && watcher.seen.len() == leases.len() + 1).await;
    assert_eq!((watcher.resets, watcher.errors.as_slice()), (1, [].as_slice()));
}
