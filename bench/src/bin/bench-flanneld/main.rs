//! flanneld with etcd beside Go flannel, both measured in one run: start, processor time, memory, one lease, a thousand
//! leases. Prints lines of JSON and works in network namespaces of its own.
//!
//! Needs root, iproute2, and what `testkit/etcd/build` and `testkit/flannel/build` put into `target/`. A program of its
//! own, so that the other benchmarks measure the library's memory and not an etcd client's.

mod agent;
mod beside;
mod cluster;
mod routes;
mod run;

use bench::Error;
use clap::Parser;

/// flanneld with etcd, side by side with Go flannel.
#[derive(Debug, Parser)]
struct Args {
    /// How often each program is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Numbers of leases.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
    peers: Vec<u32>,
}

fn main() -> Result<(), Error> {
    let Args { runs, peers } = Args::parse();
    let programs = agent::Programs::find()?;
    peers.into_iter().try_for_each(|n| run::compare(&programs, n, runs))
}
