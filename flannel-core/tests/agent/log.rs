//! What an operator reads at the default level.

use std::cell::RefCell;
use std::fmt::{Debug, Write};
use std::sync::Once;
use std::time::Duration;

use flannel_core::net::Family;
use flannel_core::overlay::{Contact, Phase};
use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::node::{Node, pass, peer};
use crate::tunnel::mac_of;

thread_local! {
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// The lines at INFO and above of this thread. One subscriber serves all tests: with one for each, what tracing
/// remembers of who is interested is now and then another test's, and lines are lost.
pub(crate) struct Log;

struct Router;

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}

impl Subscriber for Router {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        LINES.with_borrow_mut(|lines| lines.push(line.0));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Log {
    /// Before anything is logged: what is first told of while a subscriber is being set may never reach it.
    pub(crate) fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| tracing::subscriber::set_global_default(Router).unwrap());
    }

    pub(crate) fn listen() -> Self {
        Self::install();
        let log = Self;
        log.take();
        log
    }

    /// What was logged since the last time.
    pub(crate) fn take(&self) -> Vec<String> {
        LINES.take()
    }
}

fn line<'a>(lines: &'a [String], level: &str, part: &str) -> &'a str {
    let found = lines.iter().find(|line| line.starts_with(level) && line.contains(part));
    found.unwrap_or_else(|| panic!("no {level} {part:?} in {lines:#?}"))
}

#[tokio::test(start_paused = true)]
async fn a_start_and_the_peers_that_come_and_go_are_told() {
    let log = Log::listen();
    let (node, agent) = Node::ready_beside([1]).await;
    let lines = log.take();
    assert!(line(&lines, "INFO", "lease acquired").contains("key=node-200"));
    assert!(line(&lines, "INFO", "peers loaded").contains("peers=1"));
    line(&lines, "INFO", "all devices and routes are configured");
    node.join([2]);
    agent.until(|status| status.peers.accepted == 2).await;
    let mut alien = peer(2);
    alien.attrs.backend_type = "other".into();
    node.store.insert([alien]);
    agent.until(|status| status.quarantined.contains_key(&peer(2).key)).await;
    pass(1.0).await;
    let lines = log.take();
    assert!(line(&lines, "INFO", "peer added").contains("subnets=10.42.2.0/24 address=192.0.2.2"), "{lines:#?}");
    assert!(line(&lines, "WARN", "ignored invalid peer record").contains("key=peer-2"));
    agent.cancelled().await.unwrap();
    line(&log.take(), "INFO", "the agent has stopped");
}

#[tokio::test(start_paused = true)]
async fn a_minute_without_the_store_is_at_most_ten_lines() {
    let log = Log::listen();
    let node = Node::with_ttl(Duration::from_secs(60));
    let agent = node.run_ready().await;
    pass(1.0).await;
    log.take();
    node.store.outage();
    pass(60.0).await;
    assert!(matches!(agent.status().store, Contact::Lost { .. }));
    let lines = log.take();
    assert!(line(&lines, "WARN", "lease store unreachable").contains("unavailable"));
    line(&lines, "WARN", "lease lost");
    assert!(lines.len() <= 10, "{lines:#?}");
    node.store.recover();
    agent.until(|status| status.store == Contact::Live && status.phase == Phase::Ready).await;
    line(&log.take(), "INFO", "lease store reachable again");
}

#[tokio::test(start_paused = true)]
async fn a_store_and_an_object_that_flap_do_not_fill_the_log() {
    let log = Log::listen();
    let (node, _agent) = Node::ready_beside([1]).await;
    log.take();
    let mac = mac_of("peer-1", Family::V4);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(600) {
        // It may not be back yet.
        let _ = node.kernel.delete_fdb("tun4.1", mac, "192.0.2.1".parse().unwrap());
        node.store.cut_watches();
        pass(0.5).await;
    }
    let lines = log.take();
    line(&lines, "INFO", "restored objects that another program had changed");
    line(&lines, "WARN", "another program keeps changing this object");
    line(&lines, "INFO", "suppressed=");
    // Lost, back, snapshots and repairs, each a burst and then one a minute.
    assert!(lines.len() <= 80, "{} lines: {lines:#?}", lines.len());
}

#[tokio::test(start_paused = true)]
async fn an_own_record_that_somebody_keeps_spoiling_does_not_fill_the_log() {
    let log = Log::listen();
    let (node, _agent) = Node::ready_beside([]).await;
    log.take();
    let mut times = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(600) {
        if let Some(mut record) = node.record().filter(|record| &*record.attrs.backend_type == "tunnel") {
            record.attrs.backend_type = "other".into();
            node.store.insert([record]);
            times += 1;
        }
        pass(0.5).await;
    }
    let lines = log.take();
    assert!(line(&lines, "WARN", "other nodes reject this node's record").contains("backend type"), "{lines:#?}");
    let told = lines.iter().filter(|line| line.contains("this node's record")).count();
    // Twice for each time, each a burst and then one a minute.
    assert!(times > 20 && told <= 5 + 10, "{told} lines of {times} times");
}
