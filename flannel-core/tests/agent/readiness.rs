//! What the status says of readiness: what is waited for, and what is done without.

use flannel_core::kernel::{KernelError, LinkName, Op};
use flannel_core::overlay::{Contact, End, Event, MissingUplink, Phase, Status, UplinkState, Wait};
use flannel_core::uplink::Select;
use futures_util::StreamExt;

use crate::env_file::env_file;
use crate::node::{Agent, Node, add_defaults, pass, pool, subnet};
use crate::storms::Away;
use crate::watch::Watched;

const ENOMEM: i32 = 12;

fn lost(doing: &str) -> KernelError {
    KernelError::Lost { doing: doing.to_owned(), reason: "overrun".to_owned() }
}

/// The only thing that is waited for.
fn only(status: &Status) -> Wait {
    let waits = status.waits_for();
    assert!(!status.is_ready() && waits.len() == 1, "{waits:?} {status:?}");
    waits.into_iter().next().unwrap()
}

/// What is waited for once it has lasted for a while.
async fn waits(agent: &Agent) -> Wait {
    pass(3.0).await;
    only(&agent.status())
}

fn says(error: &Option<String>, what: &str) -> bool {
    error.as_ref().is_some_and(|error| error.contains(what))
}

#[test]
fn a_phase_has_reached_those_before_it_and_an_end_no_other() {
    let way = [Phase::Starting, Phase::LeaseHeld, Phase::DeviceReady, Phase::Ready];
    for (nth, phase) in way.into_iter().enumerate() {
        for (other_nth, other) in way.into_iter().enumerate() {
            assert_eq!(phase.has_reached(other), nth >= other_nth, "{phase:?} {other:?}");
        }
        assert!(!phase.has_reached(Phase::Stopped) && !Phase::Stopped.has_reached(phase));
    }
    assert!(Phase::Stopped.has_reached(Phase::Stopped));
}

#[test]
fn what_is_waited_for_is_plain_text_with_a_remedy() {
    let hostile = Some("x\nREADY=1\u{1b}[2J".to_owned());
    let waits = [
        Wait::Run,
        Wait::Store { error: hostile.clone() },
        Wait::Kernel { error: hostile.clone() },
        Wait::Uplink { error: hostile.clone() },
        Wait::Lease { error: hostile.clone() },
        Wait::Peers { error: hostile.clone() },
        Wait::Device { error: hostile.clone() },
        Wait::Writes { failed_writes: 3, error: hostile.clone() },
        Wait::SubnetEnv { error: hostile },
    ];
    for wait in waits {
        let text = wait.to_string();
        assert!(text.chars().all(flannel_core::text::is_plain), "{text:?}");
        assert!(wait == Wait::Run || text.ends_with(')'), "{text}");
        assert!(!wait.remedy().is_empty());
    }
    assert_eq!(Wait::Lease { error: None }.to_string(), "a lease");
}

#[tokio::test(start_paused = true)]
async fn a_start_says_what_it_waits_for() {
    // A store that says no, and one that says nothing.
    let node = Node::alone();
    let store = Away::new(&node.store);
    store.mute();
    let agent = node.run_over(&store);
    assert!(matches!(waits(&agent).await, Wait::Store { error } if says(&error, "away")));
    store.speak();
    agent.ready().await;

    let node = Node::alone();
    let store = Away::new(&node.store);
    store.hang();
    let agent = node.run_over(&store);
    assert_eq!(waits(&agent).await, Wait::Store { error: None });

    // A kernel likewise.
    let node = Node::alone();
    for _ in 0..10 {
        node.kernel.fail_next_host_facts(lost("reading links"));
    }
    let agent = node.run();
    assert!(matches!(waits(&agent).await, Wait::Kernel { error } if says(&error, "overrun")));
    agent.ready().await;

    let node = Node::alone();
    node.kernel.stall();
    let agent = node.run();
    assert_eq!(waits(&agent).await, Wait::Kernel { error: None });
    node.kernel.resume();
    agent.ready().await;

    // A full network.
    let node = Node::alone();
    node.store.set_config(pool(9));
    node.join([9]);
    let agent = node.run();
    let Wait::Lease { error } = waits(&agent).await else { panic!("{:?}", agent.status()) };
    assert!(says(&error, "no free subnet"), "{error:?}");
    // Each further try goes through all steps again: what is waited for stays what is shown.
    let mut handle = agent.handle.clone();
    let shown = tokio::spawn(async move {
        let mut shown = Vec::new();
        while let Ok(status) = handle.changed().await {
            match &status.starting {
                Some(wait) => shown.push(wait.clone()),
                None => break,
            }
        }
        shown
    });
    pass(60.0).await;
    node.leave([9]);
    agent.ready().await;
    let shown = shown.await.unwrap();
    assert!(shown.iter().all(|wait| matches!(wait, Wait::Lease { error: Some(_) })), "{shown:?}");
}

#[tokio::test(start_paused = true)]
async fn a_start_without_an_uplink_says_so_and_since_when() {
    let node = Node::alone();
    let builder =
        node.builder().uplink(Select::Name(LinkName::new("eth9").unwrap())).missing_uplink(MissingUplink::Wait);
    let mut agent = node.run_as(builder);
    assert!(matches!(waits(&agent).await, Wait::Uplink { error } if says(&error, "eth9")));
    let UplinkState::Lost { last: None, since, error } = agent.status().uplink else { panic!("{:?}", agent.status()) };
    assert!(error.contains("eth9"), "{error}");
    pass(60.0).await;
    assert!(matches!(agent.status().uplink, UplinkState::Lost { since: still, .. } if still == since));
    node.kernel.add_uplink("eth9", "198.51.100.7/24".parse().unwrap()).unwrap();
    let ready = agent.ready().await;
    assert_eq!(ready.uplink.up().unwrap().name.as_str(), "eth9");
    assert!(ready.is_ready());
    let told = agent.drain();
    let count = |kind: &str| told.iter().filter(|event| event.kind() == kind).count();
    assert_eq!((count("uplink_lost"), count("uplink_back")), (1, 1), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_says_what_it_waits_for_before_it_is_ready() {
    let node = Node::alone();
    let silent = Watched::new(&node.store, |_| futures_util::stream::pending().boxed());
    let agent = node.run_over(&silent);
    assert_eq!(waits(&agent).await, Wait::Peers { error: None });

    let node = Node::alone();
    node.kernel.refuse_if(|op| matches!(op, Op::CreateLink { .. }).then_some(ENOMEM));
    let agent = node.run();
    assert!(matches!(waits(&agent).await, Wait::Device { error: Some(_) }));
    node.kernel.obey();
    agent.until(Status::is_ready).await;

    let node = Node::alone();
    node.join([1, 2]);
    node.kernel.refuse_if(|op| matches!(op, Op::CreateRoute { .. }).then_some(ENOMEM));
    let agent = node.run();
    assert!(matches!(waits(&agent).await, Wait::Writes { failed_writes: 2, error: Some(_) }));
    node.kernel.obey();
    agent.until(Status::is_ready).await;

    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("run"), "a file where a directory has to be").unwrap();
    let agent = node.run_as(node.builder().subnet_env(env_file(&dir)));
    let is_pending = |status: &Status| matches!(&status.waits_for()[..], [Wait::SubnetEnv { error: Some(_) }]);
    let status = agent.until(is_pending).await;
    assert_eq!((status.phase, status.is_ready()), (Phase::Ready, false));
    std::fs::remove_file(dir.path().join("run")).unwrap();
    agent.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_without_a_lease_is_not_ready_and_says_what_the_store_says() {
    let node = Node::alone().known_by_address();
    let store = Away::new(&node.store);
    let agent = node.run_over(&store).once_ready().await;
    store.fail_acquires(std::iter::repeat_n(flannel_core::testing::Fault::Unavailable, 100));
    node.store.delete(&node.key());
    agent.until(|status| status.lease.is_none() && matches!(status.store, Contact::Lost { .. })).await;
    assert!(matches!(waits(&agent).await, Wait::Lease { error: Some(_) }));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_keeps_no_node_from_being_ready() {
    let (node, agent) = Node::ready_beside([1]).await;
    node.store.outage();
    agent.until(|status| matches!(status.store, Contact::Lost { .. })).await;
    assert_eq!(
        (agent.status().is_ready(), agent.status().waits_for(), agent.status().degraded()),
        (true, vec![], None)
    );
}

#[tokio::test(start_paused = true)]
async fn an_uplink_that_is_lost_is_shown_with_the_reason_until_it_is_back() {
    let (node, mut agent) = Node::ready_beside([1]).await;
    pass(1.0).await;
    let before = agent.status().uplink.up().unwrap().clone();
    agent.drain();
    node.kernel.delete_link("eth0").unwrap();
    let status = agent.until(|status| status.uplink.up().is_none()).await;
    // The device over it goes with it.
    assert!(matches!(&status.waits_for()[0], Wait::Uplink { error: Some(_) }), "{status:?}");
    assert!(!status.is_ready());
    let UplinkState::Lost { last, since, error } = &status.uplink else { panic!("{status:?}") };
    assert_eq!(last.as_ref(), Some(&before));
    assert!(error.contains("default route"), "{error}");
    assert!(status.lease.is_some(), "it is kept");
    pass(60.0).await;
    assert!(matches!(agent.status().uplink, UplinkState::Lost { since: still, .. } if still == *since));
    let eth0 = node.kernel.add_uplink("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    node.kernel.add_address("eth0", "fd99::c8/64".parse().unwrap()).unwrap();
    add_defaults(&node.kernel, eth0);
    let back = agent.until(Status::is_ready).await;
    assert_eq!((back.uplink.up().map(|uplink| uplink.index), &back.lease), (Some(eth0), &status.lease));
    assert!(node.has_route(subnet(1)));
    let told: Vec<_> = agent.drain().iter().map(Event::kind).filter(|kind| kind.starts_with("uplink")).collect();
    assert_eq!(told, ["uplink_lost", "uplink_back", "uplink_changed"]);
}

#[tokio::test(start_paused = true)]
async fn without_a_carrier_a_node_is_not_ready_and_everything_stays() {
    let (node, mut agent) = Node::ready_beside([1]).await;
    pass(1.0).await;
    let (kernel, writes, lease) = (node.kernel.snapshot(), node.kernel.writes(), agent.status().lease);
    let up = agent.status().uplink;
    agent.drain();
    for _ in 0..3 {
        node.kernel.carrier_lost("eth0").unwrap();
        let status = agent.until(|status| !status.is_ready()).await;
        assert!(matches!(only(&status), Wait::Uplink { error } if says(&error, "eth0 has no carrier")), "{status:?}");
        assert_eq!((status.phase, &status.lease, status.uplink.last()), (Phase::Ready, &lease, up.up()));
        node.kernel.carrier_back("eth0").unwrap();
        assert_eq!(agent.until(Status::is_ready).await.uplink, up);
    }
    assert_eq!((node.kernel.snapshot(), node.kernel.writes()), (kernel, writes));
    let told: Vec<_> = agent.drain().iter().map(Event::kind).collect();
    assert_eq!(told, ["uplink_lost", "uplink_back"].repeat(3));
}

#[tokio::test(start_paused = true)]
async fn a_start_without_a_carrier_takes_its_lease_and_waits_for_one() {
    let node = Node::alone();
    node.join([1]);
    node.kernel.carrier_lost("eth0").unwrap();
    let mut agent = node.run();
    let status = agent.ready().await;
    assert!(status.lease.is_some() && node.has_route(subnet(1)));
    assert!(matches!(only(&status), Wait::Uplink { error } if says(&error, "carrier")), "{status:?}");
    node.kernel.carrier_back("eth0").unwrap();
    agent.until(Status::is_ready).await;
    let told: Vec<_> = agent.drain().iter().map(Event::kind).filter(|kind| kind.starts_with("uplink")).collect();
    assert_eq!(told, ["uplink_lost", "uplink_back"]);
}

#[tokio::test(start_paused = true)]
async fn a_named_uplink_that_is_down_is_not_ready() {
    let node = Node::alone();
    node.kernel.add_uplink("eth1", "198.51.100.7/24".parse().unwrap()).unwrap();
    let agent = node.run_as(node.builder().uplink(Select::Name(LinkName::new("eth1").unwrap()))).once_ready().await;
    agent.until(Status::is_ready).await;
    node.kernel.link_down("eth1").unwrap();
    let status = agent.until(|status| !status.is_ready()).await;
    assert!(matches!(only(&status), Wait::Uplink { error } if says(&error, "eth1 is down")), "{status:?}");
    node.kernel.link_up("eth1").unwrap();
    agent.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_done_without_is_counted_by_reason_and_keeps_no_node_from_being_ready() {
    let node = Node::alone();
    node.join(1..=4);
    let mut stranger = crate::node::peer(5);
    stranger.attrs.backend_type = "other".into();
    node.store.insert([stranger]);
    let refused = |op: &Op| matches!(op, Op::CreateRoute { prefix, .. } if *prefix == subnet(1));
    node.kernel.refuse_if(move |op| refused(op).then_some(ENOMEM));
    let agent = node.run().once_ready().await;
    let status = agent.status();
    let degraded = status.degraded().unwrap();
    assert_eq!((degraded.quarantined, degraded.refused, degraded.failed_writes), (1, 1, 1), "{degraded:?}");
    assert_eq!(degraded.to_string(), "1 invalid record, 1 write refused, 1 failed write");
    assert!(status.is_ready() && status.waits_for().is_empty());
    node.kernel.obey();
    node.store.delete(&crate::node::peer(5).key);
    agent.until(|status| status.degraded().is_none()).await;
}

#[test]
fn an_end_is_never_ready_whatever_else_the_status_has() {
    let mut status = Status::default();
    assert!(!status.is_ready());
    status.phase = Phase::Stopped;
    status.ended = Some(End::Dropped);
    status.starting = None;
    assert!(!status.is_ready());
}
