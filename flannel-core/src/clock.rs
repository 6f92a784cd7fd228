//! Time that includes suspend.
//!
//! Leases expire by a server's wall clock. An agent whose clock stops while the machine is suspended would renew too
//! late (docs/faults.md, L15). This module therefore uses `CLOCK_BOOTTIME`.

use std::time::Duration;

use async_trait::async_trait;

/// A point in time: how long the machine has been up, including suspend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BootTime(pub Duration);

impl BootTime {
    /// Returns this point plus `duration`, saturating.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// Returns the time from `earlier` to this point, or zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The agent's source of time. Tests replace it to run an hour in a millisecond.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait Clock: Send + Sync + 'static {
    /// Returns the current time. Monotonic.
    fn now(&self) -> BootTime;

    /// Returns at `deadline` or later, also if the machine was suspended in between.
    ///
    /// # Cancel safety
    /// Keeps no state: it may be dropped and called again.
    async fn sleep_until(&self, deadline: BootTime);
}

/// The longest single sleep. tokio's timers stop during suspend, so a long sleep is split, and the boot-time clock is
/// read between the parts.
const SLICE: Duration = Duration::from_secs(5);

/// The machine's clock: `CLOCK_BOOTTIME` on Linux with feature `netlink`, otherwise a monotonic clock.
///
/// It ignores tokio's paused time, in which sleeps end at once. Tests that pause time use [`TokioClock`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock(());

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> BootTime {
        BootTime(uptime())
    }

    async fn sleep_until(&self, deadline: BootTime) {
        loop {
            let left = deadline.since(self.now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(SLICE)).await;
        }
    }
}

#[cfg(all(target_os = "linux", feature = "netlink"))]
fn uptime() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    // CLOCK_BOOTTIME exists since Linux 2.6.39; a kernel without it cannot run this library.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

#[cfg(not(all(target_os = "linux", feature = "netlink")))]
fn uptime() -> Duration {
    use std::sync::OnceLock;
    use std::time::Instant;
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// tokio's clock. `tokio::time::pause` stops it, as scripted tests need.
#[derive(Debug, Clone, Copy)]
pub struct TokioClock(tokio::time::Instant);

impl TokioClock {
    /// Creates a clock that starts at zero now.
    #[expect(clippy::new_without_default, reason = "reads the time: making one is an act")]
    pub fn new() -> Self {
        Self(tokio::time::Instant::now())
    }
}

#[async_trait]
impl Clock for TokioClock {
    fn now(&self) -> BootTime {
        BootTime(self.0.elapsed())
    }

    async fn sleep_until(&self, deadline: BootTime) {
        match self.0.checked_add(deadline.0) {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            // Later than the clock can represent.
            None => std::future::pending().await,
        }
    }
}
