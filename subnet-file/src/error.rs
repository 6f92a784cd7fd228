//! File errors, with path and remedy.

use std::io;
use std::path::{Path, PathBuf};

use flannel_core::subnet::SubnetError;
use tokio::task::JoinError;

/// A file or directory of the store cannot be used. This is the source of [`SubnetError::Unavailable`] and
/// [`SubnetError::Denied`], which document whether to retry.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {}; {remedy}", path.display())]
#[non_exhaustive]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// How to fix the error.
    pub remedy: &'static str,
    /// The operating system's error.
    #[source]
    pub source: io::Error,
}

/// Returns the store's error for a failed file operation.
pub(crate) fn fault(doing: &'static str, path: &Path, source: io::Error) -> SubnetError {
    let remedy = match source.kind() {
        io::ErrorKind::PermissionDenied => "give this process's user read and write access to it (chown, chmod)",
        io::ErrorKind::ReadOnlyFilesystem => "mount its file system for writing",
        io::ErrorKind::StorageFull => "free space on its file system",
        io::ErrorKind::QuotaExceeded => "raise the disk quota of this process's user",
        io::ErrorKind::NotFound => "create its directory, or mount its file system",
        io::ErrorKind::NotADirectory => "replace it with a directory",
        io::ErrorKind::WouldBlock => "another process keeps it locked; find that with fuser, it may be stopped",
        io::ErrorKind::OutOfMemory => "free memory on this host",
        io::ErrorKind::Interrupted => "retry",
        _ if is_shortage(&source) => "raise the limit of open files",
        _ => "check its file system",
    };
    fault_with(doing, path, remedy, source)
}

/// Like [`fault`], with a remedy that depends on the operation.
pub(crate) fn fault_with(doing: &'static str, path: &Path, remedy: &'static str, source: io::Error) -> SubnetError {
    let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
    let source = Box::new(FileError { path: path.to_owned(), remedy, source });
    if denied { SubnetError::Denied { doing, source } } else { SubnetError::Unavailable { doing, source } }
}

/// Whether this process or host lacks a resource, as opposed to a bad file.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    use nix::libc::{EINTR, EMFILE, ENFILE, ENOMEM};
    error.raw_os_error().is_some_and(|errno| [EINTR, EMFILE, ENFILE, ENOMEM].contains(&errno))
}

/// Returns the result of work on the blocking pool.
pub(crate) fn joined<T>(
    doing: &'static str,
    result: Result<Result<T, SubnetError>, JoinError>,
) -> Result<T, SubnetError> {
    result.unwrap_or_else(|source| Err(SubnetError::Unavailable { doing, source: source.into() }))
}
