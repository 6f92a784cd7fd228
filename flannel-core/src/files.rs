//! Reading what an earlier run has left in a directory that others may be able to write.

use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

/// Who may have written a file for it to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trust {
    /// It belongs to root or to the user of this process, and nobody else may write it. A link is not followed.
    OwnersAlone,
    /// It belongs to root or to the user of this process. An operator may have put a link in its place.
    Owners,
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unread {
    #[error("not a regular file")]
    NotAFile,
    #[error("it belongs to another user")]
    OfAnotherUser,
    #[error("group or others may write to it; take that permission away (chmod go-w)")]
    OpenToOthers,
    #[error("larger than {0} bytes")]
    TooLarge(u64),
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl Unread {
    /// The same as an I/O error.
    pub(crate) fn into_io(self) -> io::Error {
        match self {
            Self::Io(error) => error,
            Self::TooLarge(_) => io::Error::new(io::ErrorKind::FileTooLarge, self),
            Self::OfAnotherUser | Self::OpenToOthers => io::Error::new(io::ErrorKind::PermissionDenied, self),
            Self::NotAFile => io::Error::other(self),
        }
    }
}

/// Reads a regular file of at most `max` bytes; `None` where there is none. Whatever is there instead, this neither waits
/// nor takes more memory than that.
pub(crate) fn read(path: &Path, trust: Trust, max: u64) -> Result<Option<Vec<u8>>, Unread> {
    match try_read(path, trust, max) {
        Err(Unread::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn try_read(path: &Path, trust: Trust, max: u64) -> Result<Vec<u8>, Unread> {
    // Looked at first: to open a pipe waits for its other end, and to open a device may do anything.
    let found = match trust {
        Trust::OwnersAlone => std::fs::symlink_metadata(path)?,
        Trust::Owners => std::fs::metadata(path)?,
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
    if !is_of_owner(found) {
        return Err(Unread::OfAnotherUser);
    }
    if trust == Trust::OwnersAlone && is_open_to_others(found) {
        return Err(Unread::OpenToOthers);
    }
    if found.len() > max { Err(Unread::TooLarge(max)) } else { Ok(()) }
}

/// Whether a file belongs to root or to the user of this process.
#[cfg(target_os = "linux")]
pub(crate) fn is_of_owner(found: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    found.uid() == 0 || effective_user() == Some(found.uid())
}

/// Whom the process runs as; `None` where `/proc` does not say. It is read there because the owner of the files in
/// `/proc/self` is root where the program itself was given capabilities.
#[cfg(target_os = "linux")]
fn effective_user() -> Option<u32> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // The real one comes first.
    users.split_whitespace().nth(1)?.parse().ok()
}

/// Elsewhere nothing says whom the process runs as.
#[cfg(not(target_os = "linux"))]
pub(crate) fn is_of_owner(_: &Metadata) -> bool {
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs::{self, Permissions};
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
        fs::File::create(&file).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(said(&file, Trust::Owners), "larger than 1000 bytes");
        fs::write(&file, "x").unwrap();
        symlink(&file, &link).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(
            (said(&link, Trust::OwnersAlone), said(&link, Trust::Owners)),
            ("not a regular file".into(), "1".into())
        );
        for path in [&socket, dir.path()] {
            assert_eq!(said(path, Trust::Owners), "not a regular file");
        }
        fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
        assert!(said(&file, Trust::OwnersAlone).contains("others may write to it"));
        assert_eq!(said(&file, Trust::Owners), "1");
    }
}
