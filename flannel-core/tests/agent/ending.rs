//! How an agent ends, and what it leaves.

use flannel_core::kernel::{
    ApplyReport, Claim, Device, Hint, HostFacts, Kernel, KernelError, MockKernel, Op, OverlayName, Residence, Scope,
    State,
};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::backend::Backend;
use flannel_core::lease::{Json, Record};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::{End, Ended, Event, HandleError, OverlayError, Phase, Teardown};
use flannel_core::subnet::SubnetError;
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};
use flannel_core::testing::memory_subnets::Fault;
use flannel_core::testing::{Call, FakeKernel, MemorySubnets, StoreDouble};
use futures_util::FutureExt;
use futures_util::stream::BoxStream;
use tokio::time::Instant;

use crate::altered::Altered;
use crate::env_file::env_file;
use crate::node::{Agent, Node, eventually, pass, public, subnet};
use crate::start::passing;
use crate::storms::Away;
use crate::tunnel::Tunnel;

/// A store that takes its time to find a lease.
struct SlowToFind(MemorySubnets);

impl StoreDouble for SlowToFind {
    type Store = MemorySubnets;

    fn store(&self) -> &MemorySubnets {
        &self.0
    }

    async fn call<A: Send>(
        &self,
        call: Call<'_>,
        answer: impl Future<Output = Result<A, SubnetError>> + Send,
    ) -> Result<A, SubnetError> {
        if matches!(call, Call::Previous(_)) {
            pass(2.5).await;
        }
        answer.await
    }
}

#[tokio::test(start_paused = true)]
async fn a_preview_of_a_removal_keeps_no_agent_from_starting() {
    let node = Node::alone();
    let slow = SlowToFind(node.store.clone());
    let overlay = node.builder().build(Arc::new(slow), Arc::new(node.kernel.clone())).unwrap();
    let started = async {
        pass(0.5).await;
        node.run_ready().await
    };
    let (previewed, agent) = tokio::join!(overlay.preview_removal(), started);
    assert!(previewed.is_ok(), "{previewed:?}");
    assert!(agent.status().is_ready());
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_the_store_is_away_it_ends_at_once() {
    let node = Node::alone();
    node.store.fail_next(std::iter::repeat_n(Fault::Unavailable, 1000));
    let agent = node.run();
    pass(100.0).await;
    let begun = Instant::now();
    agent.cancelled().await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(10));
    assert_eq!((node.kernel.writes(), node.store.records().len()), (0, 0));
}

/// A node whose kernel does not answer while a peer's objects are written.
async fn amid_a_round() -> (Node, Agent) {
    let (node, agent) = Node::ready_beside([]).await;
    pass(1.0).await;
    node.kernel.stall();
    node.join([1]);
    pass(1.0).await;
    (node, agent)
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_the_kernel_does_not_answer_it_ends_within_two_seconds() {
    let (node, agent) = amid_a_round().await;
    let begun = Instant::now();
    agent.cancelled().await.unwrap();
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(1) && took <= Duration::from_secs(2), "{took:?}");
    assert!(!node.has_route(subnet(1)));
}

#[tokio::test(start_paused = true)]
async fn a_round_under_way_may_finish_within_the_grace() {
    let (node, agent) = amid_a_round().await;
    let kernel = node.kernel.clone();
    let slow = tokio::spawn(async move {
        pass(1.0).await;
        kernel.resume();
    });
    agent.cancelled().await.unwrap();
    slow.await.unwrap();
    assert!(node.has_route(subnet(1)));
}

#[tokio::test(start_paused = true)]
async fn keep_leaves_everything_and_the_next_run_writes_nothing() {
    let node = Node::alone();
    node.join(1..=20);
    let agent = node.run();
    let lease = agent.ready().await.lease;
    pass(1.0).await;
    let (before, writes) = (node.kernel.snapshot(), node.kernel.writes());
    let handle = agent.handle.clone();
    agent.cancelled().await.unwrap();
    assert_eq!((handle.status().phase, &handle.status().ended), (Phase::Stopped, &Some(End::Stopped)));
    assert_eq!((node.kernel.snapshot(), node.record().as_ref()), (before.clone(), lease.as_deref()));
    let agent = node.run_ready().await;
    agent.audited().await;
    assert_eq!((node.kernel.snapshot(), node.kernel.writes()), (before, writes));
}

#[tokio::test(start_paused = true)]
async fn remove_leaves_nothing_and_gives_the_lease_back() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let before = node.kernel.snapshot();
    node.join(1..=20);
    let file = env_file(&dir);
    let agent = node.run_as(node.builder().subnet_env(file.clone())).once_ready().await;
    eventually("subnet.env is there", || file.path.exists()).await;
    // The first look of the end fails, and one write is refused: both are tried again.
    pass(1.0).await;
    let lost = KernelError::Lost { doing: "looking".to_owned(), reason: "overrun".to_owned() };
    node.kernel.fail_next_observe(lost);
    node.kernel.refuse_nth(3, 16);
    let handle = agent.handle.clone();
    agent.removed().await.unwrap();
    assert_eq!(node.kernel.snapshot(), before);
    assert_eq!((node.record(), &handle.status().lease), (None, &None));
    assert!(!file.path.exists());
}

#[tokio::test(start_paused = true)]
async fn dropped_amid_its_writes_it_leaves_what_a_new_run_finishes() {
    for enough in [0, 1, 2, 3] {
        let node = Node::alone();
        node.join(1..=180);
        let agent = node.run();
        let mut steps = 0;
        while node.kernel.writes() <= enough * 128 {
            tokio::task::yield_now().await;
            steps += 1;
            assert!(steps < 100_000, "no writes");
        }
        agent.killed().await;
        assert!(node.kernel.writes() < 540, "it was done already");
        let agent = node.run_ready().await;
        pass(1.0).await;
        assert!(agent.handle.plan().await.unwrap().plan.is_empty());
        assert!((1..=180).all(|n| node.has_route(subnet(n))));
    }
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_at_once_wait_their_turn_and_are_all_answered() {
    let (_node, agent) = Node::ready_beside([1, 2]).await;
    // Polled once, before the agent is: the first have a place in its queue, the others wait for one.
    let mut asked: Vec<_> = (0..200).map(|_| Box::pin(agent.handle.plan())).collect();
    assert!(asked.iter_mut().all(|asked| asked.now_or_never().is_none()));
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap().plan.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn questions_are_answered_while_it_runs_and_refused_afterwards() {
    let (node, agent) = Node::ready_beside([1, 2]).await;
    let handle = agent.handle.clone();
    let (one, two) = tokio::join!(handle.plan(), handle.plan());
    assert!(one.unwrap().plan.is_empty() && two.unwrap().plan.is_empty());
    node.kernel.refuse_if(|_| Some(12));
    node.kernel.flush_fdb("tun4.1").unwrap();
    assert_eq!(handle.plan().await.unwrap().plan.ops.len(), 4, "each entry, and its neighbour with it");
    let explained = handle.explain("10.42.1.7").await.unwrap().remove(0);
    assert_eq!(explained.key.as_str(), "peer-1");
    assert!(handle.explain("10.42.9.9").await.unwrap().is_empty());
    assert_eq!(handle.peers().await.unwrap().len(), 2);
    agent.cancelled().await.unwrap();
    assert!(matches!(handle.plan().await, Err(HandleError::Ended(_))));
    assert!(matches!(handle.explain("peer-1").await, Err(HandleError::Ended(_))));
    assert!(matches!(handle.peers().await, Err(HandleError::Ended(_))));
}

fn removing(node: &Node, store: &Away) -> Agent {
    node.run_over(store)
}

#[tokio::test(start_paused = true)]
async fn remove_gives_back_what_a_call_under_way_takes() {
    let node = Node::alone().known_by_address();
    let store = Away::new(&node.store);
    let mut agent = removing(&node, &store);
    agent.ready().await;
    store.delay(Duration::from_secs(1));
    node.store.delete(&node.key());
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    eventually("it is taken again, but not answered", || node.record().is_some()).await;
    agent.removed().await.unwrap();
    assert_eq!(node.record(), None);
}

#[tokio::test(start_paused = true)]
async fn remove_gives_the_lease_back_that_the_store_knows_by_a_former_address() {
    let node = Node::alone().known_by_address();
    let store = Away::new(&node.store);
    let agent = removing(&node, &store);
    agent.ready().await;
    node.kernel.add_address("eth0", "192.0.2.77/24".parse().unwrap()).unwrap();
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    store.delay(Duration::from_secs(3600));
    let is_moved = |record: &Record| record.lease.as_ref().unwrap().attrs.public_ip.v4 == Some(public(Family::V4, 77));
    eventually("it is published, but not answered", || node.store.records().iter().all(is_moved)).await;
    store.delay(Duration::ZERO);
    agent.removed().await.unwrap();
    assert_eq!(node.store.records(), []);
}

#[tokio::test(start_paused = true)]
async fn remove_ends_in_time_without_a_word_from_the_store() {
    let node = Node::alone();
    let store = Away::new(&node.store);
    let agent = removing(&node, &store);
    agent.ready().await;
    store.delay(Duration::from_secs(3600));
    let mut edited = node.record().unwrap();
    edited.attrs.backend_type = "other".into();
    node.store.insert([edited]);
    pass(1.0).await;
    let (kernel, begun) = (node.kernel.clone(), Instant::now());
    let outcome = agent.removed().await;
    assert!(matches!(outcome, Err(OverlayError::Release(_))), "{outcome:?}");
    assert!(begun.elapsed() <= Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(kernel.snapshot().matching("tun4.1").is_empty());
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_it_takes_its_lease_it_gives_it_back() {
    for delay in [1, 3600] {
        let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
        // A run before this one has left something.
        node.join([1]);
        let file = env_file(&dir);
        let before = node.kernel.snapshot();
        let agent = node.run_as(node.builder().subnet_env(file.clone())).once_ready().await;
        eventually("subnet.env is there", || file.path.exists()).await;
        agent.cancelled().await.unwrap();
        let store = Away::new(&node.store);
        store.delay(Duration::from_secs(delay));
        let builder = node.builder().subnet_env(file.clone());
        let agent = node.run_as_over(builder, &store);
        pass(0.5).await;
        agent.stop(Teardown::Remove);
        pass(1.0).await;
        store.delay(Duration::ZERO);
        agent.ended().await.unwrap();
        assert_eq!((node.record(), node.kernel.snapshot(), file.path.exists()), (None, before, false), "{delay}");
    }
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_it_waits_for_its_lease_it_gives_back_that_of_the_last_run() {
    let node = Node::alone();
    let agent = node.run_ready().await;
    agent.cancelled().await.unwrap();
    // The configuration has changed since, and with it what is published.
    let mut last = node.record().unwrap();
    last.attrs.backend_data.v4 = Some(Json::parse("7").unwrap());
    node.store.insert([last]);
    let store = Away::new(&node.store);
    store.fail_acquires(std::iter::repeat_n(Fault::Unavailable, 100));
    let agent = removing(&node, &store);
    pass(0.5).await;
    agent.removed().await.unwrap();
    assert_eq!(node.record(), None);
}

/// Another program adds a route each time the removal has deleted it.
#[tokio::test(start_paused = true)]
async fn a_removal_looks_once_more_after_its_last_round_and_names_what_is_left() {
    const ROUNDS: u32 = 5;
    for added in [ROUNDS - 1, ROUNDS] {
        let node = Node::alone();
        let (fake, uplink) = (node.kernel.clone(), node.kernel.link_index("eth0").unwrap());
        let add = move |nth: u32| {
            let route = FakeRoute::via(subnet(7), public(Family::V4, 7), uplink);
            if nth <= added {
                fake.add_route(FakeRoute { protocol: 205, ..route }, Placement::Exclusive).unwrap();
            }
        };
        add(0);
        let (fake, rounds) = (node.kernel.clone(), AtomicU32::new(0));
        let mut mock = MockKernel::new();
        mock.expect_apply().returning(move |scope: &Scope, ops| {
            let report = fake.apply(scope, ops).now_or_never().unwrap();
            add(rounds.fetch_add(1, Ordering::Relaxed) + 1);
            report
        });
        let kernel = passing(mock, &node.kernel);
        let overlay = node.builder().build(Arc::new(node.store.clone()), kernel).unwrap();
        let removed = overlay.remove().await;
        match removed {
            Ok(removed) => assert_eq!((added, removed.objects), (ROUNDS - 1, ROUNDS as usize)),
            Err(OverlayError::Teardown { left, first, .. }) => {
                assert_eq!((added, left), (ROUNDS, 1));
                assert!(first.contains("10.42.7.0/24"), "{first}");
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn cancelled_before_it_has_the_name_it_touches_nothing_of_whoever_has() {
    let (node, agent) = Node::ready_beside([]).await;
    let store = Away::new(&node.store);
    store.leave();
    let rival = removing(&node, &store);
    pass(10.0).await;
    rival.removed().await.unwrap();
    assert!(node.record().is_some() && !node.kernel.snapshot().matching("tun4.1").is_empty());
    agent.cancelled().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn nobody_takes_the_name_before_a_removal_is_done() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let agent = node.run_ready().await;
    agent.cancelled().await.unwrap();
    let store = Away::new(&node.store);
    store.delay(Duration::from_secs(1));
    let builder = node.builder().subnet_env(env_file(&dir));
    let overlay = builder.build(Arc::new(store), Arc::new(node.kernel.clone())).unwrap();
    let removal = tokio::spawn(async move { overlay.remove().await });
    eventually("the devices are gone", || node.kernel.snapshot().matching("tun4.1").is_empty()).await;
    pass(0.5).await;
    let claim = node.kernel.claim(&OverlayName::default(), &Dual::default(), Residence::Present).await;
    assert!(matches!(claim, Err(KernelError::Conflict { .. })), "{claim:?}");
    assert!(removal.await.unwrap().unwrap().lease.is_some());
    node.kernel.claim(&OverlayName::default(), &Dual::default(), Residence::Present).await.unwrap();
}

/// A kernel whose writes never end once it is told so, and which notes whether one still could go on.
struct Stuck {
    kernel: FakeKernel,
    stuck: AtomicBool,
    under_way: Arc<()>,
    beside: Arc<AtomicBool>,
}

#[async_trait]
impl Kernel for Stuck {
    async fn claim(
        &self,
        overlay: &OverlayName,
        networks: &Dual<Prefix>,
        residence: Residence,
    ) -> Result<Claim, KernelError> {
        self.kernel.claim(overlay, networks, residence).await
    }

    async fn probe(&self, devices: &[Device]) -> Result<(), KernelError> {
        self.kernel.probe(devices).await
    }

    async fn host_facts(&self, reach: &[IpAddr]) -> Result<HostFacts, KernelError> {
        self.kernel.host_facts(reach).await
    }

    async fn observe(&self, scope: &Scope) -> Result<State, KernelError> {
        self.beside.fetch_or(Arc::strong_count(&self.under_way) > 1, Ordering::Relaxed);
        self.kernel.observe(scope).await
    }

    async fn apply(&self, scope: &Scope, ops: Arc<Vec<Op>>) -> ApplyReport {
        if self.stuck.swap(false, Ordering::Relaxed) {
            let _under_way = Arc::clone(&self.under_way);
            return std::future::pending().await;
        }
        self.kernel.apply(scope, ops).await
    }

    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint> {
        self.kernel.hints(scope)
    }
}

#[tokio::test(start_paused = true)]
async fn a_round_that_was_cut_off_does_not_go_on_beside_the_removal() {
    let node = Node::alone();
    let before = node.kernel.snapshot();
    let (beside, under_way) = (Arc::new(AtomicBool::new(false)), Arc::new(()));
    let stuck = AtomicBool::new(false);
    let kernel = Stuck { kernel: node.kernel.clone(), stuck, under_way, beside: Arc::clone(&beside) };
    let kernel = Arc::new(kernel);
    let builder = node.builder();
    let agent = node.run_on(builder, Arc::clone(&kernel) as _, Arc::new(node.store.clone())).once_ready().await;
    pass(1.0).await;
    kernel.stuck.store(true, Ordering::Relaxed);
    node.join([1]);
    eventually("a round is under way", || Arc::strong_count(&kernel.under_way) > 1).await;
    agent.removed().await.unwrap();
    assert!(!beside.load(Ordering::Relaxed));
    assert_eq!((node.kernel.snapshot(), node.record()), (before, None));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_panics_is_over_for_everybody_and_the_next_takes_over() {
    let node = Node::alone();
    node.join([1]);
    let fragile = Altered {
        peer: |tunnel: &Tunnel, local, peer, family| {
            assert!(peer.subnets.v4 != Some(subnet(66)), "a bug");
            tunnel.peer(local, peer, family)
        },
        ..Altered::of(Tunnel)
    };
    let mut agent = node.run_as(node.builder_with(fragile)).once_ready().await;
    let writes = node.kernel.writes();
    let handle = agent.handle.clone();
    let waiting = tokio::spawn(async move { handle.wait_for(|status| status.peers.accepted == 9).await });
    node.join([66]);
    let panicked = End::Panicked("a bug".to_owned());
    assert_eq!(waiting.await.unwrap(), Err(Ended(panicked.clone())));
    agent.event(|event| *event == Event::Stopped(panicked.clone())).await;
    assert_eq!((agent.status().phase, agent.status().ended), (Phase::Stopped, Some(panicked)));
    assert!(matches!(agent.handle.plan().await, Err(HandleError::Ended(_))));
    let outcome = agent.ended().await;
    assert!(matches!(&outcome, Err(OverlayError::Panicked { message }) if message == "a bug"), "{outcome:?}");
    assert_eq!(node.kernel.writes(), writes, "the data plane stays");
    let _next = node.run_ready().await;
    assert!(node.has_route(subnet(1)) && node.has_route(subnet(66)));
}
