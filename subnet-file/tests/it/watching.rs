//! What the watch does with time, floods and a directory that goes away.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::{SubnetError, SubnetManager};

use super::{acquire, lease_path, new_store, next, snapshot};

fn record(subnet: &str, expires: u128) -> String {
    format!(r#"{{"PublicIP":"1.2.3.4","PublicIPv6":null,"Subnet":"{subnet}","Created":1,"ExpiresUnixMs":{expires}}}"#)
}

fn unix_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()
}

#[tokio::test]
async fn a_lease_goes_when_its_time_has_come_and_not_before() {
    let (dir, store) = new_store().await;
    let end = unix_ms() + 400;
    fs::write(lease_path(dir.path(), "brief"), record("10.5.64.0/24", end)).unwrap();
    let lasting = acquire(&store, "lasting").await;
    let mut watch = store.watch();
    let LeaseEvent::Reset(records) = next(&mut watch).await.unwrap() else { panic!("first comes a Reset") };
    assert_eq!(records.len(), 2, "{records:?}");
    assert_ne!(lasting.subnets.v4.unwrap().to_string(), "10.5.64.0/24");
    let LeaseEvent::Remove(key) = next(&mut watch).await.unwrap() else { panic!("the lease has to go") };
    assert_eq!(key.as_str(), "brief.json");
    assert!((end..end + 1000).contains(&unix_ms()), "{} ms late", unix_ms() - end);
    acquire(&store, "other").await;
    assert!(!lease_path(dir.path(), "brief").exists(), "the next to acquire clears it away");
    let event = next(&mut watch).await.unwrap();
    assert!(matches!(&event, LeaseEvent::Upsert(record) if record.key.as_str() == "other.json"), "{event:?}");
}

#[tokio::test]
async fn what_was_written_again_as_it_was_is_no_news() {
    let (dir, store) = new_store().await;
    acquire(&store, "a").await;
    let mut watch = store.watch();
    next(&mut watch).await.unwrap();
    let path = lease_path(dir.path(), "a");
    let moved = dir.path().join("leases/.copy");
    fs::copy(&path, &moved).unwrap();
    fs::rename(&moved, &path).unwrap();
    fs::write(dir.path().join("leases/README"), "not ours").unwrap();
    fs::write(dir.path().join("leases/.tmp-new"), "half a rec").unwrap();
    acquire(&store, "b").await;
    let event = next(&mut watch).await.unwrap();
    assert!(matches!(&event, LeaseEvent::Upsert(record) if record.key.as_str() == "b.json"), "{event:?}");
}

#[tokio::test]
async fn an_overflow_of_the_kernels_queue_leads_to_a_reset() {
    let (dir, store) = new_store().await;
    acquire(&store, "a").await;
    let mut watch = store.watch();
    next(&mut watch).await.unwrap();
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    // Two by turns, as equal events in a row count once. Nobody reads the stream meanwhile.
    let files = ["x", "y"].map(|name| lease_path(dir.path(), name));
    for n in 0..limit.trim().parse::<usize>().unwrap() + 4096 {
        fs::write(&files[n % 2], "").unwrap();
    }
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    loop {
        match next(&mut watch).await.unwrap() {
            LeaseEvent::Reset(records) => {
                assert_eq!(records.len(), 1, "{records:?}");
                return;
            }
            LeaseEvent::Upsert(_) | LeaseEvent::Remove(_) => {}
        }
    }
}

#[tokio::test]
async fn a_store_that_is_moved_away_is_trouble_and_not_emptiness() {
    let (dir, store) = new_store().await;
    let moved = tempfile::tempdir().unwrap();
    let mut watch = store.watch();
    next(&mut watch).await.unwrap();
    let lease = acquire(&store, "a").await;
    next(&mut watch).await.unwrap();
    let elsewhere = moved.path().join("store");
    fs::rename(dir.path(), &elsewhere).unwrap();
    let error = next(&mut watch).await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
    assert!(store.network_config().await.is_err() && store.renew(&lease).await.is_err());
    fs::rename(&elsewhere, dir.path()).unwrap();
    loop {
        match next(&mut watch).await {
            Ok(LeaseEvent::Reset(records)) => {
                assert_eq!(records.len(), 1, "{records:?}");
                break;
            }
            Ok(other) => panic!("unexpected: {other:?}"),
            Err(_) => {}
        }
    }
    store.renew(&lease).await.unwrap();
}

#[tokio::test]
async fn a_dropped_watch_leaves_no_thread_behind() {
    let (_dir, store) = new_store().await;
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.filter(|name| name.starts_with("flannel-leases")).count()
    };
    for _ in 0..200 {
        snapshot(&store).await;
    }
    let deadline = std::time::Instant::now() + super::PATIENCE;
    // Other tests have a few.
    while threads() > 50 {
        assert!(std::time::Instant::now() < deadline, "{} threads of 200 watches are left", threads());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
