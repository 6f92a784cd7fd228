//! A network namespace that exists as long as it is held.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{Context, Error};

/// A network namespace. Only a file descriptor holds it, so it ends with its last clone, with everything in it; no
/// clean-up is needed.
#[derive(Clone)]
pub struct Namespace(Arc<Held>);

struct Held {
    name: String,
    file: File,
}

impl Namespace {
    /// Creates a namespace whose loopback is up. The name is used in messages only.
    ///
    /// # Errors
    /// If the process may not create one (see [`crate::userns::enter`]).
    pub fn new(name: &str) -> Result<Self, Error> {
        let thread = thread::scope(|scope| {
            let made = scope.spawn(|| {
                let unshared = unshare(CloneFlags::CLONE_NEWNET);
                unshared.context(|| format!("making network namespace {name}: root, or userns::enter() first"))?;
                Self::current(name)
            });
            made.join()
        });
        let namespace = thread.unwrap_or_else(|panic| resume_unwind(panic))?;
        namespace.set_up("lo")?;
        Ok(namespace)
    }

    /// Like [`new`](Self::new), with an uplink that is up and has these addresses with prefix lengths. Its far end is
    /// in the same namespace.
    ///
    /// # Errors
    /// As [`new`](Self::new), or the kernel's error.
    pub fn with_uplink(name: &str, uplink: &str, addresses: &[&str]) -> Result<Self, Error> {
        let namespace = Self::new(name)?;
        let far_end = format!("{uplink}-far");
        namespace.add_veth(uplink, &namespace, &far_end)?;
        for address in addresses {
            let more = if address.contains(':') { "nodad" } else { "" };
            namespace.ip(&format!("addr add {address} dev {uplink} {more}"))?;
        }
        namespace.set_up(uplink)?;
        namespace.set_up(&far_end)?;
        Ok(namespace)
    }

    /// Returns the namespace of the calling thread.
    ///
    /// # Errors
    /// If `/proc` is not mounted.
    pub fn current(name: &str) -> Result<Self, Error> {
        let file = File::open("/proc/thread-self/ns/net").context(|| format!("opening network namespace {name}"))?;
        Ok(Self(Arc::new(Held { name: name.to_owned(), file })))
    }

    /// Opens a namespace that other programs made, by a file such as `/run/netns/NAME`.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(name: &str, path: &Path) -> Result<Self, Error> {
        let file = File::open(path).context(|| format!("opening network namespace {}", path.display()))?;
        Ok(Self(Arc::new(Held { name: name.to_owned(), file })))
    }

    /// Returns its name in messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs `f` inside, on a new thread, and waits for its end. A panic of `f` continues in the caller.
    ///
    /// Sockets opened inside stay inside, wherever they are used later.
    ///
    /// # Errors
    /// If the thread cannot enter the namespace; `f` has not run then.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, Error> {
        let joined = thread::scope(|scope| {
            let inside = scope.spawn(|| -> Result<R, Error> {
                self.enter()?;
                Ok(f())
            });
            inside.join()
        });
        joined.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Starts `f` inside, on its own thread.
    ///
    /// # Errors
    /// If no thread can be created. If the thread cannot enter the namespace, joining it returns the error.
    pub fn spawn<R: Send + 'static>(
        &self,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> Result<JoinHandle<Result<R, Error>>, Error> {
        let namespace = self.clone();
        let builder = thread::Builder::new().name(self.name().chars().take(15).collect());
        let started = builder.spawn(move || {
            namespace.enter()?;
            Ok(f())
        });
        started.context(|| format!("starting a thread in {}", self.name()))
    }

    /// Moves the calling thread into the namespace, permanently.
    ///
    /// # Errors
    /// If the process lacks the right.
    pub fn enter(&self) -> Result<(), Error> {
        let entered = setns(&self.0.file, CloneFlags::CLONE_NEWNET);
        entered.context(|| format!("entering network namespace {}", self.name()))
    }

    /// Writes a sysctl, such as `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// If it does not exist here or must not be written.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = format!("/proc/sys/{name}");
        self.run(|| fs::write(&path, value))?
            .context(|| format!("{}: writing {value} to {path} (/proc/sys has to be writable)", self.name()))
    }

    /// Writes several sysctls.
    ///
    /// # Errors
    /// As [`set_sysctl`](Self::set_sysctl), for the first that fails.
    pub fn set_sysctls(&self, values: &[(&str, &str)]) -> Result<(), Error> {
        values.iter().try_for_each(|(name, value)| self.set_sysctl(name, value))
    }

    /// Reads a sysctl, without the line end.
    ///
    /// # Errors
    /// If it does not exist here.
    pub fn sysctl(&self, name: &str) -> Result<String, Error> {
        let path = format!("/proc/sys/{name}");
        let text = self.run(|| fs::read_to_string(&path))?.context(|| format!("{}: reading {path}", self.name()))?;
        Ok(text.trim_end().to_owned())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Namespace({})", self.name())
    }
}
