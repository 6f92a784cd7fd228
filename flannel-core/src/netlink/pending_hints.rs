//! Hints waiting for their listener.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use futures_util::stream::{self, Stream};
use tokio::sync::Notify;

use crate::kernel::Hint;

/// Hints waiting for one listener: a set, so that they merge until they are polled.
#[derive(Debug, Default)]
pub(crate) struct PendingHints {
    bits: AtomicU8,
    notify: Notify,
}

const CHANGED: u8 = 1;
const FACTS_CHANGED: u8 = 2;
const LOST: u8 = 4;
const CLOSED: u8 = 8;
const BROKEN: u8 = 16;

impl PendingHints {
    pub(crate) fn raise(&self, hint: Hint) {
        self.set(match hint {
            Hint::Changed => CHANGED,
            Hint::FactsChanged => FACTS_CHANGED,
            Hint::Lost => LOST,
            Hint::SubscriptionBroken => return self.break_subscription(),
        });
    }

    /// Drops pending hints: they are older, and everything is read again anyway.
    fn break_subscription(&self) {
        let broken = |bits: u8| Some(bits & CLOSED | BROKEN);
        // The closure always returns a value.
        let _ = self.bits.fetch_update(Ordering::AcqRel, Ordering::Acquire, broken);
        self.notify.notify_one();
    }

    /// Ends the stream of hints.
    pub(crate) fn close(&self) {
        self.set(CLOSED);
    }

    fn set(&self, bit: u8) {
        self.bits.fetch_or(bit, Ordering::AcqRel);
        self.notify.notify_one();
    }

    /// Returns the hints, the most important first, until closed.
    pub(crate) fn hints(self: Arc<Self>) -> impl Stream<Item = Hint> + Send + 'static {
        stream::unfold(self, |pending| async move {
            loop {
                let bits = pending.bits.load(Ordering::Acquire);
                // Lost notifications may have reported any change.
                let (hint, taken) = match bits {
                    bits if bits & BROKEN != 0 => (Hint::SubscriptionBroken, BROKEN),
                    bits if bits & LOST != 0 => (Hint::Lost, LOST | CHANGED | FACTS_CHANGED),
                    bits if bits & FACTS_CHANGED != 0 => (Hint::FactsChanged, FACTS_CHANGED),
                    bits if bits & CHANGED != 0 => (Hint::Changed, CHANGED),
                    bits if bits & CLOSED != 0 => return None,
                    _ => {
                        pending.notify.notified().await;
                        continue;
                    }
                };
                pending.bits.fetch_and(!taken, Ordering::AcqRel);
                return Some((hint, pending));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};

    use super::*;

    #[test]
    fn what_was_heard_before_a_socket_broke_is_no_sign_that_it_works_again() {
        let pending = Arc::new(PendingHints::default());
        pending.raise(Hint::Lost);
        pending.raise(Hint::SubscriptionBroken);
        let mut hints = Box::pin(Arc::clone(&pending).hints());
        assert_eq!(hints.next().now_or_never(), Some(Some(Hint::SubscriptionBroken)));
        assert!(hints.next().now_or_never().is_none());
        pending.raise(Hint::Lost);
        assert_eq!(hints.next().now_or_never(), Some(Some(Hint::Lost)));
    }

    #[test]
    fn hints_merge_until_they_are_taken_and_end_when_closed() {
        let pending = Arc::new(PendingHints::default());
        for hint in [Hint::Changed, Hint::FactsChanged, Hint::Changed] {
            pending.raise(hint);
        }
        pending.close();
        let hints: Vec<Hint> = pending.hints().collect().now_or_never().unwrap();
        assert_eq!(hints, [Hint::FactsChanged, Hint::Changed]);
    }
}
