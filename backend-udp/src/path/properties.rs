//! Splitting and coalescing are inverse to each other, and neither panics for any bytes.

use proptest::collection::vec;
use proptest::prelude::*;

use super::checks::{by_flow, coalesced, split_all};
use super::checksum::Sum;
use super::coalesce::{Merging, Taken};
use super::header::{self, IPV4, Ip, Vnet, at, flag, put_word, word};
use super::packets::{Spec, is_right};

/// A step in a sequence of packets: the difference from the previous packet of the same flow.
#[derive(Debug, Clone)]
enum Step {
    /// The next packet, with this many bytes of payload.
    Next(usize),
    Gap(u32),
    Flags(u8),
    Tos(u8),
    Ttl(u8),
    Acknowledged(u32),
    Window(u16),
    Options(Vec<u8>),
    Id(u16),
    Fragment(u16),
    /// The previous packet, of any flow, once more: the path duplicated it.
    Again,
    /// It comes before the previous packet: the path swapped them.
    Overtaking,
    /// A byte of the packet is corrupted.
    Broken(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => prop_oneof![Just(1000_usize), Just(1000), Just(1000), 0..1400_usize].prop_map(Step::Next),
        1 => any::<u32>().prop_map(Step::Gap),
        2 => prop_oneof![Just(0x18_u8), Just(0x11), Just(0x12), Just(0x10), Just(0x50), any::<u8>()].prop_map(Step::Flags),
        1 => any::<u8>().prop_map(Step::Tos),
        1 => (2_u8..).prop_map(Step::Ttl),
        1 => any::<u32>().prop_map(Step::Acknowledged),
        1 => any::<u16>().prop_map(Step::Window),
        1 => vec(any::<u8>(), 0..=40).prop_map(|mut options| {
            options.truncate(options.len() & !3);
            Step::Options(options)
        }),
        1 => any::<u16>().prop_map(Step::Id),
        1 => prop_oneof![Just(0x4000_u16), Just(0), Just(0x2000), Just(0x00ff), Just(0x8000)].prop_map(Step::Fragment),
        1 => Just(Step::Again),
        1 => Just(Step::Overtaking),
        1 => (0_usize..1500).prop_map(Step::Broken),
    ]
}

/// Generates packets of a few flows.
fn packets() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let kinds = vec((any::<bool>(), any::<bool>(), any::<bool>()), 4);
    (kinds, vec((0_usize..4, step()), 0..160)).prop_map(|(kinds, steps)| {
        let mut flows: Vec<Spec> = kinds
            .into_iter()
            .zip(0..)
            .map(|((is_v4, is_tcp, may_fragment), flow)| {
                let fragment = if may_fragment { 0 } else { 0x4000 };
                Spec { is_v4, is_tcp, flow, fragment, ..Spec::tcp(0) }
            })
            .collect();
        let mut packets = Vec::new();
        for (flow, step) in steps {
            if matches!(step, Step::Again) {
                packets.extend(packets.last().cloned());
                continue;
            }
            let spec = &mut flows[flow];
            let (mut broken, mut place) = (None, packets.len());
            let usual = spec.clone();
            match step {
                Step::Next(len) => spec.payload = (0..len).map(|nth| (nth + packets.len()) as u8).collect(),
                Step::Gap(gap) => spec.sequence = spec.sequence.wrapping_add(gap),
                Step::Flags(flags) => spec.flags = flags,
                Step::Tos(tos) => spec.tos = tos,
                Step::Ttl(ttl) => spec.ttl = ttl,
                Step::Acknowledged(acknowledged) => spec.acknowledged = acknowledged,
                Step::Window(window) => spec.window = window,
                Step::Options(options) => spec.options = options,
                Step::Id(id) => spec.id = id,
                Step::Fragment(fragment) => spec.fragment = fragment,
                Step::Again => {}
                Step::Overtaking => place = place.saturating_sub(1),
                Step::Broken(at) => broken = Some(at),
            }
            let mut packet = spec.packet();
            if let Some(at) = broken {
                // Not in the fields for the length or the flow.
                let at = 44 + at % packet.len().saturating_sub(44).max(1);
                if let Some(byte) = packet.get_mut(at) {
                    *byte ^= 0x55;
                }
            }
            spec.sequence = spec.sequence.wrapping_add(spec.payload.len() as u32);
            spec.id = spec.id.wrapping_add(1);
            spec.flags = if spec.flags & flag::ECE != 0 { usual.flags } else { flag::ACK };
            packets.insert(place, packet);
        }
        packets
    })
}

proptest! {
    #[test]
    fn splitting_gives_back_in_order_what_was_coalesced(packets in packets(), batch in 1_usize..200, all in any::<bool>()) {
        let merging = if all { Merging::TcpAndUdp } else { Merging::Tcp };
        let sink = coalesced(&packets, batch, merging, Taken::Yes);
        prop_assert_eq!(by_flow(&sink.packets), by_flow(&packets));
    }

    #[test]
    fn super_packets_that_are_refused_go_in_their_parts(packets in packets()) {
        let sink = coalesced(&packets, 100, Merging::TcpAndUdp, Taken::No);
        prop_assert_eq!(sink.writes.len(), packets.len());
        let sort = |packets: &[Vec<u8>]| {
            let mut packets = packets.to_vec();
            packets.sort();
            packets
        };
        prop_assert_eq!(sort(&sink.packets), sort(&packets), "not a bit is changed");
    }

    #[test]
    fn segments_of_a_flow_have_right_checksums_whatever_the_headers(
        flags in any::<u8>(), options in 0_usize..=10, size in 8_usize..1400, len in 1_usize..20_000,
        is_v4 in any::<bool>(), is_tcp in any::<bool>(), id in any::<u16>(), sequence in any::<u32>(), odd in any::<u8>(),
    ) {
        let size = if is_tcp { size } else { size.max(len.div_ceil(128)) };
        let payload: Vec<u8> = (0..len).map(|nth| (nth as u8).wrapping_mul(odd)).collect();
        let spec = Spec { is_v4, is_tcp, flags, id, sequence, options: vec![odd; options * 4], payload, ..Spec::tcp(0) };
        let whole = spec.packet();
        let transport = if is_v4 { 20 } else { 40 };
        let field = transport + if is_tcp { 16 } else { 6 };
        let mut packet = whole.clone();
        // In the form that the kernel passes to the TUN.
        let ip = Ip::parse(&packet).unwrap();
        let pseudo = Sum::pseudo(ip.source, ip.destination, ip.protocol, packet.len() - transport);
        put_word(&mut packet, field, pseudo.unfinished());
        let kind = match (is_v4, is_tcp) { (_, false) => Vnet::UDP, (true, _) => Vnet::TCP_V4, (false, _) => Vnet::TCP_V6 };
        let vnet = Vnet { flags: 1, kind, segment: size as u16, start: transport as u16,
            offset: (field - transport) as u16, ..Vnet::default() };
        let segments = split_all(&vnet, &mut packet.clone());
        prop_assert_eq!(segments.len(), len.div_ceil(size));
        let headers = whole.len() - len;
        for (nth, (segment, payload)) in segments.iter().zip(spec.payload.chunks(size)).enumerate() {
            prop_assert!(is_right(segment));
            let (first, last) = (nth == 0, nth + 1 == segments.len());
            let mut expected = Spec { id: id.wrapping_add(nth as u16), payload: payload.to_vec(), ..spec.clone() };
            expected.sequence = sequence.wrapping_add((nth * size) as u32);
            if !last { expected.flags &= !(flag::FIN | flag::PSH); }
            if !first { expected.flags &= !flag::CWR; }
            prop_assert_eq!(segment, &expected.packet(), "segment {} with {} bytes of headers", nth, headers);
        }
        // A single packet.
        let single = Vnet { kind: Vnet::SINGLE, segment: 0, ..vnet };
        prop_assert!(is_right(&split_all(&single, &mut packet)[0]));
    }

    #[test]
    fn no_packet_from_the_tun_makes_splitting_panic(
        spec in (any::<bool>(), any::<bool>(), 0_usize..3000), changes in vec((0_usize..120, any::<u8>()), 0..6),
        vnet: [u8; 10], kind in prop_oneof![Just(0_u8), Just(1), Just(4), Just(5), any::<u8>()], start in 0_u16..80,
        offset in prop_oneof![Just(6_u16), Just(16), any::<u16>()], segment in prop_oneof![1_u16..20, any::<u16>()],
    ) {
        let (is_v4, is_tcp, len) = spec;
        let mut packet = Spec { is_v4, is_tcp, ..Spec::tcp(len) }.packet();
        for (at, byte) in changes {
            if let Some(place) = packet.get_mut(at) { *place = byte; }
        }
        let vnet = Vnet { kind, start, offset, segment, flags: 1, ..Vnet::parse(vnet) };
        let before = packet.len();
        let sizes: usize = split_all(&vnet, &mut packet).iter().map(Vec::len).sum();
        prop_assert!(sizes <= before + before.div_ceil(8) * super::split::MAX_HEADERS + 128 * super::split::MAX_HEADERS);
    }

    #[test]
    fn no_bytes_from_a_peer_make_coalescing_panic(
        packets in vec((any::<bool>(), any::<bool>(), 0_usize..200, vec((0_usize..80, any::<u8>()), 0..4)), 0..60),
    ) {
        let mut made = Vec::new();
        for (is_v4, is_tcp, len, changes) in packets {
            let mut packet = Spec { is_v4, is_tcp, ..Spec::tcp(len) }.packet();
            for (at, byte) in changes {
                if let Some(place) = packet.get_mut(at) { *place = byte; }
            }
            if let Ok(ip) = Ip::parse(&packet) {
                packet.truncate(ip.len);
                made.push(packet);
            }
        }
        let sink = coalesced(&made, 64, Merging::TcpAndUdp, Taken::Yes);
        let sum = |packets: &[Vec<u8>]| packets.iter().map(Vec::len).sum::<usize>();
        prop_assert_eq!(sum(&sink.packets), sum(&made));
    }
}

/// Returns `count` segments of one flow.
fn flow(count: usize, spec: &Spec) -> Vec<Vec<u8>> {
    let next = |nth: usize| Spec {
        sequence: spec.sequence.wrapping_add((nth * spec.payload.len()) as u32),
        id: spec.id.wrapping_add(nth as u16),
        ..spec.clone()
    };
    (0..count).map(|nth| next(nth).packet()).collect()
}

#[test]
fn a_bulk_flow_becomes_super_packets_of_the_largest_size() {
    let writes = |spec: &Spec, merging| coalesced(&flow(100, spec), 100, merging, Taken::Yes).writes;
    for is_v4 in [true, false] {
        let spec = Spec { is_v4, ..Spec::tcp(1400) };
        assert_eq!(writes(&spec, Merging::Tcp), [46, 46, 8]);
        assert_eq!(writes(&Spec { payload: vec![7; 100], ..spec.clone() }, Merging::Tcp), [64, 36]);
        assert_eq!(writes(&spec, Merging::Nothing), [1; 100]);
        let udp = Spec { is_tcp: false, ..spec };
        assert_eq!(writes(&udp, Merging::TcpAndUdp), [46, 46, 8]);
        assert_eq!(writes(&udp, Merging::Tcp), [1; 100]);
    }
}

#[test]
fn a_segment_that_is_repeated_or_out_of_order_is_merged_with_none_that_it_does_not_follow() {
    let flow = flow(8, &Spec::tcp(1000));
    let writes = |order: &[usize]| {
        let packets: Vec<_> = order.iter().map(|nth| flow[*nth].clone()).collect();
        let sink = coalesced(&packets, packets.len(), Merging::TcpAndUdp, Taken::Yes);
        assert_eq!(by_flow(&sink.packets), by_flow(&packets));
        sink.writes
    };
    assert_eq!(writes(&[0, 1, 2, 3, 4, 5, 6, 7]), [8]);
    assert_eq!(writes(&[0, 1, 2, 2, 3, 4]), [3, 3], "repeated");
    assert_eq!(writes(&[0, 1, 0, 1, 2, 3]), [2, 4], "repeated later");
    assert_eq!(writes(&[0, 2, 1, 3]), [1, 1, 1, 1], "swapped");
    assert_eq!(writes(&[3, 2, 1, 0]), [1, 1, 1, 1], "backwards");
    assert_eq!(writes(&[0, 1, 3, 4]), [2, 2], "lost");
}

#[test]
fn ecn_marks_and_wrong_checksums_are_preserved() {
    let mut packets = flow(10, &Spec::tcp(1000));
    packets[3] = Spec { tos: 3, sequence: 4000, ..Spec::tcp(1000) }.packet();
    packets[6][500] ^= 1;
    packets[8][10] ^= 1;
    let sink = coalesced(&packets, 10, Merging::TcpAndUdp, Taken::Yes);
    assert_eq!(sink.writes, [3, 1, 2, 1, 1, 1, 1]);
    assert_eq!(by_flow(&sink.packets), by_flow(&packets));
}

#[test]
fn of_more_flows_than_are_held_none_is_lost() {
    let flows: Vec<_> = (0..40).map(|number| flow(4, &Spec { flow: number, ..Spec::tcp(300) })).collect();
    let packets: Vec<_> = (0..4).flat_map(|nth| flows.iter().map(move |flow| flow[nth].clone())).collect();
    let sink = coalesced(&packets, 200, Merging::Tcp, Taken::Yes);
    assert_eq!(by_flow(&sink.packets), by_flow(&packets));
}

/// A fragment has no ports, and its order counts only among fragments.
#[test]
fn a_fragment_is_of_another_flow_than_a_packet_between_ports_of_zero() {
    let fragment = Spec { fragment: 0x2000, ..Spec::tcp(100) }.packet();
    let mut packet = Spec::tcp(100).packet();
    let ip = Ip::parse(&packet).unwrap();
    packet[IPV4..IPV4 + 4].fill(0);
    put_word(&mut packet, IPV4 + at::tcp::CHECKSUM, 0);
    let sum = Sum::pseudo(ip.source, ip.destination, ip.protocol, ip.len - IPV4).and(Sum::of(&packet[IPV4..]));
    put_word(&mut packet, IPV4 + at::tcp::CHECKSUM, sum.finished());
    let packets = [packet, fragment];
    let sink = coalesced(&packets, 2, Merging::Tcp, Taken::Yes);
    assert_eq!(sink.packets, [packets[1].clone(), packets[0].clone()]);
    assert_eq!(by_flow(&sink.packets), by_flow(&packets));
}

/// The inner protocol of a tunnel's packet may be UDP, in which zero means that there is no checksum.
#[test]
fn a_checksum_of_zero_is_written_as_its_other_representation_for_every_protocol() {
    const GRE: u8 = 47;
    let spec = Spec { is_tcp: false, options: Vec::new(), ..Spec::tcp(10) };
    let mut packet = spec.packet();
    packet[9] = GRE;
    header::finish_ipv4(&mut packet, IPV4);
    put_word(&mut packet, IPV4 + at::udp::CHECKSUM, 0);
    let rest = Sum::of(&packet[IPV4..]).unfinished();
    put_word(&mut packet, IPV4 + at::udp::CHECKSUM, !rest);
    let vnet =
        Vnet { flags: Vnet::NEEDS_CHECKSUM, start: IPV4 as u16, offset: at::udp::CHECKSUM as u16, ..Vnet::default() };
    assert_eq!(split_all(&vnet, &mut packet).len(), 1);
    assert_eq!(word(&packet, IPV4 + at::udp::CHECKSUM), Some(0xffff));
}

#[test]
fn what_was_not_offered_is_refused() {
    let packet = Spec::tcp(3000).packet();
    let good = Vnet { flags: 1, kind: Vnet::TCP_V4, segment: 1000, start: 20, offset: 16, ..Vnet::default() };
    let count = |vnet: Vnet| split_all(&vnet, &mut packet.clone()).len();
    assert_eq!(count(good), 3);
    for bad in [
        Vnet { kind: 3, ..good },
        Vnet { kind: Vnet::TCP_V6, ..good },
        Vnet { flags: 0, ..good },
        Vnet { segment: 0, ..good },
        Vnet { segment: 7, ..good },
        Vnet { start: 0, ..good },
        Vnet { start: 3000, ..good },
        Vnet { offset: 6, ..good },
        Vnet { kind: Vnet::SINGLE, start: 3060, ..good },
        Vnet { kind: Vnet::SINGLE, start: 0, ..good },
    ] {
        assert_eq!(count(bad), 0, "{bad:?}");
    }
    let datagrams = |count: usize| {
        let mut packet = Spec { is_tcp: false, ..Spec::tcp(count * 10) }.packet();
        split_all(&Vnet { kind: Vnet::UDP, segment: 10, offset: 6, ..good }, &mut packet).len()
    };
    assert_eq!([128, 129].map(datagrams), [128, 0], "more than the kernel makes");
    let far = |start: u16| {
        let mut packet = Spec { is_v4: false, ..Spec::tcp(3000) }.packet();
        packet[usize::from(start) + at::tcp::OFFSET] = 0x50;
        split_all(&Vnet { kind: Vnet::TCP_V6, start, ..good }, &mut packet).len()
    };
    assert_eq!([236, 237].map(far), [3, 0], "longer headers than there are");
}
