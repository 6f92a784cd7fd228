//! The node's own interface and addresses while the host changes around them.

use std::sync::Arc;

use flannel_core::net::{Dual, Family};
use flannel_core::overlay::{Event, MissingUplink};
use flannel_core::subnet::ThisNode;
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};

use crate::node::{Agent, Node, add_defaults, eventually, pass, peer, pool, public};
use crate::tunnel::{data, mac_of};

/// An agent that the store knows by its address.
fn run_by_address(node: &Node) -> Agent {
    let store = node.store.for_node(ThisNode::by_address());
    node.run_as_over(node.builder().missing_uplink(MissingUplink::Wait), &store)
}

fn published(node: &Node) -> Vec<String> {
    let records = node.store.records();
    records.iter().filter_map(|it| Some(it.lease.as_ref().ok()?.attrs.public_ip.v4?.to_string())).collect()
}

/// A node whose address comes from DHCP.
fn leased() -> Node {
    let node = Node::alone();
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    node.kernel.lease_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    add_defaults(&node.kernel, node.kernel.link_index("eth0").unwrap());
    node
}

#[tokio::test(start_paused = true)]
async fn a_virtual_address_moves_no_node() {
    let node = leased();
    let mut agent = run_by_address(&node).once_ready().await;
    node.kernel.add_address("eth0", "192.0.2.3/32".parse().unwrap()).unwrap();
    node.kernel.add_address("eth0", "fd99::3/128".parse().unwrap()).unwrap();
    pass(60.0).await;
    node.kernel.remove_address("eth0", "192.0.2.3/32".parse().unwrap()).unwrap();
    pass(60.0).await;
    assert_eq!(published(&node), ["192.0.2.200"]);
    assert!(!agent.drain().iter().any(|event| matches!(event, Event::UplinkChanged { .. } | Event::LeaseLost(_))));
}

#[tokio::test(start_paused = true)]
async fn an_address_that_an_operator_sets_in_the_store_is_published_from_then_on() {
    let node = Node::alone();
    let set = |addr: Option<&str>| {
        let public = Dual { v4: addr.map(|addr| addr.parse().unwrap()), v6: None };
        node.store.set_public(&node.identity(), public);
    };
    let mut agent = node.run().once_ready().await;
    for addr in ["203.0.113.7", "203.0.113.8"] {
        set(Some(addr));
        pass(2.0).await;
        assert_eq!(published(&node), [addr]);
        agent.event(|event| matches!(event, Event::UplinkChanged { .. })).await;
    }
    // One that is set while the watch is down is in the list that follows.
    node.store.outage();
    set(Some("203.0.113.9"));
    pass(10.0).await;
    node.store.recover();
    pass(30.0).await;
    assert_eq!(published(&node), ["203.0.113.9"]);
    set(None);
    pass(2.0).await;
    assert_eq!(published(&node), ["192.0.2.200"], "the node's own again");
    assert!(!agent.drain().iter().any(|event| matches!(event, Event::LeaseLost(_))));
}

#[tokio::test(start_paused = true)]
async fn an_address_that_an_operator_sets_in_the_store_finds_its_interface() {
    let node = Node::alone();
    node.kernel.add_uplink("eth1", "198.51.100.7/24".parse().unwrap()).unwrap();
    let set = |addr: Option<&str>| {
        let public = Dual { v4: addr.map(|addr| addr.parse().unwrap()), v6: None };
        node.store.set_public(&node.identity(), public);
    };
    let uplink = |agent: &Agent| agent.status().uplink.up().map(|uplink| uplink.name.to_string());
    set(Some("198.51.100.7"));
    let agent = node.run().once_ready().await;
    assert_eq!((uplink(&agent).as_deref(), published(&node)), (Some("eth1"), vec!["198.51.100.7".to_owned()]));
    // Any other address is published from the interface of the default route.
    for (addr, shown) in [(Some("203.0.113.7"), "203.0.113.7"), (None, "192.0.2.200")] {
        set(addr);
        pass(30.0).await;
        assert_eq!((uplink(&agent).as_deref(), published(&node)), (Some("eth0"), vec![shown.to_owned()]));
        set(Some("198.51.100.7"));
        pass(30.0).await;
        assert_eq!(uplink(&agent).as_deref(), Some("eth1"));
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_comes_back_within_seconds_was_never_given_up() {
    let node = Node::alone();
    let mut agent = run_by_address(&node).once_ready().await;
    node.kernel.add_address("eth0", "192.0.2.3/24".parse().unwrap()).unwrap();
    for _ in 0..5 {
        node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
        pass(1.5).await;
        node.kernel.add_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
        pass(20.0).await;
    }
    assert_eq!(published(&node), ["192.0.2.200"]);
    let events = agent.drain();
    assert!(!events.iter().any(|event| matches!(event, Event::UplinkChanged { .. })), "{events:?}");
    assert!(events.iter().any(|event| matches!(event, Event::UplinkLost(why) if why.contains("192.0.2.3"))));
}

#[tokio::test(start_paused = true)]
async fn a_default_route_that_moves_for_a_moment_moves_no_node() {
    let node = Node::alone();
    let eth1 = node.kernel.add_uplink("eth1", "198.51.100.7/24".parse().unwrap()).unwrap();
    let agent = node.run_ready().await;
    let eth0 = node.kernel.link_index("eth0").unwrap();
    let default = |gateway: &str, link| FakeRoute::via("0.0.0.0/0".parse().unwrap(), gateway.parse().unwrap(), link);
    let away = || node.kernel.add_route(default("198.51.100.254", eth1), Placement::Replace).unwrap();
    away();
    pass(1.0).await;
    node.kernel.add_route(default("192.0.2.254", eth0), Placement::Replace).unwrap();
    pass(30.0).await;
    assert_eq!(published(&node), ["192.0.2.200"]);
    away();
    let moved = agent.until(|status| status.uplink.up().is_some_and(|uplink| uplink.index == eth1)).await;
    assert_eq!(moved.mtu.unwrap().0, 1430);
    eventually("the new address is published", || published(&node) == ["198.51.100.7"]).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_that_another_record_publishes_is_never_taken_over() {
    let node = Node::alone();
    node.join([3]);
    let agent = run_by_address(&node).once_ready().await;
    node.kernel.add_address("eth0", "192.0.2.3/24".parse().unwrap()).unwrap();
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    pass(60.0).await;
    assert_eq!(published(&node), ["192.0.2.200", "192.0.2.3"]);
    assert_eq!(agent.status().uplink.up(), None);
    node.leave([3]);
    eventually("the address is free", || published(&node) == ["192.0.2.3"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_waits_for_a_lease_asks_by_the_address_it_has_then() {
    let node = Node::alone();
    node.store.set_config(pool(9));
    node.join([9]);
    let agent = run_by_address(&node);
    agent.until(|status| status.last_error.is_some()).await;
    // DHCP gives its address to another node, which takes a lease there.
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    node.kernel.add_address("eth0", "192.0.2.77/24".parse().unwrap()).unwrap();
    add_defaults(&node.kernel, node.kernel.link_index("eth0").unwrap());
    node.leave([9]);
    let mut other = peer(9);
    (other.key, other.attrs.public_ip.v4) =
        (flannel_core::lease::LeaseKey::new("192.0.2.200"), Some(public(Family::V4, 200)));
    node.store.insert([other.clone()]);
    pass(30.0).await;
    let now = node.store.records().into_iter().find(|record| record.key == other.key).unwrap();
    assert_eq!(now.lease.unwrap().attrs, other.attrs, "its record is as it was");
    node.store.delete(&other.key);
    agent.ready().await;
    assert_eq!(published(&node), ["192.0.2.77"]);
}

#[tokio::test(start_paused = true)]
async fn a_restart_beside_a_virtual_address_takes_no_other_nodes_lease() {
    let node = leased();
    let agent = run_by_address(&node);
    let before = agent.ready().await.lease.unwrap();
    node.kernel.add_address("eth0", "192.0.2.3/32".parse().unwrap()).unwrap();
    // The node that had the address before published it.
    let mut other = peer(3);
    other.key = flannel_core::lease::LeaseKey::new("192.0.2.3");
    node.store.insert([other.clone()]);
    agent.cancelled().await.unwrap();
    let agent = run_by_address(&node);
    assert_eq!(agent.ready().await.lease.unwrap().subnets, before.subnets);
    agent.cancelled().await.unwrap();
    let store = node.store.for_node(ThisNode::by_address());
    let overlay = node.builder().build(Arc::new(store), Arc::new(node.kernel.clone())).unwrap();
    assert_eq!(overlay.remove().await.unwrap().lease.map(|lease| lease.subnets), Some(before.subnets));
    let left = node.store.records();
    assert_eq!(left.iter().map(|record| &record.key).collect::<Vec<_>>(), [&other.key]);
}

#[tokio::test(start_paused = true)]
async fn an_interface_made_anew_with_the_same_address_is_used_at_once() {
    let (node, agent) = Node::ready_beside([]).await;
    node.kernel.delete_link("eth0").unwrap();
    pass(0.5).await;
    let eth0 = node.kernel.add_uplink("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    node.kernel.add_address("eth0", "fd99::c8/64".parse().unwrap()).unwrap();
    add_defaults(&node.kernel, eth0);
    pass(1.0).await;
    assert_eq!(agent.status().uplink.up().map(|uplink| uplink.index), Some(eth0));
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_mac_address_an_older_record_has_takes_another() {
    let node = Node::alone();
    for n in [1, 2] {
        let mut copy = peer(n);
        copy.attrs.backend_data.v4 =
            Some(data(mac_of(&format!("node-200{}", ["", "/1"][usize::from(n) - 1]), Family::V4)));
        node.store.insert([copy]);
    }
    let agent = node.run_ready().await;
    agent.until(|status| status.own_trouble.is_some()).await;
    agent.until(|status| status.own_trouble.is_none()).await;
    let mac = mac_of("node-200/2", Family::V4);
    assert_eq!(node.record().unwrap().attrs.backend_data.v4, Some(data(mac)));
    eventually("the device has it", || !node.kernel.snapshot().matching(&mac.to_string()).is_empty()).await;
}
