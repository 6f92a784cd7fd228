//! Two nodes on the real kernel, connected by the underlay and a second network.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use custom_backend::Lan;
use flannelkit::config::{Allocation, NetworkConfig};
use flannelkit::net::{Family, Mtu};
use flannelkit::spi::backend::Skip;
use flannelkit::spi::subnet::{NodeIdentity, ThisNode};
use flannelkit::testing::MemorySubnets;
use flannelkit::{End, NetlinkKernel, Overlay, OverlayError, Status};
use testkit::{Agent, Families, Namespace, PodNet, Underlay, probe, wait_until};
use tokio::runtime::Runtime;

const NETWORK: &[u8] = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"lan","Interface":"lan0","Metric":50}}"#;
const PATIENCE: Duration = Duration::from_secs(20);

/// The second network: a switch, and a device on each node.
struct SecondNetwork {
    switch: Namespace,
}

impl SecondNetwork {
    fn new() -> Self {
        let switch = Namespace::new("lan").expect("the test needs root, or: unshare -Urn cargo test");
        switch.add_bridge("br1").unwrap();
        switch.set_up("br1").unwrap();
        Self { switch }
    }

    fn address(node: u8) -> IpAddr {
        Ipv4Addr::new(198, 51, 100, node).into()
    }

    /// Sets up the network on a node, as the other program would.
    fn connect(&self, ns: &Namespace, node: u8) {
        let port = format!("lan{node}");
        ns.add_veth("lan0", &self.switch, &port).unwrap();
        self.switch.set_link(&port, "master br1").unwrap();
        self.switch.set_up(&port).unwrap();
        ns.set_up("lan0").unwrap();
        ns.add_address("lan0", Self::address(node), 24).unwrap();
    }
}

fn overlay(store: &MemorySubnets, ns: &Namespace, node: u8) -> Overlay {
    let node = NodeIdentity::new(&format!("node-{node}")).unwrap();
    // A child that is being forked may still hold the claim of the previous agent.
    drop(testkit::hold_commands());
    let kernel = NetlinkKernel::in_namespace(ns.as_fd().try_clone_to_owned().unwrap()).unwrap();
    Overlay::builder()
        .backend(Lan::TYPE, Lan::new)
        // Frequent periodic audits would hide a missing hint.
        .audit_every(Duration::from_secs(600))
        .build(Arc::new(store.for_node(ThisNode::named(node))), Arc::new(kernel))
        .unwrap()
}

/// Returns the node's route to a peer's pods.
fn route(ns: &Namespace) -> Option<(IpAddr, String, u32)> {
    let routes = ns.routes(Family::V4).unwrap();
    let network = "10.244.0.0/16".parse::<flannelkit::net::Prefix>().unwrap();
    let to_peers = routes.into_iter().find(|route| network.covers(&route.to) && route.via.is_some())?;
    Some((to_peers.via?, to_peers.dev?, to_peers.metric))
}

#[test]
fn pods_reach_each_other_over_the_second_network_while_it_exists() {
    let runtime = Runtime::new().unwrap();
    let _inside = runtime.enter();
    let underlay = Underlay::new(2, Families::V4).expect("the lab needs root, or: unshare -Urn cargo test");
    let second = SecondNetwork::new();
    let store = MemorySubnets::new(NetworkConfig::parse(NETWORK, Allocation::Pool).unwrap());
    let nodes: Vec<_> = (1..=2).zip(underlay.nodes()).collect();

    // Without the device a node has no address to publish: the agent ends with a remedy.
    let refused = Agent::start(overlay(&store, &nodes[0].1.ns, 1), PATIENCE);
    match runtime.block_on(refused.ended()) {
        Err(error @ OverlayError::Backend(_)) => {
            let text =
                error.to_string() + &std::error::Error::source(&error).map(|it| it.to_string()).unwrap_or_default();
            assert!(text.contains("lan0 is missing: start the program"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    assert!(store.records().is_empty(), "no lease is acquired");

    let mut agents = Vec::new();
    for (nth, node) in &nodes {
        second.connect(&node.ns, *nth);
        agents.push(Agent::start(overlay(&store, &node.ns, *nth), PATIENCE));
    }
    let mut pods = Vec::new();
    for (agent, (_, node)) in agents.iter().zip(&nodes) {
        let status = runtime.block_on(agent.until(|status| status.is_ready() && status.peers.accepted == 1));
        assert_eq!(status.mtu, Some(Mtu(1500)));
        let subnets = status.lease.unwrap().subnets;
        pods.push(node.attach_pod(&PodNet { subnets, mtu: Mtu(1500) }).unwrap());
    }
    for (peer, (_, node)) in (1..=2).rev().zip(&nodes) {
        let expected = Some((SecondNetwork::address(peer), "lan0".to_owned(), 50));
        wait_until("a route to the peer", PATIENCE, || Ok(route(&node.ns) == expected)).unwrap();
    }
    let there = pods[1].addr(Family::V4).unwrap();
    probe::until_reply(&pods[0].ns, there, PATIENCE).unwrap();

    // The other program deletes the device: the peer is skipped, and the node keeps its lease.
    let node = &nodes[0].1.ns;
    node.delete_link("lan0").unwrap();
    let is_missing = |status: &Status| {
        let mut skips = status.skipped.values();
        skips.any(|skip| matches!(skip, Skip::NotReady { what, .. } if what == "lan0 is missing"))
    };
    let status = runtime.block_on(agents[0].until(is_missing));
    assert!(status.lease.is_some() && status.ended.is_none(), "{status:?}");
    assert_eq!(route(node), None);
    probe::ping(&pods[0].ns, there, Duration::from_millis(200)).unwrap_err();

    // The device is created again under the old name.
    second.connect(node, 1);
    runtime.block_on(agents[0].until(|status| status.is_ready() && status.skipped.is_empty()));
    probe::until_reply(&pods[0].ns, there, PATIENCE).unwrap();

    // A stopped overlay deletes its routes, and leaves the device in place.
    for (agent, (_, node)) in agents.iter().zip(&nodes) {
        runtime.block_on(agent.removed()).unwrap();
        assert_eq!(agent.status().ended, Some(End::Stopped));
        assert_eq!(route(&node.ns), None);
        assert!(node.ns.link("lan0").unwrap().is_up());
    }
}
