//! Benchmarks of an overlay agent on a real kernel, each beside the floor: the same job done by `ip -batch` and
//! `bridge -batch`. Every benchmark prints lines of JSON and works in network namespaces of its own.
//!
//! Needs root (or `unshare --user --map-root-user --net`) and iproute2.

mod floor;
mod hostile;
mod node;
mod run;
mod udp;

use bench::Error;
use clap::{Parser, ValueEnum};

/// Benchmarks of an overlay agent, side by side with iproute2 on the same kernel.
#[derive(Debug, Parser)]
struct Args {
    /// Which to run.
    name: Name,
    /// Alternating pairs, or repetitions where there is no floor.
    #[arg(long, visible_alias = "rounds", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Numbers of peers, instead of the benchmark's own.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=i64::from(bench::peers::MOST)))]
    peers: Vec<u32>,
    /// How long `udp` measures each.
    #[arg(long, default_value = "2", value_parser = seconds)]
    seconds: f64,
    /// Parts of `udp`, instead of all.
    #[arg(long = "part", value_delimiter = ',')]
    parts: Vec<udp::Part>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.5..=60.0).contains(&seconds) { Ok(seconds) } else { Err("write 0.5 to 60".to_owned()) }
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
    /// The UDP backend beside Go flannel's, the kernel's VXLAN, and tun-rs with quinn-udp.
    Udp,
    /// All of them but `udp`.
    All,
}

fn main() -> Result<(), Error> {
    let Args { name, runs, peers, seconds, parts } = Args::parse();
    let or = |default: &[u32]| if peers.is_empty() { default.to_vec() } else { peers.clone() };
    if name == Name::Udp {
        return udp::all(&parts, runs, seconds);
    }
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
