//! Much of everything: what is kept and said stays bounded (docs/faults.md, I13).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::clock::{BootTime, Clock, TokioClock};
use flannel_core::lease::LeaseEvent;
use flannel_core::overlay::{Contact, Event, Handle, Phase};
use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_core::testing::{Call, Fault, MemorySubnets, StoreDouble};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::log::Log;
use crate::node::{Node, config, pass, peer, subnet};

/// A store that can go away, as seen by one node, and whose answers can take their time.
#[derive(Clone)]
pub(crate) struct Away {
    store: MemorySubnets,
    away: Arc<watch::Sender<bool>>,
    delay: Arc<AtomicU64>,
    pub(crate) calls: Arc<AtomicU64>,
    /// Those of them that asked for a lease.
    pub(crate) acquires: Arc<AtomicU64>,
    /// Those that asked for one, renewed one or gave one back.
    pub(crate) writes: Arc<AtomicU64>,
    /// What becomes of the next of those.
    faults: Arc<Mutex<VecDeque<Fault>>>,
    /// Whether it takes calls and answers none.
    hangs: Arc<AtomicBool>,
    /// Whether nobody may read its configuration.
    mute: Arc<AtomicBool>,
    /// When somebody tried to.
    asked: Arc<Mutex<Vec<Instant>>>,
}

impl Away {
    pub(crate) fn new(store: &MemorySubnets) -> Self {
        Self {
            store: store.clone(),
            away: Arc::new(watch::Sender::new(false)),
            delay: Arc::default(),
            calls: Arc::default(),
            acquires: Arc::default(),
            writes: Arc::default(),
            faults: Arc::default(),
            hangs: Arc::default(),
            mute: Arc::default(),
            asked: Arc::default(),
        }
    }

    pub(crate) fn leave(&self) {
        self.away.send_replace(true);
    }

    pub(crate) fn come_back(&self) {
        self.away.send_replace(false);
    }

    /// Answers no call any more.
    pub(crate) fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }

    /// Lets nobody read the configuration.
    pub(crate) fn mute(&self) {
        self.mute.store(true, Ordering::Relaxed);
    }

    /// Ends that.
    pub(crate) fn speak(&self) {
        self.mute.store(false, Ordering::Relaxed);
    }

    /// When the configuration was asked for.
    pub(crate) fn asked(&self) -> Vec<Instant> {
        self.asked.lock().unwrap().clone()
    }

    /// Lets the next calls for a lease fail, one fault each.
    pub(crate) fn fail_acquires(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults);
    }

    /// Answers come so late, after the work was done.
    pub(crate) fn delay(&self, delay: Duration) {
        self.delay.store(delay.as_millis() as u64, Ordering::Relaxed);
    }
}

fn gone() -> SubnetError {
    SubnetError::Unavailable { doing: "asking", source: "away".into() }
}

impl StoreDouble for Away {
    type Store = MemorySubnets;

    fn store(&self) -> &MemorySubnets {
        &self.store
    }

    async fn call<A: Send>(
        &self,
        call: Call<'_>,
        answer: impl Future<Output = Result<A, SubnetError>> + Send,
    ) -> Result<A, SubnetError> {
        // On a clock that stands still an agent that spins would do so for ever.
        assert!(self.calls.fetch_add(1, Ordering::Relaxed) < 100_000, "somebody spins");
        let (acquires, asks) = (matches!(call, Call::Acquire(_)), matches!(call, Call::NetworkConfig));
        let writes = acquires || matches!(call, Call::Renew(_) | Call::Release);
        self.acquires.fetch_add(acquires.into(), Ordering::Relaxed);
        self.writes.fetch_add(writes.into(), Ordering::Relaxed);
        if self.hangs.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        if *self.away.borrow() {
            return Err(gone());
        }
        if asks {
            self.asked.lock().unwrap().push(Instant::now());
            if self.mute.load(Ordering::Relaxed) {
                return Err(gone());
            }
        }
        if acquires {
            self.store.fail_next(self.faults.lock().unwrap().pop_front());
        }
        let answer = answer.await;
        if writes {
            tokio::time::sleep(Duration::from_millis(self.delay.load(Ordering::Relaxed))).await;
        }
        answer
    }

    /// While away: an error every five seconds. Back again: everything anew.
    fn watch_with(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        let state = (self.store.clone(), self.store.watch(), self.away.subscribe(), false);
        futures_util::stream::unfold(state, |(store, mut inner, mut away, mut told)| async move {
            loop {
                if *away.borrow_and_update() {
                    if std::mem::replace(&mut told, true) {
                        let _ = tokio::time::timeout(Duration::from_secs(5), away.changed()).await;
                        told = false;
                        continue;
                    }
                    inner = store.watch();
                    return Some((Err(gone()), (store, inner, away, told)));
                }
                tokio::select! {
                    biased;
                    Ok(()) = away.changed() => {}
                    event = inner.next() => return event.map(|event| (event, (store, inner, away, told))),
                }
            }
        })
        .boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn an_hour_without_the_store_and_a_hundred_thousand_events_stay_bounded() {
    let log = Log::listen();
    let node = Node::with_ttl(Duration::from_secs(7200));
    node.join(1..=20);
    let store = Away::new(&node.store);
    let mut agent = node.run_over(&store).once_ready().await;
    let (writes, calls) = (node.kernel.writes(), store.calls.load(Ordering::Relaxed));
    agent.drain();
    log.take();
    store.leave();
    pass(3600.0).await;
    assert!(matches!(agent.status().store, Contact::Lost { .. }));
    assert_eq!((agent.status().phase, node.kernel.writes()), (Phase::Ready, writes), "the data plane stays");
    let events = agent.drain();
    assert_eq!(events.iter().filter(|event| matches!(event, Event::StoreLost(_))).count(), 1, "{events:?}");
    assert!(events.len() <= 4, "{events:?}");
    assert!(store.calls.load(Ordering::Relaxed) - calls <= 900);
    assert!(log.take().len() <= 60, "more than a line a minute");
    store.come_back();
    agent.until(|status| status.store == Contact::Live).await;
    log.take();
    for round in 0..1000 {
        for n in 1..=50 {
            let mut lease = peer(n);
            lease.attrs.public_ip.v4 = Some(std::net::Ipv4Addr::new(198, 51, (round % 200) as u8, n).into());
            node.store.insert([lease]);
            node.store.insert([peer(n)]);
        }
        tokio::task::yield_now().await;
    }
    pass(1.0).await;
    assert!(log.take().len() <= 10);
    let events = agent.drain();
    assert!(matches!(events[0], Event::Missed(_)), "{:?}", events[0]);
    assert!(events.len() <= 1025);
    agent.audited().await;
    assert!(agent.handle.plan().await.unwrap().plan.is_empty());
    assert!((1..=50).all(|n| node.has_route(subnet(n))));
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_hints_costs_at_most_five_audits_a_second() {
    let (node, _agent) = Node::ready_beside(1..=5).await;
    pass(5.0).await;
    let (reads, writes) = (node.kernel.reads(), node.kernel.writes());
    for _ in 0..10_000 {
        node.kernel.carrier_change("tun4.1").unwrap();
        pass(0.001).await;
    }
    let audits = node.kernel.reads() - reads;
    assert!((5..=51).contains(&audits), "{audits} in 10 s");
    assert_eq!(node.kernel.writes(), writes);
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_without_pause_for_a_plan_share_at_most_five_looks_a_second() {
    let (node, agent) = Node::ready_beside(1..=5).await;
    pass(5.0).await;
    let reads = node.kernel.reads();
    let begun = Instant::now();
    let asker = || async {
        for _ in 0..50 {
            assert!(agent.handle.plan().await.unwrap().plan.is_empty());
        }
    };
    futures_util::future::join_all((0..10).map(|_| asker())).await;
    let (looks, seconds) = (node.kernel.reads() - reads, begun.elapsed().as_secs());
    assert!((50..=55).contains(&looks) && seconds >= 9, "{looks} in {seconds} s");
    // One who asks no more is not looked for.
    let reads = node.kernel.reads();
    assert!(agent.handle.plan().await.is_ok());
    for _ in 0..5 {
        let mut asked = Box::pin(agent.handle.plan());
        assert!(asked.as_mut().now_or_never().is_none());
    }
    pass(1.0).await;
    assert!(node.kernel.reads() - reads <= 2, "{}", node.kernel.reads() - reads);
}

/// A clock that goes on whenever it is looked at, and has somebody ask each time.
struct Curious {
    real: TokioClock,
    looks: AtomicU64,
    handle: OnceLock<Handle>,
}

#[async_trait]
impl Clock for Curious {
    fn now(&self) -> BootTime {
        if let Some(handle) = self.handle.get() {
            // Who asks does not wait for the answer.
            let _ = handle.explain("nobody").now_or_never();
            assert!(self.looks.fetch_add(1, Ordering::Relaxed) < 1_000_000, "nothing but questions");
        }
        self.real.now().after(Duration::from_micros(100 * self.looks.load(Ordering::Relaxed)))
    }

    async fn sleep_until(&self, deadline: BootTime) {
        while self.now() < deadline {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn questions_without_end_do_not_hold_up_the_end_of_a_lease() {
    let real = TokioClock::new();
    let clock = Arc::new(Curious { real, looks: AtomicU64::new(0), handle: OnceLock::new() });
    let store = MemorySubnets::with_ttl(config(), Some(Duration::from_secs(10)), Arc::clone(&clock) as _);
    let node = Node::new(200, &store, &Arc::new(real));
    let store = Away::new(&node.store);
    let mut agent = node.run_as_over(node.builder().clock(Arc::clone(&clock) as _), &store).once_ready().await;
    let ends = agent.status().lease.as_ref().unwrap().expires.unwrap();
    store.hang();
    clock.handle.set(agent.handle.clone()).unwrap();
    agent.event(|event| matches!(event, Event::LeaseLost(_))).await;
    let late = clock.now().since(ends);
    assert!(late < Duration::from_secs(1), "{late:?}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_at_rest_rests() {
    let (node, _agent) = Node::ready_beside(1..=5).await;
    pass(5.0).await;
    let (reads, writes) = (node.kernel.reads(), node.kernel.writes());
    pass(3000.0).await;
    let audits = node.kernel.reads() - reads;
    assert!((90..=112).contains(&audits), "{audits} audits in 3000 s");
    assert_eq!(node.kernel.writes(), writes);
}
