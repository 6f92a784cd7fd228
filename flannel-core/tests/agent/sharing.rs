//! A store that knows nodes by their address, in which another node publishes this node's.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flannel_core::backend::Backend;
use flannel_core::clock::TokioClock;
use flannel_core::lease::{Lease, LeaseKey};
use flannel_core::net::{Dual, Prefix};
use flannel_core::overlay::{Builder, Event, LossReason, Masquerade, SubnetEnvFile, Teardown};
use flannel_core::testing::{Fault, MemorySubnets};

use crate::gateway::bare;
use crate::node::{Agent, Node, config, eventually, parse, pass, peer};
use crate::storms::Away;
use crate::tunnel::Tunnel;

const TTL: Duration = Duration::from_secs(600);

impl Node {
    /// A node in a store that knows nodes by their address.
    fn shared() -> Self {
        let clock = Arc::new(TokioClock::new());
        let store = MemorySubnets::by_address(config(), Some(TTL), Arc::clone(&clock) as _);
        Self::new(200, &store, &clock).known_by_address()
    }

    /// Lets an agent take a lease and die.
    async fn lived(&self) -> Arc<Lease> {
        let agent = self.run();
        let lease = agent.ready().await.lease.unwrap();
        agent.killed().await;
        lease
    }

    /// The host is booted anew.
    fn reboot(&mut self) {
        *self = Self::new(200, &self.store, &self.clock);
    }

    /// Another node's lease, whose key comes before all of this node's, under this node's address.
    fn join_under_its_address(&self) -> Lease {
        let mut other = peer(3);
        other.key = LeaseKey::new("10.42.1.0-24");
        other.subnets.v4 = Some("10.42.1.0/24".parse().unwrap());
        other.attrs.public_ip.v4 = "192.0.2.200".parse().ok();
        self.store.insert([other.clone()]);
        other
    }

    fn leases(&self) -> Vec<Lease> {
        self.store.records().into_iter().map(|record| Arc::unwrap_or_clone(record.lease.unwrap())).collect()
    }

    /// The other's record is as it was, and this node has one of its own.
    fn assert_apart(&self, other: &Lease, own: Prefix) {
        let records = self.leases();
        assert_eq!(records.len(), 2, "{records:#?}");
        assert_eq!(&records[0], other);
        assert_eq!(records[1].subnets.v4, Some(own));
        assert_ne!(records[1].attrs.backend_data, other.attrs.backend_data);
    }
}

fn subnet(lease: &Lease) -> Prefix {
    lease.subnets.v4.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_lease_ran_out_while_it_was_down_takes_its_former_subnet_again_and_not_anothers() {
    let node = Node::shared();
    let before = node.lived().await;
    pass(TTL.as_secs_f64() + 1.0).await;
    assert!(node.leases().is_empty(), "it has run out");
    let other = node.join_under_its_address();
    let agent = node.run();
    let after = agent.ready().await.lease.unwrap();
    assert_eq!(after.subnets, before.subnets);
    node.assert_apart(&other, subnet(&before));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_waits_for_a_free_subnet_stays_at_the_address_of_its_device() {
    let node = Node::shared();
    let before = node.lived().await;
    pass(TTL.as_secs_f64() + 1.0).await;
    let other = node.join_under_its_address();
    let only = r#"{"Network":"10.42.0.0/16","SubnetMax":"10.42.1.0","Backend":{"Type":"tunnel"}}"#;
    node.store.set_config(parse(only));
    node.kernel.add_address("eth0", "192.0.2.77/24".parse().unwrap()).unwrap();
    let agent = node.run();
    agent.until(|status| status.last_error.as_ref().is_some_and(|error| error.contains("no free subnet"))).await;
    pass(30.0).await;
    node.store.set_config(config());
    let after = agent.ready().await.lease.unwrap();
    assert_eq!((after.subnets, after.attrs.public_ip), (before.subnets, before.attrs.public_ip));
    node.assert_apart(&other, subnet(&before));
}

#[tokio::test(start_paused = true)]
async fn a_running_node_whose_lease_is_deleted_takes_no_other_nodes() {
    let node = Node::shared();
    let mut agent = node.run();
    let before = agent.ready().await.lease.unwrap();
    let other = node.join_under_its_address();
    assert!(node.store.delete(&before.key));
    agent.event(|event| *event == Event::LeaseLost(LossReason::Deleted)).await;
    agent.event(|event| matches!(event, Event::LeaseAcquired(_))).await;
    node.assert_apart(&other, subnet(&before));
}

#[tokio::test(start_paused = true)]
async fn a_restart_finds_its_own_lease_behind_another_nodes() {
    let node = Node::shared();
    let agent = node.run();
    let before = agent.ready().await.lease.unwrap();
    let other = node.join_under_its_address();
    agent.killed().await;
    // Not what this version of the agent would publish.
    let mut old = Lease::clone(&before);
    old.attrs.backend_type = "old".into();
    node.store.insert([old]);
    let agent = node.run();
    assert_eq!(agent.ready().await.lease.unwrap().key, before.key);
    node.assert_apart(&other, subnet(&before));
}

#[tokio::test(start_paused = true)]
async fn a_node_without_devices_keeps_the_lease_that_says_what_it_would_publish() {
    let mut node = Node::shared();
    let before = node.lived().await;
    let other = node.join_under_its_address();
    // The host is booted anew.
    node.reboot();
    let agent = node.run();
    assert_eq!(agent.ready().await.lease.unwrap().key, before.key);
    node.assert_apart(&other, subnet(&before));
}

#[tokio::test(start_paused = true)]
async fn the_file_for_the_plug_in_tells_the_own_lease_where_there_is_no_device() {
    for is_held in [true, false] {
        let mut node = Node::shared();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        let run = |node: &Node| node.run_as(node.builder().subnet_env(SubnetEnvFile::new(&path, Masquerade::Plugin)));
        let agent = run(&node);
        let before = agent.ready().await.lease.unwrap();
        eventually("the file is written", || path.exists()).await;
        agent.killed().await;
        node.store.delete(&before.key);
        let other = node.join_under_its_address();
        if is_held {
            // Nothing that it publishes is this node's device.
            let mut own = Lease::clone(&before);
            own.attrs.backend_data.v4 = peer(9).attrs.backend_data.v4;
            node.store.insert([own]);
        }
        // The interface was made anew, and the device is gone with it.
        node.reboot();
        let agent = run(&node);
        assert_eq!(agent.ready().await.lease.unwrap().key, before.key);
        node.assert_apart(&other, subnet(&before));
    }
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_an_operator_reserves_for_the_address_is_used_whatever_is_left_of_another() {
    for restarts in [true, false] {
        let node = Node::shared();
        let mut agent = node.run();
        let before = agent.ready().await.lease.unwrap();
        let mut reservation = node.join_under_its_address();
        (reservation.attrs.backend_type, reservation.attrs.backend_data) = ("".into(), Dual::default());
        node.store.insert([reservation.clone()]);
        if restarts {
            agent.killed().await;
            assert!(node.store.delete(&before.key));
            agent = node.run();
            agent.ready().await;
        } else {
            assert!(node.store.delete(&before.key));
            agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
            agent.event(|event| matches!(event, Event::LeaseAcquired(_))).await;
        }
        assert_eq!(agent.status().lease.unwrap().key, reservation.key);
        assert_eq!(node.leases().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_go_flannel_left_on_a_host_without_devices_is_taken_over() {
    let node = Node::shared();
    let go = node.join_under_its_address();
    let agent = node.run();
    assert_eq!(agent.ready().await.lease.unwrap().key, go.key);
    assert_eq!(node.leases().len(), 1);
}

/// A host that is booted anew after its lease ran out. `subnet.env` is left, and another node took a lease under its
/// address that publishes the very same.
struct Anew {
    node: Node,
    file: SubnetEnvFile,
    _dir: tempfile::TempDir,
    before: Arc<Lease>,
    theirs: Lease,
}

impl Anew {
    async fn after(backend: impl Backend + Copy) -> Self {
        let mut node = Node::shared();
        let dir = tempfile::tempdir().unwrap();
        let file = SubnetEnvFile::new(dir.path().join("subnet.env"), Masquerade::Plugin);
        let agent = node.run_as(node.builder_with(backend).subnet_env(file.clone()));
        let before = agent.ready().await.lease.unwrap();
        eventually("the file is written", || file.path.exists()).await;
        agent.killed().await;
        node.store.delete(&before.key);
        let mut theirs = node.join_under_its_address();
        theirs.attrs = before.attrs.clone();
        node.store.insert([theirs.clone()]);
        node.reboot();
        Self { node, file, _dir: dir, before, theirs }
    }

    fn run(&self, builder: Builder, store: &Away) -> Agent {
        self.node.run_as_over(builder.subnet_env(self.file.clone()), store)
    }

    /// The other node's record is as it was, and this node has its former subnet again, or nothing.
    fn assert_left(&self, own: Option<Prefix>) {
        let records = self.node.leases();
        assert_eq!(records[0], self.theirs);
        assert_eq!(records[1..].iter().map(subnet).collect::<Vec<_>>(), own.into_iter().collect::<Vec<_>>());
    }
}

#[tokio::test(start_paused = true)]
async fn another_nodes_lease_is_left_alone_even_if_it_publishes_what_this_node_would() {
    for fault in [None, Some(Fault::Unavailable), Some(Fault::LostReply)] {
        for anew in [Anew::after(Tunnel).await, Anew::after(bare()).await] {
            let is_bare = anew.theirs.attrs.backend_data.is_empty();
            let builder = if is_bare { anew.node.builder_with(bare()) } else { anew.node.builder_with(Tunnel) };
            let store = Away::new(&anew.node.store);
            store.fail_acquires(fault);
            let agent = anew.run(builder, &store);
            let lease = agent.ready().await.lease.unwrap();
            assert_eq!(lease.subnets, anew.before.subnets);
            anew.assert_left(Some(subnet(&anew.before)));
            assert_eq!(lease.attrs == anew.theirs.attrs, is_bare, "another MAC address");
            agent.killed().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_that_is_undone_gives_back_its_own_lease_and_not_an_equal_one() {
    for delay in [1, 3600] {
        let anew = Anew::after(bare()).await;
        let store = Away::new(&anew.node.store);
        store.delay(Duration::from_secs(delay));
        let agent = anew.run(anew.node.builder_with(bare()), &store);
        eventually("it is taken, but not answered", || anew.node.leases().len() == 2).await;
        agent.stop(Teardown::Remove);
        pass(1.0).await;
        store.delay(Duration::ZERO);
        agent.ended().await.unwrap();
        anew.assert_left(None);
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_gives_back_its_own_lease_and_not_an_equal_one_whatever_answers_are_lost() {
    let anew = Anew::after(bare()).await;
    let store = Away::new(&anew.node.store);
    let agent = anew.run(anew.node.builder_with(bare()), &store).once_ready().await;
    store.delay(Duration::from_secs(3600));
    let is_renewed = || anew.node.leases().len() == 2 && store.calls.load(Ordering::Relaxed) > 3;
    pass(TTL.as_secs_f64() * 0.95).await;
    assert!(is_renewed(), "a renewal is under way");
    store.delay(Duration::ZERO);
    agent.removed().await.unwrap();
    anew.assert_left(None);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_lease_is_deleted_takes_its_subnet_again_and_not_an_equal_lease() {
    let anew = Anew::after(bare()).await;
    let store = Away::new(&anew.node.store);
    let mut agent = anew.run(anew.node.builder_with(bare()), &store);
    let own = agent.ready().await.lease.unwrap();
    assert!(anew.node.store.delete(&own.key));
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    agent.event(|event| matches!(event, Event::LeaseAcquired(_))).await;
    anew.assert_left(Some(subnet(&anew.before)));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_asked_for_in_vain_is_asked_for_again() {
    for fault in [Fault::Unavailable, Fault::LostReply] {
        let node = Node::shared();
        // Of a backend that publishes no MAC address.
        let mut before = node.join_under_its_address();
        (before.attrs.backend_type, before.attrs.backend_data) = ("other".into(), Dual::default());
        node.store.insert([before.clone()]);
        let store = Away::new(&node.store);
        store.fail_acquires([fault]);
        let agent = node.run_over(&store);
        assert_eq!(agent.ready().await.lease.unwrap().key, before.key);
        assert_eq!(node.leases().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_removal_gives_back_the_lease_of_its_device_and_no_other() {
    for is_held in [false, true] {
        let node = Node::shared();
        let own = node.lived().await;
        let other = node.join_under_its_address();
        if !is_held {
            node.store.delete(&own.key);
        }
        let removed = node.overlay().remove().await.unwrap();
        assert_eq!(removed.lease.map(|lease| lease.key), is_held.then(|| own.key.clone()));
        assert_eq!(removed.store.is_some(), !is_held);
        assert_eq!(node.leases(), [other]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_removal_gives_back_no_lease_that_may_be_another_nodes() {
    let mut node = Node::shared();
    let own = node.lived().await;
    let other = node.join_under_its_address();
    // The host is booted anew: nothing tells which is whose.
    node.reboot();
    let removed = node.overlay().remove().await.unwrap();
    assert_eq!(removed.lease, None);
    let why = removed.store.unwrap();
    assert!(why.contains(own.key.as_str()) && why.contains(other.key.as_str()), "{why}");
    node.assert_apart(&other, subnet(&own));
}
