//! The hosts, their store, and the acts so far.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::clock::TokioClock;
use flannel_core::lease::{Lease, LeaseKey};
use flannel_core::net::Family;
use flannel_core::testing::MemorySubnets;

use crate::clock::HostClock;
use crate::host::Host;
use crate::network::{LAST, Setting};
use crate::witness::Shared;

/// The lifetime of leases: the records of a node that is gone expire eventually.
pub(crate) const TTL: Duration = Duration::from_secs(600);

/// How many of the last acts a failure shows.
const SHOWN: usize = 30;

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) random: Random,
    pub(crate) store: MemorySubnets,
    /// The configuration in the store.
    pub(crate) setting: Setting,
    pub(crate) shared: Arc<Shared>,
    pub(crate) hosts: Vec<Host>,
    /// The records of nodes of Go flannel.
    pub(crate) go: BTreeMap<LeaseKey, Lease>,
    /// The acts, in order.
    pub(crate) log: Vec<String>,
    pub(crate) when: When,
}

/// The progress of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    Step(usize),
    Settling,
    AtRest,
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(step) => write!(f, "step {step}"),
            Self::Settling => f.write_str("while it settles"),
            Self::AtRest => f.write_str("at rest"),
        }
    }
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

pub(crate) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let clock = TokioClock::new();
        let families = match random.below(4) {
            0 | 1 => vec![Family::V4],
            2 => vec![Family::V6],
            _ => Family::BOTH.to_vec(),
        };
        let setting = Setting::new(families.clone(), random.below(3) > 0);
        let store = MemorySubnets::by_address(setting.config(), Some(TTL), Arc::new(clock));
        let count = 3 + random.below(4);
        let host = |n| Host::new(n, families.clone(), 10 + n as u8, random.below(2) == 0, HostClock::new(clock));
        let hosts = (0..count).map(host).collect();
        let shared = Arc::new(Shared::default());
        shared.set(&setting);
        let (go, log, when) = (BTreeMap::new(), Vec::new(), When::Step(0));
        Self { seed, random, store, setting, shared, hosts, go, log, when }
    }

    pub(crate) fn some_host(&mut self) -> usize {
        self.random.below(self.hosts.len())
    }

    pub(crate) fn start(&mut self, host: usize) {
        self.hosts[host].start(&self.store, &self.shared, self.seed);
    }

    pub(crate) fn configure(&mut self, setting: Setting) {
        self.store.set_config(setting.config());
        self.shared.set(&setting);
        self.setting = setting;
    }

    /// Waits until everything works, all agents run with the present network, and the leases of ended nodes have
    /// expired.
    pub(crate) async fn settle(&mut self) {
        self.configure(Setting { min: 1, max: LAST, ..self.setting.clone() });
        for host in 0..self.hosts.len() {
            self.hosts[host].wake(Duration::ZERO);
            self.hosts[host].act(|kernel| kernel.link_up("eth0"));
            self.hosts[host].put_addresses();
            let networks = self.setting.networks();
            let outdated = |agent: &crate::host::Agent| *agent.networks.lock().unwrap() != networks;
            if self.hosts[host].agent.as_ref().is_some_and(outdated) {
                let shared = Arc::clone(&self.shared);
                self.hosts[host].end(&shared, false).await;
            }
            if self.hosts[host].agent.is_none() {
                self.start(host);
            }
        }
        pass(2.0 * TTL.as_secs_f64()).await;
    }

    /// Returns the kernels' final states and the numbers of changes.
    pub(crate) fn outcome(&self) -> String {
        let kernels = self.hosts.iter().map(|host| format!("{}{}\n", host.kernel.snapshot(), host.kernel.changes()));
        kernels.collect()
    }

    /// Returns what each node publishes and has.
    fn outline(&self) -> String {
        let lease = |lease: &Lease| {
            let data: Vec<_> = lease.attrs.backend_data.iter().map(|(_, json)| json.as_str().to_owned()).collect();
            let public: Vec<_> = lease.attrs.public_ip.iter().map(|(_, addr)| addr.to_string()).collect();
            format!("{} at {} {} until {:?}", lease.key, public.join(" and "), data.join(" "), lease.expires)
        };
        let records = self.store.records().into_iter().filter_map(|record| record.lease.ok());
        let mut lines: Vec<String> = records.map(|it| format!("record {}", lease(&it))).collect();
        lines.extend(self.go.values().map(|it| format!("Go node {}", lease(it))));
        for host in &self.hosts {
            let status = host.status();
            let phase = status.as_ref().map(|status| status.phase);
            let held = status.as_ref().and_then(|status| status.lease.as_deref().map(lease));
            let withheld = status.as_ref().map(|status| status.withheld.clone()).unwrap_or_default();
            let error = status.and_then(|status| status.last_error.clone());
            let (own, number, asleep) = (host.own, host.number, host.clock.is_asleep());
            let virtuals = &host.virtuals;
            lines
                .push(format!("host {number}: {own:?}, asleep {asleep}, {virtuals:?}, {phase:?}, {held:?}, {error:?}"));
            if !withheld.is_empty() {
                lines.push(format!("host {number} withholds {withheld:?}"));
            }
        }
        lines.join("\n")
    }
}

/// A run that fails prints its acts and how to repeat it.
impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let Self { seed, when, log, setting, .. } = &*self;
        let first = log.len().saturating_sub(SHOWN);
        println!("seed {seed}, {when}, {setting:?}\nthe last actions:");
        for (nth, line) in log.iter().enumerate().skip(first) {
            println!("{nth:5} {line}");
        }
        println!("{}", self.outline());
        println!("again: CHURN_SEED={seed} cargo test -p flannel-backend-vxlan --test churn every_node");
    }
}
