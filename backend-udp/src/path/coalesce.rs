//! Merges received packets into super-packets for the TUN, as generic receive offload does in the kernel.
//!
//! Packets are merged only if [`split`](super::split) returns them bit for bit, except for the IPv4 identification of
//! packets that must not be fragmented, which has no meaning (RFC 6864, section 4.1). Packets of a flow stay in order.

use std::io::IoSlice;
use std::net::IpAddr;
use std::ops::Range;

use super::checksum::Sum;
use super::header::{
    self, DONT_FRAGMENT, Fragment, IPV4, IPV6, Ip, TCP, UDP, Vnet, at, flag, long, protocol, put_word, word,
};
use super::split::LEAST_SEGMENT;

/// The most flows held at a time. For one more, a held flow is written.
pub(crate) const MAX_FLOWS: usize = 16;
/// The most packets merged into one: kernels before 6.11 accept no more datagrams (`UDP_MAX_SEGMENTS`).
pub(crate) const MAX_MERGED: usize = 64;
/// The largest super-packet, in bytes: the length field has 16 bits.
const LONGEST: usize = 0xffff;
/// The longest headers of a merged packet, in bytes: IPv6, and TCP with all options.
const HEADERS: usize = IPV6 + 60;

/// Which packets are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Merging {
    /// None.
    Nothing,
    /// TCP segments.
    Tcp,
    /// TCP segments and UDP datagrams.
    TcpAndUdp,
}

/// The destination of packets.
pub(crate) trait Sink {
    /// Writes a packet as it was received.
    fn single(&mut self, packet: &[u8]);

    /// Writes a super-packet: the bytes of a [`Vnet`], then the packet in parts. It contains `count` packets of `bytes`
    /// bytes in total.
    fn merged(&mut self, parts: &[IoSlice<'_>], count: usize, bytes: usize) -> Taken;
}

/// Whether a super-packet was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It was accepted, or the device cannot accept any packet.
    Yes,
    /// It was refused as a super-packet: its packets have to be written one by one.
    No,
}

/// The flows that are held. All places refer to one buffer, the arena. Until [`flush`](Self::flush), only this type may
/// change the arena.
#[derive(Debug)]
pub(crate) struct Coalescer {
    merging: Merging,
    flows: [Flow; MAX_FLOWS],
    /// The flow that was last written to make room. The flow after it is written next.
    displaced: usize,
}

impl Coalescer {
    pub(crate) fn new(merging: Merging) -> Self {
        Self { merging, flows: std::array::from_fn(|_| Flow::default()), displaced: 0 }
    }

    /// Sets which packets are merged from now on.
    pub(crate) fn set_merging(&mut self, merging: Merging) {
        self.merging = merging;
    }

    /// Takes the packet at a place; `ip` is its parsed header.
    pub(crate) fn push(&mut self, arena: &mut [u8], place: Range<usize>, ip: &Ip, sink: &mut impl Sink) {
        let Some(packet) = arena.get(place.clone()) else { return };
        let Some(candidate) = Candidate::of(packet, ip, self.merging) else {
            self.flush_beside(arena, packet_key(packet, ip), ip, sink);
            return single(arena, place, sink);
        };
        if let Some(flow) = self.flows.iter_mut().find(|flow| flow.count > 0 && flow.key == candidate.key) {
            if flow.takes(arena, &candidate, packet) {
                flow.add(&candidate, place);
                if flow.is_full(&candidate) {
                    flow.flush(arena, sink);
                }
                return;
            }
            flow.flush(arena, sink);
        }
        if candidate.is_pushed || candidate.payload < LEAST_SEGMENT {
            return single(arena, place, sink);
        }
        let free = self.flows.iter().position(|flow| flow.count == 0);
        let index = free.unwrap_or_else(|| {
            self.displaced = (self.displaced + 1) % MAX_FLOWS;
            self.displaced
        });
        if let Some(flow) = self.flows.get_mut(index) {
            flow.flush(arena, sink);
            flow.begin(&candidate, place);
        }
    }

    /// Writes all held flows.
    pub(crate) fn flush(&mut self, arena: &mut [u8], sink: &mut impl Sink) {
        self.flows.iter_mut().for_each(|flow| flow.flush(arena, sink));
    }

    /// Writes the flows that an unmerged packet must not overtake: its own flow, or all flows between its addresses if
    /// its ports are not known.
    fn flush_beside(&mut self, arena: &mut [u8], key: Option<Key>, ip: &Ip, sink: &mut impl Sink) {
        let addresses = (ip.source, ip.destination);
        let is_beside = |flow: &Flow| key.map_or(flow.key.addresses == addresses, |key| flow.key == key);
        let beside = self.flows.iter_mut().filter(|flow| flow.count > 0 && is_beside(flow));
        beside.for_each(|flow| flow.flush(arena, sink));
    }
}

fn single(arena: &[u8], place: Range<usize>, sink: &mut impl Sink) {
    if let Some(packet) = arena.get(place) {
        sink.single(packet);
    }
}

/// The fields that all packets of a flow share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    ports: u32,
    protocol: u8,
    addresses: (IpAddr, IpAddr),
}

/// Returns the flow of a packet, if its ports are known.
fn packet_key(packet: &[u8], ip: &Ip) -> Option<Key> {
    let has_ports = matches!(ip.protocol, protocol::TCP | protocol::UDP) && ip.fragment != Fragment::Later;
    let ports = long(packet, ip.header).filter(|_| has_ports)?;
    Some(Key { ports, protocol: ip.protocol, addresses: (ip.source, ip.destination) })
}

/// A packet that may be merged: not a fragment, without IP options, with a payload, and with correct checksums, because
/// merging would hide wrong ones.
struct Candidate {
    key: Key,
    /// The start of the transport header, in bytes.
    transport: usize,
    /// The start of the payload, in bytes.
    headers: usize,
    /// The length of the payload, in bytes.
    payload: usize,
    /// The TCP sequence number.
    sequence: u32,
    /// Whether no packet may be merged after this one.
    is_pushed: bool,
}

impl Candidate {
    fn of(packet: &[u8], ip: &Ip, merging: Merging) -> Option<Self> {
        let is_plain = ip.fragment == Fragment::Whole && packet.len() == ip.len;
        let has_options = ip.is_v4() && ip.header != IPV4;
        if !is_plain || has_options {
            return None;
        }
        let (header, transport) = packet.split_at_checked(ip.header)?;
        let (length, sequence, is_pushed) = match (ip.protocol, merging) {
            (protocol::TCP, Merging::Tcp | Merging::TcpAndUdp) => {
                let tcp: &[u8; TCP] = transport.first_chunk()?;
                let flags = tcp[at::tcp::FLAGS];
                let is_data = flags & !(flag::PSH | flag::ECE) == flag::ACK && tcp[at::tcp::OFFSET] & 0xf == 0;
                let length = usize::from(tcp[at::tcp::OFFSET] >> 4) * 4;
                if !is_data || length < TCP {
                    return None;
                }
                (length, long(transport, at::tcp::SEQUENCE)?, flags & flag::PSH != 0)
            }
            (protocol::UDP, Merging::TcpAndUdp) => {
                let len = usize::from(word(transport, at::udp::LEN)?);
                if len != transport.len() || word(transport, at::udp::CHECKSUM)? == 0 {
                    return None;
                }
                (UDP, 0, false)
            }
            _ => return None,
        };
        let payload = transport.len().checked_sub(length).filter(|payload| *payload > 0)?;
        let pseudo = Sum::pseudo(ip.source, ip.destination, ip.protocol, transport.len());
        let is_right = (!ip.is_v4() || Sum::of(header).is_right()) && pseudo.and(Sum::of(transport)).is_right();
        is_right.then_some(Self {
            key: packet_key(packet, ip)?,
            transport: ip.header,
            headers: ip.header + length,
            payload,
            sequence,
            is_pushed,
        })
    }
}

/// Consecutive packets of a flow.
#[derive(Debug)]
struct Flow {
    key: Key,
    transport: usize,
    headers: usize,
    /// The payload of each packet except the last, in bytes.
    size: usize,
    /// The headers of the first packet and the payload of all, in bytes.
    len: usize,
    /// The sequence number that the next packet must have.
    next: u32,
    is_pushed: bool,
    /// The number of packets; zero if this place is free.
    count: usize,
    places: [(usize, usize); MAX_MERGED],
}

impl Default for Flow {
    fn default() -> Self {
        let nowhere = IpAddr::from([0; 4]);
        Self {
            key: Key { ports: 0, protocol: 0, addresses: (nowhere, nowhere) },
            transport: 0,
            headers: 0,
            size: 0,
            len: 0,
            next: 0,
            is_pushed: false,
            count: 0,
            places: [(0, 0); MAX_MERGED],
        }
    }
}

impl Flow {
    fn begin(&mut self, candidate: &Candidate, place: Range<usize>) {
        self.key = candidate.key;
        self.transport = candidate.transport;
        self.headers = candidate.headers;
        self.size = candidate.payload;
        self.len = candidate.headers;
        self.next = candidate.sequence;
        self.count = 0;
        self.add(candidate, place);
    }

    fn add(&mut self, candidate: &Candidate, place: Range<usize>) {
        if let Some(free) = self.places.get_mut(self.count) {
            *free = (place.start, place.end);
            self.count += 1;
            self.len += candidate.payload;
            self.next = self.next.wrapping_add(candidate.payload as u32);
            self.is_pushed = candidate.is_pushed;
        }
    }

    /// Whether no packet can follow the added one.
    fn is_full(&self, added: &Candidate) -> bool {
        self.is_pushed || added.payload < self.size || self.count == MAX_MERGED
    }

    /// Whether the packet continues the flow so that splitting returns both.
    fn takes(&self, arena: &[u8], candidate: &Candidate, packet: &[u8]) -> bool {
        let Some(head) = self.places.first().and_then(|(start, end)| arena.get(*start..*end)) else { return false };
        let same = |range: Range<usize>| head.get(range.clone()) == packet.get(range);
        let is_ip_equal = if candidate.transport == IPV4 {
            let fragment = at::v4::FRAGMENT;
            let expected = word(head, at::v4::ID).map(|id| id.wrapping_add(self.count as u16));
            let may_differ = word(packet, fragment).is_some_and(|word| word & DONT_FRAGMENT != 0);
            same(0..at::v4::LEN)
                && same(fragment..at::v4::TTL + 1)
                && (may_differ || word(packet, at::v4::ID) == expected)
        } else {
            same(0..at::v6::LEN) && same(at::v6::HOP_LIMIT..at::v6::HOP_LIMIT + 1)
        };
        let tcp = self.transport;
        let flags = |packet: &[u8]| packet.get(tcp + at::tcp::FLAGS).map(|flags| flags & !flag::PSH);
        let continues = || {
            candidate.sequence == self.next
                && flags(head) == flags(packet)
                && same(tcp + at::tcp::SEQUENCE + 4..tcp + at::tcp::FLAGS)
                && same(tcp + at::tcp::FLAGS + 1..tcp + at::tcp::CHECKSUM)
                && same(tcp + at::tcp::CHECKSUM + 2..self.headers)
        };
        self.headers == candidate.headers
            && candidate.payload <= self.size
            && self.len + candidate.payload <= LONGEST
            && is_ip_equal
            && (self.key.protocol != protocol::TCP || continues())
    }

    /// Writes the held packets and frees the place.
    fn flush(&mut self, arena: &mut [u8], sink: &mut impl Sink) {
        let places = self.places.get(..std::mem::take(&mut self.count)).unwrap_or(&[]);
        if let [(start, end)] = *places {
            return single(arena, start..end, sink);
        }
        let Some((start, _)) = places.first().copied() else { return };
        let mut saved = [0_u8; HEADERS];
        let Some(headers) = arena.get_mut(start..start + self.headers) else { return };
        let Some(saved) = saved.get_mut(..headers.len()) else { return };
        saved.copy_from_slice(headers);
        let vnet = self.make_super(headers).bytes();
        if self.write(arena, places, &vnet, sink) == Taken::Yes {
            return;
        }
        if let Some(headers) = arena.get_mut(start..start + self.headers) {
            headers.copy_from_slice(saved);
        }
        places.iter().for_each(|(start, end)| single(arena, *start..*end, sink));
    }

    fn write(&self, arena: &[u8], places: &[(usize, usize)], vnet: &[u8], sink: &mut impl Sink) -> Taken {
        let mut parts = [IoSlice::new(&[]); 1 + MAX_MERGED];
        let [first, rest @ ..] = &mut parts;
        *first = IoSlice::new(vnet);
        for (nth, (part, (start, end))) in rest.iter_mut().zip(places).enumerate() {
            let skipped = if nth == 0 { 0 } else { self.headers };
            *part = IoSlice::new(arena.get(start + skipped..*end).unwrap_or(&[]));
        }
        let bytes = places.iter().map(|(start, end)| end - start).sum();
        sink.merged(parts.get(..=places.len()).unwrap_or(&[]), places.len(), bytes)
    }

    /// Turns the headers of the first packet into those of the super-packet.
    fn make_super(&self, headers: &mut [u8]) -> Vnet {
        let is_v4 = self.transport == IPV4;
        if is_v4 {
            put_word(headers, at::v4::LEN, self.len as u16);
            header::finish_ipv4(headers, IPV4);
        } else {
            put_word(headers, at::v6::LEN, (self.len - IPV6) as u16);
        }
        let len = self.len - self.transport;
        let (source, destination) = self.key.addresses;
        let pseudo = Sum::pseudo(source, destination, self.key.protocol, len).unfinished();
        let transport = headers.get_mut(self.transport..).unwrap_or_default();
        let (kind, offset) = if self.key.protocol == protocol::TCP {
            if let Some(flags) = transport.get_mut(at::tcp::FLAGS).filter(|_| self.is_pushed) {
                *flags |= flag::PSH;
            }
            (if is_v4 { Vnet::TCP_V4 } else { Vnet::TCP_V6 }, at::tcp::CHECKSUM)
        } else {
            put_word(transport, at::udp::LEN, len as u16);
            (Vnet::UDP, at::udp::CHECKSUM)
        };
        put_word(transport, offset, pseudo);
        Vnet {
            flags: Vnet::NEEDS_CHECKSUM,
            kind,
            header: self.headers as u16,
            segment: self.size as u16,
            start: self.transport as u16,
            offset: offset as u16,
        }
    }
}
