//! Paths to peers that do not carry runs of datagrams of the link's size, as shown to the path's owner.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Peers whose path is narrower than the link, as reported to the path's owner. Sending threads add to it when the kernel
/// refuses a run, which is rare, because each avoids its own [`RefusedRuns`](super::outbox::RefusedRuns).
#[derive(Debug, Default)]
pub(crate) struct NarrowPaths(Mutex<BTreeMap<SocketAddr, Refused>>);

#[derive(Debug, Clone, Copy)]
struct Refused {
    /// The smallest datagram size of a refused run, in bytes.
    size: usize,
    last: Instant,
}

impl NarrowPaths {
    /// The most peers that are recorded.
    const MOST: usize = 64;
    /// How long a path is shown as narrow after the last refusal. A path in use is retried more often than that.
    const SHOWN: Duration = Duration::from_secs(60);

    /// Records that the kernel refused a run of datagrams of this size. Returns whether this peer's path is newly
    /// recorded.
    pub(crate) fn refuse(&self, to: SocketAddr, size: usize, now: Instant) -> bool {
        let mut paths = self.paths(now);
        if let Some(known) = paths.get_mut(&to) {
            *known = Refused { size: size.min(known.size), last: now };
            return false;
        }
        paths.len() < Self::MOST && paths.insert(to, Refused { size, last: now }).is_none()
    }

    /// Returns the peers, each with the smallest refused size in bytes.
    pub(crate) fn list(&self, now: Instant) -> Vec<(SocketAddr, usize)> {
        self.paths(now).iter().map(|(to, refused)| (*to, refused.size)).collect()
    }

    fn paths(&self, now: Instant) -> MutexGuard<'_, BTreeMap<SocketAddr, Refused>> {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paths.retain(|_, refused| now.saturating_duration_since(refused.last) < Self::SHOWN);
        paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_path_is_new_once_and_forgotten_a_minute_after_its_last_refusal() {
        let (narrow, start) = (NarrowPaths::default(), Instant::now());
        let peer = |port: u16| SocketAddr::from(([192, 0, 2, 1], port));
        let at = |secs| start + Duration::from_secs(secs);
        assert!(narrow.refuse(peer(1), 1400, at(0)));
        assert!(!narrow.refuse(peer(1), 1300, at(10)) && !narrow.refuse(peer(1), 1350, at(20)));
        assert_eq!(narrow.list(at(79)), [(peer(1), 1300)]);
        assert_eq!(narrow.list(at(80)), []);
        assert!(narrow.refuse(peer(1), 1400, at(80)));
        let fresh = (2..1000).filter(|port| narrow.refuse(peer(*port), 1400, at(81))).count();
        assert_eq!((fresh, narrow.list(at(81)).len()), (NarrowPaths::MOST - 1, NarrowPaths::MOST));
    }
}
