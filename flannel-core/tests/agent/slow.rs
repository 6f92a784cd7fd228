//! A store whose watch lags behind its calls.

use std::sync::atomic::Ordering;
use std::time::Duration;

use flannel_core::net::{Dual, Family};
use flannel_core::overlay::Event;
use futures_util::StreamExt;
use tokio::time::{Instant, sleep_until};

use crate::node::{Node, add_defaults, eventually, pass, public, subnet};
use crate::storms::Away;
use crate::watch::{Watch, Watched};

/// How far the watch lags: longer than any back-off of the agent, and than the time between two audits.
const LAG: Duration = Duration::from_secs(90);

/// The addresses that the node has one after the other, in the last byte.
const ADDRESSES: [u8; 4] = [77, 78, 79, 80];
/// Seconds between two renewals at least: half a lease's life, or a tenth less.
const SOONEST: u64 = 45;

/// Calls are answered at once. What the watch shows is as old as [`LAG`], but for the first list.
fn late(mut events: Watch) -> Watch {
    let (late, mut shown) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut first = true;
        while let Some(event) = events.next().await {
            let lag = if std::mem::take(&mut first) { Duration::ZERO } else { LAG };
            if late.send((Instant::now() + lag, event)).is_err() {
                return;
            }
        }
    });
    let next = async move || {
        let (due, event) = shown.recv().await?;
        sleep_until(due).await;
        Some(event)
    };
    futures_util::stream::unfold(next, |mut next| async move { next().await.map(|event| (event, next)) }).boxed()
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_lags_costs_the_node_no_lease_and_no_write_and_its_peers_come_in_the_end() {
    let node = Node::with_ttl(Duration::from_secs(100));
    let store = Away::new(&node.store);
    let mut agent = node.run_over(&Watched::new(&store, late)).once_ready().await;
    let subnets = node.record().unwrap().subnets;
    let (writes, begun) = (store.writes.load(Ordering::Relaxed), Instant::now());
    // What the node publishes changes again and again; the watch shows each former state long after it.
    for n in ADDRESSES {
        let addr = agent.status().uplink.up().unwrap().addrs.v4.unwrap();
        node.kernel.remove_address("eth0", format!("{addr}/24").parse().unwrap()).unwrap();
        node.kernel.add_address("eth0", format!("192.0.2.{n}/24").parse().unwrap()).unwrap();
        add_defaults(&node.kernel, node.kernel.link_index("eth0").unwrap());
        let wanted = Dual { v4: Some(public(Family::V4, n)), v6: None };
        eventually("published", || node.record().is_some_and(|lease| lease.attrs.public_ip == wanted)).await;
        node.join([n - 70]);
    }
    pass(10.0 * LAG.as_secs_f64()).await;
    let most = ADDRESSES.len() as u64 + begun.elapsed().as_secs() / SOONEST + 1;
    let wrote = store.writes.load(Ordering::Relaxed) - writes;
    assert!(wrote <= most, "{wrote} writes, {most} were due");
    let told = agent.drain();
    let lost = |event: &Event| matches!(event, Event::LeaseLost(_) | Event::LeaseAcquired(_));
    assert!(!told.iter().skip(1).any(lost), "{told:?}");
    assert_eq!(node.record().unwrap().subnets, subnets);
    assert_eq!(node.record().unwrap().attrs.public_ip.v4, ADDRESSES.last().map(|last| public(Family::V4, *last)));
    assert!(ADDRESSES.into_iter().all(|n| node.has_route(subnet(n - 70))));
    agent.audited().await;
    assert!(agent.handle.plan().await.unwrap().plan.is_empty());
}
