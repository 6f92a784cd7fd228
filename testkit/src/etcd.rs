//! Real etcd servers on the loopback, in a temporary directory, which end when their handle is dropped.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{Context, Error, Process};

/// The version of etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Debian 12's: `/usr/bin/etcd` (package `etcd-server`), or the value of `ETCD_DEBIAN`.
    Debian,
    /// A current one: `target/etcd-3.7.3`, which `./test` builds, or the value of `ETCD_CURRENT`.
    Current,
    /// The minor version before the current one, for upgrades: `target/etcd-3.6.16`, built the same way, or the value
    /// of `ETCD_PREVIOUS`.
    Previous,
}

impl Version {
    /// The versions that are supported on their own.
    pub const ALL: [Self; 2] = [Self::Debian, Self::Current];

    /// Returns the path of the program.
    ///
    /// # Errors
    /// The path that was searched and how to get the program: a test that needs etcd fails without it.
    pub fn program(self) -> Result<PathBuf, Error> {
        const BUILD: &str = "run ./test, which builds it with Go, once";
        let target = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(name);
        let (variable, default, remedy) = match self {
            Self::Debian => ("ETCD_DEBIAN", PathBuf::from("/usr/bin/etcd"), "apt-get install etcd-server"),
            Self::Current => ("ETCD_CURRENT", target("etcd-3.7.3"), BUILD),
            Self::Previous => ("ETCD_PREVIOUS", target("etcd-3.6.16"), BUILD),
        };
        let program = std::env::var_os(variable).map_or(default, PathBuf::from);
        if !program.is_file() {
            let text = format!("no etcd at {}: {remedy}, or set {variable}", program.display());
            return Err(Error::new(text));
        }
        Ok(program)
    }
}

/// The options of a cluster.
#[derive(Debug, Clone)]
pub struct Options {
    /// The version.
    pub version: Version,
    /// The number of members.
    pub members: usize,
    /// The members' TLS files; `None` for clear text.
    pub tls: Option<ServerTls>,
    /// Further flags.
    pub flags: Vec<String>,
}

impl Options {
    /// One member, clear text.
    pub fn single(version: Version) -> Self {
        Self { version, members: 1, tls: None, flags: Vec::new() }
    }
}

/// PEM files of the members.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// The members' certificate.
    pub certificate: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// The authority that signs clients' certificates; `None` if clients need none.
    pub client_ca: Option<PathBuf>,
}

/// A running etcd. Dropping it kills the members and removes their data.
#[derive(Debug)]
pub struct Etcd {
    options: Options,
    program: PathBuf,
    members: Vec<Member>,
    dir: TempDir,
}

#[derive(Debug)]
struct Member {
    ports: [u16; 3],
    process: Option<Process>,
}

const PATIENCE: Duration = Duration::from_secs(30);

impl Etcd {
    /// Starts the members and waits until each is healthy.
    ///
    /// # Errors
    /// What is missing, or the end of a member's log.
    pub fn start(options: Options) -> Result<Self, Error> {
        let program = options.version.program()?;
        let dir = crate::memory_dir().context(|| "no temporary directory".to_owned())?;
        let members = (0..options.members).map(|_| Ok(Member { ports: crate::ports::free()?, process: None }));
        let members = members.collect::<Result<_, Error>>()?;
        let mut etcd = Self { options, program, members, dir };
        etcd.restart_all()?;
        Ok(etcd)
    }

    /// Returns the client endpoint of each member.
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|n| self.endpoint(n)).collect()
    }

    /// Returns the client endpoint of one member.
    pub fn endpoint(&self, n: usize) -> String {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.members[n].ports[0])
    }

    /// Returns a member's counters in Prometheus' format.
    ///
    /// # Errors
    /// If the member does not answer.
    pub fn metrics(&self, n: usize) -> Result<String, Error> {
        ask(self.members[n].ports[2], "/metrics").context(|| format!("member {n} shows no metrics"))
    }

    /// Kills a member. Its data stays.
    pub fn kill(&mut self, n: usize) {
        self.members[n].process = None;
    }

    /// Starts a killed member again, on its data and ports.
    ///
    /// # Errors
    /// The end of the member's log.
    pub fn restart(&mut self, n: usize) -> Result<(), Error> {
        self.kill(n);
        self.spawn(n)?;
        self.await_health(n)
    }

    /// Starts all members again, on their data and ports: after a loss of most of them, none becomes healthy alone.
    ///
    /// # Errors
    /// The end of a member's log.
    pub fn restart_all(&mut self) -> Result<(), Error> {
        for n in 0..self.members.len() {
            self.kill(n);
            self.spawn(n)?;
        }
        (0..self.members.len()).try_for_each(|n| self.await_health(n))
    }

    /// Starts a member again with another version, as in a rolling upgrade. Members started later have that version
    /// too.
    ///
    /// # Errors
    /// What is missing, or the end of the member's log.
    pub fn restart_as(&mut self, n: usize, version: Version) -> Result<(), Error> {
        self.program = version.program()?;
        self.restart(n)
    }

    /// Freezes a member: its connections stay open, and it does not answer.
    ///
    /// # Errors
    /// If the member is not running.
    pub fn pause(&self, n: usize) -> Result<(), Error> {
        self.signal(n, Signal::SIGSTOP)
    }

    /// Resumes a frozen member.
    ///
    /// # Errors
    /// If the member is not running.
    pub fn resume(&self, n: usize) -> Result<(), Error> {
        self.signal(n, Signal::SIGCONT)
    }

    /// Copies the data of the only member, for a later [`restore`](Self::restore). The member is stopped meanwhile.
    ///
    /// # Errors
    /// The system's error.
    pub fn back_up(&mut self) -> Result<(), Error> {
        self.kill(0);
        copy(&self.data(0), &self.dir.path().join("backup")).context(|| "cannot copy etcd's data".to_owned())?;
        self.restart(0)
    }

    /// Replaces the data with the copy, as an operator does after a loss.
    ///
    /// # Errors
    /// The system's error.
    pub fn restore(&mut self) -> Result<(), Error> {
        self.kill(0);
        let data = self.data(0);
        fs::remove_dir_all(&data).context(|| format!("cannot remove {}", data.display()))?;
        copy(&self.dir.path().join("backup"), &data).context(|| "cannot copy etcd's data".to_owned())?;
        self.restart(0)
    }

    fn spawn(&mut self, n: usize) -> Result<(), Error> {
        let client = self.endpoint(n);
        let [_, peer, metrics] = self.members[n].ports;
        let cluster: Vec<_> =
            self.members.iter().enumerate().map(|(n, m)| format!("m{n}=http://127.0.0.1:{}", m.ports[1])).collect();
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--name=m{n}"))
            .arg(format!("--data-dir={}", self.data(n).display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"))
            .arg(format!("--listen-metrics-urls=http://127.0.0.1:{metrics}"))
            .arg(format!("--initial-cluster={}", cluster.join(",")))
            .args(&self.options.flags)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(tls) = &self.options.tls {
            command.arg(format!("--cert-file={}", tls.certificate.display()));
            command.arg(format!("--key-file={}", tls.key.display()));
            if let Some(ca) = &tls.client_ca {
                command.arg("--client-cert-auth").arg(format!("--trusted-ca-file={}", ca.display()));
            }
        }
        let log = self.dir.path().join(format!("m{n}.log"));
        self.members[n].process = Some(Process::start(&mut command, &log)?);
        Ok(())
    }

    fn await_health(&mut self, n: usize) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while !is_healthy(self.members[n].ports[2]) {
            let Some(process) = &mut self.members[n].process else { return Ok(()) };
            if process.ended()?.is_some() || Instant::now() > deadline {
                return Err(Error::new(format!("etcd member {n} is not healthy:\n{}", process.last_words())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn signal(&self, n: usize, signal: Signal) -> Result<(), Error> {
        let process = self.members[n].process.as_ref();
        process.ok_or_else(|| Error::new(format!("member {n} does not run")))?.signal(signal)
    }

    fn data(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("m{n}"))
    }
}

fn is_healthy(port: u16) -> bool {
    ask(port, "/health").is_ok_and(|answer| answer.contains(" 200 ") && answer.contains("\"true\""))
}

fn ask(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
