//! Pings between all pods, and the throughput of one stream.

use std::sync::Arc;
use std::time::Duration;

use flannel_core::net::Family;
use testkit::{Pod, probe};

use crate::Error;
use crate::cluster::{Cluster, blocking};
use crate::screen::{Align, Screen, Style};

/// How long a first reply may take. If a neighbour solicitation is lost, the kernel sends another after a second, and
/// request and reply each need one.
const PATIENCE: Duration = Duration::from_secs(5);
const STREAM: Duration = Duration::from_secs(1);
/// The most nodes that fit in a table.
const TABLE: usize = 9;

/// The result of the pings from one pod to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// The round trips, in the order of the cluster's families; `None` without a reply.
    pub(crate) trips: Vec<Option<Duration>>,
}

impl Pair {
    /// Whether there was a reply in every family.
    pub(crate) fn is_good(&self) -> bool {
        self.trips.iter().all(Option::is_some)
    }
}

/// Pings from every pod to every other.
pub(crate) async fn ping_all(cluster: &Cluster) -> Result<Vec<Pair>, Error> {
    let pods: Arc<[Pod]> = cluster.members.iter().map(|member| member.pod.clone()).collect();
    let families: Arc<[Family]> = cluster.families().into();
    let mut rows = Vec::new();
    for from in 0..pods.len() {
        let (pods, families) = (Arc::clone(&pods), Arc::clone(&families));
        rows.push(tokio::task::spawn_blocking(move || row(from, &pods, &families)));
    }
    let mut pairs = Vec::new();
    for row in rows {
        pairs.extend(row.await??);
    }
    Ok(pairs)
}

fn row(from: usize, pods: &[Pod], families: &[Family]) -> Result<Vec<Pair>, testkit::Error> {
    let mut pairs = Vec::new();
    for to in (0..pods.len()).filter(|to| *to != from) {
        let mut trips = Vec::new();
        for family in families {
            let addr = pods[to].addr(*family)?;
            // The first ping also waits for address resolution; the second measures the round trip.
            let first = probe::until_reply(&pods[from].ns, addr, PATIENCE).ok();
            trips.push(first.and_then(|_| probe::ping(&pods[from].ns, addr, PATIENCE).ok()));
        }
        pairs.push(Pair { from, to, trips });
    }
    Ok(pairs)
}

pub(crate) fn show(screen: &mut Screen, cluster: &Cluster, pairs: &[Pair]) -> Result<(), Error> {
    for (nth, family) in cluster.families().iter().enumerate() {
        let trips: Vec<_> = pairs.iter().map(|pair| (pair, pair.trips.get(nth).copied().flatten())).collect();
        let good = trips.iter().filter(|(_, trip)| trip.is_some()).count();
        let mut times: Vec<_> = trips.iter().filter_map(|(_, trip)| *trip).collect();
        times.sort();
        let text = format!("{family}: {good} of {} pings answered", pairs.len());
        let style = if good == pairs.len() { Style::Good } else { Style::Bad };
        let middle = times.get(times.len() / 2).map(|time| format!(", median {} ms", millis(*time)));
        screen.line(&[(&text, style), (&middle.unwrap_or_default(), Style::Plain)])?;
        if cluster.members.len() <= TABLE {
            table(screen, cluster, &trips)?;
        }
    }
    Ok(())
}

fn table(screen: &mut Screen, cluster: &Cluster, trips: &[(&Pair, Option<Duration>)]) -> Result<(), Error> {
    let names: Vec<String> = cluster.nodes().iter().map(|node| node.name.clone()).collect();
    let mut rows = vec![["ms".to_owned()].into_iter().chain(names.iter().map(|name| format!("to {name}"))).collect()];
    // "to node1" eight times is too wide.
    if names.len() > 6 {
        rows = vec![["ms to".to_owned()].into_iter().chain(names.iter().cloned()).collect::<Vec<_>>()];
    }
    for (from, name) in names.iter().enumerate() {
        let mut row = vec![name.clone()];
        for to in 0..names.len() {
            let found = trips.iter().find(|(pair, _)| (pair.from, pair.to) == (from, to));
            row.push(match found {
                None => "-".to_owned(),
                Some((_, Some(trip))) => millis(*trip),
                Some((_, None)) => "lost".to_owned(),
            });
        }
        rows.push(row);
    }
    let aligns: Vec<_> = [Align::Left].into_iter().chain(std::iter::repeat_n(Align::Right, names.len())).collect();
    Ok(screen.table(&aligns, &rows)?)
}

fn millis(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1e3)
}

/// Returns the throughput of one TCP stream from the first pod to the second, in Gbit/s, or `None` without a
/// connection.
pub(crate) async fn throughput(screen: &mut Screen, cluster: &Cluster) -> Result<Option<f64>, Error> {
    let [one, two, ..] = &cluster.members[..] else { return Ok(None) };
    let Some(family) = cluster.families().first() else { return Ok(None) };
    let (from, to, addr) = (one.pod.ns.clone(), two.pod.ns.clone(), two.pod.addr(*family)?);
    screen.begin("One TCP stream for a second, node1's pod to node2's: ", 0)?;
    match blocking(move || probe::throughput(&from, &to, addr, STREAM)).await {
        Ok(carried) => {
            screen.end(&format!("{:.1} Gbit/s", carried.gbit_per_second()), Style::Good)?;
            Ok(Some(carried.gbit_per_second()))
        }
        Err(error) => {
            screen.end("failed", Style::Bad)?;
            screen.wrapped(4, 0, &crate::chain(&*error), Style::Plain)?;
            Ok(None)
        }
    }
}
