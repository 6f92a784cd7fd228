//! When the state file is written, and when it is read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

use super::*;
use crate::keeper::{PACE, SETTLE};

#[tokio::test(start_paused = true)]
async fn changes_are_gathered_and_writes_keep_their_distance() {
    let bed = Bed::new();
    let cached = bed.open();
    let (_, mut watch) = begun(&cached).await;
    drive(&mut watch, SETTLE - Duration::from_millis(100)).await;
    assert!(!bed.path().exists());
    drive(&mut watch, Duration::from_millis(200)).await;
    drive(&mut watch, Duration::from_millis(10)).await;
    let first = fs::read_to_string(bed.path()).unwrap();
    bed.store.insert([peer(3)]);
    drive(&mut watch, PACE - Duration::from_secs(1)).await;
    assert_eq!(fs::read_to_string(bed.path()).unwrap(), first);
    drive(&mut watch, Duration::from_secs(2)).await;
    let second = fs::read_to_string(bed.path()).unwrap();
    assert!(second.contains("node-3"), "{second}");
    // A renewal of another node is not a change.
    let modified = || fs::metadata(bed.path()).unwrap().modified().unwrap();
    let before = modified();
    bed.store.insert([peer(3).fenced(Fence::new("8"))]);
    drive(&mut watch, 2 * PACE).await;
    assert_eq!(modified(), before);
    let mode = fs::metadata(bed.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_over_a_file_before_all_is_known() {
    let bed = Bed::new();
    bed.saved().await;
    let before = fs::read(bed.path()).unwrap();
    let cached = bed.open();
    cached.network_config().await.unwrap();
    cached.acquire(&node(), want()).await.unwrap();
    cached.flush().await.unwrap();
    assert_eq!(fs::read(bed.path()).unwrap(), before);
}

#[tokio::test(start_paused = true)]
async fn two_watches_do_not_undo_each_other() {
    let bed = Bed::new();
    let cached = bed.open();
    let (_, mut ahead) = begun(&cached).await;
    let mut behind = cached.watch();
    behind.next().await.unwrap().unwrap();
    bed.store.insert([peer(3)]);
    bed.store.delete(&peer(3).key);
    for _ in 0..2 {
        ahead.next().await.unwrap().unwrap();
    }
    behind.next().await.unwrap().unwrap();
    cached.flush().await.unwrap();
    assert!(!fs::read_to_string(bed.path()).unwrap().contains("node-3"));
    // Once the first is dropped, the other one takes over with its next snapshot.
    drop(ahead);
    bed.store.insert([peer(4)]);
    bed.store.cut_watches();
    while !matches!(behind.next().await.unwrap(), Ok(LeaseEvent::Reset(_))) {}
    cached.flush().await.unwrap();
    assert!(fs::read_to_string(bed.path()).unwrap().contains("node-4"));
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_left_of_a_write_is_no_matter_and_cleared() {
    let bed = Bed::new();
    bed.saved().await;
    let whole = fs::read(bed.path()).unwrap();
    let leftover = |name: &str, bytes: &[u8]| {
        let path = bed.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        #[expect(clippy::disallowed_methods, reason = "file times are of the wall clock")]
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        path
    };
    // Killed before the rename: the old file is used.
    let torn = leftover(".state.json.0123456789abcdef.tmp", &whole[..whole.len() / 2]);
    let other = leftover(".state.json.swp", b"an editor's");
    let fresh = bed.dir.path().join(".state.json.fedcba9876543210.tmp");
    fs::write(&fresh, "").unwrap();
    bed.store.outage();
    assert_eq!(bed.open().network_config().await.unwrap(), config());
    bed.store.recover();
    bed.store.insert([peer(3)]);
    bed.saved().await;
    assert!(!torn.exists() && !fresh.exists() && other.exists());
    let names = fs::read_dir(bed.dir.path()).unwrap().count();
    assert_eq!(names, 2, "a temporary file was left");
    assert!(fs::read_to_string(bed.path()).unwrap().contains("node-3"));
    fs::write(&fresh, "").unwrap();
    bed.open().erase().unwrap();
    bed.open().erase().unwrap();
    assert_eq!(fs::read_dir(bed.dir.path()).unwrap().count(), 1, "only the editor's is left");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_not_whole_or_not_ours_is_ignored() {
    let bed = Bed::new();
    bed.store.insert([peer(3)]);
    assert_eq!(bed.open().check(), Ok(false));
    bed.saved().await;
    assert_eq!(bed.open().check(), Ok(true));
    let good = fs::read_to_string(bed.path()).unwrap();
    bed.store.outage();
    let ignored = |why: &str| {
        let cached = bed.open();
        let why = why.to_owned();
        async move {
            assert!(cached.check().is_err(), "{why}");
            assert!(cached.network_config().await.is_err(), "{why}");
            assert!(cached.previous(&node()).await.is_err(), "{why}");
            let first = cached.watch().next().await.unwrap();
            assert!(first.is_err(), "{why}: {first:?}");
        }
    };
    // Cut off anywhere except in the white space at its end.
    for len in (0..good.trim_end().len()).step_by(7).chain([good.trim_end().len() - 1]) {
        fs::write(bed.path(), &good[..len]).unwrap();
        ignored(&format!("cut at {len}")).await;
    }
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"version\":1,", ""),
        ("{\"version\"", "[{\"version\""),
        ("\"Network\":\"10.5.0.0/16\"", "\"Network\":\"10.5.0.0/99\""),
        ("\"PublicIP\":\"", "\"PublicIP\":\"x"),
        ("10.5.3.0/24", "10.5.3.1/24"),
        ("\"records\"", "\"more\":1,\"records\""),
        ("\"node-3\"", "\"a\""),
        ("\"node\":\"a\"", "\"node\":\"../a\""),
        ("\n", "}\n"),
    ] {
        assert!(good.contains(from), "{from} in {good}");
        fs::write(bed.path(), good.replace(from, to)).unwrap();
        ignored(&format!("{from} for {to}")).await;
    }
    fs::write(bed.path(), b"\xff\xfe").unwrap();
    ignored("no text").await;
    fs::write(bed.path(), &good).unwrap();
    fs::set_permissions(bed.path(), fs::Permissions::from_mode(0o622)).unwrap();
    ignored("others may write").await;
    fs::set_permissions(bed.path(), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(bed.open_as("another").network_config().await.is_err(), "another store's");
    assert!(bed.open().network_config().await.is_ok(), "as it was");
    // White space at the end makes no difference.
    let padded = |len: u64| [good.as_bytes(), &vec![b' '; len as usize - good.len()]].concat();
    fs::write(bed.path(), padded(MAX_BYTES)).unwrap();
    assert_eq!(bed.open().check(), Ok(true));
    fs::write(bed.path(), padded(MAX_BYTES + 1)).unwrap();
    let why = bed.open().check().unwrap_err();
    assert!(why.contains(&format!("larger than {} bytes", MAX_BYTES)), "{why}");
    ignored("too large").await;
    fs::remove_file(bed.path()).unwrap();
    fs::create_dir(bed.path()).unwrap();
    ignored("a directory").await;
}

#[tokio::test(start_paused = true)]
async fn a_bad_file_is_overwritten_with_the_next_change() {
    let bed = Bed::new();
    fs::write(bed.path(), "{").unwrap();
    bed.store.fail_next([Fault::Unavailable]);
    let cached = bed.open();
    assert!(cached.network_config().await.is_err());
    let _begun = begun(&cached).await;
    cached.flush().await.unwrap();
    bed.store.outage();
    assert!(bed.open().network_config().await.is_ok());
}
