//! Least privilege: needed capabilities are kept, and dropped ones cannot be regained. Capabilities belong to threads,
//! so this has to run before any thread is started.

use std::env;
use std::path::Path;

use caps::{CapSet, Capability, CapsHashSet};

/// Why privileges are not as they have to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivilegeError {
    #[error("CAP_NET_ADMIN is missing: run as root, or give the service AmbientCapabilities=CAP_NET_ADMIN")]
    Missing,
    #[error("dropping capabilities (-keep-capabilities leaves them as they are)")]
    Caps(#[source] caps::errors::CapsError),
    #[error("setting no_new_privs (-keep-capabilities leaves it as it is)")]
    NoNewPrivs(#[source] nix::Error),
}

/// Checks that the kernel's network state may be written.
pub(crate) fn check() -> Result<(), PrivilegeError> {
    let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).map_err(PrivilegeError::Caps)?;
    if may { Ok(()) } else { Err(PrivilegeError::Missing) }
}

/// Drops all capabilities that are not needed, for children too, and sets no_new_privs.
pub(crate) fn reduce() -> Result<(), PrivilegeError> {
    let needed = needed();
    // The bounding set first: changing it needs a capability that is dropped next.
    let may_bound = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(PrivilegeError::Caps)?;
    if may_bound {
        for capability in caps::read(None, CapSet::Bounding).map_err(PrivilegeError::Caps)? {
            if !needed.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability).map_err(PrivilegeError::Caps)?;
            }
        }
    }
    let held = caps::read(None, CapSet::Permitted).map_err(PrivilegeError::Caps)?;
    let kept: CapsHashSet = held.intersection(&needed).copied().collect();
    caps::clear(None, CapSet::Ambient).map_err(PrivilegeError::Caps)?;
    caps::set(None, CapSet::Effective, &kept).map_err(PrivilegeError::Caps)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(PrivilegeError::Caps)?;
    caps::set(None, CapSet::Inheritable, &kept).map_err(PrivilegeError::Caps)?;
    // So that nft and iptables have them too if this process is not root.
    caps::set(None, CapSet::Ambient, &kept).map_err(PrivilegeError::Caps)?;
    nix::sys::prctl::set_no_new_privs().map_err(PrivilegeError::NoNewPrivs)
}

/// Returns CAP_NET_ADMIN, and CAP_NET_RAW unless `iptables` and `ip6tables` are of the nf_tables variant: the legacy one
/// uses a raw socket. Before 1.8 there was no other, and a wrapper may choose either.
fn needed() -> CapsHashSet {
    let path = env::var_os("PATH").unwrap_or_default();
    let find = |name: &&str| env::split_paths(&path).find_map(|dir| dir.join(name).canonicalize().ok());
    let mut tools = ["iptables", "ip6tables"].iter().filter_map(find);
    let raw = tools.any(|program| may_be_legacy(&program)).then_some(Capability::CAP_NET_RAW);
    [Capability::CAP_NET_ADMIN].into_iter().chain(raw).collect()
}

/// Whether a program may be the legacy variant. The other is `xtables-nft-multi`.
fn may_be_legacy(program: &Path) -> bool {
    !program.file_name().is_some_and(|name| name.to_string_lossy().contains("nft"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iptables_keeps_its_raw_socket_unless_it_is_known_to_need_none() {
        let raw =
            ["/usr/sbin/xtables-legacy-multi", "/sbin/xtables-multi", "/usr/sbin/iptables-wrapper", "/nft/iptables"];
        assert!(raw.iter().all(|program| may_be_legacy(Path::new(program))));
        assert!(!may_be_legacy(Path::new("/usr/sbin/xtables-nft-multi")));
    }
}
