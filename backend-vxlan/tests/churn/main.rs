//! Identity and uplink under churn: many nodes whose addresses, interfaces, default routes, hosts and clocks change at
//! random, with virtual addresses that move between hosts, hosts that sleep past their leases, nodes of Go flannel, and
//! a network whose pool is narrowed and widened. Each seed uses IPv4, IPv6 or both.
//!
//! After each step, no two nodes hold overlapping subnets, no node has lost its lease to another or extends a lost one,
//! no foreign record is changed, no kernel has a route that belongs to no peer, foreign objects in the kernel are
//! unchanged, and each agent that reports ready is ready. Once it is quiet, every node reaches every other at its real
//! place.
//!
//! `CHURN_SEED` runs one seed, `CHURN_SEEDS` that many, starting at `CHURN_FROM`.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "helpers of tests")]

mod acts;
mod checks;
mod clock;
mod foreign;
mod host;
mod network;
mod rest;
mod story;
mod witness;
mod world;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::world::{When, World};

    const SEEDS: u64 = 400;
    const STEPS: usize = 250;
    /// How many seeds run at a time.
    const THREADS: usize = 2;

    fn setting(name: &str) -> Option<u64> {
        std::env::var(name).ok().map(|text| text.parse().unwrap())
    }

    /// Returns the kernels' final states and the number of writes.
    fn simulate(seed: u64, steps: usize) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut world = World::new(seed);
            for step in 0..steps {
                world.when = When::Step(step);
                world.step().await;
                world.check_step();
            }
            world.when = When::Settling;
            world.settle().await;
            world.when = When::AtRest;
            world.check_rest().await;
            world.outcome()
        })
    }

    #[test]
    fn every_node_stays_itself_and_reaches_all_others_once_it_is_quiet() {
        if let Some(seed) = setting("CHURN_SEED") {
            simulate(seed, STEPS);
            return;
        }
        let from = setting("CHURN_FROM").unwrap_or(0);
        let until = from + setting("CHURN_SEEDS").unwrap_or(SEEDS);
        let next = AtomicU64::new(from);
        std::thread::scope(|scope| {
            let run = || {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < until) {
                    simulate(seed, STEPS);
                }
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
            for thread in threads {
                if let Err(panic) = thread.join() {
                    // The others can stop.
                    next.store(until, Ordering::Relaxed);
                    std::panic::resume_unwind(panic);
                }
            }
        });
    }

    #[test]
    fn a_seed_repeats_itself() {
        for seed in 0..6 {
            assert_eq!(simulate(seed, 60), simulate(seed, 60), "seed {seed}");
        }
    }
}
