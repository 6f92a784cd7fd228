//! The UDP backend beside what a user would pick instead: Go flannel's, the kernel's VXLAN, a forwarder of tun-rs and
//! quinn-udp, and the link alone.
//!
//! Each has two hosts of its own, which are network namespaces on one link, and all are measured in turn. The traffic
//! comes from threads of this process.

mod contenders;
mod forwarder;
mod library;
mod pair;
mod peers;
mod process;
mod rows;
mod session;
mod small;
mod traffic;

use std::time::Duration;

use bench::Error;
use bench::agent::Programs;

use session::Session;

/// Measures everything, each for `seconds` and `rounds` times.
pub(crate) fn all(rounds: u32, seconds: f64) -> Result<(), Error> {
    let programs = Programs::find()?;
    let session = Session::new(rounds, Duration::from_secs_f64(seconds))?;
    traffic::compare(&session, &programs)?;
    peers::compare(&session)?;
    process::memory(&session, &programs)?;
    process::restart(&session, &programs)
}
