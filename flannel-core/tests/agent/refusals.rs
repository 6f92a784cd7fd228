//! What the kernel refuses to write: whose trouble it is, and how often it is tried.

use std::sync::Arc;

use flannel_core::clock::TokioClock;
use flannel_core::kernel::{Object, Op};
use flannel_core::net::{Family, Prefix};
use flannel_core::overlay::{Event, Phase, Status, Wait};
use flannel_core::testing::MemorySubnets;

use crate::node::{Node, dual_config, dual_peer, pass, peer, public, subnet};

const EINVAL: i32 = 22;
const ENOMEM: i32 = 12;

fn routes_to(number: u8) -> impl Fn(&Op) -> bool {
    move |op| matches!(op, Op::CreateRoute { prefix, .. } | Op::ReplaceRoute { prefix, .. } if *prefix == subnet(number))
}

#[tokio::test(start_paused = true)]
async fn a_value_of_one_peer_that_the_kernel_rejects_is_that_peers_trouble() {
    let node = Node::alone();
    node.join([1, 2]);
    let refused = routes_to(1);
    node.kernel.refuse_if(move |op| refused(op).then_some(EINVAL));
    let mut agent = node.run();
    let status = agent.ready().await;
    assert_eq!((status.failed_writes, &status.last_error), (0, &None));
    let refusal = &status.refused[&Object::Route(subnet(1))];
    assert_eq!((status.refused.len(), &refusal.peer), (1, &Some(peer(1).key)));
    assert!(refusal.error.contains("10.42.1.0/24") && refusal.error.contains("Invalid argument"), "{refusal:?}");
    assert!(node.has_route(subnet(2)) && !node.has_route(subnet(1)));
    pass(600.0).await;
    let status = agent.status();
    assert_eq!(status.phase, Phase::Ready);
    // One each half a minute happens anyway; ten minutes of the ordinary back-off would be 130.
    assert!(status.audits < 50, "{}", status.audits);
    let told = agent.drain().iter().filter(|event| matches!(event, Event::Refused(..))).count();
    assert_eq!(told, 1);
    // Others come and go meanwhile.
    node.join([3]);
    node.leave([2]);
    pass(1.0).await;
    assert!(node.has_route(subnet(3)) && !node.has_route(subnet(2)));
    // A record that says something else is written at once.
    node.kernel.obey();
    let mut moved = peer(1);
    moved.attrs.public_ip.v4 = Some(public(Family::V4, 77));
    node.store.insert([moved]);
    node.kernel.overrun_monitor();
    pass(1.0).await;
    assert!(node.has_route(subnet(1)));
    assert!(agent.status().refused.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_the_kernel_has_no_memory_for_degrades_a_node_that_reaches_others() {
    let node = Node::alone();
    node.join([1, 2]);
    let refused = routes_to(1);
    node.kernel.refuse_if(move |op| refused(op).then_some(ENOMEM));
    let agent = node.run();
    let status = agent.until(|status| status.failed_writes > 0).await;
    assert_eq!((status.phase, status.failed_writes), (Phase::Ready, 1));
    let degraded = status.degraded().unwrap();
    assert_eq!((status.is_ready(), degraded.failed_writes, degraded.refused), (true, 1, 1));
    assert_eq!(degraded.to_string(), "1 write refused, 1 failed write");
    assert!(status.refused.contains_key(&Object::Route(subnet(1))) && status.last_error.is_some(), "{status:?}");
    node.kernel.obey();
    pass(5.0).await;
    assert_eq!(
        (agent.status().phase, agent.status().failed_writes, agent.status().refused.len()),
        (Phase::Ready, 0, 0)
    );
    assert_eq!(agent.status().degraded(), None);
}

#[tokio::test(start_paused = true)]
async fn where_no_peers_route_is_taken_the_node_is_not_ready() {
    for count in [1, 2, 40] {
        let node = Node::alone();
        node.join(1..=count);
        node.kernel.refuse_if(|op| matches!(op, Op::CreateRoute { .. }).then_some(EINVAL));
        let agent = node.run();
        let status = agent.until(|status| status.audits >= 3).await;
        assert_eq!((status.phase, status.failed_writes), (Phase::DeviceReady, usize::from(count)), "{status:?}");
        let waits = status.waits_for();
        assert!(!status.is_ready(), "{status:?}");
        assert!(
            matches!(&waits[..], [Wait::Writes { failed_writes, error: Some(_) }] if *failed_writes == status.failed_writes),
            "{waits:?}"
        );
        assert!(status.last_error.is_some() && status.refused.len() == usize::from(count));
        node.kernel.obey();
        pass(5.0).await;
        assert_eq!((agent.status().phase, agent.status().failed_writes), (Phase::Ready, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn each_family_is_judged_by_itself() {
    let clock = Arc::new(TokioClock::new());
    let node = Node::new(200, &MemorySubnets::with_ttl(dual_config(), None, Arc::clone(&clock) as _), &clock);
    node.store.insert([1, 2].map(dual_peer));
    let is_v6 = |prefix: &Prefix| prefix.family() == Family::V6;
    node.kernel.refuse_if(move |op| matches!(op, Op::CreateRoute { prefix, .. } if is_v6(prefix)).then_some(EINVAL));
    let agent = node.run();
    let status = agent.until(|status| status.audits >= 3).await;
    assert_eq!((status.phase, status.failed_writes), (Phase::DeviceReady, 2), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_device_that_lacks_its_address_keeps_the_node_from_being_ready() {
    let node = Node::alone();
    node.join([1, 2]);
    node.kernel.refuse_if(|op| matches!(op, Op::AddAddress(_)).then_some(ENOMEM));
    let agent = node.run();
    let status = agent.until(|status| status.audits >= 2).await;
    assert_eq!((status.phase, status.failed_writes, status.is_ready()), (Phase::DeviceReady, 1, false), "{status:?}");
    assert!(node.has_route(subnet(1)));
    node.kernel.obey();
    agent.until(Status::is_ready).await;
}
