//! Programs that run beside a test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::{Context, Error, wait_until};

/// A running program. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program, whose standard error is written to a new file `log`.
    ///
    /// # Errors
    /// If the file cannot be written or the program cannot be run.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self, Error> {
        let file = File::create(log).context(|| format!("cannot write {}", log.display()))?;
        let child = command.stderr(file).spawn();
        let child = child.context(|| format!("cannot run {}", command.get_program().display()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        let pid = i32::try_from(self.id()).map_err(|_| Error::new("a process number beyond 31 bits"))?;
        signal::kill(Pid::from_raw(pid), signal).context(|| format!("cannot send {signal} to {pid}"))
    }

    /// Returns the exit status, if the process has ended.
    ///
    /// # Errors
    /// The system's error.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.child.try_wait().context(|| "cannot wait for a process".to_owned())
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// If it does not end within `patience`, with the end of its log.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus, Error> {
        let mut status = None;
        let waited = wait_until("the end of the process", patience, || {
            status = self.ended()?;
            Ok(status.is_some())
        });
        status.ok_or_else(|| {
            let error = waited.err().map(|error| error.to_string()).unwrap_or_default();
            Error::new(format!("{error}; the log:\n{}", self.last_words()))
        })
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Returns the last lines of the log, for messages.
    pub fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().rev().take(12).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
