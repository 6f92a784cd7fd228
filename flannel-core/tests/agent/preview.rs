//! What a plan and a preview say, and when they cannot say it.

use std::time::Duration;

use flannel_core::kernel::Op;
use flannel_core::net::Family;
use flannel_core::overlay::{HandleError, HeldBecause, OverlayError, Phase, WithheldBecause};
use futures_util::StreamExt;
use tokio::time::Instant;

use crate::node::{Node, pass};
use crate::tunnel::mac_of;
use crate::watch::Watched;

#[tokio::test(start_paused = true)]
async fn plan_and_peers_are_not_given_before_the_store_has_said_what_is_everything() {
    let node = Node::alone();
    node.join([1, 2]);
    let before = node.run_ready().await;
    before.cancelled().await.unwrap();
    let agent = node.run_over(&Watched::new(&node.store, |_| futures_util::stream::pending().boxed()));
    agent.reached(Phase::LeaseHeld).await;
    let error = agent.handle.plan().await.unwrap_err();
    assert!(matches!(error, HandleError::NotSynced), "{error}");
    let error = agent.handle.peers().await.unwrap_err();
    assert!(matches!(error, HandleError::NotSynced), "nobody may take it for a network without peers: {error}");
}

#[tokio::test(start_paused = true)]
async fn a_preview_holds_back_what_the_start_would() {
    let (node, agent) = Node::ready_beside(1..=20).await;
    agent.cancelled().await.unwrap();
    assert!(node.overlay().preview().await.unwrap().unwrap().is_settled());
    node.leave(1..=20);
    let preview = node.overlay().preview().await.unwrap().unwrap();
    assert!(!preview.plan.ops.iter().any(Op::is_delete), "{preview}");
    let withheld = |held: &&flannel_core::overlay::Held| {
        matches!(held.because, HeldBecause::Withheld(WithheldBecause::MassRemoval(_)))
            && matches!(held.op, Op::DeleteRoute { .. })
    };
    assert_eq!(preview.held.iter().filter(withheld).count(), 20, "{preview}");
    assert!(!preview.is_settled() && preview.to_string().contains("deferred: "), "{preview}");
}

#[tokio::test(start_paused = true)]
async fn a_preview_without_a_store_says_so_in_bounded_time() {
    let node = Node::alone();
    node.run().ready().await;
    node.store.outage();
    let begun = Instant::now();
    let answer = tokio::time::timeout(Duration::from_secs(60), node.overlay().preview()).await.expect("it never ends");
    let Err(error @ OverlayError::Unanswered { .. }) = answer else { panic!("{answer:?}") };
    assert!(begun.elapsed() <= Duration::from_secs(11), "{:?}", begun.elapsed());
    let text = error.to_string();
    assert!(text.contains("unavailable") && text.contains("retry"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_plan_shows_what_waits_because_somebody_keeps_changing_it() {
    let (node, agent) = Node::ready_beside([1]).await;
    pass(1.0).await;
    let mac = mac_of("peer-1", Family::V4);
    let deadline = Instant::now() + Duration::from_secs(120);
    let preview = loop {
        assert!(Instant::now() < deadline, "never held");
        // It may not be back yet.
        let _ = node.kernel.delete_fdb("tun4.1", mac, "192.0.2.1".parse().unwrap());
        if !agent.status().flapping.is_empty() {
            let preview = agent.handle.plan().await.unwrap();
            if !preview.held.is_empty() {
                break preview;
            }
        }
        pass(0.05).await;
    };
    let flapping = |held: &flannel_core::overlay::Held| matches!(held.because, HeldBecause::Flapping(_));
    assert!(preview.held.iter().any(flapping) && preview.plan.is_empty(), "{preview}");
    assert!(preview.to_string().contains("another program"), "{preview}");
}
