//! Namespace lab, sabotage and traffic probes for tests, benchmarks and the quickstart.
//!
//! For the lab nothing but the Linux kernel is needed: no program is run, everything goes through netlink and plain
//! sockets, and all of it works inside an unprivileged user namespace ([`userns::enter`]). [`etcd`] runs real servers.
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

mod error;
mod lab;
mod netlink;
mod objects;

pub mod canary;
pub mod etcd;
pub mod filter;
pub mod go_flannel;
pub mod namespace;
pub mod probe;
pub mod sabotage;
pub mod userns;

pub use error::Error;
pub use lab::{Families, Node, Pod, PodNet, UNDERLAY_LINK, Underlay, wait_until};
pub use namespace::Namespace;
pub use objects::{Address, Fdb, Hop, Link, Listing, Neighbour, Route, Rule, VxlanLink};

pub(crate) use error::Context;

/// A temporary directory in memory where the system has one (`/dev/shm`): a store that waits for a busy disk would make
/// tests fail that are about something else.
///
/// # Errors
/// When neither there nor on the disk one can be made.
pub fn memory_dir() -> std::io::Result<tempfile::TempDir> {
    tempfile::TempDir::new_in("/dev/shm").or_else(|_| tempfile::TempDir::new())
}

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
