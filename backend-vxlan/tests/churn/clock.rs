//! The clock of a host that can be suspended: boot time continues, the host and its timers do not.

use std::pin::pin;
use std::sync::{Mutex, MutexGuard};
use std::task::{Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::clock::{BootTime, Clock, TokioClock};
use futures_util::future::poll_fn;

/// How late a timer may be after a suspend: the machine's clock waits in slices of this length.
pub(crate) const SLICE: Duration = Duration::from_secs(5);

pub(crate) struct HostClock {
    boot: TokioClock,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    asleep: bool,
    /// When the host last woke.
    woke: Option<BootTime>,
    /// When the timers that were running at that time fire if due.
    timers: BootTime,
    waker: Option<Waker>,
}

impl HostClock {
    pub(crate) fn new(boot: TokioClock) -> Self {
        Self { boot, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn is_asleep(&self) -> bool {
        self.lock().asleep
    }

    /// Whether timers that were due during a suspend may not have fired yet.
    pub(crate) fn is_drowsy(&self) -> bool {
        let state = self.lock();
        state.asleep || state.woke.is_some_and(|woke| self.boot.now() <= woke.after(SLICE))
    }

    pub(crate) fn suspend(&self) {
        self.lock().asleep = true;
    }

    /// Wakes the host. The current slice has `rest` left.
    pub(crate) fn resume(&self, rest: Duration) {
        let now = self.boot.now();
        let waker = {
            let mut state = self.lock();
            (state.asleep, state.woke, state.timers) = (false, Some(now), now.after(rest.min(SLICE)));
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Runs `future` while the host is awake.
    pub(crate) async fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        poll_fn(|context| {
            {
                let mut state = self.lock();
                if state.asleep {
                    state.waker = Some(context.waker().clone());
                    return Poll::Pending;
                }
            }
            future.as_mut().poll(context)
        })
        .await
    }
}

#[async_trait]
impl Clock for HostClock {
    fn now(&self) -> BootTime {
        self.boot.now()
    }

    async fn sleep_until(&self, deadline: BootTime) {
        let begun = self.now();
        self.boot.sleep_until(deadline).await;
        let late = {
            let state = self.lock();
            // A wait that began after the suspend has its own slice.
            state.woke.filter(|woke| *woke >= begun).map(|_| state.timers)
        };
        if let Some(late) = late {
            self.boot.sleep_until(late).await;
        }
    }
}
