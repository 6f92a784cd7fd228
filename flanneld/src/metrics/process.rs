//! Metrics about the process, with the names that Prometheus' client libraries give them.

use std::sync::atomic::AtomicU64;

use procfs::process::{LimitValue, Process};
use procfs::{ProcResult, WithCurrentSystemInfo as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use super::{count, gauge};

/// Registers the process' use of resources. Registers nothing where `/proc` cannot be read.
pub(super) fn register(registry: &mut Registry) {
    if let Ok(usage) = Usage::read() {
        usage.register(registry);
    }
}

struct Usage {
    start: u64,
    cpu_seconds: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    threads: i64,
    open_fds: usize,
    max_fds: LimitValue,
}

impl Usage {
    fn read() -> ProcResult<Self> {
        let process = Process::myself()?;
        let stat = process.stat()?;
        let ticks = procfs::ticks_per_second();
        #[expect(clippy::cast_precision_loss, reason = "counts a process' clock ticks: fewer than 2⁵²")]
        let cpu_seconds = (stat.utime + stat.stime) as f64 / ticks as f64;
        Ok(Self {
            start: procfs::boot_time_secs()? + stat.starttime / ticks,
            cpu_seconds,
            resident_bytes: stat.rss_bytes().get(),
            virtual_bytes: stat.vsize,
            threads: stat.num_threads,
            open_fds: process.fd_count()?,
            max_fds: process.limits()?.max_open_files.soft_limit,
        })
    }

    fn register(&self, registry: &mut Registry) {
        let cpu = Counter::<f64, AtomicU64>::default();
        cpu.inc_by(self.cpu_seconds);
        registry.register("process_cpu_seconds", "Processor time used, in user and kernel mode", cpu);
        let mut gauge = |name, help, value| gauge(registry, name, help, value);
        gauge("process_start_time_seconds", "Unix time at which the process started", saturated(self.start));
        gauge("process_resident_memory_bytes", "Resident memory", saturated(self.resident_bytes));
        gauge("process_virtual_memory_bytes", "Virtual memory", saturated(self.virtual_bytes));
        gauge("process_threads", "Threads", self.threads);
        gauge("process_open_fds", "Open file descriptors", count(self.open_fds));
        if let LimitValue::Value(limit) = self.max_fds {
            gauge("process_max_fds", "Limit of open file descriptors", saturated(limit));
        }
    }
}

fn saturated(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
