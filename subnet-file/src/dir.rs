//! The directory: reads without a lock, writes under it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, DirEntry, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::iter;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::config::NetworkConfig;
use flannel_core::lease::{BadRecord, LeaseAttrs, LeaseKey};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, SubnetError};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::error::{fault, is_shortage};
use crate::wire::Entry;

/// The contents of a record's file.
pub(crate) type Loaded = Result<Entry, BadRecord>;

/// The paths of a store.
pub(crate) struct Dir {
    root: PathBuf,
    leases: PathBuf,
}

const SUFFIX: &str = ".json";

const READING: &str = "reading a lease";

/// The permissions of other users on directories, records and configuration, whatever the umask: read only.
const DIR_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;
/// Other users have no access to the lock: a user who can read a file can lock it.
const LOCK_MODE: u32 = 0o600;

/// Creates a directory and its missing parents.
pub(crate) fn make(dir: &Path) -> Result<(), SubnetError> {
    let made = DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir);
    made.map_err(|error| fault("creating the store's directory", dir, error))
}

impl Dir {
    pub(crate) fn open(root: PathBuf) -> Result<Self, SubnetError> {
        const DOING: &str = "opening the store's directory";
        let invalid = |reason: &str| SubnetError::Invalid { at: root.display().to_string(), reason: reason.to_owned() };
        match fs::metadata(&root) {
            Ok(metadata) if !metadata.is_dir() => return Err(invalid("not a directory; name another path")),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(invalid(
                    "no such directory; create it (mkdir -p) and write config.json into it, or mount its file system",
                ));
            }
            Err(error) => return Err(fault(DOING, &root, error)),
        }
        let leases = root.join("leases");
        match DirBuilder::new().mode(DIR_MODE).create(&leases) {
            Err(error) if !leases.is_dir() => Err(fault(DOING, &leases, error)),
            _ => Ok(Self { root, leases }),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn leases(&self) -> &Path {
        &self.leases
    }

    pub(crate) fn config_path(&self) -> PathBuf {
        self.root.join("config.json")
    }

    /// Returns the configuration's text, or `None` if there is none.
    pub(crate) fn config(&self) -> Result<Option<Vec<u8>>, SubnetError> {
        const DOING: &str = "reading the network configuration";
        let path = self.config_path();
        let file = match OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A missing directory is an error of the store, not of its configuration.
                fs::metadata(&self.root).map_err(|error| fault(DOING, &self.root, error))?;
                return Ok(None);
            }
            Err(error) => return Err(fault(DOING, &path, error)),
        };
        let mut text = Vec::new();
        // One byte more than is allowed, so that parsing reports it as too large.
        let most = NetworkConfig::MAX_BYTES as u64 + 1;
        file.take(most).read_to_end(&mut text).map_err(|error| fault(DOING, &path, error))?;
        Ok(Some(text))
    }

    /// Passes each record to `take`, in no particular order: there may be more than fit into memory. After an error,
    /// some are missing. Two threads read the files, if there are two processors.
    pub(crate) fn each(&self, mut take: impl FnMut(LeaseKey, Loaded)) -> Result<(), SubnetError> {
        const DOING: &str = "listing the leases";
        /// The most records in memory that are not passed on yet.
        const BATCH: usize = 512;
        let failed = |error| fault(DOING, &self.leases, error);
        let reader = Reader::open(&self.leases, DOING)?;
        let has_two_processors = thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        let mut files = fs::read_dir(&self.leases).map_err(failed)?;
        loop {
            let batch: Vec<_> = files.by_ref().take(BATCH).collect::<Result<_, _>>().map_err(failed)?;
            if batch.is_empty() {
                return Ok(());
            }
            let next = AtomicUsize::new(0);
            let load = || {
                let files = iter::from_fn(|| batch.get(next.fetch_add(1, Ordering::Relaxed)));
                files.filter_map(|file| reader.load_listed(file).transpose()).collect::<Result<Vec<_>, _>>()
            };
            let loaded = thread::scope(|scope| {
                let spawn = || thread::Builder::new().name("flannel-leases".to_owned()).spawn_scoped(scope, load);
                // If there can be no second thread, this one reads all files.
                let helper = has_two_processors.then(spawn).and_then(Result::ok);
                let own = load();
                let helped = helper.map(|helper| helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
                [own].into_iter().chain(helped).collect::<Result<Vec<_>, _>>()
            });
            loaded?.into_iter().flatten().for_each(|(key, loaded)| take(key, loaded));
        }
    }

    /// Reads one record; `None` if there is none. An error means that this process cannot read; an unreadable file is a
    /// bad record.
    pub(crate) fn load(&self, name: &OsStr) -> Result<Option<Loaded>, SubnetError> {
        Reader::open(&self.leases, READING)?.load(name)
    }

    /// Waits for the lock, at most `wait`. It is released when the value is dropped or the process ends.
    pub(crate) fn lock(&self, wait: Duration) -> Result<Locked<'_>, SubnetError> {
        const DOING: &str = "locking the store";
        const LONGEST_PAUSE: Duration = Duration::from_millis(20);
        let path = self.root.join("lock");
        let failed = |error| fault(DOING, &path, error);
        let began = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let file = open_lock(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => return Ok(Locked { dir: self, file }),
                // Another process deleted the file, and further processes lock a new one.
                Ok(()) => continue,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
                Err(TryLockError::WouldBlock) if began.elapsed() >= wait => {
                    return Err(failed(io::ErrorKind::WouldBlock.into()));
                }
                Err(TryLockError::WouldBlock) => {}
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Reads records. The directory is looked up once, not for each of them.
struct Reader<'a> {
    leases: &'a Path,
    dir: File,
}

impl<'a> Reader<'a> {
    fn open(leases: &'a Path, doing: &'static str) -> Result<Self, SubnetError> {
        File::open(leases).map(|dir| Self { leases, dir }).map_err(|error| fault(doing, leases, error))
    }

    /// Reads a record in a listing, which has the file's type. `None` for files that are not records.
    fn load_listed(&self, file: &DirEntry) -> Result<Option<(LeaseKey, Loaded)>, SubnetError> {
        let name = file.file_name();
        let Some(key) = key_of(&name) else { return Ok(None) };
        let loaded = match file.file_type() {
            Ok(kind) if !kind.is_file() => Some(Err(not_regular())),
            Ok(_) => self.read(&name, |_| Ok(true))?,
            Err(_) => self.load(&name)?,
        };
        Ok(loaded.map(|loaded| (key, loaded)))
    }

    fn load(&self, name: &OsStr) -> Result<Option<Loaded>, SubnetError> {
        self.read(name, |file| Ok(file.metadata()?.is_file()))
    }

    fn read(
        &self,
        name: &OsStr,
        is_regular: impl FnOnce(&File) -> io::Result<bool>,
    ) -> Result<Option<Loaded>, SubnetError> {
        let unreadable = |error: io::Error| {
            if is_shortage(&error) {
                return Err(fault(READING, &self.leases.join(name), error));
            }
            Ok(Some(Err(bad(format!("cannot be read: {error}")))))
        };
        // A file of another kind must neither block nor redirect the read.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
        let file = match openat(&self.dir, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(None),
            // A symbolic link.
            Err(Errno::ELOOP) => return Ok(Some(Err(not_regular()))),
            Err(errno) => return unreadable(errno.into()),
        };
        match is_regular(&file) {
            Ok(true) => {}
            Ok(false) => return Ok(Some(Err(not_regular()))),
            Err(error) => return unreadable(error),
        }
        // One byte more than is allowed, so that parsing reports it as too large. A read of a regular file returns less
        // than was asked for only at the end of the file.
        let mut text = [0; LeaseAttrs::MAX_BYTES + 1];
        let len = match (&file).read(&mut text) {
            Ok(len) => len,
            Err(error) => return unreadable(error),
        };
        if node_of(name).is_none() {
            return Ok(Some(Err(bad("the file is not named after a node (NODE.json)".to_owned()))));
        }
        Ok(Some(Entry::from_json(&text[..len])))
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.mode(LOCK_MODE).custom_flags(OFlag::O_NOFOLLOW.bits()).open(path)?;
    // Created by an older version, or its mode was changed.
    if file.metadata()?.permissions().mode() & 0o777 != LOCK_MODE {
        file.set_permissions(Permissions::from_mode(LOCK_MODE))?;
    }
    Ok(file)
}

/// The lock, which permits writing.
pub(crate) struct Locked<'a> {
    dir: &'a Dir,
    file: File,
}

impl Locked<'_> {
    /// Returns a number larger than any issued in this directory before, and larger than `seen`, which matters if the
    /// lock file was lost.
    pub(crate) fn next_generation(&self, seen: u64) -> Result<u64, SubnetError> {
        let mut text = [0; DIGITS];
        let read = self.file.read_exact_at(&mut text, 0).ok();
        let kept = read.and_then(|()| std::str::from_utf8(&text).ok()?.parse().ok()).unwrap_or(0);
        let next = seen.max(kept).saturating_add(1);
        // The length never changes: overwriting needs no space.
        let written = self.file.write_all_at(format!("{next:0DIGITS$}\n").as_bytes(), 0);
        written.map_err(|error| fault("counting the store's generation", &self.dir.root.join("lock"), error))?;
        Ok(next)
    }

    pub(crate) fn write_lease(&self, name: &str, text: &str) -> Result<(), SubnetError> {
        replace("writing a lease", &self.dir.leases, name, text)
    }

    pub(crate) fn write_config(&self, text: &str) -> Result<(), SubnetError> {
        replace("writing the network configuration", &self.dir.root, "config.json", text)
    }

    /// Removes an expired record. It counts as removed in any case: one that stays, now or after a crash, does no harm.
    pub(crate) fn clear(&self, expired: &LeaseKey) {
        let _ = fs::remove_file(self.dir.leases.join(expired.as_str()));
    }

    pub(crate) fn remove_lease(&self, name: &str) -> Result<(), SubnetError> {
        const DOING: &str = "removing a lease";
        let path = self.dir.leases.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(fault(DOING, &path, error)),
            _ => sync_dir(DOING, &self.dir.leases),
        }
    }
}

const DIGITS: usize = 20;

/// Replaces a file as a whole, or changes nothing.
fn replace(doing: &'static str, dir: &Path, name: &str, text: &str) -> Result<(), SubnetError> {
    let path = dir.join(name);
    // One fixed name: only the holder of the lock writes, so the leftover of a crash is overwritten.
    let temporary = dir.join(".tmp-new");
    let written = write_through(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(fault(doing, &path, error));
    }
    sync_dir(doing, dir)
}

fn write_through(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn sync_dir(doing: &'static str, dir: &Path) -> Result<(), SubnetError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| fault(doing, dir, error))
}

fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => identity(ours) == identity(there),
        _ => false,
    }
}

fn not_regular() -> BadRecord {
    bad("not a regular file".to_owned())
}

fn bad(reason: String) -> BadRecord {
    BadRecord::new(reason, Dual::default())
}

/// Returns the name of a node's record file.
pub(crate) fn file_name(node: &NodeIdentity) -> Result<String, SubnetError> {
    const LONGEST: usize = 255;
    let name = format!("{node}{SUFFIX}");
    if name.len() > LONGEST {
        let longest = LONGEST - SUFFIX.len();
        let text = format!(
            "a node identity of more than {longest} characters, which is too long for a file name; choose a shorter one"
        );
        return Err(SubnetError::Unsupported(text));
    }
    Ok(name)
}

/// Returns the key of a file's lease, or `None` for files that are not records.
pub(crate) fn key_of(name: &OsStr) -> Option<LeaseKey> {
    let bytes = name.as_encoded_bytes();
    if bytes.starts_with(b".") || !bytes.ends_with(SUFFIX.as_bytes()) {
        return None;
    }
    Some(LeaseKey::of_bytes(bytes))
}

/// Returns the node whose record a file is.
pub(crate) fn node_of(name: &OsStr) -> Option<NodeIdentity> {
    NodeIdentity::new(name.to_str()?.strip_suffix(SUFFIX)?).ok()
}
