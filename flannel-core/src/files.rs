//! Crash-safe files, in directories that other users may be able to write to. They keep an agent's state between runs.
//!
//! All functions here block on disk I/O: do not call them from an async task.

use std::fs::{self, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::text::Plain;

/// Which owners and permissions a file must have to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trust {
    /// Owned by root or by this process's user, and not writable by others. Symbolic links are not followed.
    OwnersAlone,
    /// Owned by root or by this process's user. Symbolic links are followed, as an operator may have created one.
    Owners,
    /// Any owner: an operator named the file.
    Anyone,
}

/// Who may read a written file. Only the owner may write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only this process's user: 0600.
    Private,
    /// All users: 0644 regardless of the umask. When a file of root or of this process's user is replaced, its mode is
    /// kept, without write permission for group and others.
    Public,
    /// Everybody may read and run it: 0755 whatever the umask.
    Program,
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unread {
    /// The path is not a regular file.
    #[error("not a regular file")]
    NotAFile,
    /// The file belongs to another user.
    #[error("it belongs to another user")]
    OfAnotherUser,
    /// Other users may write to the file.
    #[error("group or others may write to it; take that permission away (chmod go-w)")]
    OpenToOthers,
    /// The file has more bytes than this.
    #[error("larger than {0} bytes")]
    TooLarge(u64),
    /// The operating system returned an error.
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

/// A file could not be read, written or removed. The file is intact: it has the old content, or the new one if only the
/// last step, syncing the directory, failed.
///
/// Retry with back-off once the remedy is applied.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {remedy}", Plain(path.display()))]
#[non_exhaustive]
pub struct FileError {
    /// The operation that failed.
    pub doing: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// What to do about it.
    pub remedy: &'static str,
    /// The cause.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// Creates an error for an operation on `path`, with the remedy for it.
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

/// Reads a regular file of at most `max` bytes. Returns `None` if it does not exist. Never waits on a pipe or a device,
/// and never uses more memory than that. (With the feature `netlink`, also if a pipe replaces the file during the
/// call.)
///
/// # Errors
/// [`Unread`] says why the file was not read; callers continue without its content.
pub fn read(path: &Path, trust: Trust, max: u64) -> Result<Option<Vec<u8>>, Unread> {
    match try_read(path, trust, max) {
        Err(Unread::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn try_read(path: &Path, trust: Trust, max: u64) -> Result<Vec<u8>, Unread> {
    // Check first: opening a pipe waits for its other end, and opening a device may have any effect.
    let found = match trust {
        Trust::OwnersAlone => fs::symlink_metadata(path)?,
        Trust::Owners | Trust::Anyone => fs::metadata(path)?,
    };
    judge(&found, trust, max)?;
    let file = guarded(OpenOptions::new().read(true), trust).open(path)?;
    // The path may refer to another file by now.
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

/// Returns whether a file belongs to root or to this process's user.
#[cfg(target_os = "linux")]
fn is_of_owner(found: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    found.uid() == 0 || effective_user() == Some(found.uid())
}

/// Returns the process's effective user ID, or `None` if `/proc` does not show it. The owner of the files in
/// `/proc/self` cannot be used: it is root if the program file has capabilities.
#[cfg(target_os = "linux")]
fn effective_user() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // The real user ID comes first.
    users.split_whitespace().nth(1)?.parse().ok()
}

/// On other systems the process's user is not available.
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

/// Sets flags so that opening fails if a pipe or a symbolic link has replaced the file in the meantime.
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

/// Replaces a file with what `fill` writes, at most `max` bytes. A reader sees either the whole old or the whole new
/// content, also after a crash. Creates missing directories (0755), and removes temporary files that crashes have left.
///
/// # Errors
/// [`FileError`]: the old file, if any, is unchanged, or the new one is in place and only the directory could not be synced.
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
        // The partial file is of no use; a later write removes it if this fails.
        let _ = fs::remove_file(&temporary);
        return Err(FileError::new("write", path, source));
    }
    // The rename survives a crash only once the directory is synced.
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| FileError::new("sync the directory", dir, source))
}

/// Deletes a file, and temporary files that crashes have left. Succeeds if the file does not exist.
///
/// # Errors
/// [`FileError`]: the file still exists.
pub fn remove(path: &Path) -> Result<(), FileError> {
    if let Some(dir) = path.parent() {
        clear_leftovers(dir, path);
    }
    // Check first: on a read-only file system, deleting a missing file fails too.
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
    // Other users must not have access before the mode is set, whatever the umask.
    private(&mut options);
    let file = options.write(true).create_new(true).open(temporary)?;
    match mode {
        Mode::Private => {}
        Mode::Public => publish(&file, target)?,
        Mode::Program => make_program(&file)?,
    }
    let mut writer = BufWriter::with_capacity(1 << 16, Limited { file, max, left: max });
    fill(&mut writer)?;
    writer.flush()?;
    writer.get_ref().file.sync_all()
}

/// A file that accepts at most `max` bytes.
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

/// Returns `.NAME.RANDOM.tmp`. The random part keeps two concurrent writers from mixing their contents.
fn temporary_beside(path: &Path) -> PathBuf {
    let number = RandomState::new().build_hasher().finish();
    path.with_file_name(format!("{}{number:016x}{SUFFIX}", prefix_of_temporaries(path)))
}

fn prefix_of_temporaries(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Removes temporary files that crashes have left. Failures are ignored. If another process is writing at the same
/// time, its write fails, and it retries.
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

#[cfg(unix)]
fn make_program(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn make_program(_: &File) -> io::Result<()> {
    Ok(())
}

/// Sets the mode of a file that replaces `target`.
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

/// Returns the mode of the new file. `found` is the mode of the file it replaces, if any, and whether that file belongs
/// to root or to this process's user: the mode of another user's file is ignored.
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
        // Only root may change a file's owner.
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
        // A writer that never stops gets an error.
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
