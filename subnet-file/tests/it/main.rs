//! The store on real directories, with several processes and broken disks.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

mod contract;
mod faults;
mod local_users;
mod processes;
mod scale;
mod watching;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Lease, LeaseAttrs, LeaseEvent, LeaseKey, Record};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use flannel_core::text::chain;
use flannel_subnet_file::{FileSubnets, Options};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(10);

/// 64 subnets.
const CONFIG: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.64.0","SubnetMax":"10.5.127.0"}"#;

async fn store_in(dir: &Path) -> FileSubnets {
    let store = FileSubnets::open(dir, Options::default()).unwrap();
    store.put_config_json(CONFIG).await.unwrap();
    store
}

async fn new_store() -> (TempDir, FileSubnets) {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path()).await;
    (dir, store)
}

fn node(name: &str) -> NodeIdentity {
    NodeIdentity::new(name).unwrap()
}

fn want() -> Want {
    let public_ip = Dual { v4: Some("192.168.0.7".parse().unwrap()), v6: None };
    Want::new(LeaseAttrs::new(public_ip))
}

async fn acquire(store: &FileSubnets, name: &str) -> Lease {
    store.acquire(&node(name), want()).await.unwrap()
}

fn lease_path(dir: &Path, name: &str) -> PathBuf {
    dir.join("leases").join(format!("{name}.json"))
}

type Stream = BoxStream<'static, Result<LeaseEvent, SubnetError>>;

async fn next(stream: &mut Stream) -> Result<LeaseEvent, SubnetError> {
    let next = tokio::time::timeout(PATIENCE, stream.next()).await;
    next.expect("the watch reports something in time").expect("the watch never ends")
}

async fn snapshot(store: &FileSubnets) -> BTreeMap<LeaseKey, Record> {
    let records = reset(&mut store.watch()).await;
    records.into_iter().map(|record| (record.key.clone(), record)).collect()
}

/// Returns the first list of a watch, or the next one after an error.
async fn reset(watch: &mut Stream) -> Vec<Record> {
    loop {
        match next(watch).await {
            Ok(LeaseEvent::Reset(records)) => return records,
            Ok(other) => panic!("first comes a Reset, not {other:?}"),
            // The store is unavailable, or others on this machine use up the inotify instances.
            Err(error) => assert!(matches!(error, SubnetError::Unavailable { .. }), "{}", chain(&error)),
        }
    }
}

fn config() -> NetworkConfig {
    NetworkConfig::parse(CONFIG.as_bytes(), Allocation::Pool).unwrap()
}
