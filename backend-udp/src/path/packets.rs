//! Packets for tests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::{self, Sum};
use super::header::{self, IPV4, IPV6, Ip, protocol, put_word};

/// The contents of a TCP or UDP packet.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) is_v4: bool,
    pub(crate) is_tcp: bool,
    /// The flow that the packet belongs to.
    pub(crate) flow: u8,
    pub(crate) id: u16,
    /// The word with the fragment flags and offset.
    pub(crate) fragment: u16,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// For TCP, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Spec {
    /// Returns a segment with data in the middle of a flow.
    pub(crate) fn tcp(payload: usize) -> Self {
        Self {
            is_v4: true,
            is_tcp: true,
            flow: 0,
            id: 7,
            fragment: 0x4000,
            tos: 0,
            ttl: 64,
            sequence: 1000,
            acknowledged: 1,
            flags: header::flag::ACK,
            window: 512,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload: (0..payload).map(|nth| nth as u8).collect(),
        }
    }

    /// Returns the packet with correct checksums.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let [source, destination]: [IpAddr; 2] = if self.is_v4 {
            [Ipv4Addr::new(10, 5, 1, 2).into(), Ipv4Addr::new(10, 5, 2, 2).into()]
        } else {
            [Ipv6Addr::new(0xfd00, 5, 1, 0, 0, 0, 0, 2).into(), Ipv6Addr::new(0xfd00, 5, 2, 0, 0, 0, 0, 2).into()]
        };
        let mut transport = vec![0x9c, 0x40 + self.flow, 0x14, 0x51];
        let (number, field) = if self.is_tcp {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.acknowledged.to_be_bytes());
            transport.extend([((20 + self.options.len()) / 4 * 16) as u8, self.flags]);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend(&self.options);
            (protocol::TCP, 16)
        } else {
            transport.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            transport.extend([0; 2]);
            (protocol::UDP, 6)
        };
        transport.extend(&self.payload);
        let sum = Sum::pseudo(source, destination, number, transport.len()).and(Sum::of(&transport));
        put_word(&mut transport, field, if self.is_tcp { sum.finished() } else { checksum::of_udp(sum) });
        let mut packet = if self.is_v4 {
            let mut header = vec![0x45, self.tos];
            header.extend(((IPV4 + transport.len()) as u16).to_be_bytes());
            header.extend(self.id.to_be_bytes());
            header.extend(self.fragment.to_be_bytes());
            header.extend([self.ttl, number, 0, 0]);
            header
        } else {
            let mut header = vec![0x60 | self.tos >> 4, self.tos << 4, 0, self.flow];
            header.extend((transport.len() as u16).to_be_bytes());
            header.extend([number, self.ttl]);
            header
        };
        for address in [source, destination] {
            match address {
                IpAddr::V4(address) => packet.extend(address.octets()),
                IpAddr::V6(address) => packet.extend(address.octets()),
            }
        }
        if self.is_v4 {
            header::finish_ipv4(&mut packet, IPV4);
        }
        packet.extend(transport);
        packet
    }
}

/// Whether all checksums of a TCP or UDP packet are correct.
pub(crate) fn is_right(packet: &[u8]) -> bool {
    let ip = Ip::parse(packet).unwrap();
    let (header, transport) = packet.split_at(ip.header);
    let pseudo = Sum::pseudo(ip.source, ip.destination, ip.protocol, transport.len());
    (header.len() == IPV6 || Sum::of(header).is_right()) && pseudo.and(Sum::of(transport)).is_right()
}
