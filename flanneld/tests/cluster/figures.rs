//! Ours and Go flannel side by side, from `kubectl apply` on: `./test cluster figures`.

use std::path::Path;
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use testkit::cluster::manifests;
use testkit::probe;

use crate::bed::{Bed, GO, Kind, OURS, PATIENCE, Traffic};

const RUNS: u32 = 5;
/// Each run applies the manifest this much later than the run before, because kubelets retry with back-off.
const PHASE: Duration = Duration::from_secs(1);

/// What one run measured: seconds, a number of sandboxes, MiB.
#[derive(Debug)]
struct Run {
    nodes: f64,
    ping: f64,
    agents: f64,
    failed: f64,
    restart: f64,
    memory: f64,
}

/// Measures both, alternately, and prints the medians.
pub(crate) fn compare(dir: &Path) {
    let mut runs: [Vec<Run>; 2] = Default::default();
    for nth in 0..RUNS {
        for (kind, runs) in [OURS, GO].iter().zip(&mut runs) {
            let dir = dir.join(format!("{}-{nth}", kind.set));
            std::fs::create_dir(&dir).unwrap();
            let run = measure(&dir, kind, PHASE * nth);
            println!("{} {run:?}", kind.set);
            runs.push(run);
            std::fs::remove_dir_all(&dir).unwrap();
        }
    }
    let row = |name: &str, unit: &str, of: fn(&Run) -> f64| {
        let [ours, go] = runs.each_ref().map(|runs| {
            let mut values: Vec<_> = runs.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        });
        println!("{name:32} {ours:8.2} {go:8.2} {unit:4} ratio {:.2}", ours / go);
    };
    println!("{:32} {:>8} {:>8}", "after kubectl apply", "ours", "Go");
    row("both nodes Ready", "s", |run| run.nodes);
    row("first ping across nodes", "s", |run| run.ping);
    row("agents Ready", "s", |run| run.agents);
    row("failed sandboxes", "", |run| run.failed);
    row("rollout restart", "s", |run| run.restart);
    row("agent's memory", "MiB", |run| run.memory);
}

fn measure(dir: &Path, kind: &Kind, phase: Duration) -> Run {
    let bed = Bed::with_go_flannel(dir);
    let cluster = &bed.cluster;
    for (name, nth) in [("one", 1), ("two", 2)] {
        cluster.create_pod(name, nth).unwrap();
    }
    let manifest = if kind.set == OURS.set { manifests::ours() } else { manifests::go_flannel() }.unwrap();
    std::thread::sleep(phase);
    let start = Instant::now();
    let seconds = |at: Duration| at.as_secs_f64();
    bed.apply(&manifest);
    let (nodes, agents, ping, pods) = std::thread::scope(|scope| {
        let nodes = scope.spawn(|| {
            cluster.until("all nodes are ready", |cluster| cluster.nodes_are_ready()).unwrap();
            start.elapsed()
        });
        let agents = scope.spawn(|| {
            bed.until_agents_are_ready(kind);
            start.elapsed()
        });
        let pods = ["one", "two"].map(|name| cluster.pod(name).unwrap());
        probe::until_reply(&pods[0].ns, pods[1].addr(Family::V4).unwrap(), PATIENCE).unwrap();
        let ping = start.elapsed();
        (nodes.join().unwrap(), agents.join().unwrap(), ping, pods)
    });
    let failed = bed.failed_sandboxes().len();
    let traffic = Traffic::start(&pods);
    let restart = bed.restart(kind);
    traffic.arrived("a restart of all agents");
    Run {
        nodes: seconds(nodes),
        ping: seconds(ping),
        agents: seconds(agents),
        failed: failed as f64,
        restart: seconds(restart),
        memory: memory(&bed),
    }
}

/// Returns the resident memory of the agent on node 1, in MiB.
fn memory(bed: &Bed) -> f64 {
    let node = &bed.cluster.nodes()[0];
    let pid = node.run(&["pgrep", "-x", "flanneld"]).unwrap();
    let status = node.run(&["cat", &format!("/proc/{}/status", pid.trim())]).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}
