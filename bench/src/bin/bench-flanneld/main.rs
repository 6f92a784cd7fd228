//! flanneld with etcd or Kubernetes beside Go flannel, both measured in one run: start, processor time, memory, what
//! changes cost; or ours alone with each of its stores (`--setups`). Prints lines of JSON and works in network namespaces of
//! its own.
//!
//! Needs root, iproute2, and what `./test` builds into `target/`; with `--kube` nft too. A program of its own, so that the
//! other benchmarks measure the library's memory and not a client's.

mod beside;
mod kube_run;
mod nodes;
mod routes;
mod run;
mod setups;

use bench::Error;
use clap::Parser;

/// flanneld with etcd or Kubernetes, side by side with Go flannel.
#[derive(Debug, Parser)]
struct Args {
    /// How often each program is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Numbers of leases. Default: 1000 and 10000 in etcd, 5000 in Kubernetes, 2 and 10000 with --setups.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<u32>,
    /// Leases in Kubernetes instead of etcd.
    #[arg(long)]
    kube: bool,
    /// Ours alone, with etcd and with the embedded store, with and without a state file.
    #[arg(long, conflicts_with = "kube")]
    setups: bool,
}

fn main() -> Result<(), Error> {
    let Args { runs, peers, kube, setups } = Args::parse();
    let programs = bench::agent::Programs::find()?;
    let numbers = |default: &[u32]| if peers.is_empty() { default.to_vec() } else { peers.clone() };
    match (kube, setups) {
        (true, _) => numbers(&[5_000]).into_iter().try_for_each(|n| kube_run::compare(&programs, n, runs)),
        (false, true) => numbers(&[2, 10_000]).into_iter().try_for_each(|n| setups::measure(&programs, n, runs)),
        (false, false) => numbers(&[1_000, 10_000]).into_iter().try_for_each(|n| run::compare(&programs, n, runs)),
    }
}
