//! Ensures that only one overlay uses a name in a network namespace.

use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::Duration;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_USERSOCK;
use nix::sys::stat::fstat;

use crate::kernel::{Claim, KernelError, OverlayName, Residence};
use crate::net::{Dual, Family, Prefix};
use crate::text::Plain;

/// The start of a claim's socket name.
const SCHEME: &str = "flannelkit/";
/// The start of the socket name, before six random hexadecimal digits, if an unprivileged process has bound the usual
/// name. Including the digits it is as long as [`SCHEME`], because the longest claim has no room for more.
const OTHER_SCHEME: &str = "flk-";
/// How many random names are tried before the claim fails.
const MOST_NAMES: usize = 8;
/// The end of the socket name of a former overlay. One byte, because the longest claim has no room for two.
const FORMER: &str = "~";
/// How long one of two simultaneous claimants waits, so that the other can finish.
const TURN: Duration = Duration::from_millis(100);

/// Claims the name in the calling thread's network namespace, with two sockets that exist per namespace and close with
/// the process (docs/kernel-facts.md, "Abstract sockets"):
///
/// * An abstract Unix socket names the claim: `flannelkit/<name>/<v4>/<v6>`. A prefix is spelt `10.5.0.0-16`, a family
///   not in use `-`; the name of a former overlay is followed by `~`, which names cannot contain.
/// * Any process may bind such a socket, so it counts only with a proof: a netlink socket of the protocol `USERSOCK`
///   that has joined the multicast groups whose bits are the Unix socket's inode number. The kernel requires
///   `CAP_NET_ADMIN` in the namespace to join a group. A process without that privilege binds the name without a proof;
///   only other unprivileged processes respect that claim.
///
/// Other claims are checked before, so that no socket is created in vain, and after, so that of two simultaneous
/// claimants at least one yields. If both yield, each tries once more, the one with the lower inode number first.
pub(crate) fn claim(
    overlay: &OverlayName,
    networks: &Dual<Prefix>,
    residence: Residence,
) -> Result<Claim, KernelError> {
    let name = name_of(overlay, residence);
    match attempt(&name, networks)? {
        Attempt::Held(claim) => return Ok(claim),
        Attempt::Tied { is_first: true, .. } => {}
        Attempt::Tied { is_first: false, .. } => std::thread::sleep(TURN),
    }
    match attempt(&name, networks)? {
        Attempt::Held(claim) => Ok(claim),
        Attempt::Tied { rival, .. } => Err(conflict(&rival.name)),
    }
}

/// The outcome of an attempt to claim.
enum Attempt {
    Held(Claim),
    /// Another process claimed at the same time; this claim is released.
    Tied {
        rival: Other,
        is_first: bool,
    },
}

fn attempt(name: &str, networks: &Dual<Prefix>) -> Result<Attempt, KernelError> {
    let rival = |own| -> Result<Option<Other>, KernelError> {
        let clashing = others(own)?.into_iter().filter(|other| clashes(&other.name, name, networks));
        Ok(clashing.min_by_key(|other| other.inode))
    };
    if let Some(rival) = rival(None)? {
        return Err(conflict(&rival.name));
    }
    let text = spell(name, networks);
    let (listener, named) = bind(&text).map_err(|error| lost(&error))?;
    let inode = inode_of(&listener).map_err(|error| lost(&error))?;
    match prove(inode) {
        Ok(proof) => Ok(match rival(Some(inode))? {
            None => Attempt::Held(Claim::new((listener, proof))),
            Some(rival) => Attempt::Tied { is_first: inode < rival.inode, rival },
        }),
        // An agent that writes nothing to the kernel needs no privilege. The bound name excludes other agents of that
        // kind.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => match named {
            Named::AsUsual => Ok(Attempt::Held(Claim::new(listener))),
            Named::Otherwise => Err(conflict(&text)),
        },
        Err(error) => Err(lost(&error)),
    }
}

/// Whether a claim's socket has the usual name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    AsUsual,
    /// Another process has bound the usual name.
    Otherwise,
}

/// Binds a socket with this name, or with a different start if the name is in use.
fn bind(text: &str) -> io::Result<(UnixListener, Named)> {
    let bind = |text: &str| UnixListener::bind_addr(&SocketAddr::from_abstract_name(text)?);
    let mut bound = bind(text).map(|listener| (listener, Named::AsUsual));
    for nth in 0..MOST_NAMES {
        if !matches!(&bound, Err(error) if error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
        let random = RandomState::new().hash_one(nth) & 0xff_ffff;
        let other = format!("{OTHER_SCHEME}{random:06x}/{}", text.strip_prefix(SCHEME).unwrap_or(text));
        bound = bind(&other).map(|listener| (listener, Named::Otherwise));
    }
    bound
}

fn inode_of(socket: &impl AsFd) -> io::Result<u32> {
    // Sockets are numbered with 32 bits (`get_next_ino`, fs/inode.c).
    u32::try_from(fstat(socket.as_fd())?.st_ino).map_err(io::Error::other)
}

/// Proves that the owner of the socket with this inode number is privileged.
fn prove(inode: u32) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_USERSOCK)?;
    // The socket is never read: messages that other processes send to these groups must not use memory.
    socket.set_rx_buf_sz(0_u32)?;
    socket.bind(&netlink_sys::SocketAddr::new(0, inode))?;
    Ok(socket)
}

/// The claim of another process.
struct Other {
    /// The inode number of its socket.
    inode: u32,
    /// The name of its socket.
    name: String,
}

/// Returns the claims of other processes. A line of the list can be forged with a line break in a socket's name, but
/// only with the inode number of an existing claim: at worst, that claim looks larger.
fn others(own: Option<u32>) -> Result<Vec<Other>, KernelError> {
    let read = || -> io::Result<Vec<Other>> {
        let mut proven = BTreeSet::new();
        for line in lines("netlink")? {
            proven.extend(proof(&line?).filter(|inode| Some(*inode) != own));
        }
        let mut claims = Vec::new();
        for line in lines("unix")? {
            let line = line?;
            let mut words = line.split_ascii_whitespace().skip(6);
            let (Some(inode), Some(path)) = (words.next(), words.next()) else { continue };
            let inode = inode.parse().ok().filter(|inode| proven.contains(inode) && is_claim(path));
            claims.extend(inode.map(|inode| Other { inode, name: path.trim_start_matches('@').to_owned() }));
        }
        Ok(claims)
    };
    read().map_err(|error| lost(&error))
}

/// Returns the lines of a list of this thread's network namespace.
fn lines(list: &str) -> io::Result<impl Iterator<Item = io::Result<String>>> {
    // `/proc/net` belongs to the process's first thread, which may be in another namespace.
    let file = File::open(format!("/proc/thread-self/net/{list}"))?;
    Ok(BufReader::new(file).split(b'\n').map(|line| Ok(String::from_utf8_lossy(&line?).into_owned())))
}

/// Returns the inode number that a line of `/proc/net/netlink` proves: protocol and groups are the second and fourth
/// columns.
fn proof(line: &str) -> Option<u32> {
    let words: Vec<&str> = line.split_ascii_whitespace().take(4).collect();
    let [_, protocol, _, groups] = words.as_slice() else { return None };
    (protocol.parse() == Ok(NETLINK_USERSOCK))
        .then(|| u32::from_str_radix(groups, 16).ok())?
        .filter(|inode| *inode != 0)
}

fn is_claim(path: &str) -> bool {
    path.strip_prefix('@').is_some_and(|name| name.starts_with(SCHEME) || name.starts_with(OTHER_SCHEME))
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

/// Returns whether names are equal or prefixes overlap. A former overlay does not clash with one of the same name. A
/// claim that does not parse clashes.
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
        other: Plain(other.split_once('/').map_or(other, |(_, claimed)| claimed)).to_string(),
        hint: "stop it, or give this overlay another name and a network that does not overlap".to_owned(),
    }
}

fn lost(error: &io::Error) -> KernelError {
    KernelError::Lost { doing: "claiming the overlay's name".to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::samples::dual;

    #[test]
    fn only_a_member_of_a_group_of_the_right_protocol_proves_anything() {
        let line =
            |protocol: &str, groups: &str| format!("00000000230f1912 {protocol}   26639 {groups} 0 0 0 2 0 40581");
        assert_eq!(proof(&line("2", "00009e84")), Some(0x9e84));
        for line in [line("2", "00000000"), line("0", "00009e84"), line("2", "?"), "sk Eth Pid Groups".to_owned()] {
            assert_eq!(proof(&line), None, "{line}");
        }
    }

    #[test]
    fn where_the_usual_name_is_taken_another_of_the_same_length_is_used() {
        let text = format!("{SCHEME}test-{}/-/-", std::process::id());
        let (squatter, usual) = bind(&text).unwrap();
        let (other, named) = bind(&text).unwrap();
        assert_eq!((usual, named), (Named::AsUsual, Named::Otherwise));
        let name = other.local_addr().unwrap().as_abstract_name().unwrap().to_owned();
        assert_eq!(name.len(), text.len());
        assert!(is_claim(&format!("@{}", String::from_utf8(name).unwrap())));
        drop(squatter);
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
