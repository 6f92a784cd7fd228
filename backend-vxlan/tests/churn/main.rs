//! Identity and uplink under churn: many nodes whose addresses, interfaces, default routes, hosts and clock change at
//! random, with virtual addresses that move from host to host, nodes of Go flannel among them, and a pool that is
//! narrowed and widened.
//!
//! After each step no two nodes hold what overlaps, none has lost its lease to another, no record of another is changed,
//! and no kernel has a route that is not one peer's. Once it is quiet every node reaches every other where it really is.
//!
//! `CHURN_SEED` runs one seed, `CHURN_SEEDS` so many.

#[cfg(test)]
mod acts;
#[cfg(test)]
mod checks;
#[cfg(test)]
mod host;
#[cfg(test)]
mod world;

#[cfg(test)]
mod tests {
    use crate::world::World;

    const SEEDS: u64 = 400;
    const STEPS: usize = 250;

    fn setting(name: &str) -> Option<u64> {
        std::env::var(name).ok().map(|text| text.parse().unwrap())
    }

    /// Names the seed of a run that fails.
    struct Seed(u64);

    impl Drop for Seed {
        fn drop(&mut self) {
            if std::thread::panicking() {
                println!("seed {}", self.0);
            }
        }
    }

    fn simulate(seed: u64) {
        let _seed = Seed(seed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut world = World::new(seed);
            for step in 0..STEPS {
                world.step().await;
                world.check_step(step);
            }
            world.settle().await;
            world.check_quiet();
        });
    }

    #[test]
    fn every_node_stays_itself_and_reaches_all_others_once_it_is_quiet() {
        if let Some(seed) = setting("CHURN_SEED") {
            return simulate(seed);
        }
        let seeds = setting("CHURN_SEEDS").unwrap_or(SEEDS);
        let half = |half| std::thread::spawn(move || (half..seeds).step_by(2).for_each(simulate));
        for thread in [half(0), half(1)] {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}
