//! The state file on disk: whole, or not there.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::files::{self, Trust};
use crate::subnet_env::{make_dirs, remedy};

/// The largest file read or written, in bytes: room for 100 000 ordinary records several times over.
pub(super) const MAX_BYTES: u64 = 64 << 20;

/// The state file could not be written. The old one, if any, is as it was.
///
/// Retry once the remedy is applied.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {remedy}", path.display())]
#[non_exhaustive]
pub struct StateFileError {
    /// What was being done.
    pub doing: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// What to do about it.
    pub remedy: &'static str,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl StateFileError {
    pub(super) fn of(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self { doing, path: path.to_owned(), remedy: remedy(&source), source }
    }
}

/// The file's bytes; `None` where there is none. The error says in words why it is not to be read.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    files::read(path, Trust::OwnersAlone, MAX_BYTES).map_err(|error| error.to_string())
}

/// Puts what `fill` writes in place of the file, or changes nothing.
pub(super) fn replace(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), StateFileError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    make_dirs(dir).map_err(|source| StateFileError::of("create the directory", dir, source))?;
    clear_leftovers(dir, path);
    let temporary = temporary_beside(path);
    if let Err(source) = write_through(&temporary, fill).and_then(|()| fs::rename(&temporary, path)) {
        // What is left of a failed attempt is of no use; a later one clears it if this does not.
        let _ = fs::remove_file(&temporary);
        return Err(StateFileError::of("write", path, source));
    }
    // The rename itself survives a crash only once the directory is on disk.
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|source| StateFileError::of("sync the directory", dir, source))
}

fn write_through(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    private(&mut options);
    let file = Limited { file: options.open(path)?, left: MAX_BYTES };
    let mut writer = BufWriter::with_capacity(1 << 16, file);
    fill(&mut writer)?;
    writer.flush()?;
    writer.get_ref().file.sync_all()
}

/// A file that takes so many bytes, and no more.
struct Limited {
    file: File,
    left: u64,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_BYTES} bytes to keep")));
        };
        let written = self.file.write(bytes)?;
        self.left = left + (bytes.len() - written) as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// `.NAME.RANDOM.tmp`: two processes that write at once by mistake must not write into one file.
fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = prefix_of_temporaries(path);
    name.push_str(&format!("{:016x}{SUFFIX}", RandomState::new().build_hasher().finish()));
    path.with_file_name(name)
}

const SUFFIX: &str = ".tmp";

fn prefix_of_temporaries(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Deletes the file, and what crashes have left of writes.
pub(super) fn remove(path: &Path) -> Result<(), StateFileError> {
    if let Some(dir) = path.parent() {
        clear_leftovers(dir, path);
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StateFileError::of("remove", path, source)),
        _ => Ok(()),
    }
}

/// Drops what crashes have left. What does not go away does no harm; a process that writes at the same time after all
/// sees its write fail, and tries again.
fn clear_leftovers(dir: &Path, path: &Path) {
    let prefix = prefix_of_temporaries(path);
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| name.starts_with(&prefix) && name.ends_with(SUFFIX));
        if ours {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(unix)]
fn private(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(0o600);
}

#[cfg(not(unix))]
fn private(_: &mut OpenOptions) {}
