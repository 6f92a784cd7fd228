//! An overlay that is run more than once, and how each of its runs ends.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::backend::Backend;
use flannel_core::clock::TokioClock;
use flannel_core::kernel::{
    ApplyReport, Claim, Device, Hint, HostFacts, Kernel, KernelError, Op, OverlayName, Residence, Scope, State,
};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::{
    End, Ended, Event, Events, HandleError, LossPolicy, Overlay, OverlayError, Phase, Teardown, Wait,
};
use flannel_core::subnet::{SubnetError, ThisNode};
use flannel_core::testing::{Call, FakeKernel, MemorySubnets, StoreDouble};
use futures_util::FutureExt;
use futures_util::future::poll_fn;
use futures_util::stream::BoxStream;

use crate::altered::Altered;
use crate::node::{Node, config, eventually, pass, public, subnet};
use crate::storms::Away;
use crate::tunnel::Tunnel;

fn drain(events: &mut Events) -> Vec<Event> {
    std::iter::from_fn(|| events.next().now_or_never().flatten()).collect()
}

fn fragile() -> impl Backend + Copy {
    Altered {
        peer: |tunnel: &Tunnel, local, peer, family| {
            assert!(peer.subnets.v4 != Some(subnet(66)), "a bug");
            tunnel.peer(local, peer, family)
        },
        ..Altered::of(Tunnel)
    }
}

#[tokio::test(start_paused = true)]
async fn an_overlay_is_run_again_with_the_same_handle_and_subscription() {
    let node = Node::alone();
    let before = node.kernel.snapshot();
    node.join([1, 2]);
    let overlay = node.overlay();
    let (mut handle, mut events) = (overlay.handle(), overlay.handle().events());
    assert_eq!(handle.status().waits_for(), [Wait::Run]);

    let running = overlay.spawn().unwrap();
    let first = running.ready().await.unwrap();
    assert_eq!((first.peers.accepted, first.waits_for()), (2, vec![]));
    pass(1.0).await;
    running.shutdown(Teardown::Keep).await.unwrap();
    let (kept, writes) = (node.kernel.snapshot(), node.kernel.writes());
    let ended = Ended(End::Stopped);
    let status = handle.status();
    assert_eq!((status.phase, &status.ended, status.is_ready()), (Phase::Stopped, &Some(End::Stopped), false));
    assert_eq!((status.waits_for(), &status.lease), (vec![Wait::Run], &first.lease));
    // Nobody hangs between the runs.
    assert_eq!(handle.reached(Phase::Ready).await, Err(ended.clone()));
    assert_eq!(handle.reached(Phase::Stopped).await, Ok(Arc::clone(&status)));
    assert_eq!(handle.changed().await, Ok(status), "its last change");
    assert_eq!(handle.changed().await, Err(ended.clone()));

    let running = overlay.spawn().unwrap();
    let fresh = handle.changed().await.unwrap();
    assert_eq!((fresh.phase, &fresh.ended, fresh.audits, &fresh.lease), (Phase::Starting, &None, 0, &None));
    let second = handle.reached(Phase::Ready).await.unwrap();
    assert_eq!((&second.lease, node.kernel.writes()), (&first.lease, writes));
    assert_eq!(node.kernel.snapshot(), kept);
    assert!(running.handle().plan().await.unwrap().plan.is_empty());
    running.shutdown(Teardown::Remove).await.unwrap();
    assert_eq!((node.kernel.snapshot(), node.record()), (before, None));

    let told = drain(&mut events);
    let marks: Vec<_> = told
        .iter()
        .filter(|event| matches!(event, Event::LeaseAcquired(_) | Event::Ready | Event::Stopped(_)))
        .map(Event::kind)
        .collect();
    assert_eq!(marks, ["lease_acquired", "ready", "stopped", "lease_acquired", "ready", "stopped"]);
    drop(overlay);
    assert_eq!(events.next().await, None, "there is no overlay to be run");
    assert_eq!(handle.clone().wait_for(|_| false).await, Err(ended));
}

#[tokio::test(start_paused = true)]
async fn a_second_run_at_once_is_refused_and_touches_nothing() {
    let node = Node::alone();
    let overlay = node.overlay();
    let running = overlay.spawn().unwrap();
    let mut events = overlay.handle().events();
    running.ready().await.unwrap();
    pass(1.0).await;
    drain(&mut events);
    let (status, writes) = (overlay.handle().status(), node.kernel.writes());
    for _ in 0..2 {
        let outcome = overlay.clone().spawn().map(drop);
        assert!(matches!(outcome, Err(OverlayError::AlreadyRunning)), "{outcome:?}");
        let outcome = overlay.run(async { Teardown::Remove }).await;
        assert!(matches!(outcome, Err(OverlayError::AlreadyRunning)), "{outcome:?}");
    }
    assert_eq!((overlay.handle().status(), node.kernel.writes()), (status, writes));
    assert_eq!(drain(&mut events), []);
    running.shutdown(Teardown::Keep).await.unwrap();
    overlay.run(async { Teardown::Keep }).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_not_polled_has_not_begun() {
    let node = Node::alone();
    let overlay = node.overlay();
    drop(overlay.run(std::future::pending()));
    assert_eq!(overlay.handle().status().ended, None);
    let waiting = overlay.run(async { Teardown::Keep });
    overlay.spawn().unwrap().shutdown(Teardown::Keep).await.unwrap();
    waiting.await.unwrap();
}

/// Store or kernel of which each call can be cut off before and after it does its work.
struct Halting<T>(T);

async fn between<A>(work: impl Future<Output = A>) -> A {
    tokio::task::yield_now().await;
    let answer = work.await;
    tokio::task::yield_now().await;
    answer
}

impl StoreDouble for Halting<MemorySubnets> {
    type Store = MemorySubnets;

    fn store(&self) -> &MemorySubnets {
        &self.0
    }

    async fn call<A: Send>(
        &self,
        _: Call<'_>,
        answer: impl Future<Output = Result<A, SubnetError>> + Send,
    ) -> Result<A, SubnetError> {
        between(answer).await
    }
}

#[async_trait]
impl Kernel for Halting<FakeKernel> {
    async fn claim(
        &self,
        overlay: &OverlayName,
        networks: &Dual<Prefix>,
        residence: Residence,
    ) -> Result<Claim, KernelError> {
        between(self.0.claim(overlay, networks, residence)).await
    }

    async fn probe(&self, devices: &[Device]) -> Result<(), KernelError> {
        between(self.0.probe(devices)).await
    }

    async fn host_facts(&self, reach: &[IpAddr]) -> Result<HostFacts, KernelError> {
        between(self.0.host_facts(reach)).await
    }

    async fn observe(&self, scope: &Scope) -> Result<State, KernelError> {
        between(self.0.observe(scope)).await
    }

    async fn apply(&self, scope: &Scope, ops: Arc<Vec<Op>>) -> ApplyReport {
        // What is written may be cut off anywhere.
        let mut report = ApplyReport::default();
        for (place, op) in ops.iter().enumerate() {
            let one = between(self.0.apply(scope, Arc::new(vec![op.clone()]))).await;
            report.applied += one.applied;
            report.refused.extend(one.refused.into_iter().map(|(_, error)| (place, error)));
        }
        report
    }

    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint> {
        self.0.hints(scope)
    }
}

#[tokio::test(start_paused = true)]
async fn dropped_at_each_await_the_next_run_takes_over_at_once() {
    for teardown in [Teardown::Keep, Teardown::Remove] {
        let mut enough = 0;
        loop {
            let node = Node::alone();
            let before = node.kernel.snapshot();
            node.join(1..=5);
            let (store, kernel) = (Halting(node.store.clone()), Halting(node.kernel.clone()));
            let overlay = node.builder().build(Arc::new(store), Arc::new(kernel)).unwrap();
            let handle = overlay.handle();
            let ended = {
                let mut life = pin!(overlay.run(async {
                    handle.reached(Phase::Ready).await.unwrap();
                    teardown
                }));
                let mut polls = 0;
                poll_fn(|context| {
                    if polls == enough {
                        return Poll::Ready(None);
                    }
                    polls += 1;
                    life.as_mut().poll(context).map(Some)
                })
                .await
            };
            let expected = match ended {
                _ if enough == 0 => None,
                None => Some(End::Dropped),
                Some(_) => Some(End::Stopped),
            };
            assert_eq!(handle.status().ended, expected, "{enough}");
            let running = overlay.spawn().unwrap();
            running.ready().await.unwrap();
            assert!((1..=5).all(|n| node.has_route(subnet(n))), "{enough}");
            pass(1.0).await;
            assert!(handle.plan().await.unwrap().plan.is_empty(), "{enough}");
            running.shutdown(Teardown::Remove).await.unwrap();
            assert_eq!((node.kernel.snapshot(), node.record()), (before, None), "{enough}");
            if ended.is_some() {
                break;
            }
            enough += 1;
        }
        assert!(enough > 30, "{teardown:?} has {enough} awaits");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_that_is_dropped_leaves_its_turn_to_the_next_at_once() {
    let node = Node::alone();
    node.join(1..=20);
    let overlay = node.overlay();
    let handle = overlay.handle();
    for round in 0..100 {
        let running = overlay.spawn().unwrap();
        if round % 3 == 0 {
            running.ready().await.unwrap();
        }
        drop(running);
        assert_eq!(handle.status().ended, Some(End::Dropped));
    }
    assert!(handle.wait_for(|_| false).await.is_err());
    let running = overlay.spawn().unwrap();
    running.ready().await.unwrap();
    assert!((1..=20).all(|n| node.has_route(subnet(n))));
    running.shutdown(Teardown::Keep).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_an_end_and_an_error_and_the_next_run_takes_over() {
    let node = Node::alone();
    node.join([1]);
    let store = Arc::new(node.store.clone());
    let overlay = node.builder_with(fragile()).build(store, Arc::new(node.kernel.clone())).unwrap();
    let mut running = overlay.spawn().unwrap();
    running.ready().await.unwrap();
    let writes = node.kernel.writes();
    node.join([66]);
    let outcome = running.wait().await;
    assert!(matches!(&outcome, Err(OverlayError::Panicked { message }) if message == "a bug"), "{outcome:?}");
    let panicked = End::Panicked("a bug".to_owned());
    assert_eq!((overlay.handle().status().ended.clone(), node.kernel.writes()), (Some(panicked.clone()), writes));
    assert_eq!(running.ready().await, Err(Ended(panicked)));
    running.wait().await.unwrap();
    running.shutdown(Teardown::Keep).await.unwrap();
    // It panics for as long as its cause is there.
    let running = overlay.spawn().unwrap();
    let outcome = running.ready().await;
    assert!(matches!(&outcome, Err(Ended(End::Panicked(_)))), "{outcome:?}");
    let outcome = running.shutdown(Teardown::Remove).await;
    assert!(matches!(outcome, Err(OverlayError::Panicked { .. })), "{outcome:?}");
    assert!(node.has_route(subnet(1)) && node.record().is_some(), "the data plane stays");
    node.leave([66]);
    let running = overlay.spawn().unwrap();
    running.ready().await.unwrap();
    assert_eq!(node.kernel.writes(), writes);
    running.shutdown(Teardown::Keep).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ends_by_itself_keeps_everything_and_says_why() {
    let node = Node::alone().known_by_address();
    let before = node.kernel.snapshot();
    node.join([1]);
    let store = Arc::new(node.store.clone());
    let overlay = node.builder().on_loss(LossPolicy::Stop).build(store, Arc::new(node.kernel.clone())).unwrap();
    let mut running = overlay.spawn().unwrap();
    running.ready().await.unwrap();
    pass(1.0).await;
    let kept = node.kernel.snapshot();
    assert!(node.store.delete(&node.key()));
    let outcome = running.wait().await;
    assert!(matches!(outcome, Err(OverlayError::LeaseLost)), "{outcome:?}");
    let status = overlay.handle().status();
    assert_eq!((status.phase, &status.ended), (Phase::Stopped, &Some(End::Failed("the lease was lost".to_owned()))));
    running.shutdown(Teardown::Remove).await.unwrap();
    assert_eq!(node.kernel.snapshot(), kept, "nobody had decided that while it ran");
    overlay.remove().await.unwrap();
    assert_eq!(node.kernel.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_fatal_end_shows_its_reason_and_the_next_run_starts_afresh() {
    let node = Node::alone();
    let overlay = node.overlay();
    node.kernel.fail_next_probe(KernelError::Unsupported { what: "vxlan".to_owned(), hint: "load it".to_owned() });
    let mut running = overlay.spawn().unwrap();
    let Err(Ended(End::Failed(text))) = running.ready().await else { panic!("it is ready") };
    assert!(text.contains("vxlan") && text.contains("using the kernel"), "{text}");
    let Err(OverlayError::Kernel(KernelError::Unsupported { .. })) = running.wait().await else { panic!("no error") };
    let handle = overlay.handle();
    let status = handle.status();
    assert_eq!((status.phase, status.is_ready(), status.waits_for()), (Phase::Stopped, false, vec![Wait::Run]));
    assert_eq!(status.ended, Some(End::Failed(text)));
    let Err(HandleError::Ended(Ended(End::Failed(_)))) = handle.plan().await else { panic!("an answer") };
    let running = overlay.spawn().unwrap();
    assert_eq!((handle.status().phase, &handle.status().ended), (Phase::Starting, &None));
    running.ready().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_aborted_run_shows_as_ended() {
    let (_node, agent) = Node::ready_beside([1]).await;
    let handle = agent.handle.clone();
    let waiting = tokio::spawn(async move { handle.wait_for(|status| status.peers.accepted == 9).await });
    assert!(agent.killed().await);
    let status = agent.status();
    assert_eq!((status.phase, status.ended), (Phase::Stopped, Some(End::Dropped)));
    assert_eq!(waiting.await.unwrap(), Err(Ended(End::Dropped)));
}

#[tokio::test(start_paused = true)]
async fn questions_are_answered_in_each_run_and_refused_with_the_reason_around_them() {
    let node = Node::alone();
    node.join([1]);
    let store = Away::new(&node.store);
    let overlay = node.builder().build(Arc::new(store.clone()), Arc::new(node.kernel.clone())).unwrap();
    let handle = overlay.handle();
    let starting = async || match handle.peers().await {
        Err(HandleError::Starting { waits_for }) => waits_for,
        other => panic!("{other:?}"),
    };
    assert_eq!(starting().await, [Wait::Run]);
    for _ in 0..2 {
        store.mute();
        let running = overlay.spawn().unwrap();
        pass(10.0).await;
        assert!(matches!(&starting().await[..], [Wait::Store { error: Some(_) }]), "{:?}", starting().await);
        let text = handle.plan().await.unwrap_err().to_string();
        assert!(text.contains("waits for the lease store (") && text.contains("away"), "{text}");
        store.speak();
        running.ready().await.unwrap();
        assert_eq!(handle.peers().await.unwrap().len(), 1);
        running.shutdown(Teardown::Keep).await.unwrap();
        let Err(HandleError::Ended(Ended(End::Stopped))) = handle.explain("peer-1").await else { panic!("an answer") };
    }
    drop(overlay);
    assert!(matches!(handle.peers().await, Err(HandleError::Ended(_))));
}

#[tokio::test(start_paused = true)]
async fn who_asks_while_it_ends_is_told_before_the_end_is_over() {
    let node = Node::alone();
    let store = Away::new(&node.store);
    let overlay = node.builder().build(Arc::new(store.clone()), Arc::new(node.kernel.clone())).unwrap();
    let running = overlay.spawn().unwrap();
    running.ready().await.unwrap();
    node.kernel.stall();
    let handle = overlay.handle();
    let asked = tokio::spawn({
        let handle = handle.clone();
        async move { handle.plan().await.map(drop) }
    });
    pass(0.1).await;
    let ending = tokio::spawn(running.shutdown(Teardown::Remove));
    pass(0.1).await;
    assert!(matches!(handle.peers().await, Err(HandleError::Ended(_))));
    pass(2.0).await;
    assert!(matches!(asked.now_or_never().unwrap().unwrap(), Err(HandleError::Ended(_))));
    assert!(!ending.is_finished());
    node.kernel.resume();
    ending.await.unwrap().unwrap();
}

#[test]
fn without_a_runtime_or_after_it_a_run_is_an_error() {
    let node = Node::alone();
    let overlay = node.overlay();
    assert!(matches!(overlay.spawn().map(drop), Err(OverlayError::NoRuntime)));
    assert_eq!(overlay.handle().status().ended, None);
    let one = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let running = one.block_on(async {
        let running = overlay.spawn().unwrap();
        running.ready().await.unwrap();
        running
    });
    drop(one);
    assert_eq!(overlay.handle().status().ended, Some(End::Dropped));
    let other = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let outcome = other.block_on(running.shutdown(Teardown::Keep));
    assert!(matches!(outcome, Err(OverlayError::NoRuntime)), "{outcome:?}");
    other.block_on(async { overlay.spawn().unwrap().ready().await.map(drop) }).unwrap();
}

#[tokio::test(start_paused = true)]
async fn ten_overlays_run_side_by_side_and_each_has_its_own_end() {
    let clock = Arc::new(TokioClock::new());
    let store = MemorySubnets::with_ttl(config(), None, Arc::clone(&clock) as _);
    let nodes: Vec<Node> = (200..210).map(|n| Node::new(n, &store, &clock)).collect();
    let overlays: Vec<Overlay> = nodes.iter().map(Node::overlay).collect();
    let mut running: Vec<_> = overlays.iter().map(|overlay| overlay.spawn().unwrap()).collect();
    let all = |status: &flannel_core::overlay::Status| status.is_ready() && status.peers.accepted == 9;
    for running in &running {
        running.handle().wait_for(all).await.unwrap();
    }
    for (nth, running) in running.drain(..).enumerate() {
        match nth % 3 {
            0 => running.shutdown(Teardown::Remove).await.unwrap(),
            1 => running.shutdown(Teardown::Keep).await.unwrap(),
            _ => drop(running),
        }
    }
    for (nth, overlay) in overlays.iter().enumerate() {
        let end = if nth % 3 == 2 { End::Dropped } else { End::Stopped };
        assert_eq!(overlay.handle().status().ended, Some(end), "{nth}");
        assert_eq!(nodes[nth].record().is_some(), nth % 3 != 0, "{nth}");
    }
    let running: Vec<_> = overlays.iter().map(|overlay| overlay.spawn().unwrap()).collect();
    for running in &running {
        running.handle().wait_for(all).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_known_by_its_address_finds_its_lease_in_the_next_run() {
    let node = Node::alone().known_by_address();
    let store = Arc::new(node.store.for_node(ThisNode::by_address()));
    let overlay = node.builder().build(store, Arc::new(node.kernel.clone())).unwrap();
    let running = overlay.spawn().unwrap();
    let first = running.ready().await.unwrap().lease.clone();
    running.shutdown(Teardown::Keep).await.unwrap();
    let running = overlay.spawn().unwrap();
    assert_eq!(running.ready().await.unwrap().lease, first);
    let published = node.record().unwrap().attrs.public_ip.v4;
    assert_eq!(published, Some(public(Family::V4, 200)));
    eventually("it is at rest", || overlay.handle().status().audits >= 1).await;
    tokio::time::timeout(Duration::from_secs(2), running.shutdown(Teardown::Keep)).await.unwrap().unwrap();
}
