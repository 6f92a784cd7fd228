//! The benchmarks.

use std::time::{Duration, Instant};

use flannel_core::lease::LeaseKey;
use flannel_core::overlay::Teardown;

use bench::Error;
use bench::bed::{in_bed, ip};
use bench::peers::{self, peer, prefix};
use bench::report::{median, resident, row};

use crate::floor::{Floor, Spread};
use crate::node::{self, store};

/// Runs `work` on an agent of `n` peers, in a namespace of its own.
fn with_node<T: Send, F: Future<Output = Result<T, Error>>>(
    n: u32,
    work: impl FnOnce(testkit::Agent, flannel_core::testing::MemorySubnets, Duration) -> F + Send,
) -> Result<T, Error> {
    in_bed(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let store = store(n)?;
            let (node, took) = node::start(&store).await?;
            work(node, store, took).await
        })
    })
}

fn ours(n: u32) -> Result<Duration, Error> {
    with_node(n, |node, _, took| async move {
        node::stop(node, Teardown::Keep).await?;
        Ok(took)
    })
}

pub(crate) fn scale(n: u32, runs: u32) -> Result<(), Error> {
    /// Past this a floor with one protocol takes minutes.
    const PLAIN: u32 = 10_000;
    let rows = [("scale", Spread::Ours, peers::MOST), ("scale_plain", Spread::None, PLAIN)];
    for (name, spread, _) in rows.into_iter().filter(|(_, _, most)| n <= *most) {
        let floor = Floor::new(n, spread)?;
        let (mut us, mut them) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            them.push(in_bed(|| floor.program())?.as_secs_f64());
            us.push(ours(n)?.as_secs_f64());
        }
        row(name, n, median(us), "s", Some(median(them)));
    }
    Ok(())
}

pub(crate) fn audit(n: u32, runs: u32) -> Result<(), Error> {
    let took = with_node(n, |node, _, _| async move {
        node::settle(&node).await;
        let mut took = Vec::new();
        for _ in 0..runs {
            let started = Instant::now();
            let preview = node.handle.plan().await?;
            took.push(started.elapsed().as_secs_f64());
            if !preview.plan.is_empty() {
                return Err(format!("an audit with nothing to do has {} writes", preview.plan.ops.len()).into());
            }
        }
        node::stop(node, Teardown::Keep).await?;
        Ok(took)
    })?;
    row("audit", n, median(took), "s", None);
    Ok(())
}

pub(crate) fn event(n: u32, runs: u32) -> Result<(), Error> {
    /// Single events measured in each run.
    const SINGLES: u32 = 100;
    /// Events of a burst.
    const BURST: u32 = 1000;
    let (mut ones, mut bursts) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let (singles, burst) = with_node(n, |node, store, _| async move {
            node::settle(&node).await;
            let audits = node.handle.status().audits;
            let mut singles = Vec::new();
            for extra in 1..=SINGLES {
                let rounds = node.handle.status().lease_rounds;
                let started = Instant::now();
                store.insert([peer(n + extra)]);
                node.until(|status| status.lease_rounds > rounds).await;
                singles.push(started.elapsed().as_secs_f64() * 1e3);
            }
            let joined = n + SINGLES;
            let wanted = (joined + BURST) as usize;
            let started = Instant::now();
            store.insert((joined + 1..=joined + BURST).map(peer));
            let rounds = node.handle.status().lease_rounds;
            node.until(|status| status.peers.accepted == wanted && status.lease_rounds > rounds).await;
            let burst = started.elapsed().as_secs_f64();
            let preview = node.handle.plan().await?;
            if !preview.plan.is_empty() || node.handle.status().audits != audits {
                return Err("a lease event left something undone or caused an audit".into());
            }
            node::stop(node, Teardown::Keep).await?;
            Ok((singles, burst))
        })?;
        ones.extend(singles);
        bursts.push(burst);
    }
    row("event_one", n, median(ones), "ms", None);
    row("event_burst", n, median(bursts), "s", None);
    Ok(())
}

pub(crate) fn heal(n: u32, runs: u32) -> Result<(), Error> {
    let took = with_node(n, |node, _, _| async move {
        node::settle(&node).await;
        let mut took = Vec::new();
        for _ in 0..runs {
            let repaired = node.handle.status().drift_repaired;
            ip("route flush table main proto 200")?;
            for protocol in 201..232 {
                ip(&format!("route flush table main proto {protocol}"))?;
            }
            let started = Instant::now();
            node.until(|status| status.drift_repaired > repaired).await;
            while !node.handle.plan().await?.plan.is_empty() {
                tokio::task::yield_now().await;
            }
            took.push(started.elapsed().as_secs_f64());
        }
        node::stop(node, Teardown::Keep).await?;
        Ok(took)
    })?;
    row("heal", n, median(took), "s", None);
    Ok(())
}

pub(crate) fn teardown(n: u32, runs: u32) -> Result<(), Error> {
    let mut took = Vec::new();
    for _ in 0..runs {
        took.push(with_node(n, |node, _, _| async move {
            node::settle(&node).await;
            Ok(node::stop(node, Teardown::Remove).await?.as_secs_f64())
        })?);
    }
    row("teardown", n, median(took), "s", None);
    Ok(())
}

pub(crate) fn memory(n: u32) -> Result<(), Error> {
    let (steady, peak) = with_node(n, |node, store, _| async move {
        node::settle(&node).await;
        // Some life, so that it is not the memory of a start alone: a hundred peers go and come, and audits happen.
        for _ in 0..5 {
            let keys: Vec<_> = (1..=100).map(|peer| LeaseKey::new(&format!("node-{peer}"))).collect();
            store.delete_all(&keys);
            store.insert((1..=100).map(peer));
            ip(&format!("route delete {}", prefix(200)))?;
            let repaired = node.handle.status().drift_repaired;
            node.until(|status| status.drift_repaired > repaired).await;
        }
        let memory = resident("/proc/self/status")?;
        node::stop(node, Teardown::Keep).await?;
        Ok(memory)
    })?;
    row("memory_steady", n, steady, "MiB", None);
    row("memory_peak", n, peak, "MiB", None);
    Ok(())
}
