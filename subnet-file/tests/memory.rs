//! However many records a directory contains, few are in memory (docs/bounds.md). A separate test program: it counts
//! allocations.

use std::fmt::Write as _;

use flannel_core::lease::{LeaseAttrs, LeaseEvent, OldestRecords, RECORD_BYTES, Record};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, SubnetManager, Want};
use flannel_subnet_file::{FileSubnets, Options};
use futures_util::StreamExt;
use peak_alloc::PeakAlloc;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

const FILES: usize = 20_000;
const DATA: usize = 3800;
/// Half of the files' contents.
const MOST: usize = 38 << 20;

#[tokio::test]
async fn of_a_directory_without_end_a_watch_and_an_acquire_hold_few_records() {
    // In memory if possible: the disk would take most of the time.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let store = FileSubnets::open(dir.path(), Options::default()).unwrap();
    store.put_config_json(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#).await.unwrap();
    let (mut text, data) = (String::new(), "x".repeat(DATA));
    for n in 0..FILES {
        let (high, low) = (n / 256, n % 256);
        text.clear();
        let public = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":"#;
        write!(text, r#"{public}"{data}","Subnet":"10.{high}.{low}.0/24","Created":{n}}}"#).unwrap();
        std::fs::write(dir.path().join(format!("leases/node-{n}.json")), &text).unwrap();
    }
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let Some(Ok(LeaseEvent::Reset(records))) = store.watch().next().await else { panic!("no list") };
    let peak = HEAP.peak_usage() - before;
    assert!(peak < MOST, "{peak} bytes for a list");
    let weight: usize = records.iter().map(Record::weight).sum();
    assert!(weight <= OldestRecords::LIMIT && weight + 2 * DATA / RECORD_BYTES > OldestRecords::LIMIT, "{weight}");
    assert!(records.iter().all(|record| record.lease.is_ok() && record.created < 4000), "the oldest");
    drop(records);
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let public_ip = Dual { v4: Some("192.0.2.2".parse().unwrap()), v6: None };
    let want = Want::new(LeaseAttrs::new(public_ip));
    store.acquire(&NodeIdentity::new("us").unwrap(), want).await.unwrap();
    let peak = HEAP.peak_usage() - before;
    assert!(peak < 4 << 20, "{peak} bytes to acquire");
}
