//! A flanneld as a process, ours or Go's, with what it costs.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};
use tempfile::TempDir;
use testkit::Process;

use crate::Error;

/// How long an agent may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long an agent may take to be ready.
const START: Duration = Duration::from_secs(60);

/// Whose program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// flannelkit's.
    Ours,
    /// Go flannel's.
    Go,
}

/// The programs that can be measured.
#[derive(Debug)]
pub struct Programs {
    ours: PathBuf,
    go: Option<PathBuf>,
    /// Holds `ours`.
    _installed: TempDir,
}

impl Programs {
    /// Builds and installs ours, and finds Go's where it was built.
    ///
    /// A copy is measured, as a package installs one. The page cache holds a file that a linker wrote in other pieces
    /// than a copy, which changes resident memory and the time of a start.
    ///
    /// # Errors
    /// When ours does not build, or cannot be copied.
    pub fn find() -> Result<Self, Error> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let build = ["build", "--release", "--quiet", "--locked", "-p", "flanneld"];
        let built = Command::new(env!("CARGO")).args(build).current_dir(&root).status()?;
        if !built.success() {
            return Err("flanneld does not build".into());
        }
        // Beside this program, wherever cargo was told to put things.
        let built = std::env::current_exe()?.with_file_name("flanneld");
        let installed = tempfile::tempdir()?;
        let ours = installed.path().join("flanneld");
        fs::copy(built, &ours)?;
        Ok(Self { ours, go: testkit::go_flannel::program().ok(), _installed: installed })
    }

    /// Those to measure, each as often as the other.
    pub fn all(&self) -> Vec<Program> {
        let go = self.go.is_some().then_some(Program::Go);
        go.into_iter().chain([Program::Ours]).collect()
    }

    /// Runs a command of ours, in the caller's network namespace, and returns how long it took. `store` and `state` are
    /// what the agent was started with.
    ///
    /// # Errors
    /// When it fails. Doctor also fails where it found an error.
    pub fn ask(&self, store: &[String], state: State, dir: &Path, words: &[&str]) -> Result<Duration, Error> {
        let mut command = Command::new(&self.ours);
        let begun = Instant::now();
        let output = prepared(command.args(store), state, 0, dir).args(words).output()?;
        let took = begun.elapsed();
        let has_found_errors = words == ["doctor"] && output.status.code() == Some(1) && !output.stdout.is_empty();
        let has_answered = output.status.success() || has_found_errors;
        if !has_answered {
            return Err(format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(took)
    }

    fn path(&self, program: Program) -> Option<&Path> {
        match program {
            Program::Ours => Some(&self.ours),
            Program::Go => self.go.as_deref(),
        }
    }
}

/// Where an agent keeps its lease and peers for a boot without its store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// In a file in its directory.
    File,
    /// Nowhere.
    None,
}

fn prepared<'a>(command: &'a mut Command, state: State, n: u32, dir: &Path) -> &'a mut Command {
    // Go flannel does not know the flag.
    match state {
        State::File => command.env_clear().env("FLANNELD_STATE_FILE", dir.join("state")),
        State::None => command.env_clear().arg("-state-file="),
    };
    command
        .arg(format!("-subnet-file={}", dir.join("subnet.env").display()))
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("NODE_NAME", format!("node-{n}"))
        .stdin(Stdio::null())
}

/// A running one.
#[derive(Debug)]
pub struct Agent(Process);

impl Agent {
    /// Starts a program on node `n` as an operator does who gives nothing but where the store is, in the caller's network
    /// namespace; its files are in `dir`.
    ///
    /// # Errors
    /// When there is no such program, or it cannot be run.
    pub fn start(programs: &Programs, program: Program, n: u32, store: &[String], dir: &Path) -> Result<Self, Error> {
        let path = programs.path(program).ok_or("there is no such program")?;
        let mut command = Command::new(path);
        let command = prepared(command.args(store), State::File, n, dir).stdout(Stdio::null());
        Ok(Self(Process::start(command, &dir.join("log"))?))
    }

    /// Starts ours as node 0, and returns it with the time until it notified a supervisor of its readiness.
    ///
    /// # Errors
    /// When it cannot be run, or is not ready in time.
    pub fn ready(programs: &Programs, store: &[String], state: State, dir: &Path) -> Result<(Self, Duration), Error> {
        let supervisor = UnixDatagram::bind(dir.join("notify"))?;
        supervisor.set_read_timeout(Some(START))?;
        let mut command = Command::new(&programs.ours);
        let command = prepared(command.args(store), state, 0, dir).stdout(Stdio::null());
        let command = command.env("NOTIFY_SOCKET", dir.join("notify"));
        let begun = Instant::now();
        let agent = Self(Process::start(command, &dir.join("log"))?);
        let mut text = [0; 4096];
        loop {
            let len = supervisor.recv(&mut text).map_err(|_| format!("not ready: {}", agent.last_words()))?;
            if text.get(..len).unwrap_or_default().starts_with(b"READY=1") {
                return Ok((agent, begun.elapsed()));
            }
        }
    }

    /// Processor time of the process until now, without the tools that it ran.
    pub fn cpu(&self) -> Result<Duration, Error> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // The name, in parentheses, may hold anything.
        let (_, fields) = text.rsplit_once(')').ok_or("no name in /proc/PID/stat")?;
        let field = |nth: usize| -> Result<u64, Error> {
            Ok(fields.split_whitespace().nth(nth).ok_or("too few fields in /proc/PID/stat")?.parse()?)
        };
        // utime and stime, fields 14 and 15 of proc(5); what follows the name begins with field 3.
        let ticks = field(11)? + field(12)?;
        let a_second = sysconf(SysconfVar::CLK_TCK)?.ok_or("the kernel does not say how long a tick is")?;
        Ok(Duration::from_secs_f64(ticks as f64 / a_second as f64))
    }

    /// Resident memory now and at its peak, in MiB (proc(5), status).
    pub fn memory(&self) -> Result<(f64, f64), Error> {
        crate::report::resident(&format!("/proc/{}/status", self.0.id()))
    }

    /// The end of what it logged, for messages.
    pub fn last_words(&self) -> String {
        self.0.last_words()
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.0.signal(Signal::SIGKILL)?;
        self.0.wait(PATIENCE)?;
        Ok(())
    }

    /// Ends it as a supervisor does.
    pub fn stop(mut self) -> Result<(), Error> {
        self.0.signal(Signal::SIGTERM)?;
        self.0.wait(PATIENCE)?;
        Ok(())
    }
}
