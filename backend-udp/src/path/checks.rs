//! Properties that hold for any bytes, used by property tests and fuzz targets. Each check panics if its property
//! fails.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::net::IpAddr;

use super::checksum::Sum;
use super::coalesce::{Coalescer, Merging, Sink, Taken};
use super::header::{self, DONT_FRAGMENT, Fragment, Ip, Vnet, at, long, protocol, put_word, word};
use super::icmp;
use super::split::{self, Split};

/// Splits a packet from the TUN; returns nothing if it is refused. Checks that each part is a valid packet by its own
/// headers, and that the number and length of the parts are within the stated limits.
pub(crate) fn split_all(vnet: &Vnet, packet: &mut [u8]) -> Vec<Vec<u8>> {
    let Ok(ip) = Ip::parse(packet) else { return Vec::new() };
    match split::split(vnet, &ip, packet) {
        Err(split::Refused) => Vec::new(),
        Ok(Split::Whole) => vec![packet.get(..ip.len).unwrap_or_default().to_vec()],
        Ok(Split::Segments(mut segments)) => {
            let (mut found, mut headers) = (Vec::new(), Vec::new());
            while let Some(segment) = segments.next(packet, &mut headers) {
                assert!(segment.headers.len() <= split::MAX_HEADERS);
                let parts = [headers.get(segment.headers), packet.get(segment.payload)];
                let segment = parts.map(Option::unwrap_or_default).concat();
                assert_eq!(Ip::parse(&segment).map(|ip| ip.len), Ok(segment.len()));
                assert!(!ip.is_v4() || Sum::of(segment.get(..ip.header).unwrap_or_default()).is_right());
                found.push(segment);
            }
            assert!((1..=split::MAX_SEGMENTS).contains(&found.len()));
            found
        }
    }
}

/// A sink that splits what is written to it.
#[derive(Debug)]
pub(crate) struct Splitting {
    /// Whether super-packets are accepted.
    pub(crate) takes: Taken,
    /// The packets after splitting, in order.
    pub(crate) packets: Vec<Vec<u8>>,
    /// The number of packets in each write.
    pub(crate) writes: Vec<usize>,
}

impl Splitting {
    pub(crate) fn new(takes: Taken) -> Self {
        Self { takes, packets: Vec::new(), writes: Vec::new() }
    }
}

impl Sink for Splitting {
    fn single(&mut self, packet: &[u8]) {
        self.writes.push(1);
        self.packets.push(packet.to_vec());
    }

    fn merged(&mut self, parts: &[IoSlice<'_>], count: usize, bytes: usize) -> Taken {
        if self.takes == Taken::No {
            return Taken::No;
        }
        let vnet = parts.first().and_then(|vnet| vnet.first_chunk().copied()).map(Vnet::parse).unwrap_or_default();
        let mut packet = parts.iter().skip(1).flat_map(|part| part.iter().copied()).collect::<Vec<u8>>();
        assert!(packet.len() <= 0xffff);
        let split = split_all(&vnet, &mut packet);
        assert_eq!((split.len(), split.iter().map(Vec::len).sum()), (count, bytes));
        self.writes.push(count);
        self.packets.extend(split);
        Taken::Yes
    }
}

/// Coalesces packets, `batch` at a time, and splits the result. Checks that each part is a valid packet.
pub(crate) fn coalesced(packets: &[Vec<u8>], batch: usize, merging: Merging, takes: Taken) -> Splitting {
    let (mut coalescer, mut sink) = (Coalescer::new(merging), Splitting::new(takes));
    for batch in packets.chunks(batch.max(1)) {
        let mut arena = Vec::new();
        for packet in batch {
            let start = arena.len();
            arena.extend(packet);
            let end = arena.len();
            if let Ok(ip) = Ip::parse(packet) {
                coalescer.push(&mut arena, start..end, &ip, &mut sink);
            }
        }
        coalescer.flush(&mut arena, &mut sink);
    }
    sink
}

/// Source, destination, protocol, and ports. Fragments have no ports.
type Flow = (IpAddr, IpAddr, u8, Option<u32>);

/// Returns the packets of each flow in order, without insignificant differences: the identification of packets that
/// must not be fragmented, and the two representations of a zero checksum.
pub(crate) fn by_flow(packets: &[Vec<u8>]) -> BTreeMap<Flow, Vec<Vec<u8>>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for packet in packets {
        let Ok(ip) = Ip::parse(packet) else { continue };
        let mut packet = packet.clone();
        let is_plain = ip.fragment == Fragment::Whole;
        let mut positive = |at: usize| {
            if word(&packet, at) == Some(0xffff) {
                put_word(&mut packet, at, 0);
            }
        };
        if is_plain && ip.protocol == protocol::TCP {
            positive(ip.header + at::tcp::CHECKSUM);
        }
        if ip.is_v4() {
            let is_right = Sum::of(packet.get(..ip.header).unwrap_or_default()).is_right();
            let is_atomic = word(&packet, at::v4::FRAGMENT).is_some_and(|word| word & DONT_FRAGMENT != 0);
            if is_right && is_plain && is_atomic {
                put_word(&mut packet, at::v4::ID, 0);
            }
            if is_right {
                header::finish_ipv4(&mut packet, ip.header);
            }
        }
        let ports = long(&packet, ip.header).filter(|_| is_plain);
        flows.entry((ip.source, ip.destination, ip.protocol, ports)).or_default().push(packet);
    }
    flows
}

/// Checks that splitting a packet that follows a TUN header does not panic and returns valid packets.
#[cfg(feature = "fuzzing")]
pub(crate) fn split(bytes: &[u8]) {
    let Some((vnet, packet)) = bytes.split_first_chunk() else { return };
    split_all(&Vnet::parse(*vnet), &mut packet.to_vec());
}

/// Checks that splitting returns the coalesced packets. Each packet is preceded by its length in two bytes and a byte
/// whose lowest bit selects whether its checksums are corrected.
#[cfg(feature = "fuzzing")]
pub(crate) fn coalesce(bytes: &[u8]) {
    let Some(([batch, merging], mut rest)) = bytes.split_first_chunk::<2>() else { return };
    let mut packets = Vec::new();
    while let Some(([high, low, mend], after)) = rest.split_first_chunk::<3>() {
        let len = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (packet, after) = after.split_at(len);
        rest = after;
        let mut packet = packet.to_vec();
        if let Ok(ip) = Ip::parse(&packet) {
            packet.truncate(ip.len);
            if mend & 1 == 1 {
                mended(&mut packet, &ip);
            }
            packets.push(packet);
        }
    }
    let merging = match merging % 4 {
        0 => Merging::Nothing,
        1 => Merging::Tcp,
        _ => Merging::TcpAndUdp,
    };
    let sink = coalesced(&packets, usize::from(*batch), merging, Taken::Yes);
    assert_eq!(sink.packets.len(), packets.len());
    assert_eq!(by_flow(&sink.packets), by_flow(&packets));
}

/// Corrects the checksums of a packet.
#[cfg(feature = "fuzzing")]
fn mended(packet: &mut [u8], ip: &Ip) {
    let field = match ip.protocol {
        protocol::TCP => at::tcp::CHECKSUM,
        protocol::UDP => at::udp::CHECKSUM,
        _ => return,
    };
    if ip.is_v4() {
        header::finish_ipv4(packet, ip.header);
    }
    let transport = packet.get_mut(ip.header..).unwrap_or_default();
    put_word(transport, field, 0);
    let sum = Sum::pseudo(ip.source, ip.destination, ip.protocol, transport.len()).and(Sum::of(transport));
    put_word(transport, field, super::checksum::of_udp(sum));
}

/// Checks that a packet's header is read, its TTL decremented and the packet answered without panic. A correct header
/// stays correct, the header of an answer is correct, and an answer is not answered.
pub(crate) fn header(bytes: &[u8]) {
    let Ok(ip) = Ip::parse(bytes) else { return };
    assert!(ip.header <= ip.len && ip.len <= bytes.len());
    let mut packet = bytes.to_vec();
    let is_right = |packet: &[u8]| Sum::of(packet.get(..ip.header).unwrap_or_default()).is_right();
    let was_right = is_right(&packet);
    if header::decrement_ttl(&mut packet, &ip).is_some() {
        assert!(!ip.is_v4() || is_right(&packet) == was_right);
    } else {
        assert_eq!(packet, bytes);
    }
    let mut answer = [0; icmp::MAX_LEN];
    let Some(len) = icmp::unreachable(bytes, &ip, &mut answer) else { return };
    let answer = answer.get(..len).unwrap_or_default();
    let back = Ip::parse(answer);
    assert_eq!(back.map(|back| (back.source, back.destination, back.len)), Ok((ip.destination, ip.source, len)));
    if let Ok(back) = back {
        assert!(!back.is_v4() || Sum::of(answer.get(..back.header).unwrap_or_default()).is_right());
        assert_eq!(icmp::unreachable(answer, &back, &mut [0; icmp::MAX_LEN]), None);
    }
}
