//! Counters of forwarded and dropped packets.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The reason why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// From the TUN: not an IP packet, or shorter than its header states.
    SentMalformed,
    /// From the TUN: to a multicast group, which no peer has.
    SentToGroup,
    /// From the TUN: no peer has a subnet with the destination. The sender gets an ICMP error, rate-limited.
    NoPeer,
    /// From the TUN: its TTL or hop limit expired.
    SentExpired,
    /// From the TUN: a super-packet that cannot be split.
    NotSplit,
    /// There is no socket of the address family of the peer's endpoint.
    NoSocket,
    /// The socket buffer stayed full for some time.
    SocketFull,
    /// The kernel refused to send the packet.
    SendRefused,
    /// The kernel truncated a datagram. No UDP datagram is that long.
    Truncated,
    /// A datagram from an address and port that belong to no peer.
    UnknownSender,
    /// From a peer: not an IP packet, or shorter than its header states.
    Malformed,
    /// From a peer: its source is neither in a subnet of that peer nor the address that the peer sends from.
    WrongSource,
    /// From a peer: its destination is not in a subnet of this node.
    WrongDestination,
    /// From a peer: its TTL or hop limit expired.
    Expired,
    /// The TUN was down, or refused the packet.
    TunRefused,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 15] = [
        Self::SentMalformed,
        Self::SentToGroup,
        Self::NoPeer,
        Self::SentExpired,
        Self::NotSplit,
        Self::NoSocket,
        Self::SocketFull,
        Self::SendRefused,
        Self::Truncated,
        Self::UnknownSender,
        Self::Malformed,
        Self::WrongSource,
        Self::WrongDestination,
        Self::Expired,
        Self::TunRefused,
    ];

    /// Returns a name for metrics, such as `no_peer`.
    pub fn name(self) -> &'static str {
        match self {
            Self::SentMalformed => "sent_malformed",
            Self::SentToGroup => "sent_to_group",
            Self::NoPeer => "no_peer",
            Self::SentExpired => "sent_expired",
            Self::NotSplit => "not_split",
            Self::NoSocket => "no_socket",
            Self::SocketFull => "socket_full",
            Self::SendRefused => "send_refused",
            Self::Truncated => "truncated",
            Self::UnknownSender => "unknown_sender",
            Self::Malformed => "malformed",
            Self::WrongSource => "wrong_source",
            Self::WrongDestination => "wrong_destination",
            Self::Expired => "expired",
            Self::TunRefused => "tun_refused",
        }
    }
}

/// The reason in words, to be read after a number of packets.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SentMalformed => "from this host: not an IP packet, or shorter than its header states",
            Self::SentToGroup => "to a multicast group",
            Self::NoPeer => "to a subnet that no node has",
            Self::SentExpired => "from this host: TTL or hop limit expired",
            Self::NotSplit => "a super-packet that cannot be split",
            Self::NoSocket => "no socket has the address family of the peer's address",
            Self::SocketFull => "the socket buffer stayed full",
            Self::SendRefused => "the kernel refused to send it",
            Self::Truncated => "received incomplete",
            Self::UnknownSender => "from an address and port of no peer",
            Self::Malformed => "from a peer: not an IP packet, or shorter than its header states",
            Self::WrongSource => "from a peer, with a source outside the peer's subnet that is not the peer's address",
            Self::WrongDestination => "from a peer, with a destination outside this node's subnet",
            Self::Expired => "from a peer: TTL or hop limit expired",
            Self::TunRefused => "the TUN device was down or refused it",
        })
    }
}

/// Counters of one direction, since the path was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Packets of the overlay, counted as on the wire.
    pub packets: u64,
    /// Bytes of these packets, without the headers of the underlay.
    pub bytes: u64,
    /// Reads from or writes to the TUN: a super-packet counts once.
    pub tun: u64,
    /// Messages through the socket: datagrams that the kernel splits or has merged count once. The ratio of packets to
    /// this, or to [`tun`](Self::tun), is the gain from offloading.
    pub udp: u64,
    /// System calls, except for waiting.
    pub calls: u64,
}

/// The counters of a packet path since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// From the TUN to peers.
    pub sent: Traffic,
    /// From peers to the TUN.
    pub received: Traffic,
    /// ICMP answers to packets without a peer.
    pub answered: u64,
    /// Packets that were sent one by one because the path to the peer does not carry runs of that size.
    pub unbatched: u64,
    /// Messages that the kernel dropped instead of receiving them: a socket buffer was full, the checksum was wrong, or
    /// a socket filter refused them. A message is a datagram, or with `UDP_GRO` a run of up to 64 datagrams.
    pub overflowed: u64,
    dropped: [u64; Reason::ALL.len()],
}

impl Counters {
    /// A metric name for [`overflowed`](Self::overflowed), beside the names of reasons.
    pub const OVERFLOWED: &'static str = "no_room";

    /// Returns the number of packets dropped for a reason.
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.dropped.get(reason as usize).copied().unwrap_or(0)
    }

    /// Returns the number of packets dropped for all reasons, without [`overflowed`](Self::overflowed).
    pub fn all_dropped(&self) -> u64 {
        self.dropped.iter().sum()
    }
}

/// The counters of one thread. Only that thread adds to them.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Cells {
    pub(crate) packets: Cell,
    pub(crate) bytes: Cell,
    pub(crate) tun: Cell,
    pub(crate) udp: Cell,
    pub(crate) calls: Cell,
    pub(crate) answered: Cell,
    pub(crate) unbatched: Cell,
    dropped: [Cell; Reason::ALL.len()],
}

impl Cells {
    /// Counts one dropped packet.
    pub(crate) fn dropped(&self, reason: Reason) {
        self.dropped_many(reason, 1);
    }

    /// Counts several dropped packets.
    pub(crate) fn dropped_many(&self, reason: Reason, count: u64) {
        if let Some(cell) = self.dropped.get(reason as usize) {
            cell.add(count);
        }
    }

    /// Adds these counters to those of other threads.
    pub(crate) fn add_to(&self, counters: &mut Counters, direction: fn(&mut Counters) -> &mut Traffic) {
        let traffic = direction(counters);
        traffic.packets += self.packets.read();
        traffic.bytes += self.bytes.read();
        traffic.tun += self.tun.read();
        traffic.udp += self.udp.read();
        traffic.calls += self.calls.read();
        counters.answered += self.answered.read();
        counters.unbatched += self.unbatched.read();
        counters.dropped.iter_mut().zip(&self.dropped).for_each(|(sum, cell)| *sum += cell.read());
    }
}

/// A number that one thread adds to and others read.
#[derive(Debug, Default)]
pub(crate) struct Cell(AtomicU64);

impl Cell {
    pub(crate) fn add(&self, count: u64) {
        // No other thread writes, so this need not be one instruction.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_place_of_its_own() {
        let (cells, mut counters) = (Cells::default(), Counters::default());
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
            cells.dropped_many(reason, 1 << place);
        }
        cells.add_to(&mut counters, |counters| &mut counters.sent);
        assert_eq!(Reason::ALL.map(|reason| counters.dropped(reason)), std::array::from_fn(|place| 1 << place));
        assert_eq!(counters.all_dropped(), (1 << Reason::ALL.len()) - 1);
    }
}
