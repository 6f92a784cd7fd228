//! Agents as processes in namespaces.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use flannel_core::net::Prefix;
use flannel_core::subnet_env::SubnetEnv;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use testkit::{Families, Namespace, Pod, PodNet, Process, Underlay};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const VXLAN: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
pub(crate) const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"host-gw"}}"#;
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_flanneld");

/// Nodes, and the directory that is their lease store.
pub(crate) struct Site {
    pub(crate) underlay: Underlay,
    pub(crate) dir: TempDir,
}

impl Site {
    pub(crate) fn new(nodes: usize, config: &str) -> Self {
        Self::with(nodes, Families::V4, config)
    }

    pub(crate) fn with(nodes: usize, families: Families, config: &str) -> Self {
        let underlay = Underlay::new(nodes, families);
        let underlay = underlay.expect("the lab needs root, or a user namespace: unshare -Urn cargo test -p flanneld");
        let dir = testkit::memory_dir().unwrap();
        fs::create_dir(dir.path().join("store")).unwrap();
        fs::write(dir.path().join("store/config.json"), config).unwrap();
        // The agent creates no directory that a flag names.
        (1..=nodes).for_each(|nth| fs::create_dir(dir.path().join(format!("run{nth}"))).unwrap());
        Self { underlay, dir }
    }

    pub(crate) fn ns(&self, nth: usize) -> &Namespace {
        &self.underlay.nodes()[nth - 1].ns
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The arguments of node `nth`'s agent.
    pub(crate) fn args(&self, nth: usize) -> Vec<String> {
        vec![
            format!("-subnet-dir={}", self.path("store").display()),
            format!("-node-name=node{nth}"),
            "-subnet-file".to_owned(),
            self.subnet_file(nth).display().to_string(),
            "--healthz-port=8081".to_owned(),
        ]
    }

    pub(crate) fn subnet_file(&self, nth: usize) -> PathBuf {
        self.path(&format!("run{nth}/subnet.env"))
    }

    /// The subnet that node `nth` serves, by its `subnet.env`.
    pub(crate) fn subnet(&self, nth: usize) -> Prefix {
        self.env(nth).subnets.v4.expect("no FLANNEL_SUBNET")
    }

    /// Attaches a pod to node `nth`, as a CNI plug-in would.
    pub(crate) fn pod(&self, nth: usize) -> Pod {
        let env = self.env(nth);
        let net = PodNet { subnets: env.subnets, mtu: env.mtu.unwrap() };
        self.underlay.nodes()[nth - 1].attach_pod(&net).unwrap()
    }

    fn env(&self, nth: usize) -> SubnetEnv {
        SubnetEnv::read(&self.subnet_file(nth)).unwrap().expect("no subnet.env")
    }

    pub(crate) fn start(&self, nth: usize, more: &[&str]) -> Agent {
        Agent::start(self.ns(nth), &[self.args(nth), owned(more)].concat(), self.path(&format!("log{nth}")))
    }

    /// Starts an agent that finds programs in `path` only.
    pub(crate) fn start_with_path(&self, nth: usize, more: &[&str], path: &str) -> Agent {
        let args = [self.args(nth), owned(more)].concat();
        Agent::start_in(self.ns(nth), command(&args).env("PATH", path), self.path(&format!("log{nth}")))
    }

    /// Runs another program in a node's namespace.
    pub(crate) fn tool(&self, nth: usize, words: &[&str]) -> CommandOutput {
        self.ns(nth).run(|| Command::new(words[0]).args(&words[1..]).output().unwrap()).unwrap().into()
    }

    /// Runs a command of the binary in a node's namespace.
    pub(crate) fn run(&self, nth: usize, more: &[&str]) -> CommandOutput {
        run(self.ns(nth), &[self.args(nth), owned(more)].concat())
    }
}

pub(crate) fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

/// What a finished process said.
#[derive(Debug)]
pub(crate) struct CommandOutput {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl CommandOutput {
    /// What ended it. The thread that writes the log may have had more to say after that.
    pub(crate) fn error(&self) -> &str {
        self.err.lines().find(|line| line.starts_with("flanneld: ")).unwrap_or_default()
    }
}

impl From<Output> for CommandOutput {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Does something on the switch, in a runtime of its own.
pub(crate) fn on_switch<T: Send>(site: &Site, work: impl AsyncFnOnce() -> T + Send) -> T {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work())
    };
    site.underlay.switch().run(run).unwrap()
}

pub(crate) fn run(ns: &Namespace, args: &[String]) -> CommandOutput {
    ns.run(|| command(args).output().unwrap()).unwrap().into()
}

/// The binary with a clean environment.
pub(crate) fn command(args: &[String]) -> Command {
    let mut command = bare(Command::new(BINARY));
    command.args(args);
    command
}

/// A command with a clean environment.
pub(crate) fn bare(mut command: Command) -> Command {
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
    command
}

/// A running agent. Killed when dropped.
pub(crate) struct Agent {
    process: Process,
    ns: Namespace,
    notified: UnixDatagram,
    messages: String,
}

impl Agent {
    pub(crate) fn start(ns: &Namespace, args: &[String], log: PathBuf) -> Self {
        Self::start_in(ns, &mut command(args), log)
    }

    /// The same under a supervisor that does not read what it is told.
    pub(crate) fn start_unread(ns: &Namespace, args: &[String], log: PathBuf) -> Self {
        let supervisor = Self::supervisor(&log);
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_nonblocking(true).unwrap();
        sender.connect_addr(&supervisor.local_addr().unwrap()).unwrap();
        while sender.send(b"STATUS=").is_ok() {}
        Self::start_under(supervisor, ns, &mut command(args), log)
    }

    pub(crate) fn start_in(ns: &Namespace, command: &mut Command, log: PathBuf) -> Self {
        Self::start_under(Self::supervisor(&log), ns, command, log)
    }

    /// The supervisor's socket.
    fn supervisor(log: &Path) -> UnixDatagram {
        let socket = log.with_extension("notify");
        let _ = fs::remove_file(&socket);
        let notified = UnixDatagram::bind(&socket).unwrap();
        notified.set_nonblocking(true).unwrap();
        notified
    }

    fn start_under(notified: UnixDatagram, ns: &Namespace, command: &mut Command, log: PathBuf) -> Self {
        let command = command.env("NOTIFY_SOCKET", log.with_extension("notify"));
        let process = ns.run(|| Process::start(command, &log).unwrap()).unwrap();
        Self { process, ns: ns.clone(), notified, messages: String::new() }
    }

    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What the supervisor was told so far.
    pub(crate) fn messages(&mut self) -> &str {
        let mut buffer = [0; 4096];
        while let Ok(len) = self.notified.recv(&mut buffer) {
            self.messages.push_str(std::str::from_utf8(&buffer[..len]).unwrap());
            self.messages.push('\n');
        }
        &self.messages
    }

    /// The same once it is ready.
    pub(crate) fn ready(self) -> Self {
        self.until_ready();
        self
    }

    /// Waits for `/readyz`.
    pub(crate) fn until_ready(&self) {
        self.until("ready", || self.is_ready());
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.get(8081, "/readyz") == Some((200, "flanneld is ready".to_owned()))
    }

    /// Waits until it has ended, or `reached` holds. Returns whether it has ended.
    pub(crate) fn ended_or(&mut self, reached: impl Fn(&Self) -> bool) -> bool {
        let end = Instant::now() + PATIENCE;
        loop {
            if self.process.ended().unwrap().is_some() {
                return true;
            }
            if reached(self) {
                return false;
            }
            assert!(Instant::now() < end, "neither ended nor as awaited; the log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn until(&self, what: &str, reached: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !reached() {
            assert!(Instant::now() < end, "not {what} in time; the log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Status and body of one of its pages.
    pub(crate) fn get(&self, port: u16, path: &str) -> Option<(u16, String)> {
        let answer = self.asked(port, &format!("GET {path} HTTP/1.0\r\n\r\n"))?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// The value of a metric, named without the label `overlay`.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let (code, page) = self.get(9472, "/metrics")?;
        assert_eq!(code, 200, "{page}");
        let page = page.replace("{overlay=\"flannel\"}", "").replace("{overlay=\"flannel\",", "{");
        let mut values = page.lines().filter_map(|line| line.rsplit_once(' '));
        values.find(|(shown, _)| *shown == name).map(|(_, value)| value.parse().unwrap())
    }

    /// The answer to a request as it is.
    pub(crate) fn ask(&self, port: u16, request: &str) -> String {
        self.asked(port, request).unwrap()
    }

    fn asked(&self, port: u16, request: &str) -> Option<String> {
        let answer = self.ns.run(|| {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
            stream.write_all(request.as_bytes()).ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            Some(answer)
        });
        answer.unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal).unwrap();
    }

    /// Sends a signal and waits for the end: the exit code and how long it took.
    pub(crate) fn end(mut self, signal: Signal) -> (Option<i32>, Duration) {
        let started = Instant::now();
        self.signal(signal);
        let code = self.wait();
        (code, started.elapsed())
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        self.process.wait(PATIENCE).unwrap_or_else(|error| panic!("{error}")).code()
    }
}

/// Tries cases side by side: they wait more than they work.
pub(crate) fn side_by_side<C: Send>(cases: impl IntoIterator<Item = C>, f: impl Fn(C) + Sync) {
    let f = &f;
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(move || f(case));
        }
    });
}

/// A node's routes, as people know them.
pub(crate) fn routes(ns: &Namespace) -> String {
    ns.show(testkit::Listing::Routes(flannel_core::net::Family::V4)).unwrap()
}

/// Copies a program in another process: a program that this one has open for writing, in a child that another test just
/// starts too, cannot be run.
pub(crate) fn copy_program(from: impl AsRef<OsStr>, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

pub(crate) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
