//! Splits a super-packet from the TUN into its segments, or completes the checksum of a single packet.
//!
//! The kernel passes packets as it would to a network card with segmentation and checksum offload; this module does the
//! work of that card.

use std::ops::Range;

use super::checksum::{self, Sum};
use super::header::{self, Ip, TCP, UDP, Vnet, at, flag, put_long, put_word, word};

/// The longest headers of a super-packet, in bytes: IPv6 with extension headers and a full TCP header.
pub(crate) const MAX_HEADERS: usize = 256;
/// The most UDP segments that the kernel makes of one send (`UDP_MAX_SEGMENTS`).
const MAX_DATAGRAMS: usize = 128;
/// The smallest payload of a TCP segment other than the last, in bytes (`TCP_MIN_GSO_SIZE`).
pub(crate) const LEAST_SEGMENT: usize = 8;
/// The most segments of one packet: the largest packet with the smallest payload per segment.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) const MAX_SEGMENTS: usize = 0xffff_usize.div_ceil(LEAST_SEGMENT);

/// The result of splitting a packet.
#[derive(Debug)]
pub(crate) enum Split {
    /// The packet is sent unchanged.
    Whole,
    /// The packet is sent in segments.
    Segments(Segments),
}

/// The packet needs an offload that was not enabled, or is inconsistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

/// The parts of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The range of its headers in the buffer that [`Segments::next`] appends to.
    pub(crate) headers: Range<usize>,
    /// The range of its payload in the packet.
    pub(crate) payload: Range<usize>,
}

/// The remaining segments of a super-packet.
#[derive(Debug)]
pub(crate) struct Segments {
    is_v4: bool,
    is_tcp: bool,
    ip_header: usize,
    /// The start of the transport header.
    transport: usize,
    /// The start of the payload.
    payload: usize,
    /// The end of the payload.
    end: usize,
    /// The payload of each segment except the last.
    size: usize,
    /// The start of the next segment's payload.
    next: Option<usize>,
    /// The number of segments so far.
    count: u16,
    id: u16,
    sequence: u32,
    flags: u8,
    /// The part of the checksum that all segments share: the pseudo-header without the length.
    pseudo: Sum,
}

/// Examines a packet whose headers `vnet` and `ip` were parsed. Completes the checksum of a single packet in place.
pub(crate) fn split(vnet: &Vnet, ip: &Ip, packet: &mut [u8]) -> Result<Split, Refused> {
    let packet = packet.get_mut(..ip.len).ok_or(Refused)?;
    if vnet.kind & !Vnet::ECN == Vnet::SINGLE {
        if vnet.flags & Vnet::NEEDS_CHECKSUM != 0 {
            complete(vnet, ip, packet).ok_or(Refused)?;
        }
        return Ok(Split::Whole);
    }
    Segments::new(vnet, ip, packet).map(Split::Segments).ok_or(Refused)
}

/// Completes a checksum: the field contains the sum of the pseudo-header, and the sum of the rest is added.
fn complete(vnet: &Vnet, ip: &Ip, packet: &mut [u8]) -> Option<()> {
    let start = usize::from(vnet.start);
    let field = start + usize::from(vnet.offset);
    if start < ip.header || field + 2 > packet.len() {
        return None;
    }
    let sum = Sum::of(packet.get(start..)?);
    // As the kernel does for every protocol (skb_checksum_help): the inner protocol of a tunnel may be UDP.
    put_word(packet, field, checksum::of_udp(sum));
    Some(())
}

impl Segments {
    fn new(vnet: &Vnet, ip: &Ip, packet: &[u8]) -> Option<Self> {
        let (is_v4, is_tcp) = match vnet.kind & !Vnet::ECN {
            Vnet::TCP_V4 if ip.is_v4() => (true, true),
            Vnet::TCP_V6 if !ip.is_v4() => (false, true),
            Vnet::UDP => (ip.is_v4(), false),
            _ => return None,
        };
        let transport = usize::from(vnet.start);
        let field = if is_tcp { at::tcp::CHECKSUM } else { at::udp::CHECKSUM };
        let needs_checksum = vnet.flags & Vnet::NEEDS_CHECKSUM != 0;
        if transport < ip.header || usize::from(vnet.offset) != field || !needs_checksum {
            return None;
        }
        let tcp = |field: usize| packet.get(transport + field).copied();
        let header = if is_tcp { usize::from(tcp(at::tcp::OFFSET)? >> 4) * 4 } else { UDP };
        let (payload, size) = (transport + header, usize::from(vnet.segment));
        if (is_tcp && header < TCP) || payload > packet.len().min(MAX_HEADERS) || size == 0 {
            return None;
        }
        let count = (packet.len() - payload).div_ceil(size);
        if if is_tcp { size < LEAST_SEGMENT } else { count > MAX_DATAGRAMS } {
            return None;
        }
        let len = u16::try_from(packet.len() - transport).ok()?;
        Some(Self {
            is_v4,
            is_tcp,
            ip_header: ip.header,
            transport,
            payload,
            end: packet.len(),
            size,
            next: Some(payload),
            count: 0,
            id: word(packet, at::v4::ID)?,
            sequence: if is_tcp { header::long(packet, transport + at::tcp::SEQUENCE)? } else { 0 },
            flags: if is_tcp { tcp(at::tcp::FLAGS)? } else { 0 },
            // The field includes the length of all segments, which is subtracted here.
            pseudo: Sum::of_word(word(packet, transport + field)?).and(Sum::of_word(!len)),
        })
    }

    /// Returns the next segment of `packet`, which must be the packet passed to [`split`]. Appends its headers to
    /// `headers`, at most [`MAX_HEADERS`] bytes.
    pub(crate) fn next(&mut self, packet: &[u8], headers: &mut Vec<u8>) -> Option<Segment> {
        let begin = self.next?;
        let end = self.end.min(begin + self.size);
        let (is_first, is_last) = (begin == self.payload, end == self.end);
        let payload = packet.get(begin..end)?;
        let place = headers.len();
        headers.extend_from_slice(packet.get(..self.payload)?);
        let header = headers.get_mut(place..)?;

        let len = (self.payload + payload.len()) as u16;
        if self.is_v4 {
            put_word(header, at::v4::LEN, len);
            put_word(header, at::v4::ID, self.id.wrapping_add(self.count));
            header::finish_ipv4(header, self.ip_header);
        } else {
            put_word(header, at::v6::LEN, len - header::IPV6 as u16);
        }
        let transport = header.get_mut(self.transport..)?;
        let len = (transport.len() + payload.len()) as u16;
        if self.is_tcp {
            let offset = (begin - self.payload) as u32;
            put_long(transport, at::tcp::SEQUENCE, self.sequence.wrapping_add(offset));
            let mut flags = self.flags;
            flags &= if is_last { !0 } else { !(flag::FIN | flag::PSH) };
            flags &= if is_first { !0 } else { !flag::CWR };
            *transport.get_mut(at::tcp::FLAGS)? = flags;
            put_word(transport, at::tcp::CHECKSUM, 0);
        } else {
            put_word(transport, at::udp::LEN, len);
            put_word(transport, at::udp::CHECKSUM, 0);
        }
        let sum = self.pseudo.and(Sum::of_word(len)).and(Sum::of(transport)).and(Sum::of(payload));
        if self.is_tcp {
            put_word(transport, at::tcp::CHECKSUM, sum.finished());
        } else {
            put_word(transport, at::udp::CHECKSUM, checksum::of_udp(sum));
        }

        self.count = self.count.wrapping_add(1);
        self.next = if is_last { None } else { Some(end) };
        Some(Segment { headers: place..headers.len(), payload: begin..end })
    }
}
