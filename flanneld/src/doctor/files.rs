//! The files and directories that the agent writes.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::{fs, io};

use flannel_core::subnet_env::SubnetEnv;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat, geteuid};

use super::{Finding, Severity};
use crate::options::{Capabilities, Options, StateFile, StoreOptions};
use crate::{chain, directories, stores};

/// Checks the directories of all files.
pub(super) fn directories(options: &Options) -> Vec<Finding> {
    // A start reports errors of the default state file, and goes on.
    let severity = |file: &StateFile| if file.asked_for { Severity::Error } else { Severity::Warning };
    let state = options.state_file.as_ref();
    let state = state.map(|file| ("state-file", directories::of(&file.path), severity(file)));
    let needed = |(flag, dir)| (flag, dir, Severity::Error);
    let files = [("subnet-file", directories::of(&options.subnet_file))].into_iter().chain(options.cni.directories());
    let all = files.map(needed).chain(state);
    all.map(|(flag, dir, severity)| match directories::check(flag, dir) {
        Ok(()) => writable(flag, dir, severity, options.capabilities),
        Err(error) => Finding::alone("directory", severity, chain(&error)),
    })
    .collect()
}

/// Checks that the agent, started by this user, can write into a directory, or create it if it does not exist.
pub(super) fn writable(flag: &'static str, dir: &Path, severity: Severity, capabilities: Capabilities) -> Finding {
    let found = dir.ancestors().find(|dir| dir.exists()).unwrap_or(dir);
    let shown = found.display();
    let error = match may_write(found, capabilities) {
        Ok(()) if found == dir => return Finding::ok("directory", format!("{shown} is writable")),
        Ok(()) => return Finding::ok("directory", format!("{} will be created", dir.display())),
        Err(error) => error,
    };
    let user = geteuid();
    let found = format!("-{flag}: the agent cannot write to {shown} as this user (uid {user}): {error}");
    let fix = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => format!("mount its file system for writing, or choose another -{flag}"),
        _ => format!("run doctor as the agent's user, or: chown {user} {shown}"),
    };
    Finding::new("directory", severity, found, fix)
}

fn may_write(dir: &Path, capabilities: Capabilities) -> io::Result<()> {
    let wanted = AccessFlags::W_OK | AccessFlags::X_OK;
    let ask = || faccessat(AT_FDCWD, dir, wanted, AtFlags::AT_EACCESS).map_err(io::Error::from);
    directories::as_agent(capabilities, ask)
}

/// Checks whether the state file could be used by a start.
pub(super) async fn state(store: &StoreOptions, file: &StateFile) -> Finding {
    let path = &file.path;
    let shown = path.display();
    let warning = |found: String, fix: String| Finding::new("state file", Severity::Warning, found, fix);
    let unreadable = || {
        let found = format!("{shown} is not readable by this user (uid {})", geteuid());
        let fix = "run doctor as the agent's user, for example: sudo flanneld doctor";
        Finding::new("state file", Severity::Note, found, fix)
    };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let found = format!("{shown} does not exist: without it, startup waits for the store");
            let fix = "nothing: the agent writes it within a minute of its start";
            return Finding::new("state file", Severity::Note, found, fix);
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return unreadable(),
        Err(error) => return Finding::alone("state file", Severity::Warning, format!("{shown}: {error}")),
    };
    if !found.is_file() {
        return warning(format!("{shown} is not a regular file"), "choose another -state-file".to_owned());
    }
    if let Err(error) = fs::File::open(path)
        && error.kind() == io::ErrorKind::PermissionDenied
    {
        return unreadable();
    }
    if found.permissions().mode() & 0o022 != 0 {
        let what = format!("{shown} is writable by other users, so a start ignores it");
        return warning(what, format!("chmod 0600 {shown}"));
    }
    // Without a store it is unknown to which store the file belongs.
    let kept = stores::open(store).await.ok().and_then(|opened| opened.with_state_file(Some(file)).state);
    if let Some(Err(reason)) = kept.map(|kept| kept.check()) {
        let what = format!("a start ignores {shown}: {reason}");
        return warning(what, format!("rm {shown} (the agent writes it again)"));
    }
    #[expect(clippy::disallowed_methods, reason = "file times are of the wall clock, and this one is only shown")]
    let age = found.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
    Finding::ok("state file", format!("{shown} was written {} min ago", age.as_secs() / 60))
}

/// Reads `subnet.env`.
pub(super) fn subnet_env(options: &Options) -> (Option<SubnetEnv>, Finding) {
    let path = options.subnet_file.display();
    match SubnetEnv::read(&options.subnet_file) {
        Ok(Some(env)) if env.mtu.is_some() && !env.subnets.is_empty() => {
            (Some(env), Finding::ok("subnet file", format!("{path} is complete")))
        }
        Ok(Some(_)) => {
            let found = format!("{path} is incomplete, so pods cannot be attached");
            let fix = format!("rm {path} (the agent writes it again when it starts)");
            (None, Finding::new("subnet file", Severity::Warning, found, fix))
        }
        Ok(None) => {
            let found = format!("{path} does not exist: pods cannot be attached until the agent has written it");
            (None, Finding::new("subnet file", Severity::Note, found, "if the agent is running: flanneld status"))
        }
        Err(error) => {
            let fix = "run doctor as the agent's user, for example: sudo flanneld doctor";
            (None, Finding::new("subnet file", Severity::Warning, chain(&error), fix))
        }
    }
}
