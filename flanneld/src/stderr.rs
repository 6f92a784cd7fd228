//! The last output of the program, on stderr. The program ends even if no process reads it.

use std::io::{self, Write};
use std::process::abort;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long the reader of stderr may take.
const TIMEOUT: Duration = Duration::from_millis(500);
/// How long the report of a panic may take: reading the symbols of a backtrace from a busy disk can take a second.
const REPORT: Duration = Duration::from_secs(5);

/// Writes to stderr, for at most half a second.
pub(crate) fn write(text: String) {
    let (done, ended) = mpsc::channel();
    let written = thread::Builder::new().name("stderr".to_owned()).spawn(move || {
        // If stderr is closed, the text is lost.
        let _ = io::stderr().write_all(text.as_bytes());
        let _ = done.send(());
    });
    if written.is_ok() {
        // The program ends, even if the text is not written in time.
        let _ = ended.recv_timeout(TIMEOUT);
    }
}

/// Makes every panic abort the process. A restart is better than running on without a task, and does not change the
/// data plane.
pub(crate) fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // The report waits for the lock on stderr, which the log may hold while it waits for a reader.
        let deadline = thread::Builder::new().name("deadline".to_owned()).spawn(|| {
            thread::sleep(REPORT);
            abort();
        });
        if deadline.is_ok() {
            report(panic);
        }
        abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus, Stdio};
    use std::time::Instant;

    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::signal::Signal;

    use super::*;

    const PART: &str = "FLANNELD_LAST_WORDS_PART";

    /// Returns the ends of a stream whose buffer is full.
    fn full() -> (UnixStream, UnixStream) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[b'x'; 4096]).is_ok() {}
        ours.set_nonblocking(false).unwrap();
        (ours, theirs)
    }

    /// Runs this binary in the role `part`, without a reader of its stderr, and returns its exit status.
    fn unread(part: &str) -> ExitStatus {
        let (stderr, _unread) = full();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "stderr::tests::child_process", "--nocapture"]);
        command.env(PART, part).stdout(Stdio::null()).stderr(OwnedFd::from(stderr));
        let mut child = command.spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > end {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{part}: it never ends");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process that the other tests start; by itself it tests nothing.
    #[test]
    fn child_process() {
        let Ok(part) = std::env::var(PART) else { return };
        // The panic aborts on purpose: no core file may be left behind.
        setrlimit(Resource::RLIMIT_CORE, 0, 0).unwrap();
        // Holds the lock on stderr while it waits, as the log does.
        thread::spawn(|| io::stderr().write_all(b"a line"));
        if part == "panic" {
            abort_on_panic();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                tokio::spawn(async { panic!("a task") });
                std::future::pending().await
            })
        }
        write("an error".repeat(100_000));
    }

    #[test]
    fn a_task_that_panics_ends_the_program_though_nobody_reads_why() {
        assert_eq!(unread("panic").signal(), Some(Signal::SIGABRT as i32));
    }

    #[test]
    fn an_end_is_one_though_nobody_reads_why() {
        assert!(unread("error").success());
    }
}
