//! Watches the directory through inotify: the kernel reports file names, and the files are read and compared.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::lease::{LeaseEvent, LeaseKey, OldestRecords, Record};
use flannel_core::subnet::SubnetError;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use tokio::sync::mpsc;

use crate::dir::key_of;
use crate::error::{fault, fault_with, joined};
use crate::reader::{Loaded, or_bad};
use crate::store::Store;
use crate::wire::WallTime;

/// Returns all records of a store, then the changes.
pub(crate) fn watch(store: Arc<Store>) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    watch_at_most(store, OldestRecords::LIMIT)
}

/// Like [`watch`], but returns only the oldest records up to the weight `most`. That is more than the agent keeps, so
/// that the agent detects that there are too many; it begins a new watch once it has room.
fn watch_at_most(store: Arc<Store>, most: usize) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    let watch = Watch {
        store,
        most,
        weight: 0,
        source: None,
        pause: None,
        seen: BTreeMap::new(),
        hasher: RandomState::new(),
        ends: BTreeSet::new(),
        ready: VecDeque::new(),
    };
    stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed()
}

const DOING: &str = "watching the leases";

/// The wait after a failure: doubles from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The longest sleep until a lease's end: tokio's timers stop in suspend, and the wall clock may be set.
const SLICE: Duration = Duration::from_secs(5);

/// The most events taken before their files are read: a file that is written constantly must not delay others.
const MAX_EVENTS: usize = 1024;

struct Watch {
    store: Arc<Store>,
    /// The weight limit of the reported records: see [`Record::weight`].
    most: usize,
    /// The weight of the records in `seen`.
    weight: usize,
    /// `None`: everything has to be read again.
    source: Option<Source>,
    /// The wait before that, if the last try failed.
    pause: Option<Duration>,
    /// The reported records.
    seen: BTreeMap<LeaseKey, Seen>,
    /// Makes [`Seen::digest`], with a random key: nobody can write different contents with an equal hash.
    hasher: RandomState,
    /// When the reported leases end.
    ends: BTreeSet<(WallTime, LeaseKey)>,
    /// Events that are still to be returned.
    ready: VecDeque<LeaseEvent>,
}

/// A record that was read.
struct Found {
    record: Record,
    seen: Seen,
}

/// What is kept of a reported record. Small: there is one for each record of the store.
struct Seen {
    /// A hash of the contents: a file with the same hash has not changed.
    digest: u64,
    /// [`Record::weight`].
    weight: usize,
    expires: Option<WallTime>,
}

/// The reason to look.
enum Wake {
    /// It is time to look for leases that ended.
    Time,
    /// These files changed.
    Changed(BTreeSet<OsString>),
    /// An event was missed, or the directory was replaced.
    Gap,
}

impl Watch {
    async fn next(&mut self) -> Result<LeaseEvent, SubnetError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let result = match &mut self.source {
                None => self.begin().await,
                Some(source) => match wake(source, self.ends.first().map(|(end, _)| *end)).await {
                    Ok(wake) => self.look(wake).await,
                    Err(error) => Err(fault(DOING, self.store.dir.leases(), error)),
                },
            };
            if let Err(error) = result {
                self.source = None;
                self.pause = Some(self.pause.map_or(PAUSES.0, |pause| (pause * 2).min(PAUSES.1)));
                return Err(error);
            }
        }
    }

    /// Reads everything. The inotify watch starts before, so that no change is missed.
    async fn begin(&mut self) -> Result<(), SubnetError> {
        if let Some(pause) = self.pause {
            tokio::time::sleep(pause).await;
        }
        let source = Source::open(&self.store)?;
        let (store, most, hasher) = (Arc::clone(&self.store), self.most, self.hasher.clone());
        let read = move || {
            let now = WallTime::now();
            let mut oldest = OldestRecords::within(most);
            let prepare = |key, read| Found::of(&store, key, or_bad(read), now, &hasher);
            store.dir.each(prepare, |found| oldest.push(found))?;
            Ok(oldest.finish())
        };
        let mut all = joined(DOING, tokio::task::spawn_blocking(read).await)?;
        all.sort_unstable_by(|a, b| a.record.age().cmp(&b.record.age()));
        let end = |found: &Found| found.seen.expires.map(|end| (end, found.record.key.clone()));
        self.ends = all.iter().filter_map(end).collect();
        self.weight = all.iter().map(|found| found.seen.weight).sum();
        let (records, seen): (Vec<_>, Vec<_>) = all.into_iter().map(|Found { record, seen }| (record, seen)).unzip();
        self.seen = records.iter().map(|record| record.key.clone()).zip(seen).collect();
        self.ready.clear();
        self.ready.push_back(LeaseEvent::Reset(records));
        self.source = Some(source);
        self.pause = None;
        Ok(())
    }

    async fn look(&mut self, wake: Wake) -> Result<(), SubnetError> {
        match wake {
            Wake::Time => self.drop_ended(),
            Wake::Gap => self.source = None,
            Wake::Changed(names) => {
                let store = Arc::clone(&self.store);
                let read = move || -> Result<Vec<_>, SubnetError> {
                    let load = |name: &OsString| Ok((key_of(name), store.dir.load(name)?));
                    names.iter().map(load).collect()
                };
                let changed = joined(DOING, tokio::task::spawn_blocking(read).await)?;
                let now = WallTime::now();
                for (key, loaded) in changed {
                    if let Some(key) = key {
                        self.fold(key, loaded, now);
                    }
                }
            }
        }
        Ok(())
    }

    fn drop_ended(&mut self) {
        let now = WallTime::now();
        while let Some((end, _)) = self.ends.first()
            && *end <= now
            && let Some((_, key)) = self.ends.pop_first()
        {
            self.forget(key);
        }
    }

    /// Reports that a record is gone, if it was reported.
    fn forget(&mut self, key: LeaseKey) {
        if let Some(old) = self.seen.remove(&key) {
            self.weight -= old.weight;
            old.expires.map(|end| self.ends.remove(&(end, key.clone())));
            self.ready.push_back(LeaseEvent::Remove(key));
        }
    }

    /// Handles the present contents of a file, and reports them if they changed. A record without room counts as
    /// removed.
    fn fold(&mut self, key: LeaseKey, loaded: Option<Loaded>, now: WallTime) {
        let fresh = loaded.and_then(|loaded| Found::of(&self.store, key.clone(), loaded, now, &self.hasher));
        let old = self.seen.get(&key);
        if let (Some(old), Some(fresh)) = (old, &fresh)
            && old.digest == fresh.seen.digest
        {
            return;
        }
        let others = self.weight - old.map_or(0, |old| old.weight);
        let Some(fresh) = fresh.filter(|fresh| others.saturating_add(fresh.seen.weight) <= self.most) else {
            return self.forget(key);
        };
        self.weight = others + fresh.seen.weight;
        if let Some(end) = old.and_then(|old| old.expires) {
            self.ends.remove(&(end, key.clone()));
        }
        self.ends.extend(fresh.seen.expires.map(|end| (end, key.clone())));
        self.ready.push_back(LeaseEvent::Upsert(fresh.record));
        self.seen.insert(key, fresh.seen);
    }
}

impl Found {
    /// Returns the contents of a file, or `None` if its record has expired.
    fn of(store: &Store, key: LeaseKey, loaded: Loaded, now: WallTime, hasher: &RandomState) -> Option<Self> {
        let digest = hasher.hash_one(&loaded);
        let (record, expires) = match loaded {
            Ok(entry) if entry.is_expired(now) => return None,
            Ok(entry) => {
                let (created, expires) = (entry.created, entry.expires);
                (Record::of(store.lease(key, entry), created), expires)
            }
            // The creation time of a bad record is unknown: it counts as the newest.
            Err(bad) => (Record::bad(key, u64::MAX, bad), None),
        };
        let seen = Seen { digest, weight: record.weight(), expires };
        Some(Self { record, seen })
    }
}

impl Borrow<Record> for Found {
    fn borrow(&self) -> &Record {
        &self.record
    }
}

/// Waits until there is something to do. Cancel safe.
async fn wake(source: &mut Source, end: Option<WallTime>) -> io::Result<Wake> {
    let time = async {
        match end {
            Some(end) => tokio::time::sleep(end.since(WallTime::now()).min(SLICE)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = time => Ok(Wake::Time),
        wake = source.wakes.recv() => wake.unwrap_or(Ok(Wake::Gap)),
    }
}

/// The kernel's events of the directory, read by a thread: this needs no unsafe code and works with any tokio runtime.
struct Source {
    /// At most one: until it is received, events queue in the kernel, which reports an overflow.
    wakes: mpsc::Receiver<io::Result<Wake>>,
    /// Closed with this value, which ends the thread.
    _stop: UnixStream,
}

impl Source {
    fn open(store: &Store) -> Result<Self, SubnetError> {
        let (root, leases) = (store.dir.root(), store.dir.leases());
        let failed = |error| fault(DOING, leases, error);
        let inotify = watch_dirs(root, leases).map_err(|errno| match errno {
            Errno::EMFILE => fault_with(DOING, leases, "raise fs.inotify.max_user_instances", errno.into()),
            Errno::ENOSPC => fault_with(DOING, leases, "raise fs.inotify.max_user_watches", errno.into()),
            _ => failed(errno.into()),
        })?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let (sender, wakes) = mpsc::channel(1);
        let thread = std::thread::Builder::new().name("flannel-leases".to_owned());
        thread.spawn(move || follow(&inotify, &stopped, &sender)).map_err(failed)?;
        Ok(Self { wakes, _stop: stop })
    }
}

fn watch_dirs(root: &Path, leases: &Path) -> nix::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let of_itself = AddWatchFlags::IN_ONLYDIR | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF;
    let of_files = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_ATTRIB;
    inotify.add_watch(leases, of_itself | of_files)?;
    // Moving the store's directory moves its leases without an event of their own.
    inotify.add_watch(root, of_itself)?;
    Ok(inotify)
}

/// The thread's function: returns when the other end of `stopped` is closed or the receiver is dropped.
fn follow(inotify: &Inotify, stopped: &UnixStream, sender: &mpsc::Sender<io::Result<Wake>>) {
    loop {
        let mut fds =
            [PollFd::new(inotify.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, PollTimeout::NONE);
        if fds[1].any().unwrap_or(false) {
            return;
        }
        let wake = match polled.and_then(|_| changes(inotify)) {
            Ok(None) | Err(Errno::EINTR) => continue,
            Ok(Some(wake)) => Ok(wake),
            Err(errno) => Err(errno.into()),
        };
        let is_last = wake.is_err();
        if sender.blocking_send(wake).is_err() || is_last {
            return;
        }
    }
}

/// Returns the kernel's pending events.
fn changes(inotify: &Inotify) -> nix::Result<Option<Wake>> {
    let (mut names, mut taken) = (BTreeSet::new(), 0);
    while taken < MAX_EVENTS {
        let events = match inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(errno),
        };
        taken += events.len();
        for event in events {
            if is_gap(&event) {
                return Ok(Some(Wake::Gap));
            }
            names.extend(event.name.filter(|name| key_of(name).is_some()));
        }
    }
    Ok((!names.is_empty()).then_some(Wake::Changed(names)))
}

fn is_gap(event: &InotifyEvent) -> bool {
    let gaps = AddWatchFlags::IN_Q_OVERFLOW
        | AddWatchFlags::IN_UNMOUNT
        | AddWatchFlags::IN_IGNORED
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    event.mask.intersects(gaps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileSubnets, Options};
    use flannel_core::lease::{Json, LeaseAttrs, RECORD_BYTES};
    use flannel_core::net::Dual;
    use flannel_core::subnet::{NodeIdentity, SubnetManager, Want};

    #[test]
    fn a_directory_that_is_written_without_end_is_read_after_so_many_events_and_none_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        inotify.add_watch(dir.path(), AddWatchFlags::IN_CREATE).unwrap();
        let files = 3 * MAX_EVENTS;
        for n in 0..files {
            std::fs::write(dir.path().join(format!("node-{n}.json")), "").unwrap();
        }
        let mut found = BTreeSet::new();
        let mut reads = 0;
        while let Some(wake) = changes(&inotify).unwrap() {
            let Wake::Changed(names) = wake else { panic!("a gap") };
            // A read of the kernel's queue returns what fits into 4 KiB: fewer than 256 events.
            assert!(names.len() < MAX_EVENTS + 256, "{}", names.len());
            found.extend(names);
            reads += 1;
        }
        assert!(reads >= 3 && found.len() == files, "{} names in {reads} reads", found.len());
    }

    #[tokio::test]
    async fn of_too_many_files_the_oldest_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileSubnets::open(dir.path(), Options::default()).unwrap();
        store.put_config_json(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).await.unwrap();
        let acquire = async |name: &str| {
            let public_ip = Dual { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
            let want = Want::new(LeaseAttrs::new(public_ip));
            store.acquire(&NodeIdentity::new(name).unwrap(), want).await.unwrap()
        };
        for name in ["d", "c", "b"] {
            acquire(name).await;
        }
        let mut watch = watch_at_most(Arc::new(Store::open(dir.path().to_owned(), Options::default()).unwrap()), 2);
        let Some(Ok(LeaseEvent::Reset(records))) = watch.next().await else { panic!("no reset") };
        assert_eq!(records.iter().map(|record| record.key.as_str()).collect::<Vec<_>>(), ["d.json", "c.json"]);
        let other = acquire("a").await;
        let known = acquire("c").await;
        store.release(other).await.unwrap();
        store.release(known).await.unwrap();
        loop {
            match watch.next().await.unwrap().unwrap() {
                LeaseEvent::Upsert(record) => assert_eq!(record.key.as_str(), "c.json"),
                LeaseEvent::Remove(key) => break assert_eq!(key.as_str(), "c.json"),
                other => panic!("{other:?}"),
            }
        }
    }
    #[tokio::test]
    async fn large_records_count_as_several() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileSubnets::open(dir.path(), Options::default()).unwrap();
        store.put_config_json(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).await.unwrap();
        let acquire = async |name: &str, bytes: usize| {
            let public_ip = Dual { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
            let v4 = Json::parse(&format!("\"{}\"", "x".repeat(bytes))).ok();
            let want = Want::new(LeaseAttrs::new(public_ip).with_backend("", Dual { v4, v6: None }));
            store.acquire(&NodeIdentity::new(name).unwrap(), want).await.unwrap()
        };
        acquire("a", 1).await;
        let mut watch = watch_at_most(Arc::new(Store::open(dir.path().to_owned(), Options::default()).unwrap()), 9);
        let Some(Ok(LeaseEvent::Reset(records))) = watch.next().await else { panic!("no reset") };
        assert_eq!(records.len(), 1);
        let mut next = async || watch.next().await.unwrap().unwrap();
        // Each of these counts as five.
        acquire("b", 4 * RECORD_BYTES).await;
        assert!(matches!(next().await, LeaseEvent::Upsert(record) if record.key.as_str() == "b.json"));
        acquire("c", 4 * RECORD_BYTES).await;
        acquire("d", 1).await;
        assert!(matches!(next().await, LeaseEvent::Upsert(record) if record.key.as_str() == "d.json"));
        // A record that grew is not left in its old form.
        acquire("a", 4 * RECORD_BYTES).await;
        assert_eq!(next().await, LeaseEvent::Remove(LeaseKey::new("a.json")));
    }
}
