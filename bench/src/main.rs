//! Benchmarks of an overlay agent on a real kernel, each beside the floor: the same job done by `ip -batch` and
//! `bridge -batch`. Every benchmark prints lines of JSON and works in network namespaces of its own.
//!
//! Needs root (or `unshare --user --map-root-user --net`) and iproute2.

mod floor;
mod hostile;
mod node;
mod run;

use bench::Error;
use clap::{Parser, ValueEnum};

/// Benchmarks of an overlay agent, side by side with iproute2 on the same kernel.
#[derive(Debug, Parser)]
struct Args {
    /// Which to run.
    name: Name,
    /// Alternating pairs, or repetitions where there is no floor.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Numbers of peers, instead of the benchmark's own.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=i64::from(bench::peers::MOST)))]
    peers: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// An empty kernel to N peers programmed, against iproute2's batches.
    Scale,
    /// Comparing everything with nothing to do.
    Audit,
    /// One lease event, and a thousand at once, to the last acknowledgement.
    Event,
    /// Everything back after `ip route flush`.
    Heal,
    /// Removing everything.
    Teardown,
    /// Resident memory.
    Memory,
    /// What hostile records cost.
    AdmitHostile,
    /// All of them.
    All,
}

fn main() -> Result<(), Error> {
    let Args { name, runs, peers } = Args::parse();
    let or = |default: &[u32]| if peers.is_empty() { default.to_vec() } else { peers.clone() };
    let is = |this: Name| name == this || name == Name::All;
    // First: what ran before would count.
    if is(Name::Memory) {
        for n in or(&[10_000, 100_000]) {
            run::memory(n)?;
        }
    }
    if is(Name::Scale) {
        for n in or(&[1_000, 5_000, 10_000, 40_000, 100_000]) {
            run::scale(n, runs)?;
        }
    }
    if is(Name::Audit) {
        for n in or(&[10_000]) {
            run::audit(n, runs)?;
        }
    }
    if is(Name::Event) {
        for n in or(&[1_000, 10_000, 40_000, 100_000]) {
            run::event(n, runs)?;
        }
    }
    if is(Name::Heal) {
        for n in or(&[10_000]) {
            run::heal(n, runs)?;
        }
    }
    if is(Name::Teardown) {
        for n in or(&[10_000, 100_000]) {
            run::teardown(n, runs)?;
        }
    }
    if is(Name::AdmitHostile) {
        hostile::all(runs)?;
    }
    Ok(())
}
