//! Namespace lab, sabotage and traffic probes for tests, benchmarks and the quickstart.
//!
//! The lab needs the Linux kernel and iproute2 (`ip` and `bridge`), and works inside an unprivileged user namespace
//! ([`userns::enter`]). [`etcd`] and, with the feature `kubernetes`, `kubernetes` run real servers.
//!
//! ```no_run
//! use testkit::{Families, Underlay, probe};
//!
//! # fn main() -> Result<(), testkit::Error> {
//! testkit::userns::enter()?;
//! let underlay = Underlay::new(2, Families::V4)?;
//! let [one, two] = underlay.nodes() else { return Ok(()) };
//! probe::ping(&one.ns, two.v4()?, std::time::Duration::from_secs(1))?;
//! # Ok(())
//! # }
//! ```

mod agent;
mod error;
mod iproute;
mod lab;
mod objects;
mod ports;
mod process;
mod programs;

pub mod canary;
#[cfg(feature = "kubernetes")]
pub mod cluster;
pub mod etcd;
mod ethtool;
pub mod filter;
pub mod firewall_contract;
pub mod go_flannel;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod monitoring;
pub mod namespace;
pub mod probe;
pub mod sabotage;
pub mod userns;

pub use agent::Agent;
pub use error::Error;
pub use iproute::hold_commands;
pub use lab::{Families, Node, Pod, PodNet, UNDERLAY_LINK, Underlay, wait_until};
pub use namespace::Namespace;
pub use objects::{Address, Fdb, Hop, Link, Listing, Neighbour, Route, Rule, VxlanLink};
pub use process::Process;

pub(crate) use error::Context;

/// The usual place of an in-memory file system.
const MEMORY: &str = "/dev/shm";
/// The least free space in memory, in bytes: an etcd uses 64 MiB at once, and several run at the same time. Containers
/// often have no more than that.
const MEMORY_LEAST: u64 = 1 << 30;

/// Creates a temporary directory for a store, in memory if there is room: a store that waits for a busy disk would make
/// unrelated tests fail. Not for programs: memory may be mounted `noexec`.
///
/// # Errors
/// If no directory can be created there or on the disk.
pub fn memory_dir() -> std::io::Result<tempfile::TempDir> {
    let free = nix::sys::statvfs::statvfs(MEMORY).map_or(0, |fs| fs.blocks_available() * fs.fragment_size());
    if free < MEMORY_LEAST {
        return tempfile::TempDir::new();
    }
    tempfile::TempDir::new_in(MEMORY).or_else(|_| tempfile::TempDir::new())
}

/// Defines tests that are calls of one function.
#[macro_export]
macro_rules! cases {
    ($(fn $name:ident() = $check:ident($($argument:expr),*);)+) => {
        $(#[test]
        fn $name() {
            $check($($argument),*);
        })+
    };
}
