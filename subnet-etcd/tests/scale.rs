//! Ten thousand records. A separate test program, so that nothing runs beside it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

#[path = "etcd/common.rs"]
mod common;

use std::time::Instant;

use etcd_client::{Client, Txn, TxnOp};
use flannel_core::lease::LeaseKey;
use flannel_core::subnet::SubnetManager;
use flannel_core::testing::store_contract::Watcher;
use testkit::etcd::Version;

use common::{BASE, established, node, open, raw, single, v4, watch};

const COUNT: u16 = 10_000;

async fn fill(client: &mut Client) {
    let numbers: Vec<u16> = (0..COUNT).collect();
    for chunk in numbers.chunks(100) {
        let put = |n: &u16| {
            let [high, low] = n.to_be_bytes();
            TxnOp::put(format!("{BASE}/subnets/10.{}.{low}.0-24", 64 + high), node(*n).attrs.to_json(), None)
        };
        client.txn(Txn::new().and_then(chunk.iter().map(put).collect::<Vec<_>>())).await.unwrap();
    }
}

/// Returns the number of range requests that the server has answered.
fn ranges(metrics: &str) -> u64 {
    let sample = r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Range""#;
    let line = metrics.lines().find(|line| line.starts_with(sample)).unwrap_or_default();
    line.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_records_are_listed_in_pages() {
    for version in Version::ALL {
        let (etcd, store) = single(version).await;
        store.put_config_json(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#).await.unwrap();
        fill(&mut raw(&etcd).await).await;
        let before = ranges(&etcd.metrics(0).unwrap());
        let start = Instant::now();
        let records = store.list().await.unwrap();
        let took = start.elapsed();
        let requests = ranges(&etcd.metrics(0).unwrap()) - before;
        assert_eq!(records.len(), usize::from(COUNT));
        assert_eq!(requests, 10, "a request a page");
        drop(records);

        let fresh = open(&etcd);
        let start = Instant::now();
        let mut watcher = watch(&fresh).await;
        let snapshot = start.elapsed();
        established(&mut watcher, &store).await;
        let new = node(COUNT + 1);
        let start = Instant::now();
        let lease = new.acquire(&store).await;
        let acquired = start.elapsed();
        watcher.until(20, "the new lease", |watcher| watcher.good(&lease.key).is_some()).await;
        let mut delays = Vec::new();
        let mut client = raw(&etcd).await;
        for n in 0..100 {
            let key = format!("{BASE}/subnets/10.64.{n}.0-24");
            let start = Instant::now();
            client.put(key, node(20_000 + n).attrs.to_json(), None).await.unwrap();
            let written = start.elapsed();
            let name = LeaseKey::new(&format!("10.64.{n}.0-24"));
            let is_shown = |watcher: &Watcher| watcher.good(&name).is_some_and(|l| l.attrs == node(20_000 + n).attrs);
            watcher.until(20, "a change", is_shown).await;
            delays.push((start.elapsed(), written));
        }
        delays.sort();
        println!("{version:?}: put to event p50 {:?} (the put itself {:?})", delays[50].0, delays[50].1);
        println!(
            "{version:?}: listing {took:?}, first snapshot with connect {snapshot:?}, acquire {acquired:?}, \
             peak {} KiB",
            peak_kib()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_lists_the_records_once_unless_others_write_meanwhile() {
    let (etcd, store) = single(Version::Current).await;
    store.put_config_json(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#).await.unwrap();
    let mut client = raw(&etcd).await;
    fill(&mut client).await;
    let pages = 10;
    let read = || ranges(&etcd.metrics(0).unwrap());
    // The first start acquires a lease, the second has a previous one.
    for _ in 0..2 {
        let (fresh, new, before) = (open(&etcd), node(COUNT + 1), read());
        fresh.previous(&new.id).await.unwrap();
        let lease = new.acquire(&fresh).await;
        let watcher = watch(&fresh).await;
        assert!(watcher.holds(&lease));
        assert_eq!(watcher.seen.len(), usize::from(COUNT) + 1);
        let requests = read() - before;
        assert!((pages..2 * pages).contains(&requests), "{requests} requests, {pages} a listing");
    }
    // Between any two steps another client deletes or writes.
    let (fresh, new) = (open(&etcd), node(COUNT + 2));
    fresh.previous(&new.id).await.unwrap();
    client.delete(format!("{BASE}/subnets/10.64.1.0-24"), None).await.unwrap();
    let lease = fresh.acquire(&new.id, new.preferring("10.64.1.0/24")).await.unwrap();
    assert_eq!(lease.subnets, v4("10.64.1.0/24"));
    client.delete(format!("{BASE}/subnets/10.64.2.0-24"), None).await.unwrap();
    client.put(format!("{BASE}/subnets/10.200.0.0-24"), node(COUNT + 3).attrs.to_json(), None).await.unwrap();
    let watcher = watch(&fresh).await;
    assert!(watcher.holds(&lease));
    assert!(watcher.good(&LeaseKey::new("10.64.2.0-24")).is_none());
    assert!(watcher.good(&LeaseKey::new("10.200.0.0-24")).is_some());
}

fn peak_kib() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().to_owned();
    line.split_whitespace().nth(1).unwrap_or_default().to_owned()
}
