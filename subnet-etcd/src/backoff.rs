//! How long to wait after a failure.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// 1, 2, 4, then 4.5 s, each ± 10 % (docs/design.md, "Errors and retries"): a store that is back is noticed within 5 s,
/// and a thousand nodes do not come back in step.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backoff {
    tries: u32,
}

impl Backoff {
    const LAST: Duration = Duration::from_millis(4500);

    /// The next wait.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = match self.tries {
            0..=2 => Duration::from_secs(1 << self.tries),
            _ => Self::LAST,
        };
        self.tries = self.tries.saturating_add(1);
        let permille = 900 + u32::try_from(random() % 201).unwrap_or_default();
        wait * permille / 1000
    }

    /// All is well again.
    pub(crate) fn reset(&mut self) {
        self.tries = 0;
    }
}

/// 64 bits that need not be secret.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
