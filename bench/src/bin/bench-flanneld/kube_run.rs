//! flanneld with Kubernetes, side by side with Go flannel.

use std::time::{Duration, Instant};

use bench::Error;
use bench::bed::{in_bed, ip};
use tokio::time::{MissedTickBehavior, interval};

use crate::beside::{Row, print};
use crate::nodes::{LEN, MOST, Nodes, node, subnet};
use crate::routes::Routes;
use crate::run::{AFTERMATH, PATIENCE, complete};
use bench::agent::{Agent, Programs};

/// Nodes made one by one in each run.
const SINGLES: u32 = 20;
/// How often some Node says that it lives: 5 000 kubelets do every 5 minutes, and now and then in between.
const HEARTBEATS: Duration = Duration::from_millis(50);
/// Heartbeats in each run: half a minute.
const BEATS: u32 = 600;

/// What one run of a program showed.
struct Run {
    start: Duration,
    cpu: Duration,
    memory: f64,
    peak: f64,
    read: u64,
    /// Of one core.
    share: f64,
    singles: Vec<Duration>,
}

/// Measures each program `runs` times with `n` Nodes, in turn.
pub(crate) fn compare(programs: &Programs, n: u32, runs: u32) -> Result<(), Error> {
    if n > MOST - SINGLES {
        return Err(format!("{n} Nodes: the network has room for {MOST}").into());
    }
    let measured = in_bed(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let shared = tempfile::tempdir()?;
        let nodes = runtime.block_on(Nodes::with_peers(n, shared.path()))?;
        let mut measured = Vec::new();
        for _ in 0..runs {
            for program in programs.all() {
                let dir = tempfile::tempdir()?;
                let routes = Routes::listen(LEN)?;
                nodes.read()?;
                let started = Instant::now();
                let agent = Agent::start(programs, program, 0, nodes.args(), dir.path())?;
                let run = runtime.block_on(run(&nodes, &agent, &routes, started, n));
                let run = run.map_err(|error| format!("{program:?}, {n} Nodes: {error}\n{}", agent.last_words()))?;
                agent.stop()?;
                measured.push((program, run));
                runtime.block_on(nodes.remove(n + 1..=n + SINGLES))?;
                ip("link delete flannel.1")?;
            }
        }
        Ok(measured)
    })?;
    let print = |name, unit, most: Option<f64>, most_ratio: Option<f64>, value: &dyn Fn(&Run) -> Vec<f64>| {
        // Promised for so many.
        let promised = |most: Option<f64>| most.filter(|_| n <= 5_000);
        print(&measured, Row { name, n, unit, most: promised(most), most_ratio: promised(most_ratio) }, value);
    };
    print("flanneld_kube_start", "s", Some(0.9), Some(0.25), &|run| vec![run.start.as_secs_f64()]);
    print("flanneld_kube_cpu", "s", None, None, &|run| vec![run.cpu.as_secs_f64()]);
    print("flanneld_kube_memory", "MiB", Some(20.0), None, &|run| vec![run.memory]);
    print("flanneld_kube_memory_peak", "MiB", Some(32.0), None, &|run| vec![run.peak]);
    print("flanneld_kube_read", "MB", None, Some(1.0), &|run| vec![run.read as f64 / 1e6]);
    print("flanneld_kube_heartbeats", "%", Some(0.7), Some(0.35), &|run| vec![run.share * 100.0]);
    print("flanneld_kube_node", "ms", Some(3.0), Some(0.8), &|run| {
        run.singles.iter().map(|took| took.as_secs_f64() * 1e3).collect()
    });
    Ok(())
}

async fn run(nodes: &Nodes, agent: &Agent, routes: &Routes, started: Instant, n: u32) -> Result<Run, Error> {
    let start = routes.until(n as usize, PATIENCE)? - started;
    tokio::time::sleep(AFTERMATH).await;
    let cpu = agent.cpu()?;
    let (memory, peak) = agent.memory()?;
    let read = nodes.read()?;

    let mut ticks = interval(HEARTBEATS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let begun = Instant::now();
    for beat in 1..=BEATS {
        ticks.tick().await;
        // Nodes from all over the list.
        nodes.heartbeat(1 + beat.wrapping_mul(2_654_435_761) % n).await?;
    }
    let share = (agent.cpu()? - cpu).as_secs_f64() / begun.elapsed().as_secs_f64();

    let mut singles = Vec::new();
    for peer in n + 1..=n + SINGLES {
        let new = node(peer);
        let begun = Instant::now();
        nodes.create(new).await?;
        singles.push(routes.until_to(subnet(peer), PATIENCE)?.saturating_duration_since(begun));
    }
    complete(routes.count())?;
    Ok(Run { start, cpu, memory, peak, read, share, singles })
}
