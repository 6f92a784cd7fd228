//! Several processes on one directory: this binary runs itself again in a given role.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::SubnetManager;
use flannel_subnet_file::{FileSubnets, Options};

use super::{acquire, new_store, next, node, reset, snapshot, want};

const PART: &str = "FLANNEL_SUBNET_FILE_PART";
const DIR: &str = "FLANNEL_SUBNET_FILE_DIR";
const NAME: &str = "FLANNEL_SUBNET_FILE_NAME";

/// Starts this binary again in a role on `dir`.
pub(crate) fn start(part: &str, dir: &Path, name: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "processes::child_process", "--nocapture", "--test-threads=1"]);
    command.envs([(PART, part), (NAME, name)]).env(DIR, dir).stdout(Stdio::null());
    command.spawn().unwrap()
}

/// Not a test: the other tests start it. Without a role it does nothing.
#[test]
fn child_process() {
    let Ok(part) = std::env::var(PART) else { return };
    let (dir, name) = (PathBuf::from(std::env::var_os(DIR).unwrap()), std::env::var(NAME).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        match part.as_str() {
            "eight nodes" => {
                // Sixty-four writes may wait for each other on a busy disk.
                let options = Options::default().with_lock_wait(Duration::from_secs(60));
                let store = FileSubnets::open(&dir, options).unwrap();
                let names: Vec<String> = (0..8).map(|n| format!("{name}-{n}")).collect();
                futures_util::future::join_all(names.iter().map(|name| acquire(&store, name))).await;
            }
            "churn" => {
                let store = FileSubnets::open(&dir, Options::default()).unwrap();
                for n in 0u64.. {
                    let lease = acquire(&store, &format!("{name}-{}", n % 5)).await;
                    let lease = store.renew(&lease).await.unwrap();
                    if n % 3 == 0 {
                        store.release(lease).await.unwrap();
                    }
                }
            }
            "scale" => super::scale::measure(&dir).await,
            other => panic!("no such part: {other}"),
        }
    });
}

#[tokio::test]
async fn racing_processes_get_subnets_of_their_own() {
    let (dir, store) = new_store().await;
    let mut children: Vec<Child> = (0..8).map(|n| start("eight nodes", dir.path(), &format!("process-{n}"))).collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success(), "every one of 64 nodes has to get one of 64 subnets");
    }
    let records = snapshot(&store).await;
    let subnets: std::collections::BTreeSet<_> =
        records.values().map(|record| record.lease.as_ref().unwrap().subnets.v4.unwrap()).collect();
    let created: std::collections::BTreeSet<_> = records.values().map(|record| record.created).collect();
    assert_eq!((records.len(), subnets.len(), created.len()), (64, 64, 64), "{subnets:?}");
}

#[tokio::test]
async fn a_watch_sees_what_another_process_writes() {
    let (dir, store) = new_store().await;
    let mut watch = store.watch();
    assert!(reset(&mut watch).await.is_empty());
    assert!(start("eight nodes", dir.path(), "peer").wait().unwrap().success());
    let written = Instant::now();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 8 {
        match next(&mut watch).await.unwrap() {
            LeaseEvent::Upsert(record) => assert!(seen.insert(record.lease.unwrap().subnets), "one event a change"),
            other => panic!("unexpected: {other:?}"),
        }
    }
    println!("eight records of another process seen {:?} after it ended", written.elapsed());
}

#[tokio::test]
async fn processes_killed_at_any_moment_leave_nothing_half_done() {
    let (dir, store) = new_store().await;
    let first = dir.path().join("leases/victim-0.json");
    for n in 0..20 {
        let _ = std::fs::remove_file(&first);
        let mut child = start("churn", dir.path(), "victim");
        let deadline = Instant::now() + super::PATIENCE;
        while !first.exists() {
            assert!(Instant::now() < deadline, "the victim never wrote anything");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // A little longer each time, to kill it at different points.
        tokio::time::sleep(Duration::from_micros(330 * n)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let records = snapshot(&store).await;
        assert!(records.values().all(|record| record.lease.is_ok()), "{records:?}");
        let lease = store.acquire(&node("survivor"), want()).await.unwrap();
        store.release(lease).await.unwrap();
    }
}
