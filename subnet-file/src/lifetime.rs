//! The lifetime of leases.

use std::time::Duration;

/// How long a lease lasts unless renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// Forever: a node that never returns keeps its subnet until its record is deleted.
    Never,
    /// For this time.
    After(LeaseTime),
}

impl Default for Ttl {
    /// 24 h, as in flannel.
    fn default() -> Self {
        Self::After(LeaseTime(Duration::from_secs(86_400)))
    }
}

/// The lifetime of a lease: from a minute to ten years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaseTime(Duration);

/// The lifetime is out of range. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a lease time of {0:?} is out of range; choose from {min:?} to {max:?}, or Ttl::Never", min = LeaseTime::MIN.0, max = LeaseTime::MAX.0)]
pub struct LeaseTimeError(Duration);

impl LeaseTime {
    /// A minute: an agent needs time to renew.
    pub const MIN: Self = Self(Duration::from_secs(60));

    /// Ten years of 365 days.
    pub const MAX: Self = Self(Duration::from_secs(3650 * 86_400));

    /// Returns a lifetime in range.
    ///
    /// # Errors
    /// [`LeaseTimeError`]. Final for this input.
    pub fn new(time: Duration) -> Result<Self, LeaseTimeError> {
        let in_range = (Self::MIN.0..=Self::MAX.0).contains(&time);
        in_range.then_some(Self(time)).ok_or(LeaseTimeError(time))
    }

    /// Returns the duration.
    pub fn duration(self) -> Duration {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_lasts_from_a_minute_to_ten_years() {
        assert!(LeaseTime::new(Duration::from_secs(60)).is_ok() && LeaseTime::new(LeaseTime::MAX.0).is_ok());
        for bad in [Duration::ZERO, Duration::from_millis(59_999), Duration::from_secs(3651 * 86_400)] {
            let error = LeaseTime::new(bad).unwrap_err().to_string();
            assert!(error.contains("60s") && error.contains("Ttl::Never"), "{error}");
        }
    }
}
