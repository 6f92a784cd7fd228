//! The directories that the agent writes to. Only the default ones are created: a mistyped path must not leave
//! directories behind.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;

use caps::{CapSet, Capability};
use nix::unistd::geteuid;

use crate::options::{Capabilities, Options};

/// The default directories, which are created if they do not exist, with directories below them.
const DEFAULTS: [&str; 2] = ["/run/flannel", "/var/lib/flannel"];

/// A file cannot be written where a flag says. Names the flag, the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryError {
    #[error(
        "-{flag}: the directory {dir} does not exist: create it (mkdir -p {dir}), or correct the path",
        dir = dir.display()
    )]
    Missing { flag: &'static str, dir: PathBuf },
    #[error("-{flag}: {} is a directory: give the path of a file", path.display())]
    NoFile { flag: &'static str, path: PathBuf },
    #[error("-{flag}: {} is not a directory: correct the path", path.display())]
    NoDirectory { flag: &'static str, path: PathBuf },
    #[error(
        "-{flag}: cannot write to {dir}: give it to this user (chown {user} {dir}), or choose another -{flag}",
        dir = dir.display(),
        user = geteuid()
    )]
    Unwritable {
        flag: &'static str,
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Checks all directories before anything else is written, and creates the default ones.
pub(crate) fn prepare(options: &Options) -> Result<(), DirectoryError> {
    for (flag, dir) in options.cni.directories() {
        check(flag, dir)?;
    }
    prepare_file("subnet-file", &options.subnet_file, options.capabilities)?;
    match &options.state_file {
        Some(file) if file.asked_for => prepare_file("state-file", &file.path, options.capabilities),
        // Errors of the default file are reported when it is written.
        _ => Ok(()),
    }
}

/// Returns the directory of a file.
pub(crate) fn of(file: &Path) -> &Path {
    match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Checks that a directory exists, or would be created.
pub(crate) fn check(flag: &'static str, dir: &Path) -> Result<(), DirectoryError> {
    let dir = dir.to_owned();
    match fs::metadata(&dir) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(DirectoryError::NoDirectory { flag, path: dir }),
        Err(_) if is_default(&dir) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DirectoryError::Missing { flag, dir }),
        Err(source) => Err(DirectoryError::Unwritable { flag, dir, source }),
    }
}

fn is_default(dir: &Path) -> bool {
    DEFAULTS.iter().any(|default| dir.starts_with(default))
}

/// Checks that a file can be written later, so that an error is reported at start.
fn prepare_file(flag: &'static str, path: &Path, capabilities: Capabilities) -> Result<(), DirectoryError> {
    if path.is_dir() {
        return Err(DirectoryError::NoFile { flag, path: path.to_owned() });
    }
    let dir = of(path);
    check(flag, dir)?;
    let created = match is_default(dir) {
        // Independent of the umask: no other user may write files that are read from there.
        true => DirBuilder::new().recursive(true).mode(0o755).create(dir),
        false => Ok(()),
    };
    let probed = created.and_then(|()| as_agent(capabilities, || probe(dir)));
    probed.map_err(|source| DirectoryError::Unwritable { flag, dir: dir.to_owned(), source })
}

/// Runs `work` without the capability by which root writes into other users' directories, if the agent will drop it.
/// Capabilities belong to threads.
pub(crate) fn as_agent(capabilities: Capabilities, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let reduced = || {
        if capabilities == Capabilities::Drop {
            // A process without it has nothing to drop.
            let _ = caps::drop(None, CapSet::Effective, Capability::CAP_DAC_OVERRIDE);
        }
        work()
    };
    thread::scope(|scope| {
        let ended = thread::Builder::new().spawn_scoped(scope, reduced)?.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("the check panicked")))
    })
}

fn probe(dir: &Path) -> io::Result<()> {
    // Always the same name, so that the next start removes the file that a start killed here has left.
    let probe = dir.join(".flanneld-probe");
    clear(&probe)?;
    // Never an existing file: it may be a link to one of our files, made by another user.
    match OpenOptions::new().write(true).create_new(true).open(&probe) {
        // `AlreadyExists`: another start at the same time has created it.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    clear(&probe)
}

/// Removes a file that may not exist.
fn clear(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_probe_of_a_directory_empties_no_file_that_a_link_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, dir.path().join(".flanneld-probe")).unwrap();
        prepare_file("subnet-file", &dir.path().join("subnet.env"), Capabilities::Keep).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn only_default_directories_may_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nope");
        let error = check("state-file", &missing).unwrap_err().to_string();
        for part in ["-state-file", "does not exist", &format!("mkdir -p {}", missing.display())] {
            assert!(error.contains(part), "{error}");
        }
        check("state-file", Path::new("/var/lib/flannel/not/there")).unwrap();
        let error = check("cni-conf-dir", Path::new("/etc/passwd")).unwrap_err().to_string();
        assert!(error.contains("is not a directory"), "{error}");
    }
}
