//! A machine that sleeps: time goes on, and nothing runs (docs/faults.md, L15).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::clock::{BootTime, Clock, TokioClock};
use flannel_core::overlay::Event;
use flannel_core::testing::MemorySubnets;
use tokio::time::Instant;

use crate::node::{Agent, Node, config, peer};

const TTL: Duration = Duration::from_secs(100);
/// After waking up: the longest slice of a sleep, and a round.
const SOON: Duration = Duration::from_secs(6);

/// Goes on in suspend, where tokio's timers stand still, as the machine's does.
struct Sleepy {
    awake: TokioClock,
    slept: AtomicU64,
}

#[async_trait]
impl Clock for Sleepy {
    fn now(&self) -> BootTime {
        self.awake.now().after(Duration::from_secs(self.slept.load(Ordering::Relaxed)))
    }

    async fn sleep_until(&self, deadline: BootTime) {
        while self.now() < deadline {
            tokio::time::sleep(deadline.since(self.now()).min(Duration::from_secs(5))).await;
        }
    }
}

impl Sleepy {
    fn suspend(&self, seconds: u64) {
        self.slept.fetch_add(seconds, Ordering::Relaxed);
    }
}

async fn started() -> (Node, Agent, Arc<Sleepy>) {
    let awake = TokioClock::new();
    let clock = Arc::new(Sleepy { awake, slept: AtomicU64::new(0) });
    let store = MemorySubnets::with_ttl(config(), Some(TTL), Arc::clone(&clock) as _);
    let node = Node::new(200, &store, &Arc::new(awake));
    let mut agent = node.run_as(node.builder().clock(Arc::clone(&clock) as _)).once_ready().await;
    agent.drain();
    (node, agent, clock)
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_due_after_a_sleep_is_renewed_at_once() {
    let (node, mut agent, clock) = started().await;
    let before = node.record();
    let woken = Instant::now();
    clock.suspend(80);
    let event = agent.event(|event| matches!(event, Event::LeaseRenewed(_) | Event::LeaseLost(_))).await;
    assert!(matches!(event, Event::LeaseRenewed(_)), "{event:?}");
    assert!(woken.elapsed() <= SOON, "{:?}", woken.elapsed());
    assert_eq!(node.record().map(|lease| lease.subnets), before.map(|lease| lease.subnets));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ran_out_in_a_sleep_is_not_renewed_and_its_next_holder_is_left_alone() {
    let (node, mut agent, clock) = started().await;
    let before = agent.status().lease.clone().unwrap();
    let woken = Instant::now();
    clock.suspend(250);
    // Meanwhile the store has given the subnet away.
    node.store.delete(&before.key);
    let mut next = peer(7);
    next.subnets = before.subnets;
    node.store.insert([next.clone()]);
    let mut events = Vec::new();
    while !events.iter().any(|event| matches!(event, Event::LeaseAcquired(_))) {
        events.push(agent.event(|_| true).await);
    }
    assert!(woken.elapsed() <= SOON, "{:?}", woken.elapsed());
    assert!(events.iter().any(|event| matches!(event, Event::LeaseLost(_))), "{events:?}");
    assert!(!events.iter().any(|event| matches!(event, Event::LeaseRenewed(_))), "{events:?}");
    let after = agent.ready().await.lease.unwrap();
    assert_ne!(after.subnets, before.subnets);
    let theirs = node.store.records().into_iter().find(|record| record.key == next.key).unwrap();
    assert_eq!(theirs.lease.unwrap().attrs, next.attrs);
}
