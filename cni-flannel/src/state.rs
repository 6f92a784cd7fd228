//! The other plug-in's configuration, stored for each container. DEL uses it, because `subnet.env` may have changed since ADD.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::files::{self, Trust};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::error::Error;
use crate::request::ContainerId;

/// The largest stored configuration that is read, in bytes.
const MAX: u64 = 1 << 20;

/// The name that Kubernetes' runtimes give to a pod's interface. Only other names are stored.
const DEFAULT_IFNAME: &str = "eth0";

/// How long a call waits for another call for the same container.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it tries to get the lock meanwhile.
const POLL_EVERY: Duration = Duration::from_millis(5);

/// The directory of stored configurations. Each container has a file, named by its ID.
#[derive(Debug)]
pub(crate) struct Store<'a>(pub(crate) &'a Path);

/// How a call uses an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It stores or reads the entry.
    Use,
    /// It removes the entry.
    Remove,
}

/// One container's entry, locked. Other calls for the container wait until this value is dropped and every plug-in that was run
/// meanwhile has ended, even if a runtime kills this process.
#[derive(Debug)]
pub(crate) struct Entry {
    path: PathBuf,
    lock: PathBuf,
    /// `None` if the disk is full and the call removes the entry.
    lock_file: Option<File>,
}

impl Store<'_> {
    /// Locks a container's entry, and creates the directory with mode 0700. A call that removes an entry continues without a
    /// lock if the disk is full.
    ///
    /// # Errors
    /// [`Error::Busy`] if another call has held the lock for a minute.
    pub(crate) fn entry(&self, container: &ContainerId, purpose: Purpose) -> Result<Entry, Error> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| Error::State { doing, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(self.0).map_err(failed("creating", self.0))?;
        // A container's ID does not begin with a dot.
        let lock = self.0.join(format!(".{}.lock", container.as_str()));
        let until = Instant::now() + PATIENCE;
        loop {
            let path = self.0.join(container.as_str());
            match try_lock(&lock) {
                Ok(Some(locked)) => return Ok(Entry { path, lock, lock_file: Some(locked) }),
                Ok(None) => {}
                Err(error) if purpose == Purpose::Remove && is_full(&error) => {
                    return Ok(Entry { path, lock, lock_file: None });
                }
                Err(error) => return Err(failed("locking", &lock)(error)),
            }
            if Instant::now() >= until {
                return Err(Error::Busy(PATIENCE));
            }
            thread::sleep(POLL_EVERY);
        }
    }

    /// Returns whether the directory exists.
    pub(crate) fn exists(&self) -> bool {
        self.0.exists()
    }

    /// Returns the IDs of all containers that have an entry.
    pub(crate) fn containers(&self) -> Result<Vec<ContainerId>, Error> {
        let failed = |source| Error::State { doing: "reading", path: self.0.to_owned(), source };
        let entries = match fs::read_dir(self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let names = names.collect::<io::Result<Vec<_>>>().map_err(failed)?;
        Ok(names.iter().filter_map(|name| ContainerId::new(name.to_str()?)).collect())
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Takes the lock. Returns `None` if another process holds it. Plug-ins that this process runs inherit it.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Ok(None),
        Err(fs::TryLockError::Error(error)) => return Err(error),
    }
    // Its former holder may have deleted it.
    let is_there = match fs::symlink_metadata(path) {
        Ok(found) => found.ino() == file.metadata()?.ino(),
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if !is_there {
        return Ok(None);
    }
    fcntl(file.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).map_err(io::Error::from)?;
    Ok(Some(file))
}

impl Entry {
    /// Stores a configuration and the interface's name. Each file is replaced atomically and synced: after a crash of the host,
    /// DEL needs the configuration to release the addresses that host-local keeps reserved.
    pub(crate) fn store(&self, text: &str, ifname: &str) -> Result<(), Error> {
        let (temporary, temporary_name) = (self.hidden_file("tmp"), self.hidden_file("ifname.tmp"));
        let write = || {
            write_synced(&temporary, text)?;
            if ifname == DEFAULT_IFNAME {
                self.forget_ifname();
            } else {
                write_synced(&temporary_name, ifname)?;
                fs::rename(&temporary_name, self.hidden_file("ifname"))?;
            }
            fs::rename(&temporary, &self.path)?;
            // A rename survives a crash only once the directory is synced.
            File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&temporary);
            let _ = fs::remove_file(&temporary_name);
            if !self.path.is_file() {
                self.forget_ifname();
            }
            Error::State { doing: "writing", path: self.path.clone(), source }
        })
    }

    /// Returns the stored configuration; `None` if there is none.
    pub(crate) fn load(&self) -> Result<Option<Vec<u8>>, Error> {
        files::read(&self.path, Trust::Owners, MAX).map_err(|error| Error::State {
            doing: "reading",
            path: self.path.clone(),
            source: error.into(),
        })
    }

    /// Returns the name of the container's interface. GC needs it, and Go flannel's format does not contain it.
    pub(crate) fn ifname(&self) -> String {
        let found = files::read(&self.hidden_file("ifname"), Trust::Owners, 64).ok().flatten();
        let name = found.and_then(|text| String::from_utf8(text).ok()).filter(|name| !name.is_empty());
        name.unwrap_or_else(|| DEFAULT_IFNAME.to_owned())
    }

    fn forget_ifname(&self) {
        let _ = fs::remove_file(self.hidden_file("ifname"));
    }

    /// Returns the path of a hidden file beside the entry. Only the holder of the lock writes it.
    fn hidden_file(&self, kind: &str) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        self.path.with_file_name(format!(".{name}.{kind}"))
    }

    pub(crate) fn remove(&self) -> Result<(), Error> {
        // A killed call may have left them.
        let _ = fs::remove_file(self.hidden_file("tmp"));
        let _ = fs::remove_file(self.hidden_file("ifname.tmp"));
        self.forget_ifname();
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(Error::State { doing: "removing", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

/// Writes and syncs a file that only its owner can read.
fn write_synced(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.lock_file.is_none() {
            return;
        }
        // Deleted while it is held: another call that has it open then finds that it is gone.
        let _ = fs::remove_file(&self.lock);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn id(text: &str) -> ContainerId {
        ContainerId::new(text).unwrap()
    }

    #[test]
    fn an_entry_is_stored_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("cni/flannel");
        let store = Store(&place);
        assert_eq!(store.containers().unwrap(), []);
        let entry = store.entry(&id("c1"), Purpose::Use).unwrap();
        assert_eq!(entry.load().unwrap(), None);
        entry.store("{}", "net1").unwrap();
        assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(place.join("c1")).unwrap().mode() & 0o777, 0o600);
        entry.store("{\"a\":1}", "net1").unwrap();
        assert_eq!(entry.load().unwrap().unwrap(), b"{\"a\":1}");
        assert_eq!((store.containers().unwrap(), entry.ifname()), (vec![id("c1")], "net1".to_owned()));
        entry.remove().unwrap();
        entry.remove().unwrap();
        drop(entry);
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn calls_for_one_container_are_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, path) = (AtomicBool::new(false), dir.path());
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _entry = Store(path).entry(&id("c1"), Purpose::Use).unwrap();
                        assert!(!inside.swap(true, Ordering::SeqCst), "two at once");
                        inside.store(false, Ordering::SeqCst);
                    }
                });
            }
            let _other = Store(path).entry(&id("c2"), Purpose::Use).unwrap();
        });
        assert_eq!(fs::read_dir(path).unwrap().count(), 0);
    }

    #[test]
    fn a_write_that_fails_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Store(dir.path()).entry(&id("c1"), Purpose::Use).unwrap();
        entry.store("old", DEFAULT_IFNAME).unwrap();
        fs::create_dir(dir.path().join(".c1.tmp")).unwrap();
        assert!(entry.store("new", DEFAULT_IFNAME).unwrap_err().to_string().contains("writing"));
        assert_eq!(entry.load().unwrap().unwrap(), b"old");
    }

    #[test]
    fn the_name_of_an_interface_is_stored_only_with_its_entry() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Store(dir.path()).entry(&id("c1"), Purpose::Use).unwrap();
        let name = dir.path().join(".c1.ifname");
        // The rename over a directory fails.
        fs::create_dir(dir.path().join("c1")).unwrap();
        entry.store("new", "net1").unwrap_err();
        assert!(!name.exists());
        fs::remove_dir(dir.path().join("c1")).unwrap();
        entry.store("new", "net1").unwrap();
        assert_eq!((entry.ifname().as_str(), fs::metadata(&name).unwrap().mode() & 0o777), ("net1", 0o600));
        // As a crash of the host left it before names were synced.
        fs::write(&name, "").unwrap();
        assert_eq!(entry.ifname(), DEFAULT_IFNAME);
        entry.remove().unwrap();
        drop(entry);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    }
}
