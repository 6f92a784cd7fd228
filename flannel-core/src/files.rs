//! Files that survive a crash, in directories that others may be able to write: state of an agent between its runs.
//!
//! Everything here blocks on the disk: not for an async task.

use std::fs::{self, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::text::Plain;

/// Who may have written a file for it to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trust {
    /// It belongs to root or to the user of this process, and nobody else may write it. A link is not followed.
    OwnersAlone,
    /// It belongs to root or to the user of this process. An operator may have put a link in its place.
    Owners,
    /// Anybody: an operator named it.
    Anyone,
}

/// Who may read a file that is written. Nobody else may write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The user of this process: 0600.
    Private,
    /// Everybody: 0644 whatever the umask. A file of root or of the user of this process that is replaced keeps its mode,
    /// but for the permission of others to write.
    Public,
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unread {
    /// There is something else under its name.
    #[error("not a regular file")]
    NotAFile,
    /// Somebody else wrote it.
    #[error("it belongs to another user")]
    OfAnotherUser,
    /// Somebody else may have written it.
    #[error("group or others may write to it; take that permission away (chmod go-w)")]
    OpenToOthers,
    /// It has more bytes than this.
    #[error("larger than {0} bytes")]
    TooLarge(u64),
    /// The system refused.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl From<Unread> for io::Error {
    fn from(unread: Unread) -> Self {
        match unread {
            Unread::Io(error) => error,
            Unread::TooLarge(_) => Self::new(io::ErrorKind::FileTooLarge, unread),
            Unread::OfAnotherUser | Unread::OpenToOthers => Self::new(io::ErrorKind::PermissionDenied, unread),
            Unread::NotAFile => Self::other(unread),
        }
    }
}

/// A file could not be read, written or removed. What is there is whole: the old content, or after a failure of the last
/// step, syncing the directory, the new one.
///
/// Retry with back-off once the remedy is applied.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {remedy}", Plain(path.display()))]
#[non_exhaustive]
pub struct FileError {
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

impl FileError {
    /// An error while `doing` something to `path`, with the remedy for it.
    pub fn new(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self { doing, path: path.to_owned(), remedy: remedy(&source), source }
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "let this process write to the directory",
        io::ErrorKind::ReadOnlyFilesystem => "mount the file system writable or choose another path",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space on the file system",
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::AlreadyExists => {
            "choose a path whose parents are directories"
        }
        _ => "see the cause, or choose another path",
    }
}

/// Reads a regular file of at most `max` bytes; `None` where there is none. Whatever is there instead, this neither waits
/// nor takes more memory than that (with the feature `netlink` also where a pipe takes its place just then).
///
/// # Errors
/// [`Unread`] says why not: whoever calls goes on without what the file says.
pub fn read(path: &Path, trust: Trust, max: u64) -> Result<Option<Vec<u8>>, Unread> {
    match try_read(path, trust, max) {
        Err(Unread::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn try_read(path: &Path, trust: Trust, max: u64) -> Result<Vec<u8>, Unread> {
    // Looked at first: to open a pipe waits for its other end, and to open a device may do anything.
    let found = match trust {
        Trust::OwnersAlone => fs::symlink_metadata(path)?,
        Trust::Owners | Trust::Anyone => fs::metadata(path)?,
    };
    judge(&found, trust, max)?;
    let file = guarded(OpenOptions::new().read(true), trust).open(path)?;
    // What was opened may be another one by now.
    judge(&file.metadata()?, trust, max)?;
    let mut bytes = Vec::with_capacity(usize::try_from(found.len()).unwrap_or_default() + 1);
    Read::take(file, max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max { Err(Unread::TooLarge(max)) } else { Ok(bytes) }
}

fn judge(found: &Metadata, trust: Trust, max: u64) -> Result<(), Unread> {
    if !found.is_file() {
        return Err(Unread::NotAFile);
    }
    if trust != Trust::Anyone && !is_of_owner(found) {
        return Err(Unread::OfAnotherUser);
    }
    if trust == Trust::OwnersAlone && is_open_to_others(found) {
        return Err(Unread::OpenToOthers);
    }
    if found.len() > max { Err(Unread::TooLarge(max)) } else { Ok(()) }
}

/// Whether a file belongs to root or to the user of this process.
#[cfg(target_os = "linux")]
fn is_of_owner(found: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    found.uid() == 0 || effective_user() == Some(found.uid())
}

/// Whom the process runs as; `None` where `/proc` does not say. It is read there because the owner of the files in
/// `/proc/self` is root where the program itself was given capabilities.
#[cfg(target_os = "linux")]
fn effective_user() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // The real one comes first.
    users.split_whitespace().nth(1)?.parse().ok()
}

/// Elsewhere nothing says whom the process runs as.
#[cfg(not(target_os = "linux"))]
fn is_of_owner(_: &Metadata) -> bool {
    true
}

#[cfg(unix)]
fn is_open_to_others(found: &Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt;
    found.permissions().mode() & 0o022 != 0
}

#[cfg(not(unix))]
fn is_open_to_others(_: &Metadata) -> bool {
    false
}

/// Has a pipe or a link that took the file's place meanwhile refused rather than waited for or followed.
#[cfg(all(target_os = "linux", feature = "netlink"))]
fn guarded(options: &mut OpenOptions, trust: Trust) -> &mut OpenOptions {
    use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
    use std::os::unix::fs::OpenOptionsExt;
    options.custom_flags(if trust == Trust::OwnersAlone { O_NONBLOCK | O_NOFOLLOW } else { O_NONBLOCK })
}

#[cfg(not(all(target_os = "linux", feature = "netlink")))]
fn guarded(options: &mut OpenOptions, _: Trust) -> &mut OpenOptions {
    options
}

/// Puts what `fill` writes, at most `max` bytes, in the place of a file, so that a reader sees the old content or the new
/// one, whole, also after a crash. Makes missing directories (0755), and clears what a crash has left of earlier writes.
///
/// # Errors
/// [`FileError`]: there is the old file, if any, or where only the directory could not be synced the new one.
pub fn replace(
    path: &Path,
    mode: Mode,
    max: u64,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), FileError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    make_dirs(dir).map_err(|source| FileError::new("create the directory", dir, source))?;
    clear_leftovers(dir, path);
    let temporary = temporary_beside(path);
    let written = write_temporary(&temporary, path, mode, max, fill).and_then(|()| fs::rename(&temporary, path));
    if let Err(source) = written {
        // What is left of a failed attempt is of no use; a later one clears it if this does not.
        let _ = fs::remove_file(&temporary);
        return Err(FileError::new("write", path, source));
    }
    // The rename itself survives a crash only once the directory is on disk.
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| FileError::new("sync the directory", dir, source))
}

/// Deletes a file, and what crashes have left of writes. One that is not there is no error.
///
/// # Errors
/// [`FileError`]: the file is still there.
pub fn remove(path: &Path) -> Result<(), FileError> {
    if let Some(dir) = path.parent() {
        clear_leftovers(dir, path);
    }
    // Looked at first: a file system that is read-only refuses to delete even what is not there.
    match fs::symlink_metadata(path).and_then(|_| fs::remove_file(path)) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", path, source)),
        _ => Ok(()),
    }
}

fn write_temporary(
    temporary: &Path,
    target: &Path,
    mode: Mode,
    max: u64,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut options = OpenOptions::new();
    // Nobody else's before it has its mode, whatever the umask.
    private(&mut options);
    let file = options.write(true).create_new(true).open(temporary)?;
    if mode == Mode::Public {
        publish(&file, target)?;
    }
    let mut writer = BufWriter::with_capacity(1 << 16, Limited { file, max, left: max });
    fill(&mut writer)?;
    writer.flush()?;
    writer.get_ref().file.sync_all()
}

/// A file that takes so many bytes, and no more.
struct Limited {
    file: File,
    max: u64,
    left: u64,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {} bytes to write", self.max)));
        };
        let written = self.file.write(bytes)?;
        self.left = left + (bytes.len() - written) as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

const SUFFIX: &str = ".tmp";

/// `.NAME.RANDOM.tmp`: of two that write at once by mistake neither can tear the other's content.
fn temporary_beside(path: &Path) -> PathBuf {
    let number = RandomState::new().build_hasher().finish();
    path.with_file_name(format!("{}{number:016x}{SUFFIX}", prefix_of_temporaries(path)))
}

fn prefix_of_temporaries(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Drops what crashes have left. What does not go away does no harm; a process that writes at the same time after all
/// sees its write fail, and tries again.
fn clear_leftovers(dir: &Path, path: &Path) {
    let prefix = prefix_of_temporaries(path);
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(SUFFIX));
        if number.is_some_and(|number| number.len() == 16 && number.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(unix)]
fn make_dirs(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)
}

#[cfg(not(unix))]
fn make_dirs(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)
}

#[cfg(unix)]
fn private(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(0o600);
}

#[cfg(not(unix))]
fn private(_: &mut OpenOptions) {}

/// Gives a file that replaces `target` its mode.
#[cfg(unix)]
fn publish(file: &File, target: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let found = fs::metadata(target).ok().map(|found| (found.permissions().mode() & 0o7777, is_of_owner(&found)));
    file.set_permissions(fs::Permissions::from_mode(public_mode(found)))
}

#[cfg(not(unix))]
fn publish(_: &File, _: &Path) -> io::Result<()> {
    Ok(())
}

/// The mode of a file that replaces one of this mode, if there is one, and whether that belongs to root or to the own
/// user: another's file says nothing about ours.
#[cfg(unix)]
fn public_mode(found: Option<(u32, bool)>) -> u32 {
    match found {
        Some((mode, true)) => mode & 0o755,
        _ => 0o644,
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    const MAX: u64 = 1000;

    #[test]
    fn the_user_of_this_process_is_the_owner_of_what_it_makes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(effective_user(), Some(std::os::unix::fs::MetadataExt::uid(&file.as_file().metadata().unwrap())));
    }

    #[test]
    fn a_file_is_read_if_it_is_one_and_not_too_large_and_nobody_else_may_write_it() {
        let dir = tempfile::tempdir().unwrap();
        let [file, link, socket] = ["file", "link", "socket"].map(|name| dir.path().join(name));
        let said = |path: &Path, trust: Trust| match read(path, trust, MAX) {
            Ok(bytes) => bytes.map_or_else(|| "none".to_owned(), |bytes| bytes.len().to_string()),
            Err(error) => error.to_string(),
        };
        assert_eq!(said(&file, Trust::OwnersAlone), "none");
        for (size, words) in [(0, "0"), (1000, "1000"), (1001, "larger than 1000 bytes")] {
            fs::write(&file, vec![b'x'; size]).unwrap();
            fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
            assert_eq!(said(&file, Trust::OwnersAlone), words);
        }
        File::create(&file).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(said(&file, Trust::Owners), "larger than 1000 bytes");
        fs::write(&file, "x").unwrap();
        symlink(&file, &link).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(
            (said(&link, Trust::OwnersAlone), said(&link, Trust::Owners)),
            ("not a regular file".into(), "1".into())
        );
        for path in [&socket, dir.path()] {
            for trust in [Trust::Owners, Trust::Anyone] {
                assert_eq!(said(path, trust), "not a regular file");
            }
        }
        fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
        assert!(said(&file, Trust::OwnersAlone).contains("others may write to it"));
        assert_eq!((said(&file, Trust::Owners), said(&link, Trust::Anyone)), ("1".into(), "1".into()));
        // Only root may give a file away.
        if std::os::unix::fs::chown(&file, Some(65534), None).is_ok() {
            assert_eq!(said(&file, Trust::Owners), "it belongs to another user");
            assert_eq!(said(&file, Trust::Anyone), "1");
        }
    }

    fn write(path: &Path, mode: Mode, text: &str) -> Result<(), FileError> {
        replace(path, mode, MAX, |file| file.write_all(text.as_bytes()))
    }

    #[test]
    fn a_mode_that_lets_others_write_is_not_kept_nor_that_of_another_users_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for (found, kept) in [(0o666, 0o644), (0o4777, 0o755), (0o640, 0o640), (0o444, 0o444)] {
            for (mode, kept) in [(Mode::Public, kept), (Mode::Private, 0o600)] {
                write(&path, mode, "1").unwrap();
                fs::set_permissions(&path, Permissions::from_mode(found)).unwrap();
                write(&path, mode, "2").unwrap();
                let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
                assert_eq!(mode, kept, "{found:o}");
                fs::remove_file(&path).unwrap();
            }
        }
        assert_eq!([None, Some((0o600, true)), Some((0o600, false))].map(public_mode), [0o644, 0o600, 0o644]);
    }

    #[test]
    fn what_a_killed_process_left_of_a_write_goes_with_the_next_or_with_the_file() {
        for act in [|path: &Path| write(path, Mode::Private, "x"), remove] {
            let dir = tempfile::tempdir().unwrap();
            let others = [".file.", ".file..tmp", ".file.bak", ".file.bak.tmp", "other"];
            for name in [".file.0123456789abcdef.tmp"].iter().chain(&others) {
                fs::write(dir.path().join(name), "tor").unwrap();
            }
            act(&dir.path().join("file")).unwrap();
            let _ = fs::remove_file(dir.path().join("file"));
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut left: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            left.sort();
            assert_eq!(left, others);
        }
    }

    #[test]
    fn a_write_of_too_much_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let text = |size: usize| "x".repeat(size);
        write(&path, Mode::Public, &text(MAX as usize)).unwrap();
        let error = write(&path, Mode::Public, &text(MAX as usize + 1)).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::FileTooLarge);
        // Somebody who never stops writing is stopped.
        let mut taken = 0;
        let endless = |to: &mut dyn Write| loop {
            to.write_all(&[b'x'; 1 << 16])?;
            taken += 1 << 16;
        };
        let error = replace(&path, Mode::Public, 1 << 20, endless).unwrap_err();
        assert_eq!((error.source.kind(), taken <= 1 << 20), (io::ErrorKind::FileTooLarge, true));
        assert!(error.source.to_string().contains("more than 1048576 bytes"), "{}", error.source);
        assert_eq!(fs::read_to_string(&path).unwrap(), text(MAX as usize));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
    }
}
