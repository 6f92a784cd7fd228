//! The hosts, their store, and what has been done to them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::clock::TokioClock;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Lease, LeaseKey};
use flannel_core::testing::MemorySubnets;

use crate::host::Host;

/// How long leases last: what a node that is gone has left is gone in the end.
pub(crate) const TTL: Duration = Duration::from_secs(600);

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) random: Random,
    pub(crate) clock: Arc<TokioClock>,
    pub(crate) store: MemorySubnets,
    pub(crate) hosts: Vec<Host>,
    /// The records of nodes of Go flannel.
    pub(crate) go: BTreeMap<LeaseKey, Lease>,
    /// What was done, the latest last.
    pub(crate) log: Vec<String>,
}

/// splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// The network with a pool of the subnets up to 10.42.`max`.0.
pub(crate) fn config(max: u8) -> NetworkConfig {
    let text = format!(
        r#"{{"Network":"10.42.0.0/16","SubnetMin":"10.42.1.0","SubnetMax":"10.42.{max}.0","Backend":{{"Type":"vxlan"}}}}"#
    );
    NetworkConfig::parse(text.as_bytes(), Allocation::Pool).unwrap()
}

pub(crate) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let clock = Arc::new(TokioClock::new());
        let store = MemorySubnets::by_address(config(250), Some(TTL), Arc::clone(&clock) as _);
        let hosts = (0..3 + random.below(4)).map(|n| Host::new(n, 10 + n as u8, random.below(2) == 0)).collect();
        Self { seed, random, clock, store, hosts, go: BTreeMap::new(), log: Vec::new() }
    }

    pub(crate) fn some_host(&mut self) -> usize {
        self.random.below(self.hosts.len())
    }

    pub(crate) fn start(&mut self, host: usize) {
        self.hosts[host].start(&self.store, &self.clock, self.seed);
    }

    /// Everything works, everybody runs, and what the dead have left has run out.
    pub(crate) async fn settle(&mut self) {
        self.store.set_config(config(250));
        for host in 0..self.hosts.len() {
            self.hosts[host].kernel.link_up("eth0").unwrap();
            self.hosts[host].add_default();
            if self.hosts[host].agent.is_none() {
                self.start(host);
            }
        }
        pass(3.0 * TTL.as_secs_f64()).await;
    }
}
