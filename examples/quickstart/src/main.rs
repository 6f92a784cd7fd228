//! The main job: an overlay of several nodes that pings and heals.
//!
//! `cargo run --release -p quickstart` needs no arguments, no root, and no other program: nodes and pods are network
//! namespaces of this process and end with it.

mod args;
mod cluster;
mod heal;
mod keep;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod report;
mod screen;
mod show;
mod signals;
mod traffic;

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use tempfile::TempDir;
use testkit::userns;
use tokio::runtime::Runtime;

use crate::args::Args;
use crate::cluster::Cluster;
use crate::keep::Entry;
use crate::report::Report;
use crate::screen::{Screen, Style, duration};
use crate::signals::Signals;

/// The error that ended the run, shown with its sources.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// How long cancelled writes may continue.
const GRACE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args = Args::parse();
    #[cfg(feature = "kubernetes")]
    if args.kubernetes {
        return kubernetes::run(&args);
    }
    let mut screen = if args.json { Screen::silent() } else { Screen::stdout() };
    match run(&args, &mut screen) {
        Ok(End::Good) => ExitCode::SUCCESS,
        Ok(End::Bad) => ExitCode::FAILURE,
        // The exit status that a shell reports for a program ended by a signal.
        Ok(End::Interrupted(signal)) => {
            std::mem::forget(testkit::hold_commands());
            ExitCode::from(128 + signal)
        }
        Err(error) if is_broken_pipe(&error) => ExitCode::FAILURE,
        Err(error) => {
            // Standard error may be closed.
            let _ = screen.fail(&chain(&*error));
            ExitCode::FAILURE
        }
    }
}

const USER_NAMESPACE: &str = "/proc/self/ns/user";

/// The inputs of a run.
struct Stage<'a> {
    args: &'a Args,
    /// The lease store's directory.
    store: &'a Path,
    entry: Entry,
    began: Instant,
}

/// The end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Good,
    Bad,
    /// By the signal of this number.
    Interrupted(u8),
}

fn run(args: &Args, screen: &mut Screen) -> Result<End, Error> {
    let began = Instant::now();
    let outside = fs::read_link(USER_NAMESPACE)?;
    // Before the first thread: the kernel gives no user namespace to a process with more than one thread.
    userns::enter()?;
    let runtime = Runtime::new()?;
    // Before anything is created that a signal could leave behind.
    let signals = runtime.block_on(async { Signals::new() })?;
    let store = tempfile::Builder::new().prefix("flannelkit-quickstart-").tempdir();
    let store = store.map_err(|error| format!("no directory for the leases (TMPDIR names another place): {error}"))?;
    let entry = if fs::read_link(USER_NAMESPACE)? == outside { Entry::Net } else { Entry::UserAndNet };
    let stage = Stage { args, store: store.path(), entry, began };
    let end = runtime.block_on(until_signal(&stage, screen, signals));
    // A probe may still wait for its reply.
    runtime.shutdown_timeout(Duration::from_millis(100));
    remove(store)?;
    end
}

/// Removes the store's directory. A cancelled write may still create its file in it meanwhile.
fn remove(store: TempDir) -> io::Result<()> {
    let end = Instant::now() + GRACE;
    loop {
        match fs::remove_dir_all(store.path()) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            outcome => return outcome,
        }
    }
}

async fn until_signal(stage: &Stage<'_>, screen: &mut Screen, mut signals: Signals) -> Result<End, Error> {
    let mut kept = None;
    let end = tokio::select! {
        end = demonstrate(stage, screen, &mut kept) => end,
        signal = signals.next() => Ok(End::Interrupted(signal)),
    };
    if let (Ok(End::Good | End::Bad), Some(cluster)) = (&end, &kept) {
        let mut aside = stage.args.json.then(Screen::stderr);
        keep::invite(aside.as_mut().unwrap_or(screen), cluster, stage.entry)?;
        signals.next().await;
    }
    drop(kept);
    if let Ok(End::Interrupted(_)) = end {
        screen.interrupted()?;
    }
    end
}

async fn demonstrate(stage: &Stage<'_>, screen: &mut Screen, kept: &mut Option<Cluster>) -> Result<End, Error> {
    let args = stage.args;
    screen.title("flannelkit quickstart", &args.summary())?;
    screen.note("Nodes and pods are network namespaces of this process: the network of this")?;
    screen.note("machine stays as it is, and nothing is left behind.")?;

    screen.section("Start")?;
    let cluster = Cluster::start(args, screen, stage.store).await?;

    show::leases(screen, &cluster)?;
    show::nodes(screen, &cluster)?;

    screen.section("Traffic, pod to pod")?;
    let before = traffic::ping_all(&cluster).await?;
    traffic::show(screen, &cluster, &before)?;
    let throughput = traffic::throughput(screen, &cluster).await?;

    let heals = heal::every_act(args, screen, &cluster).await?;
    let after = traffic::ping_all(&cluster).await?;

    let report = Report::new(args, &before, &after, throughput, heals);
    report.show(screen)?;
    if args.keep {
        *kept = Some(cluster);
    } else {
        cluster.remove(screen).await?;
    }
    let took = stage.began.elapsed();
    if args.json {
        report.print_json(took)?;
    }
    screen.section("Result")?;
    let verdict = if report.is_good() { Style::Good } else { Style::Bad };
    screen.line(&[(report.verdict().as_str(), verdict), (&format!(" ({})", duration(took)), Style::Dim)])?;
    Ok(if report.is_good() { End::Good } else { End::Bad })
}

/// Returns an error and its sources as one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Whether the reader of standard output is gone, as with `head`.
fn is_broken_pipe(error: &Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        || error
            .source()
            .and_then(|source| source.downcast_ref::<io::Error>())
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
