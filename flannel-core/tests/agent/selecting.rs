//! Another uplink is selected: before, during and between runs.

use std::sync::Arc;

use flannel_core::kernel::LinkName;
use flannel_core::net::Family;
use flannel_core::overlay::{
    BuildError, Builder, End, Event, MissingUplink, Overlay, OverlayError, Phase, Status, Teardown, UplinkState,
};
use flannel_core::subnet::ThisNode;
use flannel_core::uplink::{Problem, Select};
use tokio::time::Instant;

use crate::node::{Node, eventually, pass, pool, public, subnet};

fn named(name: &str) -> Select {
    Select::Name(LinkName::new(name).unwrap())
}

/// A node with eth0, which has the default route, and eth1.
fn two() -> Node {
    let node = Node::alone();
    node.kernel.add_uplink("eth1", "192.0.2.77/24".parse().unwrap()).unwrap();
    node.join([1]);
    node
}

fn build(node: &Node, builder: Builder) -> Overlay {
    builder.build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone())).unwrap()
}

fn uses(name: &str) -> impl Fn(&Status) -> bool {
    move |status| status.is_ready() && status.uplink.up().is_some_and(|uplink| uplink.name.as_str() == name)
}

fn published(node: &Node) -> Option<std::net::IpAddr> {
    node.record()?.attrs.public_ip.v4
}

#[tokio::test(start_paused = true)]
async fn a_running_agent_goes_over_at_once_with_its_lease() {
    let node = two();
    let mut agent = node.run().once_ready().await;
    let before = agent.until(uses("eth0")).await;
    pass(1.0).await;
    agent.drain();
    for (name, number) in [("eth1", 77), ("eth0", 200), ("eth1", 77)] {
        let begun = Instant::now();
        agent.handle.set_uplink(named(name)).unwrap();
        let status = agent.until(uses(name)).await;
        assert!(begun.elapsed().as_secs_f64() < 1.0, "{:?}: nothing has to settle", begun.elapsed());
        assert_eq!(status.lease.as_ref().unwrap().subnets, before.lease.as_ref().unwrap().subnets);
        eventually("it is published", || published(&node) == Some(public(Family::V4, number))).await;
        pass(1.0).await;
        assert!(node.has_route(subnet(1)) && agent.handle.plan().await.unwrap().plan.is_empty());
        let device = node.kernel.snapshot().matching(": tun4.1 ").join("\n");
        assert!(device.contains(&format!(" dev {name} ")), "{device}");
    }
    let told = agent.drain();
    let lost = |event: &Event| matches!(event, Event::LeaseLost(_) | Event::LeaseAcquired(_) | Event::UplinkLost(_));
    assert!(!told.iter().any(lost), "{told:?}");
    assert_eq!(told.iter().filter(|event| matches!(event, Event::UplinkChanged { .. })).count(), 3, "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_known_by_its_address_keeps_its_subnet_when_it_goes_over() {
    let node = two();
    let store = node.store.for_node(ThisNode::by_address());
    let agent = node.run_as_over(node.builder(), &store).once_ready().await;
    let before = agent.status().lease.unwrap();
    agent.handle.set_uplink(named("eth1")).unwrap();
    let addr = public(Family::V4, 77);
    let status =
        agent.until(|it| uses("eth1")(it) && it.lease.as_ref().unwrap().attrs.public_ip.v4 == Some(addr)).await;
    assert_eq!(status.lease.unwrap().subnets, before.subnets);
}

#[tokio::test(start_paused = true)]
async fn an_uplink_that_does_not_exist_is_shown_and_used_once_it_does() {
    let node = two();
    let mut agent = node.run().once_ready().await;
    let before = agent.until(uses("eth0")).await;
    pass(1.0).await;
    let (kernel, record) = (node.kernel.snapshot(), node.record());
    agent.drain();
    agent.handle.set_uplink(named("eth9")).unwrap();
    let status = agent.until(|status| status.uplink.up().is_none()).await;
    let UplinkState::Lost { last, error, .. } = &status.uplink else { panic!("{status:?}") };
    assert!(error.contains("eth9") && last.as_ref() == before.uplink.up(), "{status:?}");
    pass(60.0).await;
    assert_eq!((node.kernel.snapshot(), node.record(), agent.status().lease), (kernel, record, before.lease));
    assert!(!agent.status().is_ready());
    node.kernel.add_uplink("eth9", "198.51.100.9/24".parse().unwrap()).unwrap();
    agent.until(uses("eth9")).await;
    let told = agent.drain();
    assert!(!told.iter().any(|event| matches!(event, Event::LeaseLost(_))), "{told:?}");
    // Back to what is there.
    agent.handle.set_uplink(Select::DefaultRoute).unwrap();
    agent.until(uses("eth0")).await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_waits_for_an_uplink_takes_another_at_once() {
    let node = two();
    let builder = node.builder().uplink(named("eth9")).missing_uplink(MissingUplink::Wait);
    let overlay = build(&node, builder);
    let running = overlay.spawn().unwrap();
    pass(33.0).await;
    assert_eq!(overlay.handle().status().phase, Phase::Starting);
    let begun = Instant::now();
    overlay.handle().set_uplink(named("eth1")).unwrap();
    running.handle().wait_for(uses("eth1")).await.unwrap();
    assert!(begun.elapsed().as_secs_f64() < 1.0, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_start_that_waits_for_a_lease_takes_it_with_the_uplink_selected_meanwhile() {
    let node = Node::alone();
    node.kernel.add_uplink("eth1", "192.0.2.77/24".parse().unwrap()).unwrap();
    node.store.set_config(pool(9));
    node.join([9]);
    let overlay = build(&node, node.builder());
    let running = overlay.spawn().unwrap();
    running.handle().wait_for(|status| status.last_error.is_some()).await.unwrap();
    overlay.handle().set_uplink(named("eth1")).unwrap();
    node.leave([9]);
    running.handle().wait_for(uses("eth1")).await.unwrap();
    assert_eq!(published(&node), Some(public(Family::V4, 77)));
}

#[tokio::test(start_paused = true)]
async fn what_is_selected_at_any_moment_of_a_start_is_in_use_in_the_end() {
    for steps in 0..40 {
        let node = two();
        let overlay = build(&node, node.builder());
        let running = overlay.spawn().unwrap();
        for _ in 0..steps {
            tokio::task::yield_now().await;
        }
        overlay.handle().set_uplink(named("eth1")).unwrap();
        running.handle().wait_for(uses("eth1")).await.unwrap();
        eventually("it is published", || published(&node) == Some(public(Family::V4, 77))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_selected_between_runs_is_for_the_next_and_those_after_it() {
    let node = two();
    let overlay = build(&node, node.builder());
    let handle = overlay.handle();
    handle.set_uplink(named("eth1")).unwrap();
    let mut lease = None;
    for name in ["eth1", "eth0", "eth0"] {
        let running = overlay.spawn().unwrap();
        let status = handle.wait_for(uses(name)).await.unwrap();
        let subnets = status.lease.as_ref().unwrap().subnets;
        assert_eq!(*lease.get_or_insert(subnets), subnets);
        pass(1.0).await;
        running.shutdown(Teardown::Keep).await.unwrap();
        handle.set_uplink(named("eth0")).unwrap();
    }
    // One that does not exist ends the next run, if that is the policy, and no run is harmed.
    handle.set_uplink(named("eth9")).unwrap();
    let (kernel, record) = (node.kernel.snapshot(), node.record());
    let outcome = overlay.run(std::future::pending()).await;
    assert!(
        matches!(&outcome, Err(OverlayError::Uplink(error)) if error.problem == Problem::NoSuchInterface),
        "{outcome:?}"
    );
    assert!(matches!(&handle.status().ended, Some(End::Failed(text)) if text.contains("eth9")));
    assert_eq!((node.kernel.snapshot(), node.record()), (kernel, record));
    handle.set_uplink(named("eth1")).unwrap();
    assert!(overlay.preview().await.unwrap().is_some());
    let _running = overlay.spawn().unwrap();
    handle.wait_for(uses("eth1")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_selection_that_can_never_choose_is_refused_and_changes_nothing() {
    let node = two();
    let nested = Select::FirstOf(vec![named("eth1"), Select::FirstOf(Vec::new())]);
    for empty in [Select::FirstOf(Vec::new()), nested] {
        let store = Arc::new(node.store.clone());
        let refused = node.builder().uplink(empty.clone()).build(store, Arc::new(node.kernel.clone()));
        assert_eq!(refused.map(drop), Err(BuildError::NoUplink));
        let agent = node.run().once_ready().await;
        assert_eq!(agent.handle.set_uplink(empty), Err(BuildError::NoUplink));
        pass(60.0).await;
        assert!(uses("eth0")(&agent.status()), "{:?}", agent.status());
        agent.cancelled().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_removal_after_the_runs_knows_the_node_by_the_uplink_selected_last() {
    let node = two();
    let before = node.kernel.snapshot();
    let store = Arc::new(node.store.for_node(ThisNode::by_address()));
    let overlay = node.builder().build(store, Arc::new(node.kernel.clone())).unwrap();
    overlay.handle().set_uplink(named("eth1")).unwrap();
    let running = overlay.spawn().unwrap();
    running.handle().wait_for(uses("eth1")).await.unwrap();
    pass(1.0).await;
    drop(running);
    let removed = overlay.remove().await.unwrap();
    assert_eq!(removed.lease.unwrap().attrs.public_ip.v4, Some(public(Family::V4, 77)));
    assert_eq!(node.kernel.snapshot(), before);
}
