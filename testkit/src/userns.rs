//! Privileges for an unprivileged process: its own user namespace.

use std::fs;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use crate::{Context, Error};

/// Gives the process a private network namespace, and the right to create more.
///
/// Root gets only the network namespace. Any other user becomes root of a new user namespace, which is enough for
/// everything in the lab. Call it at the very start of `main`, while the process has one thread: the kernel refuses a
/// new user namespace to a process with more.
///
/// # Errors
/// If the system forbids it; the text contains the remedy. Retrying does not help.
pub fn enter() -> Result<(), Error> {
    let (uid, gid) = (geteuid(), getegid());
    if uid.is_root() && unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        return Ok(());
    }
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET) {
        return Err(Error::io(format!("no user namespace for this process: {}", remedy(errno)), errno));
    }
    // Without this, an unprivileged process may not write a group map (user_namespaces(7)).
    map("setgroups", "deny")?;
    map("uid_map", &format!("0 {uid} 1"))?;
    map("gid_map", &format!("0 {gid} 1"))
}

fn map(file: &str, text: &str) -> Result<(), Error> {
    let path = format!("/proc/self/{file}");
    fs::write(&path, text).context(|| {
        format!("the user namespace has no privileges, writing {path} was refused: run as root{}", apparmor_remedy())
    })
}

fn remedy(errno: nix::Error) -> String {
    let reason = match errno {
        nix::Error::EINVAL => return "call this before the first thread is started".to_owned(),
        nix::Error::ENOSPC | nix::Error::EUSERS if sysctl_is("user/max_user_namespaces", "0") => {
            ", or: sysctl -w user.max_user_namespaces=10000"
        }
        nix::Error::ENOSPC | nix::Error::EUSERS => ", or raise the sysctl user.max_user_namespaces",
        _ if sysctl_is("kernel/unprivileged_userns_clone", "0") => ", or: sysctl -w kernel.unprivileged_userns_clone=1",
        _ => apparmor_remedy(),
    };
    format!("run as root{reason}")
}

fn apparmor_remedy() -> &'static str {
    if sysctl_is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        ", or: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    } else {
        ", or allow user namespaces (in a container: --privileged, or --cap-add SYS_ADMIN,NET_ADMIN)"
    }
}

fn sysctl_is(name: &str, value: &str) -> bool {
    fs::read_to_string(format!("/proc/sys/{name}")).is_ok_and(|text| text.trim() == value)
}
