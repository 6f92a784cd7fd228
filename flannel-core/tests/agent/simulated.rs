//! Many nodes under trouble of every kind at random: whatever happened, once it is quiet all is as it should be.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::backoff::Jitter;
use flannel_core::clock::TokioClock;
use flannel_core::kernel::{KernelError, Link, LinkKind, LinkName, RouteKind};
use flannel_core::lease::{BadRecord, Lease, LeaseKey};
use flannel_core::net::{Dual, Family, MacAddr, Mtu, Prefix};
use flannel_core::overlay::{MissingUplink, Phase};
use flannel_core::plan::Plan;
use flannel_core::testing::fake_kernel::{FakeRoute, Nud, Placement};
use flannel_core::testing::memory_subnets::Fault;
use flannel_core::testing::{FakeKernel, MemorySubnets};

use crate::node::{Agent, Node, add_defaults, config, dual_config, dual_peer, pass, peer, public, subnet};
use crate::tunnel::{DEVICES, data, mac_of};

const SEEDS: u64 = 200;
const STEPS: usize = 120;

/// Names the seed of a run that fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("seed {}", self.0);
        }
    }
}

#[test]
fn whatever_happened_all_nodes_are_as_wanted_once_it_is_quiet() {
    let threads: Vec<_> = (0..2)
        .map(|half| {
            std::thread::spawn(move || {
                for seed in (0..SEEDS).filter(|seed| seed % 2 == half) {
                    simulate(seed);
                }
            })
        })
        .collect();
    for thread in threads {
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_seed_repeats_itself() {
    for seed in 0..5 {
        assert_eq!(simulate(seed), simulate(seed), "seed {seed}");
    }
}

/// Returns what came of it.
fn simulate(seed: u64) -> String {
    let _seed = Seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step().await;
            world.check_overlap();
        }
        world.settle().await;
        world.check().await;
        world.outcome()
    })
}

struct World {
    random: Random,
    store: MemorySubnets,
    families: Vec<Family>,
    nodes: Vec<Place>,
    /// Records that some node may not take for a peer, or takes for one from memory.
    bad: BTreeSet<LeaseKey>,
}

/// A node with its agent, and the foreign objects in its kernel.
struct Place {
    node: Node,
    number: u8,
    jitter: u64,
    agent: Option<Agent>,
    foreign: Vec<String>,
}

struct Random(Jitter);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0.number() % bound
    }

    fn number(&mut self) -> u8 {
        self.below(24) as u8 + 1
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(Jitter::seeded(seed));
        let clock = Arc::new(TokioClock::new());
        let config = if random.below(2) == 0 { config() } else { dual_config() };
        let families = config.networks.families().collect();
        let ttl = (random.below(2) == 0).then(|| Duration::from_secs(60 + random.below(120)));
        let store = MemorySubnets::with_ttl(config, ttl, Arc::clone(&clock) as _);
        let place = |number| {
            let node = Node::new(number, &store, &clock);
            put_canaries(&node.kernel);
            let foreign = foreign(&node.kernel);
            Place { node, number, jitter: seed << 8 | u64::from(number), agent: None, foreign }
        };
        let nodes = (0..2 + random.below(5)).map(|n| place(200 + n as u8)).collect();
        Self { random, store, families, nodes, bad: BTreeSet::new() }
    }

    async fn step(&mut self) {
        match self.random.below(16) {
            0..3 => {
                let seconds = [0.001, 0.05, 0.3, 1.0, 5.0, 40.0][self.random.below(6) as usize];
                pass(seconds).await;
            }
            3..5 => self.turn().await,
            5..8 => self.churn(),
            8 => self.lie(),
            9 => self.store_fault(),
            10..12 => self.kernel_fault(),
            12 => self.host_act(),
            _ => self.sabotage(),
        }
    }

    fn place(&mut self) -> usize {
        self.random.below(self.nodes.len() as u64) as usize
    }

    /// An agent starts, stops or dies.
    async fn turn(&mut self) {
        let place = self.place();
        let place = &mut self.nodes[place];
        match place.agent.take() {
            None => place.start(),
            Some(agent) if self.random.below(2) == 0 => drop(agent.killed().await),
            Some(agent) => {
                let begun = tokio::time::Instant::now();
                agent.cancelled().await.unwrap();
                assert!(begun.elapsed() <= Duration::from_secs(2), "{:?}", begun.elapsed());
            }
        }
    }

    /// A peer's lease as it is in this network.
    fn peer(&mut self) -> Lease {
        let number = self.random.number();
        if self.families.contains(&Family::V6) { dual_peer(number) } else { peer(number) }
    }

    fn churn(&mut self) {
        let lease = self.peer();
        self.bad.remove(&lease.key);
        match self.random.below(6) {
            0 | 1 => {
                self.store.delete(&lease.key);
            }
            2 => {
                let mut moved = lease;
                moved.attrs.public_ip.v4 = Some(public(Family::V4, 30 + self.random.number()));
                self.store.insert([moved]);
            }
            3 => {
                let mut renewed = lease;
                let mac = MacAddr([2, 7, 7, 7, 7, self.random.number()]);
                renewed.attrs.backend_data.v4 = Some(data(mac));
                self.store.insert([renewed]);
            }
            4 => {
                let others: Vec<Lease> = (0..8).map(|_| self.peer()).collect();
                self.store.insert(others.into_iter().chain([lease]));
            }
            _ => self.store.insert([lease]),
        }
    }

    /// A record as no agent writes it.
    fn lie(&mut self) {
        let mut lease = self.peer();
        let place = self.place();
        let own = self.nodes[place].node.key();
        match self.random.below(9) {
            0 => {
                let subnets = Dual { v4: Some(subnet(self.random.number())), v6: None };
                self.bad.insert(lease.key.clone());
                return self.store.insert_bad(&lease.key, BadRecord::new("torn", subnets));
            }
            1 => lease.attrs.public_ip.v4 = Some(subnet(9).addr()),
            2 => lease.subnets.v4 = Some("10.42.64.0/18".parse().unwrap()),
            3 => lease.subnets.v4 = Some(subnet(self.random.number())),
            4 => lease.attrs.backend_data.v4 = Some(data(mac_of("peer-3", Family::V4))),
            5 => lease.attrs.backend_type = "other".into(),
            6 => lease.attrs.public_ip.v4 = Some(public(Family::V4, 200)),
            7 => {
                self.store.delete(&own);
                return;
            }
            _ => {
                let Some(mut edited) = self.nodes[place].node.record() else { return };
                edited.attrs.backend_data.v4 = None;
                return self.store.insert([edited]);
            }
        }
        self.bad.insert(lease.key.clone());
        self.store.insert([lease]);
    }

    fn store_fault(&mut self) {
        if self.random.below(2) == 0 {
            return self.store.cut_watches();
        }
        let fault = [Fault::Unavailable, Fault::Denied, Fault::LostReply][self.random.below(3) as usize];
        let count = 1 + self.random.below(6) as usize;
        self.store.fail_next(std::iter::repeat_n(fault, count));
    }

    fn kernel_fault(&mut self) {
        let place = self.place();
        let (kernel, random) = (&self.nodes[place].node.kernel, &mut self.random);
        let fault = match random.below(2) {
            0 => KernelError::Timeout { doing: "looking".to_owned(), within: Duration::from_secs(5) },
            _ => KernelError::Lost { doing: "looking".to_owned(), reason: "overrun".to_owned() },
        };
        match random.below(9) {
            0 | 1 => {
                let errno = [1, 12, 16, 17, 2, 3, 22, 105][random.below(8) as usize];
                kernel.refuse_nth(random.below(20), errno);
            }
            2 => kernel.lose_contact_after(random.below(30)),
            3 => kernel.fail_next_observe(fault),
            4 => kernel.fail_next_host_facts(fault),
            5 => kernel.overrun_monitor(),
            6 => kernel.limit_monitor(random.below(6) as usize + 1),
            7 => kernel.stall(),
            _ => kernel.obey(),
        }
    }

    /// What an administrator does to our objects.
    fn sabotage(&mut self) {
        let place = self.place();
        let device = DEVICES[self.random.below(2) as usize];
        let number = self.random.number();
        let what = self.random.below(17);
        self.nodes[place].act(|kernel| {
            let mac = mac_of(&format!("peer-{number}"), Family::V4);
            let addr = subnet(number).addr();
            let at = public(Family::V4, number);
            // An act that the kernel refuses is none.
            let _ = match what {
                0 => kernel.delete_link(device),
                1 => kernel.link_down(device),
                2 => kernel.set_mac(device, MacAddr([2, 1, 1, 1, 1, number])),
                3 => kernel.set_mtu(device, Mtu(1300)),
                4 => kernel.rename_link(device, "x0"),
                5 => kernel.mark_link(device, 0, None),
                6 => kernel.add_address(device, "10.42.77.7/32".parse().unwrap()),
                7 => {
                    let text = kernel.snapshot();
                    let found =
                        text.matching(&format!("dev {device}")).into_iter().find(|line| line.starts_with("addr"));
                    let address = found.and_then(|line| line.split(' ').nth(1)).and_then(|text| text.parse().ok());
                    address.map_or(Ok(()), |address| kernel.remove_address(device, address))
                }
                8 => kernel.flush_neighbours(device),
                9 => kernel.flush_fdb(device),
                10 => kernel.delete_neighbour(device, addr),
                11 => kernel.delete_fdb(device, mac, at),
                12 => kernel.put_neighbour(device, addr, MacAddr([2, 9, 9, 9, 9, 9]), Nud::Permanent),
                13 => kernel.put_fdb(device, mac, public(Family::V4, 77), Nud::Permanent),
                14 => kernel.put_fdb(device, MacAddr([2, 8, 8, 8, 8, number]), at, Nud::Permanent),
                15 => kernel.carrier_change(device),
                _ => {
                    let link = kernel.link_index(device);
                    let route = FakeRoute { onlink: true, ..FakeRoute::via(subnet(number), addr, link.unwrap_or(0)) };
                    kernel.add_route(route, Placement::Replace)
                }
            };
        });
    }

    /// What happens to the host around us.
    fn host_act(&mut self) {
        let place = self.place();
        let (what, number) = (self.random.below(8), self.random.number());
        let place = &mut self.nodes[place];
        let (host, other) = (place.number, place.number + 20);
        place.act(|kernel| {
            let _ = match what {
                0 => kernel.link_down("eth0"),
                1 => kernel.delete_link("eth0"),
                2 => {
                    kernel.flush_routes(Family::V4);
                    Ok(())
                }
                3 => {
                    kernel.flush_routes(Family::V6);
                    Ok(())
                }
                4 => {
                    let _ = kernel.add_address("eth0", format!("192.0.2.{other}/24").parse().unwrap());
                    kernel.remove_address("eth0", format!("192.0.2.{host}/24").parse().unwrap())
                }
                5 => {
                    // A foreign one comes where a peer's route is, or will be.
                    let link = kernel.link_index("dum0").unwrap();
                    let gateway = "198.51.100.9".parse().unwrap();
                    let route = FakeRoute { protocol: 4, ..FakeRoute::via(subnet(number), gateway, link) };
                    kernel.add_route(route, [Placement::Exclusive, Placement::Append][usize::from(number % 2)])
                }
                _ => {
                    restore(kernel, host);
                    Ok(())
                }
            };
        });
    }

    /// The trouble is over.
    async fn settle(&mut self) {
        for place in &mut self.nodes {
            place.act(|kernel| {
                kernel.obey();
                kernel.limit_monitor(usize::MAX);
                // Without a mark, what no longer is as wanted, be it by its name, is foreign there.
                for device in DEVICES.into_iter().chain(["x0"]) {
                    let snapshot = kernel.snapshot();
                    let lines = snapshot.matching(&format!(": {device} "));
                    if lines.iter().any(|line| !line.contains(" group ")) {
                        kernel.delete_link(device).unwrap();
                    }
                }
            });
            let number = place.number;
            place.act(|kernel| restore(kernel, number));
            if place.agent.is_none() {
                place.start();
            }
        }
        if self.random.below(2) == 0 {
            self.store.delete_all(&self.bad);
            self.bad.clear();
        }
        // Longer than a mass deletion waits, and than a flapping object takes to be forgiven.
        pass(300.0).await;
    }

    async fn check(&mut self) {
        self.check_leases();
        let mut views = Vec::new();
        for place in &mut self.nodes {
            views.push(place.check_kernel().await);
        }
        if self.bad.is_empty() {
            let names: BTreeSet<String> = views.iter().map(|view| format!("{view:?}")).collect();
            let quarantined = |place: &Place| place.agent.as_ref().unwrap().status().quarantined.clone();
            let quarantined: Vec<_> = self.nodes.iter().map(quarantined).collect();
            assert_eq!(names.len(), 1, "nodes disagree about who is there: {quarantined:#?}");
        }
        self.check_rest().await;
        self.check_lease_rounds().await;
    }

    /// What the kernels have come to, and what it took.
    fn outcome(&self) -> String {
        let kernels =
            self.nodes.iter().map(|place| format!("{}\n{}", place.node.kernel.snapshot(), place.node.kernel.writes()));
        kernels.collect::<Vec<_>>().join("\n")
    }

    /// Every agent holds the lease that the store has of it, and no two hold what overlaps.
    fn check_leases(&self) {
        for place in &self.nodes {
            let status = place.agent.as_ref().unwrap().status();
            let held = status.lease.as_ref().unwrap_or_else(|| panic!("{} has no lease: {status:?}", place.node.name));
            assert_eq!(place.node.record().map(|record| record.subnets), Some(held.subnets));
        }
        self.check_overlap();
    }

    /// No two agents hold what overlaps.
    fn check_overlap(&self) {
        let held = |place: &Place| place.agent.as_ref()?.status().lease.clone();
        let leases: Vec<_> = self.nodes.iter().filter_map(held).collect();
        for (nth, lease) in leases.iter().enumerate() {
            for other in &leases[..nth] {
                let overlap = |family| match (lease.subnets.get(family), other.subnets.get(family)) {
                    (Some(one), Some(two)) => one.overlaps(two),
                    _ => false,
                };
                assert!(!Family::BOTH.into_iter().any(overlap), "{lease:?} {other:?}");
            }
        }
    }

    /// Nothing happens: nothing is written.
    async fn check_rest(&self) {
        let writes = |world: &Self| world.nodes.iter().map(|place| place.node.kernel.writes()).collect::<Vec<_>>();
        let records = |world: &Self| {
            let lease = |record: flannel_core::lease::Record| {
                record.lease.ok().map(|lease| (lease.subnets, lease.attrs.clone()))
            };
            world.store.records().into_iter().map(lease).collect::<Vec<_>>()
        };
        let before = (writes(self), records(self));
        pass(100.0).await;
        assert_eq!((writes(self), records(self)), before, "a quiet network is written");
    }

    /// An audit after lease rounds finds nothing to write.
    async fn check_lease_rounds(&mut self) {
        for place in &self.nodes {
            place.node.kernel.overrun_monitor();
        }
        pass(1.0).await;
        let audits: Vec<_> = self.nodes.iter().map(|place| place.agent.as_ref().unwrap().status().audits).collect();
        for _ in 0..10 {
            self.churn();
            pass(0.01).await;
        }
        pass(0.1).await;
        for (place, audits) in self.nodes.iter_mut().zip(audits) {
            let agent = place.agent.as_ref().unwrap();
            if agent.status().audits > audits {
                // The timer's turn came amid it: nothing can be told.
                continue;
            }
            let (before, writes) = (place.node.kernel.snapshot(), place.node.kernel.writes());
            place.node.kernel.overrun_monitor();
            pass(2.0).await;
            assert!(agent.status().audits > audits, "no audit");
            let after = place.node.kernel.snapshot();
            assert_eq!(
                place.node.kernel.writes(),
                writes,
                "{:?} {:?}",
                before.missing_from(&after),
                after.added_since(&before)
            );
            place.check_kernel().await;
        }
    }
}

impl Place {
    fn start(&mut self) {
        let builder = self.node.builder().missing_uplink(MissingUplink::Wait).jitter_seed(self.jitter);
        self.agent = Some(self.node.run_as(builder));
    }

    /// Does something to the kernel that our agents have no part in.
    fn act(&mut self, act: impl FnOnce(&FakeKernel)) {
        self.check_foreign();
        act(&self.node.kernel);
        self.foreign = foreign(&self.node.kernel);
    }

    fn check_foreign(&self) {
        assert_eq!(foreign(&self.node.kernel), self.foreign, "{} touched what is not ours", self.node.name);
    }

    /// The kernel is exactly as wanted. Returns whom this node takes for a member of the network, itself included.
    async fn check_kernel(&mut self) -> BTreeSet<(String, Option<Prefix>)> {
        self.check_foreign();
        let agent = self.agent.as_ref().unwrap();
        let status = agent.status();
        assert_eq!((status.phase, status.failed_writes), (Phase::Ready, 0), "{}: {status:?}", self.node.name);
        let Plan { ops, conflicts } = agent.handle.plan().await.unwrap().plan;
        assert!(ops.is_empty(), "{}: {ops:#?} {status:?}", self.node.name);
        let peers = agent.handle.peers().await.unwrap();
        let snapshot = self.node.kernel.snapshot();
        // Counted by hand: the agent's own plan is no witness.
        let prefixes = peers.iter().flat_map(|peer| [peer.subnets.v4, peer.subnets.v6]).flatten();
        let missing =
            |prefix: &Prefix| snapshot.matching(&format!("route {prefix} via {} dev tun", prefix.addr())).len() != 1;
        let missing: BTreeSet<Prefix> = prefixes.clone().filter(missing).collect();
        let conflicting: BTreeSet<Prefix> = conflicts
            .iter()
            .filter_map(|conflict| match conflict.object {
                flannel_core::kernel::Object::Route(prefix) => Some(prefix),
                _ => None,
            })
            .collect();
        assert!(missing.is_subset(&conflicting), "{}: {missing:?} {conflicting:?} {snapshot}", self.node.name);
        let ours = |what: &str| snapshot.matching(" dev tun").iter().filter(|line| line.starts_with(what)).count();
        let wanted = prefixes.count();
        let withheld = status.withheld.len();
        for (what, count) in [("neigh", ours("neigh")), ("fdb", ours("fdb"))] {
            assert!((wanted..=wanted + withheld).contains(&count), "{what}: {count} of {wanted} {snapshot} {status:?}");
        }
        let family_count = status.lease.as_ref().unwrap().subnets.iter().count();
        assert_eq!(ours("addr"), family_count, "{snapshot}");
        let own = status.own_trouble.is_none().then(|| status.lease.clone()).flatten();
        let members = peers.iter().chain(&own);
        members.map(|lease| (lease.key.to_string(), lease.subnets.v4)).collect()
    }
}

/// The foreign objects, as they are.
fn foreign(kernel: &FakeKernel) -> Vec<String> {
    let snapshot = kernel.snapshot();
    snapshot.lines().iter().filter(|line| line.contains("dum0")).cloned().collect()
}

/// A foreign device with all kinds of things on it, some of them where ours would be.
fn put_canaries(kernel: &FakeKernel) {
    let mut link = Link::new(LinkName::new("dum0").unwrap(), LinkKind::Other("dummy".into()), 1500);
    link.mac = Some(MacAddr([2, 0xaa, 0, 0, 0, 1]));
    let dummy = kernel.add_link(link).unwrap();
    kernel.add_address("dum0", "198.51.100.1/24".parse().unwrap()).unwrap();
    for n in 1..=10 {
        let gateway = "198.51.100.7".parse().unwrap();
        let route = FakeRoute::via(subnet(n), gateway, dummy);
        let routes = [
            FakeRoute { metric: 50, ..route.clone() },
            FakeRoute { table: 100, ..route.clone() },
            FakeRoute { table: 100, metric: 7, protocol: 210, ..route.clone() },
            FakeRoute { kind: RouteKind::Foreign, metric: 51, ..route },
        ];
        for route in routes {
            kernel.add_route(route, Placement::Exclusive).unwrap();
        }
        kernel.put_neighbour("dum0", subnet(n).addr(), MacAddr([2, 0xaa, 0, 0, 1, n]), Nud::Permanent).unwrap();
    }
}

/// Gives the host its uplink back.
fn restore(kernel: &FakeKernel, number: u8) {
    if kernel.link_index("eth0").is_none() {
        kernel.add_uplink("eth0", format!("192.0.2.{number}/24").parse().unwrap()).unwrap();
    }
    kernel.link_up("eth0").unwrap();
    let on_eth0 = |start: &str| {
        let snapshot = kernel.snapshot();
        let lines = snapshot.matching(start);
        lines.iter().any(|line| line.ends_with("dev eth0"))
    };
    if !on_eth0("addr 192.0.2.") {
        kernel.add_address("eth0", format!("192.0.2.{number}/24").parse().unwrap()).unwrap();
    }
    if !on_eth0("addr fd99::") {
        kernel.add_address("eth0", format!("fd99::{number:x}/64").parse().unwrap()).unwrap();
    }
    kernel.link_up("eth0").unwrap();
    add_defaults(kernel, kernel.link_index("eth0").unwrap());
}
