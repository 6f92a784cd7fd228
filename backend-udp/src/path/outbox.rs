//! Datagrams to be sent, grouped into runs that are sent as one message.
//!
//! Datagrams for a peer form one message as long as they have the same length, or the last one is shorter: the kernel
//! cuts the message again (`UDP_SEGMENT`). They may belong to different flows. The order is kept for each peer.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

/// The most messages in a batch.
pub(crate) const MAX_MESSAGES: usize = 128;
/// The most datagrams in a batch.
pub(crate) const MAX_DATAGRAMS: usize = 512;
/// The most datagrams in a message: the limit of kernels before 6.11 (`UDP_MAX_SEGMENTS`).
pub(crate) const MAX_RUN: usize = 64;
/// The longest payload of UDP over IPv4, in bytes.
const MAX_BYTES: usize = 65_507;

/// A datagram. If it is a segment, its headers are in one buffer and its payload in another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) headers: Range<usize>,
    pub(crate) payload: Range<usize>,
}

impl Datagram {
    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.headers.len() + self.payload.len()
    }
}

/// Whether datagrams are sent in runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    /// They are.
    Long,
    /// Each is a message, because the path to the peer carries no runs of that size.
    Narrow,
    /// Each is a message, because the sockets send no runs.
    Off,
}

/// Datagrams sent to one peer in one message.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) to: SocketAddr,
    /// The number of datagrams.
    pub(crate) count: usize,
    /// The total length, in bytes.
    pub(crate) bytes: usize,
    /// The length of each datagram except the last, in bytes.
    pub(crate) segment: usize,
    pub(crate) run: Run,
    is_open: bool,
    first: usize,
    last: usize,
}

/// The datagrams of a batch.
#[derive(Debug)]
pub(crate) struct Outbox {
    messages: Vec<Message>,
    /// Each with the index of the next datagram of its message.
    datagrams: Vec<(Datagram, usize)>,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Self { messages: Vec::with_capacity(MAX_MESSAGES), datagrams: Vec::with_capacity(MAX_DATAGRAMS) }
    }

    /// Whether one more datagram can be added.
    pub(crate) fn has_room(&self) -> bool {
        self.messages.len() < MAX_MESSAGES && self.datagrams.len() < MAX_DATAGRAMS
    }

    /// Adds a datagram for a peer.
    pub(crate) fn push(&mut self, to: SocketAddr, datagram: Datagram, run: Run) {
        let (place, len) = (self.datagrams.len(), datagram.len());
        self.datagrams.push((datagram, usize::MAX));
        let newest = self.messages.iter_mut().rev().find(|message| message.to == to);
        let fits = |message: &Message| {
            message.is_open && len <= message.segment && message.count < MAX_RUN && message.bytes + len <= MAX_BYTES
        };
        match newest.filter(|message| run == Run::Long && fits(message)) {
            Some(message) => {
                message.count += 1;
                message.bytes += len;
                message.is_open = len == message.segment;
                if let Some((_, next)) = self.datagrams.get_mut(message.last) {
                    *next = place;
                }
                message.last = place;
            }
            None => {
                let is_open = run == Run::Long;
                self.messages.push(Message {
                    to,
                    count: 1,
                    bytes: len,
                    segment: len,
                    run,
                    is_open,
                    first: place,
                    last: place,
                });
            }
        }
    }

    /// Returns the messages in sending order.
    pub(crate) fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Returns the datagrams of a message.
    pub(crate) fn datagrams(&self, message: &Message) -> impl Iterator<Item = &Datagram> {
        let mut place = message.first;
        (0..message.count).map_while(move |_| {
            let (datagram, next) = self.datagrams.get(place)?;
            place = *next;
            Some(datagram)
        })
    }

    /// Removes all datagrams.
    pub(crate) fn clear(&mut self) {
        self.messages.clear();
        self.datagrams.clear();
    }
}

/// Runs that one sending thread avoids: the kernel refused runs of that size to the peer, because the path there carries
/// less than the link. [`NarrowPaths`](super::narrow::NarrowPaths) is what all threads report of it.
#[derive(Debug)]
pub(crate) struct RefusedRuns {
    /// A peer, the smallest refused size in bytes, and the end of the entry's validity.
    refused: Vec<(SocketAddr, usize, Instant)>,
}

impl RefusedRuns {
    /// The most entries. For further peers, each run is refused again.
    pub(crate) const MOST: usize = 64;
    /// How long an entry is valid. A route's path MTU lasts ten minutes (`mtu_expires`), and may recover sooner.
    pub(crate) const VALID_FOR: Duration = Duration::from_secs(10);

    pub(crate) fn new() -> Self {
        Self { refused: Vec::with_capacity(Self::MOST) }
    }

    /// Removes expired entries. Called once for each batch.
    pub(crate) fn refresh(&mut self) {
        if !self.refused.is_empty() {
            let now = Instant::now();
            self.refused.retain(|(_, _, until)| now < *until);
        }
    }

    /// Records that a run of datagrams of this size was refused.
    pub(crate) fn refuse(&mut self, to: SocketAddr, size: usize, now: Instant) {
        let until = now + Self::VALID_FOR;
        if let Some((_, least, _)) = self.refused.iter_mut().find(|(peer, _, _)| *peer == to) {
            *least = size.min(*least);
        } else if self.refused.len() < Self::MOST {
            self.refused.push((to, size, until));
        }
    }

    /// Whether datagrams of this size can be part of a run.
    pub(crate) fn run(&self, to: SocketAddr, size: usize) -> Run {
        match self.refused.iter().find(|(peer, _, _)| *peer == to) {
            Some((_, least, _)) if size >= *least => Run::Narrow,
            _ => Run::Long,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn peer(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 8285))
    }

    fn datagram(nth: usize, len: usize) -> Datagram {
        Datagram { headers: nth..nth + 20, payload: nth * 10_000..nth * 10_000 + len - 20 }
    }

    proptest! {
        #[test]
        fn runs_are_what_the_kernel_cuts_again_and_each_peers_order_is_kept(
            pushed in vec((0_u8..5, prop_oneof![Just(1472_usize), Just(100), 20..65_507_usize], any::<bool>()), 0..MAX_DATAGRAMS)
        ) {
            let mut outbox = Outbox::new();
            let mut expected = BTreeMap::<_, Vec<_>>::new();
            for (nth, (to, len, long)) in pushed.into_iter().enumerate() {
                if !outbox.has_room() { break; }
                outbox.push(peer(to), datagram(nth, len), if long { Run::Long } else { Run::Narrow });
                expected.entry(peer(to)).or_default().push(datagram(nth, len));
            }
            let mut found = BTreeMap::<_, Vec<_>>::new();
            for message in outbox.messages() {
                let all: Vec<_> = outbox.datagrams(message).cloned().collect();
                prop_assert_eq!(all.len(), message.count);
                prop_assert!((1..=MAX_RUN).contains(&message.count));
                prop_assert_eq!(all.iter().map(Datagram::len).sum::<usize>(), message.bytes);
                prop_assert!(message.bytes <= MAX_BYTES);
                let (last, others) = all.split_last().unwrap();
                prop_assert!(others.iter().all(|datagram| datagram.len() == message.segment));
                prop_assert!(last.len() <= message.segment);
                found.entry(message.to).or_default().extend(all);
            }
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn datagrams_of_many_peers_in_turn_make_a_run_for_each() {
        let mut outbox = Outbox::new();
        (0..200).for_each(|nth| outbox.push(peer((nth % 10) as u8), datagram(nth, 1000), Run::Long));
        assert_eq!(outbox.messages().iter().map(|message| message.count).collect::<Vec<_>>(), [20; 10]);
    }

    #[test]
    fn a_size_that_was_refused_is_sent_one_by_one_for_a_while_and_smaller_ones_are_not() {
        let (mut runs, now) = (RefusedRuns::new(), Instant::now());
        runs.refuse(peer(1), 1400, now);
        runs.refuse(peer(1), 1300, now);
        runs.refuse(peer(1), 1350, now);
        assert_eq!([1299, 1300, 1400].map(|size| runs.run(peer(1), size)), [Run::Long, Run::Narrow, Run::Narrow]);
        assert_eq!(runs.run(peer(2), 1400), Run::Long);
        (0..1000_u16).for_each(|port| runs.refuse(SocketAddr::from(([192, 0, 2, 9], port)), 1000, now));
        assert_eq!(runs.refused.len(), RefusedRuns::MOST);
        let Some(long_ago) = now.checked_sub(RefusedRuns::VALID_FOR) else { return };
        runs.refused.iter_mut().for_each(|(_, _, until)| *until = long_ago);
        runs.refresh();
        assert_eq!(runs.run(peer(1), 1400), Run::Long);
    }
}
