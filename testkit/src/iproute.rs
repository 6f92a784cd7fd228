//! Access to the kernel's objects through iproute2: `ip` and `bridge`, run inside a namespace.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use nix::Error as Errno;
use serde::de::DeserializeOwned;

use crate::{Context, Error, Namespace};

/// The kernel's messages for which iproute2 prints no error number.
const IN_WORDS: [(&str, Errno); 6] = [
    ("already exists", Errno::EEXIST),
    ("already assigned", Errno::EEXIST),
    ("Invalid prefsrc address", Errno::EINVAL),
    ("Invalid source address", Errno::EINVAL),
    ("Nexthop has invalid gateway or device mismatch", Errno::EINVAL),
    ("Nexthop has invalid gateway.", Errno::ENETUNREACH),
];

/// Held for reading while a command runs.
static RUNNING: RwLock<()> = RwLock::new(());

/// Waits for running commands, and prevents new ones from starting while the result is held.
///
/// A command that has just been forked holds every descriptor of this process until it is executed, and outlives the
/// process if that ends meanwhile.
pub fn hold_commands() -> RwLockWriteGuard<'static, ()> {
    RUNNING.write().unwrap_or_else(PoisonError::into_inner)
}

impl Namespace {
    /// Runs `ip` with these arguments, separated by white space, and returns its output.
    ///
    /// # Errors
    /// If the kernel refuses: the error number, if iproute2 prints it, and iproute2's output.
    pub fn ip(&self, args: &str) -> Result<String, Error> {
        self.iproute("ip", &args.split_whitespace().collect::<Vec<_>>(), "")
    }

    /// Runs `bridge` in the same way.
    ///
    /// # Errors
    /// As [`ip`](Self::ip).
    pub fn bridge(&self, args: &str) -> Result<String, Error> {
        self.iproute("bridge", &args.split_whitespace().collect::<Vec<_>>(), "")
    }

    /// Destroys the UDP sockets that are bound to a port.
    ///
    /// # Errors
    /// As [`ip`](Self::ip), and if there is no such socket.
    pub fn destroy_udp_sockets(&self, port: u16) -> Result<(), Error> {
        let destroyed = self.iproute("ss", &["-HKuan", "sport", "=", &port.to_string()], "")?;
        if destroyed.trim().is_empty() { Err(Error::new(format!("no UDP socket has port {port}"))) } else { Ok(()) }
    }

    /// Runs a command for each line in one process: a refused command does not stop the others.
    pub(crate) fn batch(&self, program: &str, lines: impl IntoIterator<Item = String>) -> Result<(), Error> {
        let lines: String = lines.into_iter().map(|line| line + "\n").collect();
        if lines.is_empty() { Ok(()) } else { self.iproute(program, &["-force", "-batch", "-"], &lines).map(drop) }
    }

    /// Returns the objects that a command with `-json` lists, with all details, and with numbers where names are
    /// configurable.
    pub(crate) fn list<T: DeserializeOwned>(&self, args: &str) -> Result<Vec<T>, Error> {
        self.parse(args, &self.ip(&format!("-json -details -Numeric {args}"))?)
    }

    pub(crate) fn parse<T: DeserializeOwned>(&self, what: &str, json: &str) -> Result<Vec<T>, Error> {
        let json = if json.trim().is_empty() { "[]" } else { json };
        serde_json::from_str(json).map_err(|error| Error::new(format!("{}: {what}: {error}: {json}", self.name())))
    }

    pub(crate) fn iproute(&self, program: &str, args: &[&str], input: &str) -> Result<String, Error> {
        let Output { status, stdout, stderr } = self.output(program, args, input)?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&stderr);
        let context = format!("{}: {program} {}: {}", self.name(), args.join(" "), said.trim());
        Err(match errno_of(&said) {
            Some(errno) => Error::io(context, errno),
            None => Error::new(context),
        })
    }

    /// Runs a program in the namespace, and returns its output even if it fails. [`hold_commands`] waits only for
    /// programs that are started here.
    pub(crate) fn output(&self, program: &str, args: &[&str], input: &str) -> Result<Output, Error> {
        // Where the system keeps them, even if an unprivileged user's path does not contain it.
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let run = || {
            let _running = RUNNING.read().unwrap_or_else(PoisonError::into_inner);
            let mut command = Command::new(program);
            command.args(args).env("PATH", path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn()?;
            // The program prints little before it has read all input, so there is no deadlock.
            child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()))?;
            child.wait_with_output()
        };
        self.run(run)?.context(|| format!("{}: running {program}: is it installed?", self.name()))
    }
}

/// Returns the error number of the first refusal.
fn errno_of(said: &str) -> Option<Errno> {
    said.lines().find_map(|line| {
        let named = line.strip_prefix("RTNETLINK answers: ");
        let named = named.and_then(|text| (1..134).map(Errno::from_raw).find(|errno| errno.desc() == text));
        named.or_else(|| IN_WORDS.into_iter().find(|(words, _)| line.contains(words)).map(|(_, errno)| errno))
    })
}
