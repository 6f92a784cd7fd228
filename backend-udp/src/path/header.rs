//! Reads and edits the headers of IPv4, IPv6, TCP, UDP and TUN packets in place, for any bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum;

/// An IPv4 header without options, in bytes.
pub(crate) const IPV4: usize = 20;
/// An IPv6 header, in bytes.
pub(crate) const IPV6: usize = 40;
/// A TCP header without options, in bytes.
pub(crate) const TCP: usize = 20;
/// A UDP header, in bytes.
pub(crate) const UDP: usize = 8;

/// Protocol numbers.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const ICMPV6: u8 = 58;
}

/// TCP flags.
pub(crate) mod flag {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const ECE: u8 = 0x40;
    pub(crate) const CWR: u8 = 0x80;
}

/// Offsets of header fields.
pub(crate) mod at {
    /// In an IPv4 header.
    pub(crate) mod v4 {
        pub(crate) const LEN: usize = 2;
        pub(crate) const ID: usize = 4;
        pub(crate) const FRAGMENT: usize = 6;
        pub(crate) const TTL: usize = 8;
        pub(crate) const CHECKSUM: usize = 10;
    }
    /// In an IPv6 header.
    pub(crate) mod v6 {
        pub(crate) const LEN: usize = 4;
        pub(crate) const HOP_LIMIT: usize = 7;
    }
    /// In a TCP header.
    pub(crate) mod tcp {
        pub(crate) const SEQUENCE: usize = 4;
        pub(crate) const OFFSET: usize = 12;
        pub(crate) const FLAGS: usize = 13;
        pub(crate) const CHECKSUM: usize = 16;
    }
    /// In a UDP header.
    pub(crate) mod udp {
        pub(crate) const LEN: usize = 4;
        pub(crate) const CHECKSUM: usize = 6;
    }
}

/// The DF flag, in the word at [`at::v4::FRAGMENT`].
pub(crate) const DONT_FRAGMENT: u16 = 0x4000;

/// The fields of an IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// The length of the header, in bytes; without IPv6 extension headers.
    pub(crate) header: usize,
    /// The length of the packet, in bytes: at most that of the input.
    pub(crate) len: usize,
    /// The protocol after the header. For IPv6 this may be an extension header.
    pub(crate) protocol: u8,
    pub(crate) fragment: Fragment,
}

/// The position of a packet among the fragments of its datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    /// Not a fragment.
    Whole,
    /// The first fragment.
    First,
    /// Any other fragment. All IPv6 fragments count as such: their transport header follows an extension header.
    Later,
}

/// The input is not an IP packet, or is shorter than its header states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

impl Ip {
    /// Reads the header. Bytes after the packet's end are allowed, and not counted in [`len`](Self::len).
    pub(crate) fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().ok_or(Malformed)? >> 4 {
            4 => Self::v4(packet),
            6 => Self::v6(packet),
            _ => Err(Malformed),
        }
    }

    fn v4(packet: &[u8]) -> Result<Self, Malformed> {
        let fixed: &[u8; IPV4] = packet.first_chunk().ok_or(Malformed)?;
        let header = usize::from(fixed[0] & 0xf) * 4;
        let len = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        if header < IPV4 || len < header || len > packet.len() {
            return Err(Malformed);
        }
        let fragment = match u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff {
            0 => Fragment::Whole,
            0x2000 => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self {
            source: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]).into(),
            destination: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]).into(),
            header,
            len,
            protocol: fixed[9],
            fragment,
        })
    }

    fn v6(packet: &[u8]) -> Result<Self, Malformed> {
        let (fixed, _) = packet.split_first_chunk::<IPV6>().ok_or(Malformed)?;
        let len = IPV6 + usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
        if len > packet.len() {
            return Err(Malformed);
        }
        let [_, _, _, _, _, _, _, _, addresses @ ..] = fixed;
        let (source, destination) = addresses.split_at(16);
        let address = |bytes: &[u8]| Ipv6Addr::from(bytes.first_chunk().copied().unwrap_or([0_u8; 16]));
        let protocol = fixed[6];
        Ok(Self {
            source: address(source).into(),
            destination: address(destination).into(),
            header: IPV6,
            len,
            protocol,
            fragment: if protocol == protocol::FRAGMENT { Fragment::Later } else { Fragment::Whole },
        })
    }

    /// Whether this is an IPv4 packet.
    pub(crate) fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }
}

/// Decrements the TTL or hop limit. Returns `None` and changes nothing if it would become zero.
pub(crate) fn decrement_ttl(packet: &mut [u8], ip: &Ip) -> Option<()> {
    if !ip.is_v4() {
        let limit = packet.get_mut(at::v6::HOP_LIMIT)?;
        *limit = limit.checked_sub(1).filter(|left| *left > 0)?;
        return Some(());
    }
    let old = word(packet, at::v4::TTL)?;
    let ttl = packet.get_mut(at::v4::TTL)?;
    *ttl = ttl.checked_sub(1).filter(|left| *left > 0)?;
    let checksum = checksum::updated(word(packet, at::v4::CHECKSUM)?, old, old - 0x100);
    put_word(packet, at::v4::CHECKSUM, checksum);
    Some(())
}

/// Writes the checksum of an IPv4 header that is `len` bytes long.
pub(crate) fn finish_ipv4(packet: &mut [u8], len: usize) {
    put_word(packet, at::v4::CHECKSUM, 0);
    let sum = checksum::Sum::of(packet.get(..len).unwrap_or(&[]));
    put_word(packet, at::v4::CHECKSUM, sum.finished());
}

/// Reads two bytes at an offset.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// Reads four bytes at an offset.
pub(crate) fn long(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// Writes two bytes if there is room.
pub(crate) fn put_word(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value.to_be_bytes();
    }
}

/// Writes four bytes if there is room.
pub(crate) fn put_long(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value.to_be_bytes();
    }
}

/// The header before each TUN packet (`struct virtio_net_hdr`), in native byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Vnet {
    pub(crate) flags: u8,
    /// The kind of super-packet, or [`SINGLE`](Self::SINGLE).
    pub(crate) kind: u8,
    /// The length of the headers, in bytes. For a forwarded packet it is the length of the kernel's linear part.
    pub(crate) header: u16,
    /// The payload of each packet except the last, in bytes.
    pub(crate) segment: u16,
    /// The start of the bytes that the checksum covers.
    pub(crate) start: u16,
    /// The offset of the checksum field from `start`.
    pub(crate) offset: u16,
}

impl Vnet {
    /// The size of the header, in bytes.
    pub(crate) const LEN: usize = 10;
    /// Flag: the checksum field contains only the sum of the pseudo-header.
    pub(crate) const NEEDS_CHECKSUM: u8 = 1;
    /// Kind: one packet.
    pub(crate) const SINGLE: u8 = 0;
    /// Kind: TCP over IPv4.
    pub(crate) const TCP_V4: u8 = 1;
    /// Kind: TCP over IPv6.
    pub(crate) const TCP_V6: u8 = 4;
    /// Kind: UDP datagrams.
    pub(crate) const UDP: u8 = 5;
    /// Added to the kind: CWR is set.
    pub(crate) const ECN: u8 = 0x80;

    pub(crate) fn parse(bytes: [u8; Self::LEN]) -> Self {
        let [flags, kind, a, b, c, d, e, f, g, h] = bytes;
        let word = |a, b| u16::from_ne_bytes([a, b]);
        Self { flags, kind, header: word(a, b), segment: word(c, d), start: word(e, f), offset: word(g, h) }
    }

    pub(crate) fn bytes(self) -> [u8; Self::LEN] {
        let ([a, b], [c, d]) = (self.header.to_ne_bytes(), self.segment.to_ne_bytes());
        let ([e, f], [g, h]) = (self.start.to_ne_bytes(), self.offset.to_ne_bytes());
        [self.flags, self.kind, a, b, c, d, e, f, g, h]
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::path::checks::header as header_check;

    fn ipv4(ttl: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 24, 0, 1, 0, 0, ttl, 17, 0, 0, 10, 0, 0, 1, 10, 0, 1, 1, 1, 2, 3, 4];
        finish_ipv4(&mut packet, IPV4);
        packet
    }

    #[test]
    fn lengths_are_checked_against_what_is_there() {
        let packet = ipv4(9);
        assert_eq!(Ip::parse(&packet).unwrap().len, 24);
        assert_eq!(Ip::parse(&packet[..23]), Err(Malformed));
        let longer = [packet.clone(), vec![0; 3]].concat();
        assert_eq!(Ip::parse(&longer).unwrap().len, 24, "what follows is no part of it");
        for (at, value) in [(0, 0x44), (0, 0x55), (0, 0x4f), (3, 19), (3, 25)] {
            let mut packet = packet.clone();
            packet[at] = value;
            assert_eq!(Ip::parse(&packet), Err(Malformed), "byte {at} is {value:#x}");
        }
    }

    #[test]
    fn a_ttl_that_would_become_zero_is_not_touched() {
        for ttl in 0..=255 {
            let mut packet = ipv4(ttl);
            let ip = Ip::parse(&packet).unwrap();
            let before = packet.clone();
            let done = decrement_ttl(&mut packet, &ip);
            assert_eq!(done.is_some(), ttl > 1);
            if ttl > 1 {
                assert_eq!(packet, ipv4(ttl - 1));
            } else {
                assert_eq!(packet, before);
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_anything_panic_that_reads_them(bytes in vec(any::<u8>(), 0..100)) {
            header_check(&bytes);
        }

        #[test]
        fn a_tun_header_is_written_as_it_was_read(bytes: [u8; Vnet::LEN]) {
            prop_assert_eq!(Vnet::parse(bytes).bytes(), bytes);
        }
    }
}
