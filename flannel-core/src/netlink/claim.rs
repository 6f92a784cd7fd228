//! One overlay of a name in a network namespace.

use std::io::{self, BufRead, BufReader};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::kernel::{Claim, KernelError, OverlayName, Residence};
use crate::net::{Dual, Family, Prefix};

/// How all claims begin.
const SCHEME: &str = "flannelkit/";
/// How the name ends of one that ran there formerly. One byte: the longest claim has no room for two.
const FORMER: &str = "~";

/// Takes the name in the calling thread's network namespace: a listening abstract Unix socket, which lives per
/// namespace and dies with its process (kernel-facts 29), called `flannelkit/<name>/<v4>/<v6>`. A prefix is spelt
/// `10.5.0.0-16`, a family not in use `-`; the name of one that ran there formerly has `~` behind it, which no name
/// can have.
///
/// The others are looked at before, so that nothing is touched in vain, and after, so that of two who claim at the same
/// time at least one yields, perhaps both.
pub(crate) fn claim(
    overlay: &OverlayName,
    networks: &Dual<Prefix>,
    residence: Residence,
) -> Result<Claim, KernelError> {
    let name = name_of(overlay, residence);
    let text = spell(&name, networks);
    look_for_others(&text, &name, networks, Own::Counts)?;
    let listener = match SocketAddr::from_abstract_name(&text).and_then(|addr| UnixListener::bind_addr(&addr)) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(conflict(&text)),
        Err(error) => return Err(lost(&error)),
    };
    look_for_others(&text, &name, networks, Own::Skipped)?;
    Ok(Claim::new(listener))
}

/// Whether a socket of exactly our name is somebody else's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Counts,
    Skipped,
}

fn look_for_others(text: &str, name: &str, networks: &Dual<Prefix>, own: Own) -> Result<(), KernelError> {
    // `/proc/net` is that of the process's first thread, which may live in another namespace.
    let file = std::fs::File::open("/proc/thread-self/net/unix").map_err(|error| lost(&error))?;
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(|error| lost(&error))?;
        let line = String::from_utf8_lossy(&line);
        let Some(other) = line.split_ascii_whitespace().nth(7).and_then(|path| path.strip_prefix('@')) else {
            continue;
        };
        if !other.starts_with(SCHEME) || (own == Own::Skipped && other == text) {
            continue;
        }
        if other == text || clashes(other, name, networks) {
            return Err(conflict(other));
        }
    }
    Ok(())
}

fn name_of(overlay: &OverlayName, residence: Residence) -> String {
    match residence {
        Residence::Present => overlay.to_string(),
        Residence::Former => format!("{overlay}{FORMER}"),
    }
}

fn spell(name: &str, networks: &Dual<Prefix>) -> String {
    let part = |family| match networks.get(family) {
        Some(prefix) => format!("{}-{}", prefix.addr(), prefix.len()),
        None => "-".to_owned(),
    };
    format!("{SCHEME}{name}/{}/{}", part(Family::V4), part(Family::V6))
}

/// Same name or a common address; what an overlay had formerly is no rival to itself. A claim that cannot be read is
/// somebody's all the same.
fn clashes(other: &str, name: &str, networks: &Dual<Prefix>) -> bool {
    let parts: Vec<&str> = other.split('/').collect();
    let [_, theirs, prefixes @ ..] = parts.as_slice() else { return true };
    let overlay = |name: &str| name.strip_suffix(FORMER).map_or(name.to_owned(), str::to_owned);
    if overlay(theirs) == overlay(name) {
        return *theirs == name && !name.ends_with(FORMER);
    }
    prefixes.iter().any(|part| match (*part, parse(part)) {
        ("-", _) => false,
        (_, Some(theirs)) => networks.get(theirs.family()).is_some_and(|ours| ours.overlaps(&theirs)),
        (_, None) => true,
    })
}

fn parse(part: &str) -> Option<Prefix> {
    let (addr, len) = part.rsplit_once('-')?;
    Prefix::new(addr.parse().ok()?, len.parse().ok()?).ok()
}

fn conflict(other: &str) -> KernelError {
    KernelError::Conflict {
        other: other.strip_prefix(SCHEME).unwrap_or(other).to_owned(),
        hint: "stop it, or give this overlay another name and a network that does not overlap".to_owned(),
    }
}

fn lost(error: &io::Error) -> KernelError {
    KernelError::Lost { doing: "claiming the overlay's name".to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dual(v4: &str, v6: &str) -> Dual<Prefix> {
        Dual { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    #[test]
    fn a_claim_is_spelt_without_slashes_in_its_prefixes() {
        let name = |residence| name_of(&OverlayName::default(), residence);
        let (present, former) = (name(Residence::Present), name(Residence::Former));
        assert_eq!(spell(&present, &dual("10.5.0.0/16", "")), "flannelkit/flannel/10.5.0.0-16/-");
        assert_eq!(spell(&former, &dual("10.5.0.0/16", "fd00::/48")), "flannelkit/flannel~/10.5.0.0-16/fd00::-48");
    }

    #[test]
    fn the_longest_claim_fits_a_socket_name() {
        let name = OverlayName::new(&"x".repeat(32)).unwrap();
        let networks = dual("255.255.255.255/32", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128");
        assert!(SocketAddr::from_abstract_name(spell(&name_of(&name, Residence::Former), &networks)).is_ok());
    }

    #[test]
    fn claims_clash_by_name_by_overlap_and_when_unreadable() {
        let ours = dual("10.5.0.0/16", "fd00::/48");
        for other in [
            "flannelkit/flannel/-/-",
            "flannelkit/b/10.5.7.0-24/-",
            "flannelkit/b~/10.5.7.0-24/-",
            "flannelkit/b/-/fd00::-16",
            "flannelkit/b/?",
        ] {
            assert!(clashes(other, "flannel", &ours), "{other}");
            assert_eq!(clashes(other, "flannel~", &ours), !other.contains("/flannel/"), "{other}");
        }
        for other in
            ["flannelkit/b/10.6.0.0-16/-", "flannelkit/flannel2/-/fd01::-48", "flannelkit/flannel~/10.5.0.0-17/-"]
        {
            assert!(!clashes(other, "flannel", &ours), "{other}");
        }
    }
}
