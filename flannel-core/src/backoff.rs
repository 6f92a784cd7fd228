//! Back-off after failures, for agents and for lease store implementations.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::clock::BootTime;

/// A pseudo-random number generator (splitmix64). Not for secrets.
#[derive(Debug, Clone)]
pub struct Jitter(u64);

impl Jitter {
    /// Creates a generator with a different sequence in each process.
    pub fn random() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }

    /// Creates a generator with a reproducible sequence.
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns `duration` changed at random by up to ± 10 %.
    pub fn around(&mut self, duration: Duration) -> Duration {
        let permille = 900 + (self.number() % 201) as u32;
        (duration / 1000).saturating_mul(permille)
    }
}

/// A back-off that doubles: 1, 2, 4 s and so on up to a maximum, each ± 10 %, so that a thousand nodes do not retry at
/// the same moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    tries: u32,
    longest: Duration,
    jitter: Jitter,
}

impl Default for Backoff {
    /// Same as [`new`](Self::new) with [`Jitter::random`].
    fn default() -> Self {
        Self::new(Jitter::random())
    }
}

impl Backoff {
    /// Creates a back-off of up to 4.5 s (docs/design.md, "Errors and retries"): a store that is back is noticed within
    /// 5 s.
    pub fn new(jitter: Jitter) -> Self {
        Self::up_to(Duration::from_millis(4500), jitter)
    }

    /// Creates a back-off of up to `longest`.
    pub fn up_to(longest: Duration, jitter: Jitter) -> Self {
        Self { tries: 0, longest, jitter }
    }

    /// Returns the next wait: twice the last one, up to the maximum.
    pub fn wait(&mut self) -> Duration {
        let wait = Duration::from_secs(1_u64.checked_shl(self.tries).unwrap_or(u64::MAX));
        self.tries = self.tries.saturating_add(1);
        self.jitter.around(wait.min(self.longest))
    }

    /// Returns whether [`wait`](Self::wait) was not called since the start or the last [`reset`](Self::reset).
    pub fn is_fresh(&self) -> bool {
        self.tries == 0
    }

    /// Restarts with the shortest wait. Call this after a success.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

/// A separate back-off for each key: 1, 2, 4 s and so on up to 30 s. A key without a failure for 30 s after its wait
/// starts over. There is no jitter, because this is for local operations, not for retries that many nodes make at once.
#[derive(Debug, Clone)]
pub(crate) struct Keyed<K>(BTreeMap<K, Wait>);

#[derive(Debug, Clone)]
struct Wait {
    length: Duration,
    until: BootTime,
    /// Whether the end of the wait was reported.
    is_over: bool,
}

impl<K> Default for Keyed<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord> Keyed<K> {
    const LONGEST: Duration = Duration::from_secs(30);

    /// Records a failure of `key` and starts its wait again: twice as long if the last wait has ended.
    pub(crate) fn fail(&mut self, key: K, now: BootTime) {
        let length = match self.0.get(&key) {
            None => Duration::from_secs(1),
            Some(wait) if wait.until <= now => (wait.length * 2).min(Self::LONGEST),
            Some(wait) => wait.length,
        };
        self.0.insert(key, Wait { length, until: now.after(length), is_over: false });
    }

    /// Removes the keys that `is_kept` rejects.
    pub(crate) fn retain(&mut self, is_kept: impl Fn(&K) -> bool) {
        self.0.retain(|key, _| is_kept(key));
    }

    /// Removes the keys that have been healthy. Returns whether a wait has ended since the last call.
    pub(crate) fn expire(&mut self, now: BootTime) -> bool {
        self.0.retain(|_, wait| wait.until.after(Self::LONGEST) > now);
        let ended = self.0.values_mut().filter(|wait| wait.until <= now && !wait.is_over);
        ended.map(|wait| wait.is_over = true).count() > 0
    }

    /// Returns when the next wait ends or the next key is removed. A wait whose end was already reported is not
    /// returned again.
    pub(crate) fn deadline(&self) -> Option<BootTime> {
        let next = |wait: &Wait| if wait.is_over { wait.until.after(Self::LONGEST) } else { wait.until };
        self.0.values().map(next).min()
    }

    /// Returns when the wait of `key` ends or has ended.
    pub(crate) fn until(&self, key: &K) -> Option<BootTime> {
        self.0.get(key).map(|wait| wait.until)
    }

    pub(crate) fn keys(&self) -> impl ExactSizeIterator<Item = &K> {
        self.0.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_four_and_a_half_seconds_and_start_over() {
        let mut backoff = Backoff::new(Jitter::seeded(7));
        for want in [1000, 2000, 4000, 4500, 4500] {
            let got = backoff.wait().as_millis();
            assert!(got >= want * 9 / 10 && got <= want * 11 / 10, "{got} is not about {want}");
        }
        backoff.reset();
        assert!(backoff.wait() <= Duration::from_millis(1100));
    }

    #[test]
    fn waits_differ_from_node_to_node_and_from_time_to_time() {
        let waits = |seed| {
            let mut backoff = Backoff::new(Jitter::seeded(seed));
            (0..120).map(|_| backoff.wait()).collect::<Vec<_>>()
        };
        let (one, two) = (waits(1), waits(2));
        assert_ne!(one, two);
        assert!(one[3..].iter().any(|wait| *wait != one[3]), "{one:?}");
    }
}
