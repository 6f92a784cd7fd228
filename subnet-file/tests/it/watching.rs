//! How the watch handles time, floods and a directory that disappears.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::{SubnetError, SubnetManager};

use super::{acquire, lease_path, new_store, next, reset};

fn record(subnet: &str, expires: u128) -> String {
    format!(r#"{{"PublicIP":"1.2.3.4","PublicIPv6":null,"Subnet":"{subnet}","Created":1,"ExpiresUnixMs":{expires}}}"#)
}

#[expect(clippy::disallowed_methods, reason = "records end by the wall clock")]
fn unix_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()
}

#[tokio::test]
async fn a_lease_goes_when_its_time_has_come_and_not_before() {
    let (dir, store) = new_store().await;
    let (path, minute) = (lease_path(dir.path(), "brief"), 60_000);
    fs::write(&path, record("10.5.64.0/24", unix_ms() + minute)).unwrap();
    let lasting = acquire(&store, "lasting").await;
    let mut watch = store.watch();
    let records = reset(&mut watch).await;
    assert_eq!(records.len(), 2, "{records:?}");
    assert_ne!(lasting.subnets.v4.unwrap().to_string(), "10.5.64.0/24");
    let end = unix_ms() + 400;
    let shorter = dir.path().join("shorter");
    fs::write(&shorter, record("10.5.64.0/24", end)).unwrap();
    fs::rename(&shorter, &path).unwrap();
    // A record that has already ended when it is read is not reported.
    let gone = loop {
        match next(&mut watch).await.unwrap() {
            LeaseEvent::Upsert(record) => assert_eq!(record.key.as_str(), "brief.json"),
            LeaseEvent::Remove(key) => break key,
            other => panic!("unexpected: {other:?}"),
        }
    };
    assert_eq!(gone.as_str(), "brief.json");
    assert!(unix_ms() >= end, "{} ms early", end - unix_ms());
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
    reset(&mut watch).await;
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
    reset(&mut watch).await;
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    // Two alternately, because equal consecutive events count once. The stream is not read meanwhile: the watch takes
    // fewer events from the kernel before it waits for a reader than are written beyond the limit.
    let files = ["x", "y"].map(|name| lease_path(dir.path(), name));
    for n in 0..limit.trim().parse::<usize>().unwrap() + 4096 {
        fs::write(&files[n % 2], "").unwrap();
    }
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    loop {
        if let LeaseEvent::Reset(records) = next(&mut watch).await.unwrap() {
            assert_eq!(records.len(), 1, "{records:?}");
            return;
        }
    }
}

#[tokio::test]
async fn a_store_that_is_moved_away_is_trouble_and_not_emptiness() {
    let (dir, store) = new_store().await;
    let moved = tempfile::tempdir().unwrap();
    let mut watch = store.watch();
    reset(&mut watch).await;
    let lease = acquire(&store, "a").await;
    next(&mut watch).await.unwrap();
    let elsewhere = moved.path().join("store");
    fs::rename(dir.path(), &elsewhere).unwrap();
    let error = next(&mut watch).await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
    assert!(store.network_config().await.is_err() && store.renew(&lease).await.is_err());
    fs::rename(&elsewhere, dir.path()).unwrap();
    assert_eq!(reset(&mut watch).await.len(), 1);
    store.renew(&lease).await.unwrap();
}

#[tokio::test]
async fn a_dropped_watch_leaves_no_thread_behind() {
    let (dir, store) = new_store().await;
    // Its entry in /proc/self/fdinfo: what one of this process's inotify instances watches.
    let inode = format!("ino:{:x} ", fs::metadata(dir.path()).unwrap().ino());
    let watched = || {
        let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
        let texts = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
        texts.filter(|text| text.contains(&inode)).count()
    };
    let mut watches: Vec<_> = (0..5).map(|_| store.watch()).collect();
    for watch in &mut watches {
        reset(watch).await;
    }
    assert_eq!(watched(), 5);
    drop(watches);
    // The thread owns the instance: it is closed when the thread ends.
    let deadline = Instant::now() + super::PATIENCE;
    while watched() > 0 {
        assert!(Instant::now() < deadline, "{} threads of 5 watches are left", watched());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
