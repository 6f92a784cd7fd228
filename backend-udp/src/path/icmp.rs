//! The answer to a packet without a peer.
//!
//! Its source is the unreachable destination. Go flannel uses the node's own address in the overlay, and the kernel
//! drops received packets with that source (`fib_validate_source`).

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::checksum::Sum;
use super::header::{self, Fragment, IPV4, IPV6, Ip, protocol, put_word};

/// The largest answer, in bytes: the size that every IPv6 link carries (RFC 4443, section 2.4).
pub(crate) const MAX_LEN: usize = 1280;
/// An ICMP header, in bytes.
const ICMP: usize = 8;
/// The TTL of Go flannel's answers.
const TTL: u8 = 8;
/// Go flannel does not answer IPv4 packets with a header of this length or more, in bytes.
const LONGEST_HEADER: usize = 60;
/// ICMPv6 types below this are errors, which are not answered (RFC 4443, section 2.4).
const FIRST_INFORMATIONAL: u8 = 128;
/// Not answered either.
const REDIRECT: u8 = 137;

/// Writes a "destination unreachable" message to the sender of `packet` into `answer`, and returns its length. Returns
/// `None` for a packet that must not be answered.
pub(crate) fn unreachable(packet: &[u8], ip: &Ip, answer: &mut [u8; MAX_LEN]) -> Option<usize> {
    match (ip.source, ip.destination) {
        (IpAddr::V4(to), IpAddr::V4(from)) => {
            let is_answered = ip.protocol != protocol::ICMP
                && ip.fragment != Fragment::Later
                && ip.header < LONGEST_HEADER
                && !(to.is_unspecified() || to.is_multicast() || to.is_broadcast())
                && !(from.is_unspecified() || from.is_multicast() || from.is_broadcast());
            let quoted = packet.get(..ip.len.min(ip.header + 8)).filter(|_| is_answered)?;
            let len = IPV4 + ICMP + quoted.len();
            let written = answer.get_mut(..len)?;
            let (head, body) = written.split_at_mut_checked(IPV4)?;
            head.fill(0);
            let [high, low] = (len as u16).to_be_bytes();
            head.copy_from_slice(&[0x45, 0, high, low, 0, 0, 0, 0, TTL, protocol::ICMP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            head.get_mut(12..16)?.copy_from_slice(&from.octets());
            head.get_mut(16..20)?.copy_from_slice(&to.octets());
            header::finish_ipv4(head, IPV4);
            message(body, 3, quoted, Sum::default())?;
            Some(len)
        }
        (IpAddr::V6(to), IpAddr::V6(from)) => {
            let kind = packet.get(ip.header).copied().unwrap_or(0);
            let is_error = ip.protocol == protocol::ICMPV6 && (kind < FIRST_INFORMATIONAL || kind == REDIRECT);
            let is_answered = !is_error
                && ip.fragment != Fragment::Later
                && !(to.is_unspecified() || to.is_multicast() || to.is_unicast_link_local())
                && !(from.is_unspecified() || from.is_multicast());
            let quoted = packet.get(..ip.len.min(MAX_LEN - IPV6 - ICMP)).filter(|_| is_answered)?;
            let len = IPV6 + ICMP + quoted.len();
            let written = answer.get_mut(..len)?;
            let (head, body) = written.split_at_mut_checked(IPV6)?;
            head.fill(0);
            let [high, low] = (body.len() as u16).to_be_bytes();
            head.get_mut(..8)?.copy_from_slice(&[0x60, 0, 0, 0, high, low, protocol::ICMPV6, TTL]);
            head.get_mut(8..24)?.copy_from_slice(&from.octets());
            head.get_mut(24..40)?.copy_from_slice(&to.octets());
            message(body, 1, quoted, Sum::pseudo(from.into(), to.into(), protocol::ICMPV6, body.len()))?;
            Some(len)
        }
        _ => None,
    }
}

/// Writes an ICMP message of code 0 that quotes a packet.
fn message(body: &mut [u8], kind: u8, quoted: &[u8], pseudo: Sum) -> Option<()> {
    let (head, rest) = body.split_at_mut_checked(ICMP)?;
    head.copy_from_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
    rest.copy_from_slice(quoted);
    let sum = pseudo.and(Sum::of(body));
    put_word(body, 2, sum.finished());
    Some(())
}

/// Limits the rate of answers.
#[derive(Debug)]
pub(crate) struct Limit {
    left: u32,
    since: Instant,
}

impl Limit {
    /// The most answers in a [`PERIOD`](Self::PERIOD). The kernel sends a thousand a second in total
    /// (`icmp_msgs_per_sec`).
    pub(crate) const MOST: u32 = 100;
    pub(crate) const PERIOD: Duration = Duration::from_secs(1);

    pub(crate) fn new(now: Instant) -> Self {
        Self { left: Self::MOST, since: now }
    }

    /// Whether one more answer may be sent; counts it.
    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Self::PERIOD {
            *self = Self::new(now);
        }
        let allows = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allows
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn udp_v4(header: usize) -> Vec<u8> {
        let mut packet = vec![0; header + 20];
        packet[..20].copy_from_slice(&[0x40, 0, 0, 0, 0, 7, 0, 0, 63, 17, 0, 0, 10, 5, 1, 2, 10, 5, 9, 9]);
        packet[0] |= (header / 4) as u8;
        packet[3] = (header + 20) as u8;
        header::finish_ipv4(&mut packet, header);
        packet
    }

    fn answer_to(packet: &[u8]) -> Option<Vec<u8>> {
        let mut answer = [0xaa; MAX_LEN];
        let ip = Ip::parse(packet).unwrap();
        unreachable(packet, &ip, &mut answer).map(|len| answer[..len].to_vec())
    }

    #[test]
    fn the_answer_is_that_of_go_flannel_but_for_its_source() {
        let packet = udp_v4(20);
        let answer = answer_to(&packet).unwrap();
        let ip = Ip::parse(&answer).unwrap();
        assert_eq!((ip.source.to_string(), ip.destination.to_string()), ("10.5.9.9".to_owned(), "10.5.1.2".to_owned()));
        assert_eq!((answer.len(), answer[8], answer[9]), (56, 8, protocol::ICMP));
        assert_eq!((answer[20], answer[21]), (3, 0));
        assert_eq!(answer[28..], packet[..28]);
        assert!(Sum::of(&answer[..20]).is_right() && Sum::of(&answer[20..]).is_right());
    }

    #[test]
    fn there_is_none_to_icmp_later_fragments_long_headers_and_groups() {
        assert!(answer_to(&udp_v4(56)).is_some());
        assert!(answer_to(&udp_v4(60)).is_none());
        for (at, value, is_answered) in
            [(9, 1, false), (7, 1, false), (6, 0x20, true), (16, 224, false), (16, 255, true), (12, 230, false)]
        {
            let mut packet = udp_v4(20);
            packet[at] = value;
            assert_eq!(answer_to(&packet).is_some(), is_answered, "byte {at} is {value}");
        }
    }

    #[test]
    fn an_answer_in_ipv6_quotes_what_fits_and_errors_have_none() {
        let mut packet = vec![0; 1400];
        packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 5, 80, 17, 64]);
        packet[8..24].copy_from_slice(&"fd00:5::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet[24..40].copy_from_slice(&"fd00:9::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
        let answer = answer_to(&packet).unwrap();
        let ip = Ip::parse(&answer).unwrap();
        assert_eq!((answer.len(), ip.protocol, answer[40], answer[41]), (1280, protocol::ICMPV6, 1, 0));
        assert!(Sum::pseudo(ip.source, ip.destination, 58, 1240).and(Sum::of(&answer[40..])).is_right());
        packet[6] = protocol::ICMPV6;
        for (kind, is_answered) in [(1, false), (127, false), (128, true), (137, false)] {
            packet[40] = kind;
            assert_eq!(answer_to(&packet).is_some(), is_answered, "type {kind}");
        }
    }

    #[test]
    fn answers_are_limited_per_second() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let in_a_second = (0..10_000).filter(|n| limit.allows(start + Duration::from_micros(n * 99))).count();
        assert_eq!(in_a_second, Limit::MOST as usize);
        assert!(limit.allows(start + Duration::from_secs(1)));
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(bytes in vec(any::<u8>(), 20..1500), version in prop_oneof![Just(0x45_u8), Just(0x60)]) {
            let mut bytes = bytes;
            bytes[0] = version;
            bytes[2..6].copy_from_slice(&[0, 20, 0, 0]);
            crate::path::checks::header(&bytes);
        }
    }
}
