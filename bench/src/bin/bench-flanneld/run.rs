//! flanneld with etcd, side by side with Go flannel: what an operator sees of either.

use std::time::{Duration, Instant};

use bench::bed::{in_bed, ip};
use bench::peers::{Backend, LEN, MOST, subnet};
use bench::{Error, bed};

use crate::beside::{Row, print};
use crate::routes::Routes;
use bench::agent::{Agent, Programs};
use bench::cluster::Cluster;

/// Leases put one by one in each run.
const SINGLES: u32 = 100;
/// Leases put at once.
const BURST: u32 = 1000;
/// How long after everything is programmed processor time and memory are read: what follows a start counts too.
pub(crate) const AFTERMATH: Duration = Duration::from_secs(2);
/// How long anything may take before the benchmark gives up: Go flannel needs 19 s for 10 000.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What one run of a program showed.
struct Run {
    start: Duration,
    cpu: Duration,
    memory: f64,
    peak: f64,
    puts: Vec<Duration>,
    burst: Duration,
}

/// Measures each program `runs` times with `n` leases in etcd, in turn.
pub(crate) fn compare(programs: &Programs, n: u32, runs: u32) -> Result<(), Error> {
    if n > MOST - SINGLES - BURST {
        return Err(format!("{n} leases: the network has room for {MOST}").into());
    }
    let measured = in_bed(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let cluster = runtime.block_on(Cluster::with_peers(Backend::Vxlan, n, None))?;
        let mut measured = Vec::new();
        for _ in 0..runs {
            for program in programs.all() {
                let dir = tempfile::tempdir()?;
                let routes = Routes::listen(LEN)?;
                let started = Instant::now();
                let agent = Agent::start(programs, program, 0, &cluster.args(), dir.path())?;
                let run = runtime.block_on(run(&cluster, &agent, &routes, started, n));
                let run = run.map_err(|error| format!("{program:?}, {n} leases: {error}\n{}", agent.last_words()))?;
                agent.stop()?;
                measured.push((program, run));
                runtime.block_on(cluster.remove(n + 1..=n + SINGLES + BURST))?;
                ip("link delete flannel.1")?;
            }
        }
        Ok(measured)
    })?;
    let print = |name, unit, most, value: &dyn Fn(&Run) -> Vec<f64>| {
        print(&measured, Row { name, n, unit, most, most_ratio: None }, value);
    };
    let at = |small: f64, large: f64| match n {
        0..=1_000 => Some(small),
        1_001..=10_000 => Some(large),
        _ => None,
    };
    print("flanneld_start", "s", at(0.25, 0.9), &|run| vec![run.start.as_secs_f64()]);
    print("flanneld_cpu", "s", at(0.8, 0.8), &|run| vec![run.cpu.as_secs_f64()]);
    print("flanneld_memory", "MiB", at(20.0, 20.0), &|run| vec![run.memory]);
    print("flanneld_memory_peak", "MiB", None, &|run| vec![run.peak]);
    print("flanneld_put", "ms", at(2.0, 2.0), &|run| run.puts.iter().map(|took| took.as_secs_f64() * 1e3).collect());
    print("flanneld_burst", "s", at(0.25, 0.25), &|run| vec![run.burst.as_secs_f64()]);
    Ok(())
}

async fn run(cluster: &Cluster, agent: &Agent, routes: &Routes, started: Instant, n: u32) -> Result<Run, Error> {
    let start = routes.until(n as usize, PATIENCE)? - started;
    tokio::time::sleep(AFTERMATH).await;
    let cpu = agent.cpu()?;
    let (memory, peak) = agent.memory()?;

    let mut puts = Vec::new();
    let singles: Vec<u32> = (n + 1..=n + SINGLES).collect();
    for put in cluster.prepare(&singles).await?.chunks(1) {
        let begun = Instant::now();
        cluster.put(put).await?;
        puts.push(routes.until_to(subnet(put[0].n()), PATIENCE)?.saturating_duration_since(begun));
    }

    let last = n + SINGLES + BURST;
    let many: Vec<u32> = (n + SINGLES + 1..=last).collect();
    let many = cluster.prepare(&many).await?;
    let begun = Instant::now();
    cluster.put(&many).await?;
    let burst = routes.until(last as usize, PATIENCE)?.saturating_duration_since(begun);
    complete(routes.count())?;
    Ok(Run { start, cpu, memory, peak, puts, burst })
}

/// Each route has its neighbour and its forwarding entry.
pub(crate) fn complete(routes: usize) -> Result<(), Error> {
    for (program, object) in [("ip", "neighbour"), ("bridge", "fdb")] {
        let listing = bed::output(program, &[object, "show", "dev", "flannel.1"])?.to_lowercase();
        let entries = listing.lines().filter(|line| line.contains("permanent")).count();
        if entries < routes {
            return Err(format!("{routes} routes, and {entries} entries shown by {program} {object}").into());
        }
    }
    Ok(())
}
