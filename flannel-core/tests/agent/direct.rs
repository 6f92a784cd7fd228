//! Peers on the node's own links, while the connected route to them goes and comes back.

use flannel_core::net::Family;
use flannel_core::overlay::{Phase, WithheldBecause};
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};

use crate::gateway::Gateway;
use crate::node::{Agent, Node, eventually, pass, peer, public, subnet};

/// The connected route of the node's uplink, with a metric.
fn connected(node: &Node, metric: u32) -> FakeRoute {
    let link = node.kernel.link_index("eth0").unwrap();
    let made_by_kernel = FakeRoute { protocol: 2, gateway: None, metric, ..via(link) };
    FakeRoute { prefix: "192.0.2.0/24".parse().unwrap(), ..made_by_kernel }
}

fn via(link: u32) -> FakeRoute {
    FakeRoute::via(subnet(0), public(Family::V4, 0), link)
}

/// Deletes the connected route, whatever its metric.
fn disconnect(node: &Node) {
    let deleted = [0, 100].map(|metric| node.kernel.delete_route(&connected(node, metric)));
    assert!(deleted.iter().any(Result::is_ok), "{deleted:?}");
}

fn connect(node: &Node, metric: u32) {
    node.kernel.add_route(connected(node, metric), Placement::Exclusive).unwrap();
}

fn is_direct(node: &Node, n: u8) -> bool {
    let text = format!("route {} via {} dev eth0 ", subnet(n), public(Family::V4, n));
    node.kernel.snapshot().matching(&text).len() == 1
}

/// A node with two peers that are reached without encapsulation.
async fn beside_two(backend: Gateway) -> (Node, Agent) {
    let node = Node::alone();
    node.join([1, 2]);
    let agent = node.run_as(node.builder_with(backend)).once_ready().await;
    pass(1.0).await;
    assert!(is_direct(&node, 1) && is_direct(&node, 2));
    (node, agent)
}

#[tokio::test(start_paused = true)]
async fn somebody_who_takes_over_the_uplink_takes_no_direct_route_away() {
    for backend in [Gateway::OrNothing, Gateway::OrTunnel] {
        let (node, agent) = beside_two(backend).await;
        for metric in [100, 0, 100, 100] {
            disconnect(&node);
            for _ in 0..10 {
                pass(0.05).await;
                assert!(is_direct(&node, 1) && is_direct(&node, 2), "{backend:?} {}", node.kernel.snapshot());
            }
            connect(&node, metric);
            agent.until(|status| status.withheld.is_empty() && status.skipped.is_empty()).await;
            assert!(is_direct(&node, 1) && is_direct(&node, 2), "{backend:?}");
        }
        // Nor does an agent that starts in between.
        disconnect(&node);
        agent.killed().await;
        let agent = node.run_as(node.builder_with(backend));
        agent.until(|status| status.withheld.len() == 2 && status.phase == Phase::Ready).await;
        assert!(is_direct(&node, 1) && is_direct(&node, 2), "{backend:?}");
        connect(&node, 0);
        agent.until(|status| status.withheld.is_empty() && status.skipped.is_empty()).await;
        assert!(is_direct(&node, 1) && agent.handle.plan().await.unwrap().plan.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_connected_route_stays_away_the_tunnel_takes_over_and_gives_back() {
    let (node, agent) = beside_two(Gateway::OrTunnel).await;
    disconnect(&node);
    let because = Some(&WithheldBecause::Unreached);
    agent.until(|status| status.withheld.get(&subnet(1)) == because).await;
    let tunnelled = |n| {
        let text = format!("route {} via {} dev tun4.1 ", subnet(n), subnet(n).addr());
        !node.kernel.snapshot().matching(&text).is_empty()
    };
    eventually("the tunnel is used", || tunnelled(1) && tunnelled(2)).await;
    agent.until(|status| status.withheld.is_empty()).await;
    connect(&node, 100);
    eventually("the link is used", || is_direct(&node, 1) && is_direct(&node, 2)).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_while_its_route_is_kept_takes_it_along_at_once() {
    for backend in [Gateway::OrNothing, Gateway::OrTunnel] {
        let (node, agent) = beside_two(backend).await;
        disconnect(&node);
        agent.until(|status| status.withheld.len() == 2).await;
        pass(1.0).await;
        let audits = agent.status().audits;
        node.leave([1]);
        pass(1.0).await;
        assert!(!node.has_route(subnet(1)) && is_direct(&node, 2), "{backend:?} {}", node.kernel.snapshot());
        let status = agent.status();
        assert_eq!((status.audits, status.withheld.len()), (audits, 1), "{backend:?}");
        // One that moves to another gateway leaves no route to the former one behind.
        let mut moved = peer(2);
        moved.attrs.public_ip.v4 = Some("198.51.100.7".parse().unwrap());
        node.store.insert([moved]);
        pass(1.0).await;
        assert!(!is_direct(&node, 2), "{backend:?} {}", node.kernel.snapshot());
        assert_eq!((agent.status().audits, agent.status().withheld.len()), (audits, 0), "{backend:?}");
    }
}
