//! Waits between tries.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// The first wait, and after doubling the longest: what is back is noticed within 5 s.
const WAITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(4500));

/// Waits that double, each ± 10 % so that nodes do not keep step.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: WAITS.0 }
    }
}

impl Backoff {
    /// How long to wait now.
    pub(crate) fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(WAITS.1);
        let percent = 90 + RandomState::new().hash_one(wait) % 21;
        wait * u32::try_from(percent).unwrap_or(100) / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_vary() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..120).map(|_| backoff.wait()).collect();
        let around = |wait: Duration, secs: f64| (wait.as_secs_f64() - secs).abs() <= secs / 10.0 + 1e-6;
        assert!(waits.iter().zip([1.0, 2.0, 4.0]).all(|(wait, secs)| around(*wait, secs)), "{waits:?}");
        assert!(waits[3..].iter().all(|wait| around(*wait, 4.5)), "{waits:?}");
        assert!(waits[3..].iter().any(|wait| *wait != waits[3]), "{waits:?}");
    }
}
