//! The UDP backend beside what a user would pick instead: Go flannel's, the kernel's VXLAN, a forwarder of tun-rs and
//! quinn-udp, and the link alone.
//!
//! Each has two hosts of its own, which are network namespaces on one link, and all are measured in turn. The traffic
//! comes from threads of this process.

mod contenders;
mod flood;
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
use clap::ValueEnum;

use session::Session;

/// Measures these parts, or all where none is named, each for `seconds` and `rounds` times.
pub(crate) fn all(parts: &[Part], rounds: u32, seconds: f64) -> Result<(), Error> {
    let programs = Programs::find()?;
    let session = Session::new(rounds, Duration::from_secs_f64(seconds))?;
    for part in Part::value_variants().iter().filter(|part| parts.is_empty() || parts.contains(part)) {
        match part {
            Part::Traffic => traffic::compare(&session, &programs)?,
            Part::Peers => peers::compare(&session)?,
            Part::Process => {
                process::memory(&session, &programs)?;
                process::restart(&session, &programs)?;
            }
            Part::Flood => flood::compare(&session, &programs)?,
        }
    }
    Ok(())
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Throughput, packets and latency, beside other carriers.
    Traffic,
    /// Throughput among many peers.
    Peers,
    /// Memory and restart of flanneld.
    Process,
    /// What is left for peers while somebody else floods.
    Flood,
}
