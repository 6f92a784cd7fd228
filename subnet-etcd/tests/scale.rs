//! Ten thousand records. A separate test program, so that nothing runs beside it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

#[path = "etcd/common.rs"]
mod common;

use std::time::Instant;

use etcd_client::{Client, Txn, TxnOp};
use flannel_core::testing::store_contract::Watcher;
use testkit::etcd::Version;

use common::{BASE, established, node, open, raw, single, watch};

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
        watcher.until(5, "the new lease", |watcher| watcher.good(&lease.key).is_some()).await;
        let mut delays = Vec::new();
        let mut client = raw(&etcd).await;
        for n in 0..100 {
            let key = format!("{BASE}/subnets/10.64.{n}.0-24");
            let start = Instant::now();
            client.put(key, node(20_000 + n).attrs.to_json(), None).await.unwrap();
            let written = start.elapsed();
            let name = flannel_core::lease::LeaseKey::new(&format!("10.64.{n}.0-24"));
            let is_shown = |watcher: &Watcher| watcher.good(&name).is_some_and(|l| l.attrs == node(20_000 + n).attrs);
            watcher.until(5, "a change", is_shown).await;
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

fn peak_kib() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().to_owned();
    line.split_whitespace().nth(1).unwrap_or_default().to_owned()
}
