//! What the kernel refused to write: shown with its words, and of peers tried again after a wait of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::BootTime;
use crate::kernel::KernelError;
use crate::lease::LeaseKey;
use crate::overlay::backoff::Jitter;
use crate::overlay::chain;
use crate::overlay::status::Refusal;
use crate::plan::Object;

/// The most refusals that are listed and counted as a peer's own. More mean that something is wrong with the kernel.
pub(crate) const MOST: usize = 1024;
/// The first and the longest wait before an audit for the sake of a refused object alone. Every audit tries again.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// What the last audit was refused.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    objects: BTreeMap<Object, Refusal>,
    /// When the objects of peers are worth an audit.
    waits: BTreeMap<Object, Wait>,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    length: Duration,
    due: BootTime,
}

/// A refused write.
pub(crate) struct Entry<'a> {
    pub(crate) object: Object,
    /// The peer that the object is for.
    pub(crate) peer: Option<LeaseKey>,
    pub(crate) error: &'a KernelError,
}

impl Entry<'_> {
    /// Whether it is the peer's own affair: the kernel takes others' writes, and rejects what this one's record says.
    fn is_peers(&self) -> bool {
        self.peer.is_some() && self.error.rejects_value()
    }
}

impl Refused {
    /// Takes in all that an audit was refused. Returns how many of these concern the node, or are too many to be
    /// anybody's own.
    pub(crate) fn replace(&mut self, now: BootTime, jitter: &mut Jitter, entries: Vec<Entry<'_>>) -> usize {
        let (old, mut nodes) = (std::mem::take(&mut self.waits), 0);
        self.objects.clear();
        for entry in entries {
            let listed = self.objects.len() < MOST;
            let peers = listed && entry.is_peers();
            nodes += usize::from(!peers);
            if peers {
                let length = match old.get(&entry.object) {
                    None => WAIT.0,
                    Some(wait) if wait.due <= now => (wait.length * 2).min(WAIT.1),
                    Some(wait) => wait.length,
                };
                self.waits.insert(entry.object.clone(), Wait { length, due: now.after(jitter.around(length)) });
            }
            if listed {
                self.objects.insert(entry.object, Refusal { peer: entry.peer, error: chain(entry.error) });
            }
        }
        nodes
    }

    /// When the next audit is due for the sake of these.
    pub(crate) fn due(&self) -> Option<BootTime> {
        self.waits.values().map(|wait| wait.due).min()
    }

    pub(crate) fn objects(&self) -> &BTreeMap<Object, Refusal> {
        &self.objects
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Prefix;

    fn error(errno: i32) -> KernelError {
        KernelError::Refused { doing: "route add".to_owned(), errno, message: String::new() }
    }

    fn route(n: u32) -> Object {
        Object::Route(Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 8)).into(), 24).unwrap())
    }

    fn entry<'a>(n: u32, peer: bool, error: &'a KernelError) -> Entry<'a> {
        Entry { object: route(n), peer: peer.then(|| LeaseKey::new("peer")), error }
    }

    fn at(secs: u64) -> BootTime {
        BootTime(Duration::from_secs(secs))
    }

    #[test]
    fn only_a_value_that_the_kernel_rejects_is_its_peers_own_affair() {
        let (invalid, unreachable, memory) = (error(22), error(101), error(12));
        let (mut refused, mut jitter) = (Refused::default(), Jitter::seeded(1));
        let entries = vec![
            entry(1, true, &invalid),
            entry(2, true, &unreachable),
            entry(3, true, &memory),
            entry(4, false, &invalid),
        ];
        assert_eq!(refused.replace(at(0), &mut jitter, entries), 2);
        assert_eq!((refused.objects().len(), refused.waits.len()), (4, 2));
        assert_eq!(refused.replace(at(1), &mut jitter, Vec::new()), 0);
        assert!(refused.objects().is_empty() && refused.due().is_none());
    }

    #[test]
    fn waits_double_to_half_a_minute_and_audits_in_between_put_them_off() {
        let (invalid, mut refused, mut jitter) = (error(22), Refused::default(), Jitter::seeded(1));
        let (mut now, mut waits) = (at(0), Vec::new());
        for _ in 0..8 {
            refused.replace(now, &mut jitter, vec![entry(1, true, &invalid)]);
            let due = refused.due().unwrap();
            waits.push(due.since(now).as_secs_f64().round());
            now = due;
        }
        assert!(waits[..3] == [1.0, 2.0, 4.0] && waits[7] >= 27.0 && waits[7] <= 33.0, "{waits:?}");
        // A newcomer has a wait of its own, and the old one is put off with it.
        refused.replace(now, &mut jitter, vec![entry(1, true, &invalid), entry(2, true, &invalid)]);
        assert!(refused.due().unwrap().since(now) < Duration::from_secs(2));
    }

    #[test]
    fn a_flood_of_refusals_is_listed_up_to_a_bound_and_the_rest_is_the_nodes() {
        let (invalid, mut refused, mut jitter) = (error(22), Refused::default(), Jitter::seeded(1));
        let entries = (0..MOST as u32 + 7).map(|n| entry(n, true, &invalid)).collect();
        assert_eq!(refused.replace(at(0), &mut jitter, entries), 7);
        assert_eq!((refused.objects().len(), refused.waits.len()), (MOST, MOST));
    }
}
