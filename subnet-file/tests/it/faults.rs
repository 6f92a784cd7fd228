//! Broken files and broken disks.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use flannel_core::lease::{Json, LeaseEvent, Scalar};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager};
use flannel_subnet_file::{FileSubnets, LeaseTime, Options, Ttl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use super::{acquire, chain, config, lease_path, new_store, next, node, snapshot, store_in, want};

#[tokio::test]
async fn what_is_no_record_is_present_and_bad_beside_healthy_ones() {
    let (dir, store) = new_store().await;
    let healthy = acquire(&store, "healthy").await;
    let leases = dir.path().join("leases");
    fs::write(leases.join("empty.json"), "").unwrap();
    fs::write(leases.join("torn.json"), r#"{"PublicIP":"1.2.3."#).unwrap();
    fs::write(leases.join("large.json"), vec![b' '; 1 << 20]).unwrap();
    fs::write(leases.join("bad name.json"), "{}").unwrap();
    fs::write(leases.join(std::ffi::OsStr::from_bytes(b"\xff.json")), "{}").unwrap();
    fs::create_dir(leases.join("directory.json")).unwrap();
    nix::unistd::mkfifo(&leases.join("pipe.json"), Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("healthy.json", leases.join("link.json")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(leases.join("socket.json")).unwrap();
    let subnets = ["10.5.65.0/24", "10.5.66.0/24"].map(|text| text.parse().unwrap());
    let free = subnets.into_iter().find(|subnet| healthy.subnets.v4 != Some(*subnet)).unwrap();
    fs::write(leases.join("half.json"), format!(r#"{{"PublicIP":7,"Subnet":"{free}","Created":1}}"#)).unwrap();
    for ignored in [".tmp-new", "README", "x.json.swp", ".hidden.json"] {
        fs::write(leases.join(ignored), "{").unwrap();
    }
    let records = snapshot(&store).await;
    let bad: Vec<_> = records.values().filter(|record| record.lease.is_err()).map(|r| r.key.as_str()).collect();
    let expected = [
        "\\xff.json",
        "bad name.json",
        "directory.json",
        "empty.json",
        "half.json",
        "large.json",
        "link.json",
        "pipe.json",
        "socket.json",
        "torn.json",
    ];
    assert_eq!(bad, expected);
    assert_eq!(records.len(), expected.len() + 1);
    for name in ["directory.json", "link.json", "pipe.json", "socket.json"] {
        let reason =
            &records.values().find(|record| record.key.as_str() == name).unwrap().lease.as_ref().unwrap_err().reason;
        assert_eq!(reason, "not a regular file", "{name}");
    }
    assert!(store.renew(&healthy).await.is_ok());
    for n in 0..62 {
        acquire(&store, &format!("node-{n}")).await;
    }
    let full = store.acquire(&node("late"), want()).await.unwrap_err();
    assert!(matches!(full, SubnetError::Exhausted(_)), "the subnet of half.json is known, and not free: {full}");
}

#[tokio::test]
async fn without_its_directory_no_lease_counts_as_lost() {
    let (dir, store) = new_store().await;
    let lease = acquire(&store, "a").await;
    let (leases, elsewhere) = (dir.path().join("leases"), dir.path().join("elsewhere"));
    fs::rename(&leases, &elsewhere).unwrap();
    let renewed = store.renew(&lease).await;
    assert!(matches!(renewed, Err(SubnetError::Unavailable { .. })), "{renewed:?}");
    let previous = store.previous(&node("a")).await;
    assert!(matches!(previous, Err(SubnetError::Unavailable { .. })), "{previous:?}");
    fs::rename(&elsewhere, &leases).unwrap();
    assert!(store.renew(&lease).await.is_ok());
}

#[tokio::test]
async fn a_node_mends_its_own_damaged_record() {
    let (dir, store) = new_store().await;
    let lease = acquire(&store, "a").await;
    fs::write(lease_path(dir.path(), "a"), "").unwrap();
    let lost = store.renew(&lease).await.unwrap_err();
    assert!(matches!(&lost, SubnetError::Lost(text) if text.contains("damaged")), "{lost}");
    assert_eq!(store.previous(&node("a")).await.unwrap(), []);
    store.release(lease.clone()).await.unwrap();
    assert!(lease_path(dir.path(), "a").exists(), "what is damaged may be another's");
    let preferring = want().preferring(lease.subnets);
    assert_eq!(store.acquire(&node("a"), preferring).await.unwrap().subnets, lease.subnets);
}

#[test]
fn a_record_of_this_node_that_cannot_be_read_is_neither_lost_nor_replaced() {
    on_a_disk_of_its_own("size=1m", |disk| async move {
        let store = store_in(&disk).await;
        let lease = acquire(&store, "a").await;
        let path = lease_path(&disk, "a");
        // A file whose first page cannot be read.
        mount(Some("/proc/self/mem"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("a broken file");
        let errors = [
            store.renew(&lease).await.unwrap_err(),
            store.previous(&node("a")).await.unwrap_err(),
            store.acquire(&node("a"), want()).await.unwrap_err(),
            store.release(lease.clone()).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(&error, SubnetError::Unavailable { .. }), "{error:?}");
            assert!(chain(&error).contains("a.json"), "{}", chain(&error));
        }
        nix::mount::umount(&path).unwrap();
        assert_eq!(store.renew(&lease).await.unwrap().subnets, lease.subnets);
    });
}

#[test]
fn no_new_subnet_is_given_while_the_record_of_another_node_cannot_be_read() {
    on_a_disk_of_its_own("size=1m", |disk| async move {
        let store = store_in(&disk).await;
        let lease = acquire(&store, "a").await;
        let other = acquire(&store, "b").await;
        let path = lease_path(&disk, "b");
        mount(Some("/proc/self/mem"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("a broken file");
        let wanted = want().preferring(other.subnets);
        let error = store.acquire(&node("c"), wanted.clone()).await.unwrap_err();
        assert!(matches!(&error, SubnetError::Unavailable { .. }), "{error:?}");
        assert!(chain(&error).contains("b.json"), "{}", chain(&error));
        // A node that has a subnet keeps it.
        assert_eq!(acquire(&store, "a").await.subnets, lease.subnets);
        nix::mount::umount(&path).unwrap();
        assert_ne!(store.acquire(&node("c"), wanted).await.unwrap().subnets, other.subnets);
    });
}

#[tokio::test]
async fn of_two_records_that_overlap_the_younger_gives_way() {
    let (dir, store) = new_store().await;
    let older = acquire(&store, "older").await;
    let younger = acquire(&store, "younger").await;
    let text = fs::read_to_string(lease_path(dir.path(), "younger")).unwrap();
    let [theirs, mine] = [&older, &younger].map(|lease| lease.subnets.v4.unwrap().to_string());
    fs::write(lease_path(dir.path(), "younger"), text.replace(&mine, &theirs)).unwrap();
    assert_eq!(acquire(&store, "older").await.subnets, older.subnets);
    assert_ne!(acquire(&store, "younger").await.subnets, older.subnets);
}

#[tokio::test]
async fn an_older_record_that_the_pool_would_not_give_out_costs_nobody_a_lease() {
    let (dir, store) = new_store().await;
    acquire(&store, "older").await;
    let younger = acquire(&store, "younger").await;
    let text = fs::read_to_string(lease_path(dir.path(), "older")).unwrap();
    let theirs = text.split("\"Subnet\":\"").nth(1).unwrap().split('"').next().unwrap();
    fs::write(lease_path(dir.path(), "older"), text.replace(theirs, "10.5.64.0/18")).unwrap();
    assert_eq!(acquire(&store, "younger").await.subnets, younger.subnets);
}

#[tokio::test]
async fn a_lost_lock_file_does_not_turn_the_order_of_creation_back() {
    let (dir, store) = new_store().await;
    for n in 0..3 {
        acquire(&store, &format!("node-{n}")).await;
    }
    fs::remove_file(dir.path().join("lock")).unwrap();
    acquire(&store, "late").await;
    let records = snapshot(&store).await;
    let newest = records.values().max_by_key(|record| record.created).unwrap();
    assert_eq!(newest.key.as_str(), "late.json", "{records:?}");
}

#[tokio::test]
async fn a_missing_configuration_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileSubnets::open(dir.path(), Options::default()).unwrap();
    for error in [store.network_config().await.unwrap_err(), store.acquire(&node("a"), want()).await.unwrap_err()] {
        let path = dir.path().join("config.json").display().to_string();
        assert!(
            matches!(&error, SubnetError::Unconfigured { at, reason } if *at == path && reason.contains("put_config"))
        );
    }
    let error = store.put_config_json(r#"{"Network":"10.5.0.1/33"}"#).await.unwrap_err().to_string();
    assert!(error.contains("config.json $.Network"), "{error}");
    assert!(!dir.path().join("config.json").exists(), "what does not parse is not written");
    store.put_config(&config()).await.unwrap();
    assert_eq!(store.network_config().await.unwrap(), config());
}

#[tokio::test]
async fn a_directory_that_is_missing_or_none_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for (path, remedy) in [(dir.path().join("none"), "create it"), (file, "name another path")] {
        let error = FileSubnets::open(&path, Options::default()).err().unwrap().to_string();
        assert!(error.contains(&path.display().to_string()) && error.contains(remedy), "{error}");
    }
}

#[tokio::test]
async fn a_lock_held_too_long_is_unavailable_and_names_the_lock() {
    let (dir, _store) = new_store().await;
    let options = Options::default().with_lock_wait(Duration::from_millis(50));
    let store = FileSubnets::open(dir.path(), options).unwrap();
    let lock = File::open(dir.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let error = store.acquire(&node("a"), want()).await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
    let text = chain(&error);
    assert!(text.contains(&dir.path().join("lock").display().to_string()) && text.contains("fuser"), "{text}");
    assert!(snapshot(&store).await.is_empty(), "readers need no lock");
    lock.unlock().unwrap();
    acquire(&store, "a").await;
}

#[tokio::test]
async fn what_nobody_could_read_is_not_written() {
    let (dir, store) = new_store().await;
    let mut want = want();
    want.attrs.backend_data.v4 = Some(Json::object(&[("x", Scalar::Text(&"x".repeat(4096)))]));
    let error = store.acquire(&node("a"), want).await.unwrap_err();
    assert!(matches!(error, SubnetError::Invalid { .. }), "{error:?}");
    let long = NodeIdentity::new(&"a".repeat(252)).unwrap();
    let error = store.acquire(&long, super::want()).await.unwrap_err();
    assert!(matches!(error, SubnetError::Unsupported(_)), "{error:?}");
    let mut lease = acquire(&store, "b").await;
    store.release(lease.clone()).await.unwrap();
    lease.key = flannel_core::lease::LeaseKey::new("../config.json");
    assert!(matches!(store.renew(&lease).await, Err(SubnetError::Lost(_))), "a key must not lead elsewhere");
    assert_eq!(fs::read_dir(dir.path().join("leases")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_lease_that_never_ends_has_no_end() {
    let (dir, _store) = new_store().await;
    let store = FileSubnets::open(dir.path(), Options::default().with_ttl(Ttl::Never)).unwrap();
    assert_eq!(acquire(&store, "a").await.expires, None);
    let ttl = Ttl::After(LeaseTime::new(Duration::from_secs(120)).unwrap());
    let options = Options::default().with_ttl(ttl);
    let clock = options.clock.clone();
    let store = FileSubnets::open(dir.path(), options).unwrap();
    let (before, end, after) = (clock.now(), acquire(&store, "a").await.expires.unwrap(), clock.now());
    let (least, most) = (Duration::from_secs(119), Duration::from_secs(120));
    // Never longer than the record says; the two clocks are read one after the other, which may cost a moment.
    assert!(end >= before.after(least) && end <= after.after(most), "{end:?}");
}

#[test]
fn a_full_disk_is_named_and_leaves_all_as_it_was() {
    on_a_disk_of_its_own("size=64k", |disk| async move {
        let store = store_in(&disk).await;
        let before = acquire(&store, "a").await;
        let filler = disk.join("filler");
        fs::write(&filler, vec![0; 1 << 20]).unwrap_err();
        let filled = [
            store.acquire(&node("b"), want()).await.unwrap_err(),
            store.renew(&before).await.unwrap_err(),
            store.put_config(&config()).await.unwrap_err(),
        ];
        for error in filled {
            assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
            let text = chain(&error);
            assert!(text.contains(&disk.display().to_string()) && text.contains("free space"), "{text}");
        }
        let mut names: Vec<_> = fs::read_dir(disk.join("leases")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["a.json"], "nothing half-written stays");
        assert_eq!(store.network_config().await.unwrap(), config());
        assert_eq!(store.previous(&node("a")).await.unwrap().remove(0).subnets, before.subnets);
        fs::remove_file(&filler).unwrap();
        acquire(&store, "b").await;
        store.renew(&before).await.unwrap();
    });
}

#[test]
fn a_read_only_disk_is_named_and_can_be_read() {
    on_a_disk_of_its_own("size=64k", |disk| async move {
        let store = store_in(&disk).await;
        let before = acquire(&store, "a").await;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &disk, None::<&str>, flags, None::<&str>).expect("remounting read-only");
        for error in [store.acquire(&node("b"), want()).await.unwrap_err(), store.renew(&before).await.unwrap_err()] {
            assert!(matches!(error, SubnetError::Denied { .. }), "{error:?}");
            let text = chain(&error);
            assert!(text.contains(&disk.display().to_string()) && text.contains("for writing"), "{text}");
        }
        let reopened = FileSubnets::open(&disk, Options::default()).unwrap();
        assert_eq!(reopened.previous(&node("a")).await.unwrap().remove(0).attrs, before.attrs);
        let LeaseEvent::Reset(records) = next(&mut reopened.watch()).await.unwrap() else { panic!("a Reset") };
        assert_eq!(records.len(), 1);
    });
}

/// Runs a test with a tmpfs that only its thread and its child threads can see, and that ends with them.
fn on_a_disk_of_its_own<F: Future<Output = ()>>(
    options: &'static str,
    test: impl FnOnce(std::path::PathBuf) -> F + Send,
) {
    let dir = tempfile::tempdir().unwrap();
    let run = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace: this test has to run as root");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("keeping mounts to ourselves");
        let path: &Path = dir.path();
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("mounting a small disk");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(path.to_owned()));
    };
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}
