//! The facts about the host that are not in the kernel's network state. Tests replace them.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use flannel_backend_udp::path::{Tun, check_sockets};
use flannel_core::net::Dual;

/// The source of these facts.
pub(super) trait Source {
    /// Returns the value of a sysctl, such as `net/ipv4/ip_forward`; `None` if it does not exist.
    fn sysctl(&self, name: &str) -> Option<String>;
    /// Returns the names of running programs, which the kernel cuts to 15 bytes.
    fn programs(&self) -> BTreeSet<String>;
    /// Returns the wall clock, in seconds since 1970.
    fn wall_clock(&self) -> u64;
    /// Whether systemd-timesyncd reports that the clock is synchronized.
    fn is_synchronized(&self) -> bool;
    /// Checks that TUN devices can be opened; the error gives the reason.
    fn tun(&self) -> Result<(), String>;
    /// Checks that UDP sockets can be bound to `wanted`; the error gives the reason.
    fn sockets(&self, wanted: Dual<SocketAddr>) -> Result<(), String>;
}

/// `/proc` and the machine's clock.
pub(super) struct Files;

impl Source for Files {
    fn sysctl(&self, name: &str) -> Option<String> {
        fs::read_to_string(Path::new("/proc/sys").join(name)).ok().map(|text| text.trim().to_owned())
    }

    fn programs(&self) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir("/proc") else { return BTreeSet::new() };
        let comm = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("comm")).ok();
        entries.flatten().filter_map(comm).map(|name| name.trim_end().to_owned()).collect()
    }

    #[expect(clippy::disallowed_methods, reason = "judges whether the wall clock is right")]
    fn wall_clock(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default()
    }

    fn is_synchronized(&self) -> bool {
        Path::new("/run/systemd/timesync/synchronized").exists()
    }

    fn tun(&self) -> Result<(), String> {
        Tun::probe().map_err(|error| crate::chain(&error))
    }

    fn sockets(&self, wanted: Dual<SocketAddr>) -> Result<(), String> {
        check_sockets(wanted).map_err(|error| crate::chain(&error))
    }
}
