//! Reads the files of records.

use std::ffi::OsStr;
use std::fs::{self, DirEntry, File, FileType};
use std::io::{self, Read};
use std::iter;
use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use flannel_core::lease::{BadRecord, LeaseAttrs, LeaseKey};
use flannel_core::net::Dual;
use flannel_core::subnet::SubnetError;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::dir::{key_of, node_of};
use crate::error::{fault, is_shortage};
use crate::wire::Entry;

/// The contents of a record's file.
pub(crate) type Loaded = Result<Entry, BadRecord>;

/// The most files of a list that a thread reads before their records are passed on. Three batches at most are in
/// memory: one of each thread, and one that waits.
const BATCH: usize = 128;

/// The directory of the records, looked up once for all of them.
pub(crate) struct Reader<'a> {
    path: &'a Path,
    dir: File,
}

impl<'a> Reader<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self, SubnetError> {
        let dir = File::open(path).map_err(|error| fault("opening the directory of the leases", path, error))?;
        Ok(Self { path, dir })
    }

    /// Passes what `prepare` makes of each record, or of the error with which its file cannot be read, to `take`, in no
    /// particular order: there may be more than fit into memory. An error means that this process cannot read; some
    /// records are missing then. Two threads read and prepare, if there are two processors.
    pub(crate) fn each<T: Send>(
        &self,
        prepare: impl Fn(LeaseKey, io::Result<Loaded>) -> Option<T> + Sync,
        mut take: impl FnMut(T),
    ) -> Result<(), SubnetError> {
        let failed = |error| fault("listing the leases", self.path, error);
        let files = Mutex::new(fs::read_dir(self.path).map_err(failed)?);
        let next = || -> Result<Option<Vec<T>>, SubnetError> {
            let mut files = files.lock().unwrap_or_else(PoisonError::into_inner);
            let batch: Vec<_> = files.by_ref().take(BATCH).collect::<Result<_, _>>().map_err(failed)?;
            drop(files);
            if batch.is_empty() {
                return Ok(None);
            }
            let mut prepared = Vec::with_capacity(batch.len());
            for file in batch {
                prepared.extend(self.listed(&file)?.and_then(|(key, loaded)| prepare(key, loaded)));
            }
            Ok(Some(prepared))
        };
        let batches = || iter::from_fn(|| next().transpose());
        let has_two_processors = thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        thread::scope(|scope| {
            // Created in here, so that an error drops the receiver: the helper then ends instead of waiting to send.
            let (sender, receiver) = mpsc::sync_channel(1);
            let help = move || batches().try_for_each(|batch| sender.send(batch));
            let spawn = || thread::Builder::new().name("flannel-list".to_owned()).spawn_scoped(scope, help);
            // If there can be no second thread, this one reads all files.
            let _helper = has_two_processors.then(spawn);
            let own = batches().flat_map(|own| iter::once(own).chain(receiver.try_iter()));
            own.chain(receiver.iter()).try_for_each(|batch| batch.map(|batch| batch.into_iter().for_each(&mut take)))
        })
    }

    /// Reads a file of a list; `None` if it is not that of a record.
    fn listed(&self, file: &DirEntry) -> Result<Option<(LeaseKey, io::Result<Loaded>)>, SubnetError> {
        let name = file.file_name();
        let Some(key) = key_of(&name) else { return Ok(None) };
        Ok(self.try_read(&name, file.file_type().ok())?.map(|loaded| (key, loaded)))
    }

    /// Reads one record; `None` if there is none. An error means that this process cannot read; an unreadable file is a
    /// bad record.
    pub(crate) fn read(&self, name: &OsStr) -> Result<Option<Loaded>, SubnetError> {
        Ok(self.try_read(name, None)?.map(or_bad))
    }

    /// Reads one record; `None` if there is none. An error means that this process cannot read. `listed` is the file's
    /// type, if the directory was read for it.
    fn try_read(&self, name: &OsStr, listed: Option<FileType>) -> Result<Option<io::Result<Loaded>>, SubnetError> {
        match self.contents(name, listed) {
            Err(error) if is_shortage(&error) => Err(self.unreadable(name, error)),
            read => Ok(read.transpose()),
        }
    }

    /// Like [`read`](Self::read), for the record of this node: if its file cannot be read, it is not known whether the
    /// lease still exists.
    pub(crate) fn read_own(&self, name: &OsStr) -> Result<Option<Loaded>, SubnetError> {
        self.contents(name, None).map_err(|error| self.unreadable(name, error))
    }

    fn unreadable(&self, name: &OsStr, error: io::Error) -> SubnetError {
        fault("reading a lease", &self.path.join(name), error)
    }

    fn contents(&self, name: &OsStr, listed: Option<FileType>) -> io::Result<Option<Loaded>> {
        let not_regular = || Ok(Some(Err(bad("not a regular file".to_owned()))));
        // A file of another type must neither block nor redirect the read.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
        let mut file = match openat(&self.dir, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(None),
            // A symbolic link, or a socket.
            Err(Errno::ELOOP | Errno::ENXIO) => return not_regular(),
            Err(errno) => return Err(errno.into()),
        };
        let found = listed.map_or_else(|| file.metadata().map(|metadata| metadata.file_type()), Ok)?;
        if !found.is_file() {
            return not_regular();
        }
        // One byte more than is allowed, so that parsing reports it as too large. A read of a regular file returns less
        // than was requested only at the end of the file.
        let mut text = [0; LeaseAttrs::MAX_BYTES + 1];
        let len = file.read(&mut text)?;
        if node_of(name).is_none() {
            return Ok(Some(Err(bad("the file is not named after a node (NODE.json)".to_owned()))));
        }
        Ok(Some(Entry::from_json(&text[..len])))
    }
}

/// Returns a file that cannot be read as a bad record.
pub(crate) fn or_bad(read: io::Result<Loaded>) -> Loaded {
    read.unwrap_or_else(|error| Err(bad(format!("cannot be read: {error}"))))
}

fn bad(reason: String) -> BadRecord {
    BadRecord::new(reason, Dual::default())
}
