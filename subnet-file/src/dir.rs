//! The directory: reads without a lock, writes under it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::config::NetworkConfig;
use flannel_core::lease::LeaseKey;
use flannel_core::subnet::{NodeIdentity, SubnetError};
use nix::fcntl::OFlag;

use crate::error::fault;
use crate::reader::{Loaded, Reader};

/// The paths of a store.
pub(crate) struct Dir {
    root: PathBuf,
    leases: PathBuf,
}

const SUFFIX: &str = ".json";

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

    pub(crate) fn lease_path(&self, key: &LeaseKey) -> PathBuf {
        self.leases.join(key.as_str())
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

    /// Passes what `prepare` makes of each record to `take`: see [`Reader::each`].
    pub(crate) fn each<T: Send>(
        &self,
        prepare: impl Fn(LeaseKey, io::Result<Loaded>) -> Option<T> + Sync,
        take: impl FnMut(T),
    ) -> Result<(), SubnetError> {
        Reader::open(&self.leases)?.each(prepare, take)
    }

    /// Reads one record; `None` if there is none: see [`Reader::read`].
    pub(crate) fn load(&self, name: &OsStr) -> Result<Option<Loaded>, SubnetError> {
        Reader::open(&self.leases)?.read(name)
    }

    /// Reads the record of this node: see [`Reader::read_own`].
    pub(crate) fn load_own(&self, name: &OsStr) -> Result<Option<Loaded>, SubnetError> {
        Reader::open(&self.leases)?.read_own(name)
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
                Err(TryLockError::Error(error)) => return Err(failed(error)),
                // Locked by another process; or one deleted the file, and further processes lock a new one.
                Ok(()) | Err(TryLockError::WouldBlock) if began.elapsed() >= wait => {
                    return Err(failed(io::ErrorKind::WouldBlock.into()));
                }
                Ok(()) | Err(TryLockError::WouldBlock) => {}
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
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

/// Replaces a file as a whole. After an error it is as before, or replaced but perhaps not yet on the disk.
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
