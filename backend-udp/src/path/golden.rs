//! Packets of Go flannel (`tests/golden/go-flannel.txt`, recorded by flanneld's wire test): the packets it sent, each
//! the payload of one datagram, and its answer to a packet without a peer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use flannel_core::net::{Dual, Prefix};

use super::admit::admit;
use super::checks::{by_flow, coalesced, split_all};
use super::checksum::Sum;
use super::coalesce::{Merging, Taken};
use super::header::{self, Fragment, Ip, Vnet, at, word};
use super::icmp;
use super::table::{Lookup, Table};

/// The TTL set by the sender's pod, minus the decrements by its node and by Go flannel.
const TTL: u8 = 62;
/// The answer. It was written to the TUN only.
const ANSWER: &str = "unreachable";

fn recorded() -> BTreeMap<&'static str, Vec<u8>> {
    let packet = |line: &'static str| {
        let (kind, hex) = line.split_once(' ').unwrap();
        let bytes = hex.as_bytes().chunks(2).map(|byte| u8::from_str_radix(str::from_utf8(byte).unwrap(), 16).unwrap());
        (kind, bytes.collect())
    };
    include_str!("../../tests/golden/go-flannel.txt").lines().map(packet).collect()
}

/// Returns the packets that Go flannel sent.
fn sent() -> BTreeMap<&'static str, Vec<u8>> {
    let mut sent = recorded();
    sent.remove(ANSWER).unwrap();
    sent
}

fn is_right(packet: &[u8]) -> bool {
    let ip = Ip::parse(packet).unwrap();
    let transport = &packet[ip.header..ip.len];
    let pseudo = Sum::pseudo(ip.source, ip.destination, ip.protocol, transport.len());
    let of_transport = match ip.protocol {
        // The checksum also covers other fragments.
        _ if ip.fragment != Fragment::Whole => true,
        1 => Sum::of(transport).is_right(),
        _ => pseudo.and(Sum::of(transport)).is_right(),
    };
    Sum::of(&packet[..ip.header]).is_right() && of_transport
}

#[test]
fn packets_of_go_flannel_are_accepted_and_sent_identically() {
    let sent = sent();
    assert_eq!(sent.len(), 8);
    for (kind, on_wire) in &sent {
        let ip = Ip::parse(on_wire).unwrap();
        assert_eq!((on_wire[at::v4::TTL], ip.len, is_right(on_wire)), (TTL, on_wire.len(), true), "{kind}");

        // From the sender's TUN: before the TTL was decremented.
        let mut given = on_wire.clone();
        given[at::v4::TTL] += 1;
        header::finish_ipv4(&mut given, ip.header);
        let ip = Ip::parse(&given).unwrap();
        header::decrement_ttl(&mut given, &ip).unwrap();
        assert_eq!(split_all(&Vnet::default(), &mut given), std::slice::from_ref(on_wire), "{kind}");

        // At the receiver.
        let subnet = |addr| Prefix::masked(addr, 24).unwrap();
        let peer: SocketAddr = "192.0.2.2:8285".parse().unwrap();
        let own = Dual { v4: Some(subnet(ip.destination)), v6: None };
        let table = Table::new(own).with(&[(subnet(ip.source), Some(peer))]);
        let mut lookup = Lookup::new(Arc::new(ArcSwap::from_pointee(table)));
        let mut received = on_wire.clone();
        admit(&mut received, peer, &mut lookup).unwrap();
        assert_eq!((received[at::v4::TTL], is_right(&received)), (TTL - 1, true), "{kind}");
    }
}

#[test]
fn what_go_flannel_sent_comes_out_of_coalescing_as_it_was() {
    let packets: Vec<_> = sent().into_values().collect();
    for taken in [Taken::Yes, Taken::No] {
        let found = coalesced(&packets, packets.len(), Merging::TcpAndUdp, taken);
        assert_eq!(by_flow(&found.packets), by_flow(&packets));
    }
}

/// Except for the source address: see [`icmp`].
#[test]
fn where_there_is_no_peer_the_answer_is_that_of_go_flannel_byte_for_byte() {
    const SOURCE: std::ops::Range<usize> = 12..16;
    let theirs = recorded().remove(ANSWER).unwrap();
    let ip = Ip::parse(&theirs).unwrap();
    assert_eq!((ip.len, is_right(&theirs)), (theirs.len(), true));
    // The answer contains the beginning of the answered packet.
    let mut packet = theirs[ip.header + 8..].to_vec();
    packet.resize(word(&packet, at::v4::LEN).unwrap().into(), 0);
    let of_packet = Ip::parse(&packet).unwrap();
    let mut ours = [0; icmp::MAX_LEN];
    let len = icmp::unreachable(&packet, &of_packet, &mut ours).unwrap();
    let ours = &mut ours[..len];
    assert!(is_right(ours));
    assert_eq!(ours[SOURCE], packet[16..20]);
    ours[SOURCE].copy_from_slice(&theirs[SOURCE]);
    header::finish_ipv4(ours, ip.header);
    assert_eq!(ours, theirs);
}
