//! A node that starts while its store is away, from its state file.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::lease::LeaseAttrs;
use flannel_core::net::Dual;
use flannel_core::overlay::{Contact, Event, LossReason, OverlayError, Phase, Status, WithheldBecause};
use flannel_core::subnet::{SubnetManager, Want};
use flannel_core::testing::{FakeKernel, Fault};
use flannel_subnet_cached::CachedSubnets;
use tempfile::TempDir;

use crate::node::{Agent, Node, add_defaults, config, eventually, parse, pass, subnet};
use crate::storms::Away;

/// A node with a state file.
struct Keeping {
    node: Node,
    dir: TempDir,
}

impl Keeping {
    fn new(node: Node) -> Self {
        Self { node, dir: tempfile::tempdir().unwrap() }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("state.json")
    }

    fn cached(&self) -> Arc<CachedSubnets> {
        let clock = Arc::clone(&self.node.clock) as _;
        Arc::new(CachedSubnets::new(Arc::new(self.node.store.clone()), self.file(), "memory", clock))
    }

    fn run(&self) -> (Agent, Arc<CachedSubnets>) {
        let cached = self.cached();
        let store: Arc<dyn SubnetManager> = cached.clone();
        (self.node.run_on(self.node.builder(), Arc::new(self.node.kernel.clone()), store), cached)
    }

    /// Lets an agent see `peers`, keep its state and end.
    async fn lived(&self, peers: std::ops::RangeInclusive<u8>) {
        let count = peers.clone().count();
        self.node.join(peers);
        let (agent, cached) = self.run();
        agent.until(|status| status.phase == Phase::Ready && status.peers.accepted == count).await;
        agent.cancelled().await.unwrap();
        cached.flush().await.unwrap();
    }

    /// Lets an agent program `peers` and die before it has kept what it sees. The kernel lives on, the store goes away.
    async fn missed(&self, peers: [u8; 2]) {
        let (agent, _cached) = self.run();
        agent.ready().await;
        self.node.join(peers);
        let programmed = || peers.into_iter().all(|peer| self.node.has_route(subnet(peer)));
        eventually("the new peers are programmed", programmed).await;
        agent.killed().await;
        self.node.store.outage();
    }

    /// The machine starts anew: nothing is left in the kernel.
    fn reboot(&mut self) {
        self.node.kernel = FakeKernel::new();
        let eth0 = self.node.kernel.add_uplink("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
        add_defaults(&self.node.kernel, eth0);
    }

    fn routes(&self, numbers: impl IntoIterator<Item = u8>) -> Vec<u8> {
        numbers.into_iter().filter(|n| self.node.has_route(subnet(*n))).collect()
    }
}

fn is_stale(status: &Status) -> bool {
    status.phase == Phase::Ready && matches!(status.store, Contact::Lost { .. })
}

#[tokio::test(start_paused = true)]
async fn a_node_boots_into_a_working_overlay_and_converges_when_the_store_is_back() {
    let mut keeping = Keeping::new(Node::alone());
    keeping.lived(1..=4).await;
    let lease = keeping.node.record().unwrap();
    keeping.node.store.outage();
    keeping.reboot();
    let (agent, _cached) = keeping.run();
    let status = agent.until(is_stale).await;
    assert_eq!((status.peers.accepted, status.lease.unwrap().subnets), (4, lease.subnets));
    assert_eq!(keeping.routes(1..=10), [1, 2, 3, 4]);
    keeping.node.leave([1, 2, 3]);
    keeping.node.join([9]);
    pass(120.0).await;
    assert_eq!(keeping.routes(1..=10), [1, 2, 3, 4], "nothing changes while nobody can say so");
    keeping.node.store.recover();
    agent.until(|status| status.store == Contact::Live && status.peers.accepted == 2).await;
    eventually("who left is gone, who joined is there", || keeping.routes(1..=10) == [4, 9]).await;
    assert_eq!(keeping.node.record().unwrap().subnets, lease.subnets);
    assert!(agent.status().withheld.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_comes_back_almost_empty_is_looked_at_twice() {
    let mut keeping = Keeping::new(Node::alone());
    keeping.lived(1..=20).await;
    keeping.node.store.outage();
    keeping.reboot();
    let (agent, _cached) = keeping.run();
    agent.until(is_stale).await;
    keeping.node.leave(1..=18);
    keeping.node.store.recover();
    let status = agent.until(|status| status.store == Contact::Live && !status.withheld.is_empty()).await;
    assert!(status.withheld.values().all(|why| matches!(why, WithheldBecause::MassRemoval(_))), "{status:?}");
    assert_eq!(keeping.routes(1..=20).len(), 20);
    pass(65.0).await;
    eventually("the second look is taken", || keeping.routes(1..=20) == [19, 20]).await;
}

#[tokio::test(start_paused = true)]
async fn who_joined_after_the_last_write_keeps_its_route_until_the_store_says_otherwise() {
    let keeping = Keeping::new(Node::alone());
    keeping.lived(1..=3).await;
    keeping.missed([4, 5]).await;
    let (agent, _cached) = keeping.run();
    let status = agent.until(is_stale).await;
    assert_eq!(status.peers.accepted, 3);
    agent.audited().await;
    assert_eq!(keeping.routes(1..=5), [1, 2, 3, 4, 5]);
    let unconfirmed = [(subnet(4), WithheldBecause::Unconfirmed), (subnet(5), WithheldBecause::Unconfirmed)];
    assert_eq!(*agent.status().withheld, unconfirmed.into());
    keeping.node.leave([5]);
    keeping.node.store.recover();
    eventually("the store has decided", || keeping.routes(1..=5) == [1, 2, 3, 4]).await;
    let status = agent.until(|status| status.withheld.is_empty()).await;
    assert_eq!((status.peers.accepted, status.drift_repaired), (4, 0));
}

#[tokio::test(start_paused = true)]
async fn when_the_store_comes_back_without_most_of_what_was_left_alone_it_is_looked_at_twice() {
    let keeping = Keeping::new(Node::alone());
    keeping.lived(1..=3).await;
    let (agent, _cached) = keeping.run();
    agent.ready().await;
    keeping.node.join(4..=23);
    eventually("the new peers are programmed", || keeping.routes(1..=23).len() == 23).await;
    agent.killed().await;
    keeping.node.store.outage();
    let (agent, _cached) = keeping.run();
    agent.until(is_stale).await;
    keeping.node.leave(4..=23);
    keeping.node.store.recover();
    let mass = |why: &WithheldBecause| matches!(why, WithheldBecause::MassRemoval(_));
    agent.until(|status| status.withheld.len() == 20 && status.withheld.values().all(mass)).await;
    assert_eq!(keeping.routes(1..=23).len(), 23);
    pass(65.0).await;
    eventually("the second look is taken", || keeping.routes(1..=23) == [1, 2, 3]).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ran_out_while_the_node_was_off_is_not_used() {
    let mut keeping = Keeping::new(Node::with_ttl(Duration::from_secs(3600)));
    keeping.lived(1..=2).await;
    let text = std::fs::read_to_string(keeping.file()).unwrap();
    let (before, after) = text.split_once("\"expires_unix_ms\":").unwrap();
    let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
    std::fs::write(keeping.file(), format!("{before}\"expires_unix_ms\":1{after}")).unwrap();
    keeping.node.store.outage();
    keeping.reboot();
    let (agent, _cached) = keeping.run();
    agent.until(|status| matches!(status.store, Contact::Lost { .. })).await;
    pass(60.0).await;
    assert_eq!((agent.status().phase, keeping.node.kernel.writes()), (Phase::Starting, 0));
    keeping.node.store.recover();
    agent.until(|status| status.phase == Phase::Ready && status.store == Contact::Live).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_runs_out_under_a_node_that_lives_on_its_file_is_lost() {
    let mut keeping = Keeping::new(Node::with_ttl(Duration::from_secs(3600)));
    keeping.lived(1..=2).await;
    keeping.node.store.outage();
    keeping.reboot();
    let (mut agent, _cached) = keeping.run();
    agent.until(is_stale).await;
    // The store's other end of the outage counts, too.
    for _ in 0..13 {
        pass(300.0).await;
    }
    let lost = agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    assert_eq!(lost, Event::LeaseLost(LossReason::Expired));
    pass(30.0).await;
    assert_eq!(agent.status().lease, None, "a lease that has run out is not taken from the file again");
    assert_eq!(keeping.routes(1..=2), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_the_store_took_away_is_not_held_on_the_word_of_the_file() {
    let keeping = Keeping::new(Node::alone().known_by_address());
    keeping.lived(1..=2).await;
    let (mut agent, _cached) = keeping.run();
    agent.ready().await;
    // Each try asks for the configuration and for the lease.
    keeping.node.store.fail_next([Fault::Unavailable; 4].into_iter().chain([Fault::Denied; 2]));
    assert!(keeping.node.store.delete(&keeping.node.key()));
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    pass(2.0).await;
    assert_eq!(agent.status().lease, None);
    agent.until(|status| status.lease.is_some()).await;
    assert!(keeping.node.record().is_some());
}

#[tokio::test(start_paused = true)]
async fn what_the_node_wants_published_reaches_the_store_when_it_is_back() {
    let mut keeping = Keeping::new(Node::alone());
    // What the record says came from another version of the agent.
    let old = Want::new(peer_attrs().with_backend("old", Dual::default()));
    keeping.node.store.acquire(&keeping.node.identity(), old).await.unwrap();
    let cached = keeping.cached();
    cached.this_node().await.unwrap();
    cached.network_config().await.unwrap();
    cached.previous(&keeping.node.identity()).await.unwrap();
    let mut watch = cached.watch();
    futures_util::StreamExt::next(&mut watch).await.unwrap().unwrap();
    cached.flush().await.unwrap();
    keeping.node.store.outage();
    keeping.reboot();
    let (agent, _cached) = keeping.run();
    agent.until(is_stale).await;
    keeping.node.store.recover();
    let published = || keeping.node.record().is_some_and(|lease| &*lease.attrs.backend_type == "tunnel");
    eventually("the record says what the node is", published).await;
    assert!(agent.status().lease.is_some());
}

fn peer_attrs() -> LeaseAttrs {
    let v4 = Some("192.0.2.200".parse().unwrap());
    LeaseAttrs::new(Dual { v4, v6: None })
}

#[tokio::test(start_paused = true)]
async fn a_state_file_that_cannot_be_written_hurts_no_peer() {
    let keeping = Keeping::new(Node::alone());
    std::fs::create_dir_all(keeping.file().join("full")).unwrap();
    keeping.node.join([1]);
    let (agent, cached) = keeping.run();
    agent.ready().await;
    eventually("the trouble shows", || cached.trouble().is_some()).await;
    let trouble = cached.trouble().unwrap();
    assert!(trouble.contains("state.json") && trouble.contains("choose"), "{trouble}");
    keeping.node.join([2]);
    eventually("a peer joins all the same", || keeping.routes(1..=2) == [1, 2]).await;
    assert_eq!(agent.status().store, Contact::Live);
    std::fs::remove_dir_all(keeping.file()).unwrap();
    eventually("the file is written once it can be", || cached.trouble().is_none() && keeping.file().is_file()).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_snapshot_lacks_is_decided_by_the_watch_though_calls_are_denied() {
    let keeping = Keeping::new(Node::with_ttl(Duration::from_secs(3600)));
    keeping.lived(1..=3).await;
    keeping.missed([4, 5]).await;
    let (agent, _cached) = keeping.run();
    agent.until(is_stale).await;
    agent.audited().await;
    assert_eq!(agent.status().withheld.len(), 2);
    for _ in 0..7 {
        pass(300.0).await;
    }
    keeping.node.leave([5]);
    keeping.node.store.fail_next([Fault::Denied, Fault::Denied, Fault::Denied]);
    keeping.node.store.recover();
    agent.until(|status| status.store == Contact::Live && status.peers.accepted == 4).await;
    for _ in 0..4 {
        pass(100.0).await;
    }
    assert_eq!(keeping.routes(1..=5), [1, 2, 3, 4]);
}

#[tokio::test(start_paused = true)]
async fn a_start_from_the_file_ends_once_the_store_says_that_the_configuration_is_another() {
    let keeping = Keeping::new(Node::alone());
    keeping.lived(1..=2).await;
    let mute = Away::new(&keeping.node.store);
    mute.mute();
    let clock = Arc::clone(&keeping.node.clock) as _;
    let cached = CachedSubnets::new(Arc::new(mute.clone()), keeping.file(), "memory", clock);
    keeping.node.store.outage();
    let agent = keeping.node.run_on(keeping.node.builder(), Arc::new(keeping.node.kernel.clone()), Arc::new(cached));
    agent.ready().await;
    keeping.node.store.recover();
    agent.until(|status| status.store == Contact::Live).await;
    // The watch lives, and nobody may read the configuration: that says nothing, and is asked for with back-off.
    let before = mute.asked().len();
    pass(600.0).await;
    let asked = mute.asked().len() - before;
    assert!((120..=155).contains(&asked), "asked {asked} times in ten minutes");
    assert_eq!(agent.status().phase, Phase::Ready);
    keeping.node.store.set_config(parse(r#"{"Network":"10.91.0.0/16","Backend":{"Type":"tunnel"}}"#));
    mute.speak();
    assert!(matches!(agent.ended().await, Err(OverlayError::Reconfigured)));
    assert!(keeping.node.has_route(subnet(1)), "the data plane stays");
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_changes_under_an_agent_is_told_when_the_store_speaks_again_and_ends_nobody() {
    let node = Node::alone();
    let mut agent = node.run();
    let ready = agent.ready().await;
    assert_eq!(ready.network.as_deref(), Some(&config()));
    node.store.set_config(parse(r#"{"Network":"10.91.0.0/16","Backend":{"Type":"tunnel"}}"#));
    pass(60.0).await;
    node.store.cut_watches();
    agent.event(|event| matches!(event, Event::ConfigChanged(_))).await;
    pass(600.0).await;
    let status = agent.status();
    assert_eq!((status.phase, status.network.as_deref()), (Phase::Ready, Some(&config())));
    assert!(status.reconfigured.is_some());
    node.store.set_config(config());
    node.store.cut_watches();
    agent.until(|status| status.reconfigured.is_none()).await;
}
