//! How long and how often is measured, and when to stop early.

use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{SysconfVar, sysconf};

use bench::Error;

/// One run of the benchmark.
pub(crate) struct Session {
    /// Measurements of each kind, in turn.
    pub(crate) rounds: u32,
    /// How long each takes.
    pub(crate) time: Duration,
    signals: SignalFd,
}

impl Session {
    /// From now on Ctrl-C and the like do not end the process at once: [`go_on`](Self::go_on) fails, so that etcd,
    /// agents and files go with it. To be made before any thread.
    pub(crate) fn new(rounds: u32, time: Duration) -> Result<Self, Error> {
        let ends: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        ends.thread_block()?;
        let signals = SignalFd::with_flags(&ends, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { rounds, time, signals })
    }

    /// To be asked before each measurement.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        match self.signals.read_signal()? {
            Some(_) => Err("ended by a signal".into()),
            None => Ok(()),
        }
    }
}

/// Processor time of the whole system until now, all processors together (proc(5), stat).
pub(crate) fn busy() -> Result<Duration, Error> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("no cpu in /proc/stat")?;
    let ticks: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq; the rest is for others, or counted already.
    let busy: u64 = [0, 1, 2, 5, 6].into_iter().filter_map(|nth| ticks.get(nth)).sum();
    let a_second = sysconf(SysconfVar::CLK_TCK)?.ok_or("the kernel does not say how long a tick is")?;
    Ok(Duration::from_secs_f64(busy as f64 / a_second as f64))
}
