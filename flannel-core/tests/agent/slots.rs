//! A backend with several routes to each peer.

use std::sync::Arc;

use flannel_core::kernel::{Route, RouteSlot};
use flannel_core::overlay::{BuildError, Overlay};
use flannel_core::testing::backend_contract::{self, Made};
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};

use crate::altered::Altered;
use crate::gateway::{ASIDE, Gateway};
use crate::node::{Node, eventually, subnet};

/// The routes to peers in the slot beside the main table.
fn aside(node: &Node) -> usize {
    node.kernel.snapshot().matching("route 10.42.").iter().filter(|line| line.contains("metric 7 table 100")).count()
}

#[tokio::test(start_paused = true)]
async fn routes_beside_the_main_table_are_kept_and_go_with_their_peer() {
    let node = Node::alone();
    node.join(1..=3);
    let agent = node.run_as(node.builder_with(Gateway::TunnelTwice).route_slots(vec![ASIDE]));
    agent.ready().await;
    assert_eq!((aside(&node), node.has_route(subnet(2))), (3, true));
    let device = node.kernel.link_index("tun4.1").unwrap();
    let via = FakeRoute::via(subnet(2), subnet(2).addr(), device);
    let ours = FakeRoute { onlink: true, table: ASIDE.table, metric: ASIDE.metric, ..via };
    let ours = FakeRoute { protocol: Route::protocol_for(&subnet(2)), ..ours };
    // Ours in a slot that is not looked at: somebody else's.
    let beyond = FakeRoute { metric: 8, ..ours.clone() };
    node.kernel.add_route(beyond, Placement::Exclusive).unwrap();
    node.kernel.delete_route(&ours).unwrap();
    eventually("the route is back", || aside(&node) == 3).await;
    node.kernel.add_route(FakeRoute { protocol: 4, ..ours }, Placement::Replace).unwrap();
    let status = agent.until(|status| !status.conflicts.is_empty()).await;
    assert!(status.conflicts[0].found.contains("table 100 metric 7"), "{:?}", status.conflicts);
    assert!(node.has_route(subnet(2)), "the one in the main table stays");
    node.leave([1, 3]);
    eventually("the routes go with their peers", || aside(&node) == 1).await;
    assert_eq!(node.kernel.snapshot().matching("route 10.42.2.").len(), 3, "{}", node.kernel.snapshot());
}

#[tokio::test(start_paused = true)]
async fn a_removal_finds_routes_in_each_slot() {
    let node = Node::alone();
    node.join(1..=3);
    let builder = || node.builder_with(Gateway::TunnelTwice).route_slots(vec![ASIDE]);
    let agent = node.run_as(builder());
    agent.ready().await;
    agent.killed().await;
    let overlay = builder().build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone())).unwrap();
    let direct = FakeRoute::via(subnet(9), "192.0.2.9".parse().unwrap(), node.kernel.link_index("eth0").unwrap());
    let direct = FakeRoute { table: ASIDE.table, metric: ASIDE.metric, protocol: 210, ..direct };
    node.kernel.add_route(direct, Placement::Exclusive).unwrap();
    overlay.remove().await.unwrap();
    assert_eq!(aside(&node), 0, "{}", node.kernel.snapshot());
}

#[tokio::test(start_paused = true)]
async fn a_removal_finds_routes_in_the_slots_of_the_backend() {
    let node = Node::alone();
    node.join(1..=3);
    let backend = Altered { slots: |_| vec![ASIDE], ..Altered::of(Gateway::TunnelTwice) };
    let agent = node.run_as(node.builder_with(backend));
    agent.ready().await;
    assert_eq!(aside(&node), 3);
    agent.killed().await;
    let overlay = node.builder_with(backend).build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone()));
    overlay.unwrap().remove().await.unwrap();
    assert_eq!(aside(&node), 0, "{}", node.kernel.snapshot());
}

#[test]
fn table_0_is_refused() {
    let node = Node::alone();
    let builder = node.builder().route_slots(vec![RouteSlot::new(0, 7)]);
    let outcome = builder.build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone()));
    assert!(matches!(outcome, Err(BuildError::RouteTable)));
}

#[test]
fn a_backend_that_no_configuration_could_select_is_refused() {
    let build = |kinds: &[&'static str]| {
        let node = Node::alone();
        let builder =
            kinds.iter().fold(Overlay::builder(), |builder, kind| builder.backend(kind, |_| Ok(Gateway::OrTunnel)));
        builder.build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone())).map(drop)
    };
    assert_eq!(build(&["one", "two"]), Ok(()));
    assert_eq!(build(&["one", "two", "one"]), Err(BuildError::TwoBackends("one")));
    assert_eq!(build(&["One"]), Err(BuildError::BackendKind("One")));
}

#[test]
fn the_backend_contract_holds() {
    for backend in [Gateway::OrTunnel, Gateway::TunnelTwice] {
        backend_contract::all(&Made::new(r#"{"Type":"tunnel"}"#, move |_| Ok(backend)).with_slots(&[ASIDE]));
    }
}
