//! Many nodes: a thousand join at once, and more want a subnet than there are.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flannel_core::clock::TokioClock;
use flannel_core::lease::{Lease, LeaseKey};
use flannel_core::net::{Dual, Family, MacAddr, Prefix};
use flannel_core::testing::MemorySubnets;
use tokio::time::Instant;

use crate::node::{Agent, Node, parse, pass, peer, pool, subnet};
use crate::storms::Away;
use crate::tunnel::data;

const JOINS: u16 = 1000;
const WITHIN: Duration = Duration::from_secs(10);
/// Nodes that were there before, and that come amid the others.
const AGENTS: u8 = 4;

/// The lease of joining node `n` of many.
fn joining(n: u16) -> Lease {
    let [high, low] = n.to_be_bytes();
    let mut lease = peer(1);
    lease.key = LeaseKey::new(&format!("joining-{n}"));
    lease.subnets = Dual { v4: Some(Prefix::new(Ipv4Addr::new(10, 100 + high, low, 0).into(), 24).unwrap()), v6: None };
    lease.attrs.public_ip = Dual { v4: Some(Ipv4Addr::new(198, 18, high, low).into()), v6: None };
    lease.attrs.backend_data = Dual { v4: Some(data(MacAddr([2, 0, 0, 9, high, low]))), v6: None };
    lease
}

#[tokio::test(start_paused = true)]
async fn a_thousand_nodes_that_join_within_ten_seconds_are_programmed_everywhere_and_once_each() {
    let clock = Arc::new(TokioClock::new());
    let config = parse(r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"tunnel"}}"#);
    let store = MemorySubnets::with_ttl(config, None, Arc::clone(&clock) as _);
    let start = async |n: u8| {
        let node = Node::new(200 + n, &store, &clock);
        let seen = Away::new(&node.store);
        let agent = node.run_over(&seen).once_ready().await;
        (node, agent, seen)
    };
    let mut nodes = Vec::new();
    for n in 0..AGENTS / 2 {
        nodes.push(start(n).await);
    }
    pass(5.0).await;
    let work = |(node, _, seen): &(Node, Agent, Away)| {
        [node.kernel.writes(), node.kernel.reads(), seen.calls.load(Ordering::Relaxed)]
    };
    let before: Vec<_> = nodes.iter().map(work).collect();
    for n in 0..JOINS {
        store.insert([joining(n)]);
        if n % (JOINS / 2) == JOINS / 4 {
            nodes.push(start(u8::try_from(nodes.len()).unwrap()).await);
        }
        tokio::time::sleep(WITHIN / u32::from(JOINS)).await;
    }
    let peers = usize::from(JOINS) + usize::from(AGENTS) - 1;
    for (_, agent, _) in &nodes {
        let status = agent.until(|status| status.peers.accepted == peers && status.failed_writes == 0).await;
        assert_eq!((status.peers.quarantined, status.own_trouble), (0, None));
    }
    // A forwarding entry, a neighbour and a route for each, once; an audit where the timer is due, and no more; the
    // store is not asked at all.
    for (one, before) in nodes.iter().zip(&before) {
        let [writes, reads, calls] = work(one);
        assert_eq!(writes - before[0], 3 * (u64::from(JOINS) + u64::from(AGENTS / 2)));
        assert!(reads - before[1] <= 2, "{} audits", reads - before[1]);
        assert_eq!(calls - before[2], 0);
    }
    for (node, agent, _) in &nodes {
        agent.audited().await;
        assert!(agent.handle.plan().await.unwrap().plan.is_empty());
        for n in (0..JOINS).step_by(97).chain([JOINS - 1]) {
            assert!(node.has_route(*joining(n).subnets.get(Family::V4).unwrap()), "{n}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_waits_for_a_subnet_has_it_within_five_seconds_of_its_being_free_and_asks_once_a_second_at_most() {
    // Whenever in the back-off it becomes free.
    for waited in [0.1, 1.7, 3.0, 30.0, 601.7] {
        let node = Node::alone();
        node.store.set_config(pool(9));
        node.join([9]);
        let seen = Away::new(&node.store);
        let agent = node.run_over(&seen);
        agent.until(|status| status.last_error.is_some()).await;
        let tries = seen.acquires.load(Ordering::Relaxed);
        pass(waited).await;
        let tried = seen.acquires.load(Ordering::Relaxed) - tries;
        assert!(tried as f64 <= waited + 1.0, "{tried} tries in {waited} s");
        node.leave([9]);
        let free = Instant::now();
        let lease = agent.until(|status| status.lease.is_some()).await.lease.unwrap();
        assert_eq!(lease.subnets.v4, Some(subnet(9)));
        assert!(free.elapsed() <= Duration::from_secs(5), "{:?} after {waited} s", free.elapsed());
        agent.ready().await;
    }
}
