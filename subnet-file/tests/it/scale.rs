//! Ten thousand nodes.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use flannel_core::subnet::SubnetManager;
use flannel_subnet_file::{FileSubnets, Options};

use super::{acquire, reset};

const NODES: u32 = 10_000;
/// A multiple of what a busy machine with a slow disk needs.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn ten_thousand_records_are_listed_soon_and_kept_small() {
    let dir = tempfile::tempdir().unwrap();
    // In its own process: its memory is measured.
    let status = super::processes::start("scale", dir.path(), "").wait().unwrap();
    assert!(status.success(), "the figures are on standard error");
}

pub(crate) async fn measure(dir: &Path) {
    let store = FileSubnets::open(dir, Options::default()).unwrap();
    store.put_config_json(r#"{"Network":"10.0.0.0/8"}"#).await.unwrap();
    for n in 0..NODES {
        let [_, _, high, low] = n.to_be_bytes();
        let text = format!(
            "{{\"PublicIP\":\"192.168.{high}.{low}\",\"PublicIPv6\":null,\"BackendType\":\"vxlan\",\
             \"BackendData\":{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:{high:02x}:{low:02x}\"}},\
             \"Subnet\":\"10.{}.{low}.0/24\",\"Created\":{n}}}\n",
            high + 1
        );
        fs::write(dir.join("leases").join(format!("node-{n}.json")), text).unwrap();
    }
    let memory = resident();
    let began = Instant::now();
    let mut watch = store.watch();
    let records = reset(&mut watch).await;
    let listed = began.elapsed();
    let grown = resident().saturating_sub(memory);
    assert_eq!(records.len(), NODES as usize);
    let began = Instant::now();
    let lease = acquire(&store, "late").await;
    let acquired = began.elapsed();
    let began = Instant::now();
    store.renew(&lease).await.unwrap();
    let renewed = began.elapsed();
    eprintln!("{NODES} records: listed in {listed:?}, {grown} KiB more; acquire {acquired:?}, renew {renewed:?}");
    assert!(listed < SOON, "listed in {listed:?}");
    assert!(acquired < SOON, "acquired in {acquired:?}");
    assert!(grown < 32 * 1024, "{grown} KiB for {NODES} records");
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
