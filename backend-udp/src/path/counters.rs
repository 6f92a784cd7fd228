//! What went through, and what did not and why.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// From the TUN: it is no IP packet, or is not as long as it says.
    SentMalformed,
    /// From the TUN: to a group, which no peer has.
    SentToGroup,
    /// From the TUN: no peer has a subnet with the destination. The sender is told, within a limit.
    NoPeer,
    /// From the TUN: its TTL or hop limit was used up.
    SentExpired,
    /// From the TUN: a super-packet that cannot be split.
    NotSplit,
    /// There is no socket of the family that the peer's endpoint is of.
    NoSocket,
    /// The socket took nothing for some time.
    SocketFull,
    /// The kernel refused to send it.
    SendRefused,
    /// The kernel cut a datagram off. No datagram of UDP is that long.
    Truncated,
    /// A datagram from an address and port at which no peer is.
    UnknownSender,
    /// From a peer: it is no IP packet, or is shorter than it says.
    Malformed,
    /// From a peer: its source is in no subnet of that peer.
    WrongSource,
    /// From a peer: its destination is in no subnet of this node.
    WrongDestination,
    /// From a peer: its TTL or hop limit was used up.
    Expired,
    /// The TUN was down, or took nothing.
    TunRefused,
}

impl Reason {
    /// All of them.
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

    /// A name for metrics, as `no_peer`.
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

/// One direction. All numbers count from the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Packets of the overlay, as they are on the wire.
    pub packets: u64,
    /// Their bytes, without the headers of the underlay.
    pub bytes: u64,
    /// How often a packet went through the TUN: a super-packet counts once.
    pub tun: u64,
    /// How often something went through the socket: datagrams that the kernel splits or has merged count once. Packets
    /// divided by this, or by [`tun`](Self::tun), is what offloading is worth.
    pub udp: u64,
    /// System calls, but for waiting.
    pub calls: u64,
}

/// What a packet path has counted since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// From the TUN to peers.
    pub sent: Traffic,
    /// From peers to the TUN.
    pub received: Traffic,
    /// ICMP answers to packets for which there is no peer.
    pub answered: u64,
    /// Packets that were sent one by one because the path to the peer carries no run of that size.
    pub unbatched: u64,
    /// Datagrams that came in faster than they were read, for which the sockets had no room.
    pub overflowed: u64,
    dropped: [u64; Reason::ALL.len()],
}

impl Counters {
    /// A name for [`overflowed`](Self::overflowed) in metrics, beside those of reasons.
    pub const OVERFLOWED: &'static str = "no_room";

    /// Packets dropped for a reason.
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.dropped.get(reason as usize).copied().unwrap_or(0)
    }

    /// All of these; what overflowed is not among them.
    pub fn all_dropped(&self) -> u64 {
        self.dropped.iter().sum()
    }
}

/// The counters of one thread, which alone adds to them.
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
    /// Counts a drop.
    pub(crate) fn dropped(&self, reason: Reason) {
        self.dropped_many(reason, 1);
    }

    /// Counts several.
    pub(crate) fn dropped_many(&self, reason: Reason, count: u64) {
        if let Some(cell) = self.dropped.get(reason as usize) {
            cell.add(count);
        }
    }

    /// Adds them to those of other threads.
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
        // Nobody else writes, so it need not be one instruction.
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
