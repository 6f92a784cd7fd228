//! Namespaces around the whole cluster, which end with it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal};
use tempfile::TempDir;

use super::cgroups::Groups;
use super::node::child_of;
use crate::{Context, Error, wait_until};

/// How the names of runs' directories and control groups begin.
const PREFIX: &str = "flannelkit-cluster-";
/// Has the directory of a run, and is set for the program inside only.
const VARIABLE: &str = "FLANNELKIT_CLUSTER";
/// How long the program inside may take to start.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the calling program once more in mount, network and process namespaces of its own, and `inside` there. It gets
/// an empty directory on the disk.
///
/// Whatever ends the program, everything that it started ends with it. The directory and the control groups are removed
/// at the end, or at the start of the next run if this process was killed.
///
/// Call it first in `main`, before there are other threads.
///
/// # Errors
/// If the process is not root, `unshare` is missing, or the directory cannot be created.
pub fn isolated(inside: impl FnOnce(&Path) -> Result<(), Error>) -> Result<ExitCode, Error> {
    if let Some(dir) = std::env::var_os(VARIABLE) {
        // The program outside blocked some.
        SigSet::all().thread_unblock().context(|| "unblocking signals".to_owned())?;
        // What servers keep in memory ends with the namespace.
        for place in ["/dev/shm", "/run"] {
            let none = None::<&str>;
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), none)
                .context(|| format!("mounting a tmpfs at {place}"))?;
        }
        inside(Path::new(&dir))?;
        return Ok(ExitCode::SUCCESS);
    }
    let target = crate::programs::target();
    // One run begins at a time: until it holds its directory, another would take it for left over.
    let begins = lock(&target, FlockArg::LockExclusive)?;
    remove_left_over(&target)?;
    let dir = TempDir::with_prefix_in(PREFIX, &target).context(|| format!("in {}", target.display()))?;
    let _held = lock(dir.path(), FlockArg::LockExclusiveNonblock)?;
    drop(begins);
    let groups = Groups::of(dir.path())?;
    let status = run_inside(dir.path());
    if let Err(error) = groups.remove() {
        // The next run finds them by the directory.
        let _ = dir.keep();
        return Err(error);
    }
    dir.close().context(|| "removing the cluster's directory".to_owned())?;
    Ok(status?.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Runs this program in its namespaces until it ends or this process gets a signal to end.
fn run_inside(dir: &Path) -> Result<ExitStatus, Error> {
    // Signals that end this process must not keep it from cleaning up.
    let ends: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    ends.thread_block().context(|| "blocking signals".to_owned())?;
    let program = std::env::current_exe().context(|| "this program's path".to_owned())?;
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation", "private"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, dir)
        .process_group(0);
    let mut child = command.spawn().context(|| "running setpriv and unshare of util-linux".to_owned())?;
    if let Err(error) = write_pid(child.id(), dir) {
        // It may have ended.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    loop {
        let signal = ends.wait().context(|| "waiting for a signal".to_owned())?;
        if signal != Signal::SIGCHLD {
            child.kill().context(|| "ending the cluster".to_owned())?;
        }
        if let Some(status) = child.try_wait().context(|| "waiting for the cluster".to_owned())? {
            return Ok(status);
        }
    }
}

/// The file in a run's directory that has the process id of the program inside, as seen from outside.
const PID: &str = "pid";

/// Writes the process id of the program inside: the child of `unshare`.
fn write_pid(unshare: u32, dir: &Path) -> Result<(), Error> {
    let mut pid = None;
    wait_until("the program inside", PATIENCE, || {
        pid = child_of(unshare).ok();
        // `unshare` may have failed, which its exit status shows.
        Ok(pid.is_some() || !Path::new(&format!("/proc/{unshare}/exe")).exists())
    })?;
    let Some(pid) = pid else { return Ok(()) };
    // Read only when it is whole.
    let file = dir.join(PID);
    let written = fs::write(file.with_extension("new"), pid.to_string());
    written
        .and_then(|()| fs::rename(file.with_extension("new"), &file))
        .context(|| format!("writing {}", file.display()))
}

/// Returns the directory of this run.
///
/// # Errors
/// If this program is not [`isolated`].
pub(super) fn run_dir() -> Result<PathBuf, Error> {
    std::env::var_os(VARIABLE).map(PathBuf::from).ok_or_else(|| Error::new("this program has no namespaces of its own"))
}

/// Returns the process id of this program as it is outside of its namespaces.
///
/// # Errors
/// If this program is not [`isolated`].
pub(super) fn outer_pid() -> Result<String, Error> {
    let file = run_dir()?.join(PID);
    wait_until("this program's own process id", PATIENCE, || Ok(file.exists()))?;
    fs::read_to_string(&file).context(|| format!("reading {}", file.display()))
}

/// Locks a directory until the result is dropped.
fn lock(dir: &Path, how: FlockArg) -> Result<Flock<fs::File>, Error> {
    let file = fs::File::open(dir).context(|| format!("opening {}", dir.display()))?;
    Flock::lock(file, how).map_err(|(_, error)| Error::io(format!("locking {}", dir.display()), error))
}

/// Removes the control groups and directories that killed runs have left in `target`.
fn remove_left_over(target: &Path) -> Result<(), Error> {
    let entries = fs::read_dir(target).context(|| format!("reading {}", target.display()))?;
    let is_run = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
    for dir in entries.filter_map(Result::ok).filter(is_run).map(|entry| entry.path()) {
        // A run that continues holds it.
        let Ok(_alone) = lock(&dir, FlockArg::LockExclusiveNonblock) else { continue };
        Groups::of(&dir)?.remove()?;
        fs::remove_dir_all(&dir).context(|| format!("removing {}", dir.display()))?;
    }
    Ok(())
}
