//! Runs a packet filter's tool on a separate thread, so that the network namespace is fixed and a dropped future does
//! not interrupt a transaction.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self as threads, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::oneshot;

use super::FirewallError;

/// The maximum output read from a tool, in bytes: `iptables-save` on a large cluster prints about ten MiB.
const MOST_OUTPUT: u64 = 16 << 20;

/// The number of calls that can wait for the running one.
const QUEUE: usize = 16;

/// How often the stop flag is checked while a tool runs.
const SLICE: Duration = Duration::from_millis(50);

/// The thread that runs a packet filter's tool, for implementations of [`Firewall`](super::Firewall).
///
/// Tools run one at a time, in the network namespace of the thread that created this value. Dropping it kills a running
/// tool and waits until it has ended.
#[derive(Debug)]
pub struct Tools {
    jobs: Option<Sender<Job>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A program, and the remedy if it is not installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// A path, or a name to look up in `PATH`.
    pub path: PathBuf,
    /// The remedy if it is not found.
    pub hint: String,
}

impl Program {
    /// Checks that the program is installed, as [`Tools::run`] would find it. Runs nothing.
    ///
    /// # Errors
    /// [`FirewallError::Unsupported`] with [`hint`](Self::hint). Final until the program is installed.
    pub fn check(&self) -> Result<(), FirewallError> {
        let is_named = self.path.components().count() == 1;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = match is_named {
            true => std::env::split_paths(&path).any(|dir| is_program(&dir.join(&self.path))),
            false => is_program(&self.path),
        };
        if found { Ok(()) } else { Err(self.missing()) }
    }

    fn missing(&self) -> FirewallError {
        FirewallError::Unsupported { what: format!("program {}", self.path.display()), hint: self.hint.clone() }
    }
}

#[cfg(unix)]
fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_program(path: &Path) -> bool {
    path.is_file()
}

/// One run of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The program to run.
    pub program: Program,
    /// The arguments.
    pub args: Vec<String>,
    /// The standard input.
    pub input: String,
    /// The operation, for error messages.
    pub doing: String,
    /// The time limit.
    pub within: Duration,
}

/// The result of a program that ended, whatever its exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answer {
    /// The exit status.
    pub status: ExitStatus,
    /// The standard output.
    pub stdout: String,
    /// The standard error, without surrounding white space.
    pub stderr: String,
}

struct Job {
    call: Call,
    reply: oneshot::Sender<Result<Answer, FirewallError>>,
}

impl Tools {
    /// Starts the thread, in the caller's network namespace.
    ///
    /// # Errors
    /// [`FirewallError::Failed`] when the thread cannot be created. Retry with back-off.
    pub fn start() -> Result<Self, FirewallError> {
        Self::start_after(|| Ok(()))
    }

    /// Starts the thread and runs `enter`, such as a `setns` call, on it first.
    ///
    /// # Errors
    /// As [`start`](Self::start). If `enter` fails: [`FirewallError::Denied`] if a privilege is missing, else
    /// [`FirewallError::Failed`].
    pub fn start_after(enter: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<Self, FirewallError> {
        const DOING: &str = "starting the firewall's thread";
        let (jobs, mut receiver) = mpsc::channel(QUEUE);
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let (started, ready) = threads::channel();
        let thread = thread::Builder::new()
            .name("firewall".to_owned())
            .spawn(move || {
                let entered = enter();
                let go_on = entered.is_ok();
                // If this fails, the caller has gone, and the job queue is closed.
                let _ = started.send(entered);
                if go_on {
                    work(&mut receiver, &theirs);
                }
            })
            .map_err(|error| failed(DOING, &error))?;
        let tools = Self { jobs: Some(jobs), stop, thread: Some(thread) };
        match ready.recv() {
            Ok(Ok(())) => Ok(tools),
            Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
                let hint = "CAP_SYS_ADMIN is needed to enter a network namespace".to_owned();
                Err(FirewallError::Denied { doing: DOING.to_owned(), hint })
            }
            Ok(Err(error)) => Err(failed(DOING, &error)),
            Err(_) => Err(FirewallError::Stopped),
        }
    }

    /// Runs a program to its end, with messages in English.
    ///
    /// # Errors
    /// [`FirewallError::Unsupported`] when it is not installed, [`FirewallError::Timeout`], [`FirewallError::Stopped`]
    /// or [`FirewallError::Failed`]. A program that exits with an error is not an error here: see [`Answer::status`].
    ///
    /// # Cancel safety
    /// If the future is dropped, a running program runs to its end; a waiting one is never run.
    pub async fn run(&self, call: Call) -> Result<Answer, FirewallError> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(FirewallError::Stopped)?;
        jobs.send(Job { call, reply }).await.map_err(|_| FirewallError::Stopped)?;
        answer.await.map_err(|_| FirewallError::Stopped)?
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic on the thread was already reported; nothing else can be done here.
            let _ = thread.join();
        }
    }
}

impl Answer {
    /// Returns the error of a call that failed while `doing` this.
    pub fn refused(&self, doing: String) -> FirewallError {
        let text: String = self.stderr.chars().take(1024).collect();
        let said = |words: &[&str]| words.iter().any(|word| text.contains(word));
        if said(&["Operation not permitted", "Permission denied"]) {
            let hint = format!("CAP_NET_ADMIN is needed (or root), with legacy iptables CAP_NET_RAW too: {text}");
            return FirewallError::Denied { doing, hint };
        }
        if said(&["cache initialization failed", "Table does not exist", "Address family not supported"]) {
            return FirewallError::Unsupported {
                what: doing,
                hint: format!("the kernel has no packet filter of this kind, load its modules: {text}"),
            };
        }
        let text = if text.is_empty() { self.status.to_string() } else { text };
        FirewallError::Refused { doing, text }
    }
}

fn work(jobs: &mut Receiver<Job>, stop: &AtomicBool) {
    while let Some(Job { call, reply }) = jobs.blocking_recv() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        // The caller dropped its future, so the program is not started.
        if !reply.is_closed() {
            let _ = reply.send(run(&call, stop));
        }
    }
}

fn run(call: &Call, stop: &AtomicBool) -> Result<Answer, FirewallError> {
    let mut command = Command::new(&call.program.path);
    command.args(&call.args).env("LC_ALL", "C");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    apart(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(call.program.missing());
        }
        Err(error) => return Err(failed(&call.doing, &error)),
    };
    let answer = converse(&mut child, call, stop);
    if answer.is_err() {
        // Wait for the child even if it has already ended, so that no zombie remains.
        kill(&mut child);
        let _ = child.wait();
    }
    answer
}

/// The stream that some text is from.
#[derive(Clone, Copy)]
enum Stream {
    Out,
    Error,
}

fn converse(child: &mut Child, call: &Call, stop: &AtomicBool) -> Result<Answer, FirewallError> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(FirewallError::Failed { doing: call.doing.clone(), reason: "no pipe to the tool".to_owned() });
    };
    let deadline = Instant::now() + call.within;
    let (said, hear) = threads::channel();
    let started = (|| {
        let input = call.input.clone();
        // A program that ends early closes the pipe; its exit status is then more useful than the write error.
        thread::Builder::new().spawn(move || drop(stdin.write_all(input.as_bytes())))?;
        let theirs = said.clone();
        thread::Builder::new().spawn(move || drop(theirs.send((Stream::Out, text_of(stdout)))))?;
        thread::Builder::new().spawn(move || drop(said.send((Stream::Error, text_of(stderr)))))
    })();
    // The three threads end when the pipes close, that is when the child and all its descendants have ended.
    started.map_err(|error| failed(&call.doing, &error))?;

    let (mut out, mut error) = (None, None);
    let timeout = || FirewallError::Timeout { doing: call.doing.clone(), within: call.within };
    while out.is_none() || error.is_none() {
        if stop.load(Ordering::Relaxed) {
            return Err(FirewallError::Stopped);
        }
        match hear.recv_timeout(SLICE) {
            Ok((Stream::Out, text)) => out = Some(text.map_err(|error| failed(&call.doing, &error))?),
            Ok((Stream::Error, text)) => error = Some(text.map_err(|error| failed(&call.doing, &error))?),
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => return Err(timeout()),
        }
    }
    let status = loop {
        match child.try_wait().map_err(|error| failed(&call.doing, &error))? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(Duration::from_micros(200)),
            None => return Err(timeout()),
        }
    };
    let stderr = error.unwrap_or_default().trim().to_owned();
    Ok(Answer { status, stdout: out.unwrap_or_default(), stderr })
}

fn text_of(stream: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    stream.take(MOST_OUTPUT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_OUTPUT {
        return Err(io::Error::other(format!("it said more than {MOST_OUTPUT} bytes")));
    }
    // Valid UTF-8 is not copied.
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// Makes a program the leader of its own process group, so that its descendants can be killed with it.
#[cfg(unix)]
fn apart(command: &mut Command) {
    std::os::unix::process::CommandExt::process_group(command, 0);
}

#[cfg(not(unix))]
fn apart(_: &mut Command) {}

/// Kills a program that has not been waited for, and its descendants.
#[cfg(all(target_os = "linux", feature = "netlink"))]
fn kill(child: &mut Child) {
    use nix::sys::signal::{Signal, killpg};
    if let Ok(group) = i32::try_from(child.id()) {
        // An error means that the group has ended.
        let _ = killpg(nix::unistd::Pid::from_raw(group), Signal::SIGKILL);
    }
}

#[cfg(not(all(target_os = "linux", feature = "netlink")))]
fn kill(child: &mut Child) {
    let _ = child.kill();
}

fn failed(doing: &str, error: &io::Error) -> FirewallError {
    FirewallError::Failed { doing: doing.to_owned(), reason: error.to_string() }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    use futures_util::FutureExt;

    fn call(program: &str, args: &[&str], input: &str, within: Duration) -> Call {
        Call {
            program: Program { path: program.into(), hint: "install it".to_owned() },
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            input: input.to_owned(),
            doing: "testing".to_owned(),
            within,
        }
    }

    const AGES: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn input_goes_in_and_both_outputs_come_out_even_if_large() {
        let tools = Tools::start().unwrap();
        let input = "x".repeat(1 << 20);
        let answer = tools.run(call("sh", &["-c", "cat; echo oops >&2; exit 3"], &input, AGES)).await.unwrap();
        assert_eq!((answer.stdout.len(), &*answer.stderr, answer.status.code()), (1 << 20, "oops", Some(3)));
    }

    #[tokio::test]
    async fn a_missing_program_is_unsupported_with_the_remedy() {
        let tools = Tools::start().unwrap();
        let error = tools.run(call("no-such-tool-anywhere", &[], "", AGES)).await.unwrap_err();
        assert!(matches!(&error, FirewallError::Unsupported { hint, .. } if hint == "install it"), "{error}");
    }

    #[test]
    fn a_program_is_looked_for_without_running_it() {
        let check = |path: &str| Program { path: path.into(), hint: "install it".to_owned() }.check();
        assert_eq!((check("sh"), check("/bin/sh")), (Ok(()), Ok(())));
        for missing in ["no-such-tool-anywhere", "/bin/no-such-tool", "/etc/passwd", "/etc"] {
            let error = check(missing).unwrap_err().to_string();
            assert!(error.contains(missing) && error.contains("install it"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_program_that_never_stops_talking_is_ended_and_the_next_one_runs() {
        let tools = Tools::start().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("echo $$ >{}; exec cat /dev/zero", pid.display());
        let error = tools.run(call("sh", &["-c", &script], "", AGES)).await.unwrap_err();
        assert!(error.to_string().contains(&format!("more than {MOST_OUTPUT} bytes")), "{error}");
        let pid = fs::read_to_string(pid).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists(), "it runs on");
        assert_eq!(tools.run(call("echo", &["next"], "", AGES)).await.unwrap().stdout, "next\n");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_at_the_deadline() {
        let tools = Tools::start().unwrap();
        let start = Instant::now();
        let error = tools.run(call("sleep", &["60"], "", Duration::from_millis(100))).await.unwrap_err();
        assert!(matches!(error, FirewallError::Timeout { .. }), "{error}");
        assert!(start.elapsed() < AGES / 4);
    }

    #[cfg(all(target_os = "linux", feature = "netlink"))]
    #[tokio::test]
    async fn what_a_program_leaves_behind_is_ended_with_it() {
        let tools = Tools::start().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        // The background process keeps the pipes open, so that the output does not end.
        let script = format!("sleep 600 & echo $! >{}; exit 0", pid.display());
        let error = tools.run(call("sh", &["-c", &script], "", Duration::from_secs(2))).await.unwrap_err();
        assert!(matches!(error, FirewallError::Timeout { .. }), "{error}");
        let left = fs::read_to_string(pid).unwrap();
        // It stays as a zombie if no process reaps orphans.
        let runs = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", left.trim())).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        testkit::wait_until("ended", AGES, || Ok::<_, testkit::Error>(!runs())).unwrap();
    }

    #[tokio::test]
    async fn so_many_calls_wait_and_further_callers_wait_for_a_place() {
        let (jobs, mut waiting) = mpsc::channel(QUEUE);
        let tools = Tools { jobs: Some(jobs), stop: Arc::default(), thread: None };
        let mut asked: Vec<_> = (0..QUEUE + 7).map(|_| Box::pin(tools.run(call("true", &[], "", AGES)))).collect();
        assert!(asked.iter_mut().all(|asked| asked.now_or_never().is_none()));
        assert_eq!(waiting.len(), QUEUE);
        waiting.recv().await.unwrap();
        assert!(asked.iter_mut().skip(QUEUE).all(|asked| asked.now_or_never().is_none()));
        assert_eq!(waiting.len(), QUEUE);
    }

    #[tokio::test]
    async fn a_refusal_is_sorted_by_what_the_tool_says() {
        let tools = Tools::start().unwrap();
        // The messages of nft 1.0.6 and iptables 1.8.9.
        for (said, kind) in [
            (
                "Operation not permitted (you must be root)\nnetlink: Error: cache initialization failed: Operation not permitted",
                "no permission",
            ),
            ("iptables-save v1.8.9 (legacy): Cannot initialize: Permission denied (you must be root)", "no permission"),
            (
                "iptables-save v1.8.9 (legacy): Cannot initialize: Table does not exist (do you need to insmod?)",
                "not available",
            ),
            ("netlink: Error: cache initialization failed: Protocol not supported", "not available"),
            (
                "/dev/stdin:2:1-76: Error: Could not process rule: Operation not supported",
                "refused testing: /dev/stdin",
            ),
            ("", "refused testing: exit status: 1"),
        ] {
            let answer = tools.run(call("sh", &["-c", "cat >&2; exit 1"], said, AGES)).await.unwrap();
            let error = answer.refused("testing".to_owned()).to_string();
            assert!(error.contains(kind), "{said}: {error}");
            let cause = said.lines().next().unwrap_or_default();
            assert!(error.contains(cause), "{said}: {error}");
        }
    }

    #[test]
    fn dropping_the_tools_ends_a_running_program() {
        let tools = Tools::start().unwrap();
        let (reply, mut answer) = oneshot::channel();
        let job = Job { call: call("sleep", &["60"], "", AGES), reply };
        assert!(tools.jobs.as_ref().unwrap().try_send(job).is_ok());
        let start = Instant::now();
        drop(tools);
        assert!(start.elapsed() < AGES / 4);
        assert!(!matches!(answer.try_recv(), Ok(Ok(_))));
    }
}
