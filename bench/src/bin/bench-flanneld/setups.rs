//! flanneld alone, with each lease store, with and without a state file: start to ready, memory, commands.

use std::path::Path;
use std::time::Duration;

use bench::Error;
use bench::agent::{Agent, Programs, State};
use bench::bed::{in_bed, ip};
use bench::cluster::Cluster;
use bench::embedded;
use bench::peers::Backend;
use bench::report::{median, round};

use crate::run::AFTERMATH;

/// The commands of which the slowest counts.
const COMMANDS: &[&[&str]] = &[
    &["status"],
    &["status", "-o", "json"],
    &["peers"],
    &["peers", "-o", "wide"],
    &["peers", "-o", "json"],
    &["explain", "172.16.0.2"],
    &["plan"],
    &["doctor"],
    &["version"],
    &["help"],
];
/// How often a command is run; the best counts.
const TRIES: u32 = 3;

/// What one run showed.
struct Run {
    ready: Duration,
    memory: f64,
    command: Duration,
    slowest: &'static [&'static str],
}

/// Measures `runs` times with `n` leases.
pub(crate) fn measure(programs: &Programs, n: u32, runs: u32) -> Result<(), Error> {
    in_bed(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let cluster = runtime.block_on(Cluster::with_peers(Backend::Vxlan, n, None))?;
        let directory = tempfile::tempdir()?;
        embedded::fill(directory.path(), n)?;
        let stores = [
            ("etcd", cluster.args().to_vec()),
            ("embedded", vec![format!("-subnet-dir={}", directory.path().display())]),
        ];
        for (name, store) in &stores {
            for state in [State::File, State::None] {
                let measured: Vec<Run> = (0..runs).map(|_| run(programs, store, state)).collect::<Result<_, _>>()?;
                print(name, state, n, &measured);
            }
        }
        Ok(())
    })
}

fn run(programs: &Programs, store: &[String], state: State) -> Result<Run, Error> {
    let dir = tempfile::tempdir()?;
    let (agent, ready) = Agent::ready(programs, store, state, dir.path())?;
    std::thread::sleep(AFTERMATH);
    let (memory, _) = agent.memory()?;
    let (command, slowest) = slowest(programs, store, state, dir.path())?;
    agent.stop()?;
    ip("link delete flannel.1")?;
    Ok(Run { ready, memory, command, slowest })
}

/// Returns how long the slowest command takes, and which it is.
fn slowest(
    programs: &Programs,
    store: &[String],
    state: State,
    dir: &Path,
) -> Result<(Duration, &'static [&'static str]), Error> {
    let best = |words: &'static [&'static str]| -> Result<_, Error> {
        let tries = (0..TRIES).map(|_| programs.ask(store, state, dir, words));
        let best = tries.collect::<Result<Vec<_>, _>>()?.into_iter().min().unwrap_or_default();
        Ok((best, words))
    };
    let best: Vec<_> = COMMANDS.iter().map(|words| best(words)).collect::<Result<_, _>>()?;
    Ok(best.into_iter().max().unwrap_or_default())
}

#[expect(clippy::print_stdout, reason = "the rows are what this program is for")]
fn print(store: &str, state: State, n: u32, measured: &[Run]) {
    let state = match state {
        State::File => "with a state file",
        State::None => "without a state file",
    };
    let row = |name: &str, unit: &str, most: Option<f64>, value: &dyn Fn(&Run) -> f64| {
        let value = round(median(measured.iter().map(value).collect()));
        let store = format!("{store}, {state}");
        let mut row = serde_json::json!({ "name": name, "n": n, "store": store, "value": value, "unit": unit });
        if let (Some(most), Some(fields)) = (most.filter(|_| n <= 10_000), row.as_object_mut()) {
            fields.insert("most".to_owned(), most.into());
        }
        row
    };
    let millis = |took: Duration| took.as_secs_f64() * 1e3;
    let ready = row("flanneld_ready", "ms", (n <= 2).then_some(50.0), &|run| millis(run.ready));
    let memory = row("flanneld_resident", "MiB", Some(16.0), &|run| run.memory);
    let mut command = row("flanneld_command", "ms", Some(100.0), &|run| millis(run.command));
    if let (Some(run), Some(fields)) = (measured.iter().max_by_key(|run| run.command), command.as_object_mut()) {
        fields.insert("command".to_owned(), run.slowest.join(" ").into());
    }
    for row in [ready, memory, command] {
        println!("{row}");
    }
}
