//! From nothing to ready, and what can go wrong on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::kernel::{ApplyReport, Claim, Hint, Kernel, KernelError, MockKernel, OverlayName, Residence, Scope};
use flannel_core::net::{Dual, Family};
use flannel_core::overlay::{Contact, Event, OverlayError, Phase, Wait};
use flannel_core::subnet::{MockSubnetManager, SubnetError, ThisNode};
use flannel_core::testing::FakeKernel;
use futures_util::StreamExt;
use tokio::time::Instant;

use crate::node::{Node, add_defaults, config, eventually, parse, pass, pool, public, subnet};
use crate::storms::Away;
use crate::tunnel::Tunnel;
use crate::watch::Watched;

fn timeout() -> KernelError {
    KernelError::Timeout { doing: "looking".to_owned(), within: Duration::from_secs(5) }
}

fn denied() -> KernelError {
    KernelError::Denied { doing: "looking".to_owned(), hint: "CAP_NET_ADMIN".to_owned() }
}

/// A kernel that is `kernel` but for what the test expects of the mock before.
pub(crate) fn passing(mut mock: MockKernel, kernel: &FakeKernel) -> Arc<MockKernel> {
    let fake = kernel.clone();
    mock.expect_host_facts()
        .returning(move |reach| futures_util::FutureExt::now_or_never(fake.host_facts(reach)).unwrap());
    mock.expect_claim().returning(|_, _, _| Ok(Claim::new(())));
    mock.expect_probe().returning(|_| Ok(()));
    mock.expect_hints().returning(|_| futures_util::stream::pending().boxed());
    let fake = kernel.clone();
    mock.expect_observe()
        .returning(move |scope: &Scope| futures_util::FutureExt::now_or_never(fake.observe(scope)).unwrap());
    Arc::new(mock)
}

#[tokio::test(start_paused = true)]
async fn a_first_look_that_times_out_writes_nothing_and_is_repeated_after_back_off() {
    let node = Node::alone();
    node.join([1, 2]);
    node.kernel.fail_next_observe(timeout());
    let begun = Instant::now();
    let agent = node.run();
    let status = agent.until(|status| status.last_error.is_some()).await;
    assert_eq!((status.phase, node.kernel.writes()), (Phase::LeaseHeld, 0));
    assert!(status.last_error.unwrap().contains("did not answer"));
    let status = agent.ready().await;
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    assert_eq!((status.last_error, status.peers.accepted), (None, 2));
}

#[tokio::test(start_paused = true)]
async fn an_uplink_made_anew_while_the_lease_was_waited_for_is_the_one_in_use() {
    let node = Node::alone();
    node.store.set_config(pool(9));
    node.join([9]);
    let agent = node.run();
    agent.until(|status| status.lease_refused.is_some()).await;
    node.kernel.delete_link("eth0").unwrap();
    let eth0 = node.kernel.add_uplink("eth0", "192.0.2.201/24".parse().unwrap()).unwrap();
    add_defaults(&node.kernel, eth0);
    node.leave([9]);
    let status = agent.ready().await;
    assert_eq!(status.uplink.up().unwrap().index, eth0);
    let published =
        agent.until(|_| node.record().is_some_and(|it| it.attrs.public_ip.v4 == Some(public(Family::V4, 201))));
    published.await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_waits_for_a_subnet_gets_one_once_the_pool_is_widened_and_running_agents_take_it() {
    let one = Node::alone();
    one.store.set_config(pool(9));
    let running = one.run_ready().await;
    let two = Node::new(201, &one.store, &one.clock);
    let mut waiting = two.run();
    let refused = waiting.until(|status| status.lease_refused.is_some()).await;
    let text = refused.lease_refused.clone().unwrap();
    assert!(text.contains("no free subnet"), "{text}");
    assert_eq!(refused.waits_for(), [Wait::Lease { error: Some(text.clone()) }]);
    pass(60.0).await;
    assert_eq!(waiting.status().store, Contact::Live, "the store answers");
    one.store.set_config(pool(10));
    let status = waiting.ready().await;
    assert_eq!(status.lease.unwrap().subnets.v4, Some(subnet(10)));
    assert_eq!(status.lease_refused, None);
    let events = waiting.drain();
    let refusals = events.iter().filter(|event| **event == Event::LeaseRefused(text.clone())).count();
    assert_eq!(refusals, 1, "{events:?}");
    assert!(!events.iter().any(|event| matches!(event, Event::StoreLost(_) | Event::StoreBack)), "{events:?}");
    let status = running.until(|status| status.peers.accepted == 1).await;
    assert_eq!((status.peers.quarantined, status.own_trouble), (0, None));
    eventually("routes both ways", || one.has_route(subnet(10)) && two.has_route(subnet(9))).await;
    // Nor does a pool that moves away cut off those that work.
    one.store.set_config(pool(9));
    let three = Node::new(202, &one.store, &one.clock);
    let late = three.run();
    assert!(late.until(|status| status.lease_refused.is_some()).await.lease.is_none());
    assert!(one.has_route(subnet(10)) && two.has_route(subnet(9)));
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_does_not_answer_at_start_is_asked_again() {
    let asks: [fn(&FakeKernel); 2] =
        [|kernel| kernel.fail_next_host_facts(timeout()), |kernel| kernel.fail_next_probe(timeout())];
    for fail in asks {
        let node = Node::alone();
        fail(&node.kernel);
        fail(&node.kernel);
        let agent = node.run();
        agent.until(|status| status.last_error.is_some()).await;
        assert_eq!(node.store.records().len(), 0);
        agent.ready().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_can_never_be_read_is_asked_a_bounded_number_of_times() {
    let calls = Arc::new(AtomicU32::new(0));
    let node = Node::alone();
    let mut mock = MockKernel::new();
    let (fake, count) = (node.kernel.clone(), Arc::clone(&calls));
    mock.expect_host_facts().returning(move |reach| match count.fetch_add(1, Ordering::Relaxed) {
        0 => futures_util::FutureExt::now_or_never(fake.host_facts(reach)).unwrap(),
        _ => Err(timeout()),
    });
    mock.expect_hints().returning(|_| {
        let beat = tokio::time::interval(Duration::from_millis(1));
        futures_util::stream::unfold(beat, |mut beat| async {
            beat.tick().await;
            Some((Hint::FactsChanged, beat))
        })
        .boxed()
    });
    let fake = node.kernel.clone();
    mock.expect_apply()
        .returning(move |scope, plan| futures_util::FutureExt::now_or_never(fake.apply(scope, plan)).unwrap());
    let kernel = passing(mock, &node.kernel);
    let agent = node.run_on(node.builder(), kernel, Arc::new(node.store.clone()));
    pass(60.0).await;
    // Hints do not cut the back-off short.
    assert!(calls.load(Ordering::Relaxed) <= 20, "{calls:?}");
    assert!(agent.status().last_error.is_some());
    agent.cancelled().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_can_never_do_ends_the_first_round_with_its_error() {
    let unsupported = || KernelError::Unsupported { what: "vxlan".to_owned(), hint: "modprobe vxlan".to_owned() };
    for error in [denied(), unsupported()] {
        let node = Node::alone();
        let mut mock = MockKernel::new();
        let refusal = error.clone();
        mock.expect_apply().returning(move |_, _| {
            let mut report = ApplyReport::default();
            report.refused.push((0, refusal.clone()));
            report
        });
        let agent = node.run_on(node.builder(), passing(mock, &node.kernel), Arc::new(node.store.clone()));
        let Err(OverlayError::Kernel(ended)) = agent.ended().await else { panic!("no error") };
        assert_eq!(ended, error);
    }
    for error in [denied(), unsupported(), KernelError::Stopped] {
        let node = Node::alone();
        node.kernel.fail_next_observe(error.clone());
        let Err(OverlayError::Kernel(ended)) = node.run().ended().await else { panic!("no error") };
        assert_eq!(ended, error);
        node.kernel.fail_next_host_facts(error.clone());
        let Err(OverlayError::Kernel(ended)) = node.run().ended().await else { panic!("no error") };
        assert_eq!(ended, error);
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_can_never_do_leaves_no_lease_behind() {
    let unsupported = || KernelError::Unsupported { what: "vxlan".to_owned(), hint: "modprobe vxlan".to_owned() };
    for error in [denied(), unsupported()] {
        // Told before.
        let node = Node::alone();
        node.kernel.fail_next_probe(error.clone());
        let Err(OverlayError::Kernel(ended)) = node.run().ended().await else { panic!("no error") };
        assert_eq!((ended, node.store.records().len()), (error.clone(), 0));
        // Told by the first round only.
        node.kernel.fail_next_observe(error.clone());
        let agent = node.run();
        let handle = agent.handle.clone();
        let Err(OverlayError::Kernel(ended)) = agent.ended().await else { panic!("no error") };
        assert_eq!((ended, node.store.records().len()), (error.clone(), 0));
        assert_eq!(handle.status().lease, None);
        // A lease that was there before is not this start's to give back.
        node.run().ready().await;
        let before = node.record();
        node.kernel.fail_next_observe(error.clone());
        let Err(OverlayError::Kernel(_)) = node.run().ended().await else { panic!("no error") };
        assert!(before.is_some() && node.record() == before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_kernel_thread_that_stops_ends_the_agent_whenever_it_happens() {
    let (node, agent) = Node::ready_beside([]).await;
    node.kernel.fail_next_observe(KernelError::Stopped);
    assert!(matches!(agent.ended().await, Err(OverlayError::Kernel(KernelError::Stopped))));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_at_start_is_asked_with_back_off_and_told_once() {
    let node = Node::alone();
    let store = Away::new(&node.store);
    store.mute();
    let mut agent = node.run_over(&store);
    let away = agent.until(|status| matches!(status.store, Contact::Lost { .. })).await;
    assert_eq!((away.phase, node.kernel.writes()), (Phase::Starting, 0));
    eventually("it has asked six times", || store.asked().len() == 6).await;
    store.speak();
    let ready = agent.ready().await;
    assert_eq!(ready.store, Contact::Live);
    let times = store.asked();
    assert!(times.len() >= 7, "{times:?}");
    let waits: Vec<_> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    for (wait, want) in waits.iter().zip([1.0, 2.0, 4.0, 4.5, 4.5, 4.5]) {
        assert!((want * 0.9 - 0.01..=want * 1.1 + 0.01).contains(wait), "{waits:?}");
    }
    let events = agent.drain();
    let count = |wanted: fn(&Event) -> bool| events.iter().filter(|event| wanted(event)).count();
    assert_eq!(count(|event| matches!(event, Event::StoreLost(_))), 1, "{events:?}");
    assert_eq!(count(|event| matches!(event, Event::StoreBack)), 1, "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn an_invalid_config_ends_at_once_with_its_path() {
    let node = Node::alone();
    let mut store = MockSubnetManager::new();
    let this = ThisNode::named(node.identity());
    store.expect_this_node().returning(move || Ok(this.clone()));
    store.expect_network_config().times(1).returning(|| {
        let error = NetworkConfig::parse(br#"{"Network":"10.42.0.0/99"}"#, Allocation::Pool).unwrap_err();
        Err(SubnetError::Invalid { at: "/coreos.com/network/config".to_owned(), reason: error.to_string() })
    });
    let begun = Instant::now();
    let agent = node.run_on(node.builder(), Arc::new(node.kernel.clone()), Arc::new(store));
    let Err(OverlayError::Store(error)) = agent.ended().await else { panic!("no error") };
    assert!(error.to_string().contains("$.Network"), "{error}");
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_is_unknown_or_registered_under_another_name_is_refused_by_name() {
    let node = Node::alone();
    node.store.set_config(parse(r#"{"Network":"10.42.0.0/16","Backend":{"Type":"pigeon"}}"#));
    let (unknown, misnamed) = (node.builder(), node.builder().backend("pigeon", |_| Ok(Tunnel)));
    for (builder, parts) in
        [(unknown, &["$.Backend.Type", "pigeon", "tunnel"][..]), (misnamed, &[r#"type "pigeon" is called "tunnel""#])]
    {
        let Err(OverlayError::Backend(error)) = node.run_as(builder).ended().await else { panic!("no error") };
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_before_the_store_has_said_what_is_everything() {
    let node = Node::alone();
    let agent = node.run_over(&Watched::new(&node.store, |_| futures_util::stream::pending().boxed()));
    pass(3600.0).await;
    assert_eq!((agent.status().phase, node.kernel.writes()), (Phase::LeaseHeld, 0));
}

#[tokio::test(start_paused = true)]
async fn a_second_agent_of_the_name_is_refused_and_touches_nothing() {
    let node = Node::alone();
    let first = node.run_ready().await;
    let (writes, records) = (node.kernel.writes(), node.store.records());
    let Err(OverlayError::Kernel(KernelError::Conflict { .. })) = node.run().ended().await else { panic!("no error") };
    assert_eq!((node.kernel.writes(), node.store.records()), (writes, records));
    assert_eq!(first.status().phase, Phase::Ready);
}

#[tokio::test(start_paused = true)]
async fn questions_before_the_lease_are_answered_that_the_agent_does_not_run_yet() {
    let node = Node::alone();
    node.kernel.stall();
    let agent = node.run();
    pass(1.0).await;
    let answer = tokio::time::timeout(Duration::from_secs(5), agent.handle.peers()).await;
    assert!(answer.expect("no answer").is_err());
    node.kernel.resume();
    agent.ready().await;
    assert!(agent.handle.peers().await.is_ok());
}

/// A store that is away when it is first asked who this node is.
#[tokio::test(start_paused = true)]
async fn who_the_node_is_comes_from_the_store_as_soon_as_it_answers() {
    let node = Node::alone();
    let mut public = Dual { v4: Some("203.0.113.7".parse().unwrap()), v6: None };
    let this = ThisNode::named(node.identity()).publishing(public);
    let store = Away::new(&node.store.for_node(this));
    store.leave();
    let agent = node.run_over(&store);
    let status = agent.until(|status| matches!(status.store, Contact::Lost { .. })).await;
    assert_eq!((status.phase, status.lease.clone(), node.record()), (Phase::Starting, None, None));
    store.come_back();
    let lease = agent.ready().await.lease.unwrap();
    assert_eq!((&lease.key, lease.attrs.public_ip), (&node.key(), public), "an operator's address in the store");
    agent.cancelled().await.unwrap();
    // What the program was given comes first.
    public.v4 = Some("203.0.113.8".parse().unwrap());
    let builder = node.builder().public(public);
    let agent = node.run_as_over(builder, &store);
    assert_eq!(agent.ready().await.lease.unwrap().attrs.public_ip, public);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_given_up_a_moment_later_is_no_conflict() {
    let node = Node::alone();
    let networks = config().networks.map(|_, network| network.prefix);
    let name = OverlayName::default();
    let claim = || node.kernel.claim(&name, &networks, Residence::Present);
    let held = claim().await.unwrap();
    let agent = node.run();
    pass(0.5).await;
    assert_eq!((agent.status().phase, node.record()), (Phase::Starting, None));
    drop(held);
    agent.ready().await;
    agent.cancelled().await.unwrap();
    let _held = claim().await.unwrap();
    let outcome = node.run().ended().await;
    assert!(matches!(outcome, Err(OverlayError::Kernel(KernelError::Conflict { .. }))), "{outcome:?}");
}
