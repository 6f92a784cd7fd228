//! Properties that hold for every datagram, for fuzz targets and property tests.

use netlink_packet_core::{NLMSG_DONE, NLMSG_ERROR};
use nix::libc::{
    RTM_DELADDR, RTM_DELLINK, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE,
};

use super::route::SeenRoute;
use super::{Batch, HEADER_LEN, Message, Unreadable, Verdict, messages};
use super::{address, done_verdict, error_verdict, link, neighbour, route};
use crate::kernel::{Link, LinkId, LinkKind, Route, RouteKind};

/// Checks that each message of a datagram is decoded or rejected, that no decoded value is larger than the message, and
/// that values this library could have written are the same after encoding and decoding.
pub(crate) fn check_datagram(bytes: &[u8]) {
    let mut count = 0;
    for message in messages(bytes) {
        count += 1;
        if let Ok(message) = message {
            check_message(&message);
        }
    }
    assert!(count <= bytes.len().div_ceil(HEADER_LEN));
}

fn check_message(message: &Message<'_>) {
    let payload = message.payload;
    match message.kind {
        NLMSG_ERROR => check_verdict(error_verdict(message), payload),
        NLMSG_DONE => check_verdict(done_verdict(message), payload),
        RTM_NEWLINK | RTM_DELLINK => check_link(payload),
        RTM_NEWADDR | RTM_DELADDR => check_address(payload),
        RTM_NEWNEIGH | RTM_DELNEIGH => check_neighbour(payload),
        RTM_NEWROUTE | RTM_DELROUTE => check_route(payload),
        _ => {}
    }
}

fn check_verdict(verdict: Result<Verdict, Unreadable>, payload: &[u8]) {
    let Ok(verdict) = verdict else { return };
    assert!(verdict.errno >= 0 || payload[..4] != [0; 4]);
    // A byte that is not UTF-8 becomes a character of three bytes.
    assert!(verdict.text.len() <= 3 * payload.len());
}

fn check_link(payload: &[u8]) {
    let Ok(Some(seen)) = link::decode(payload) else { return };
    let LinkKind::Vxlan(vxlan) = &seen.link.kind else { return };
    let lower = match vxlan.lower {
        Some(LinkId::Other(index)) => Some(index),
        Some(LinkId::Own(_) | LinkId::Uplink) | None => None,
    };
    // Flags and alias are set by later messages.
    let link = Link { up: false, alias: None, ..seen.link.clone() };
    let mut again = written(|batch| link::create_vxlan(batch, &link, vxlan, lower));
    // A request leaves the device type unset; the kernel's messages have Ethernet.
    again[2..4].copy_from_slice(&1u16.to_ne_bytes());
    assert_eq!(link::decode(&again).map(|again| again.map(|again| again.link)), Ok(Some(link)));
}

fn check_address(payload: &[u8]) {
    let Ok(Some(seen)) = address::decode(payload) else { return };
    let again = written(|batch| address::add(batch, seen.link, seen.addr, seen.len));
    let again = address::decode(&again).map(|again| again.map(|again| (again.link, again.addr, again.len)));
    assert_eq!(again, Ok(Some((seen.link, seen.addr, seen.len))));
}

fn check_neighbour(payload: &[u8]) {
    let Ok(Some(seen)) = neighbour::decode(payload) else { return };
    assert!(seen.as_neighbour().is_none() || seen.as_fdb().is_none());
    if let Some((addr, mac)) = seen.as_neighbour() {
        let again = written(|batch| neighbour::put(batch, seen.index, addr, mac));
        let again = neighbour::decode(&again).map(|again| again.map(|again| (again.index, again.as_neighbour())));
        assert_eq!(again, Ok(Some((seen.index, Some((addr, mac))))));
    }
    if let Some((mac, dst)) = seen.as_fdb() {
        let again = written(|batch| neighbour::put_fdb(batch, seen.index, mac, dst));
        let again = neighbour::decode(&again).map(|again| again.map(|again| (again.index, again.as_fdb())));
        assert_eq!(again, Ok(Some((seen.index, Some((mac, dst))))));
    }
}

fn check_route(payload: &[u8]) {
    let Ok(Some(seen)) = route::decode(payload) else { return };
    // The smallest next hop is an attribute of eight bytes.
    assert!(seen.hops.len() <= payload.len() / 8);
    if seen.kind == RouteKind::Foreign {
        return;
    }
    let link = seen.index.map(LinkId::Other);
    let SeenRoute { kind, gateway, onlink, protocol, slot, source, .. } = seen;
    if slot.table == 0 {
        return;
    }
    let route = Route { kind, gateway, link, onlink, protocol, extra: None }.in_slot(slot).with_source(source);
    // Routes of an overlay have no type of service. Their scope is not decoded.
    let seen = SeenRoute { tos: 0, ..seen };
    for spread in [route::Spread::Protocols, route::Spread::Scopes] {
        let new = route::NewRoute { prefix: seen.prefix, route: &route, index: seen.index, spread };
        let again = written(|batch| route::create(batch, &new));
        assert_eq!(route::decode(&again).as_ref(), Ok(&Some(seen.clone())));
    }
}

/// Returns the payload of the message that `write` adds to a batch.
fn written(write: impl FnOnce(&mut Batch)) -> Vec<u8> {
    let mut batch = Batch::default();
    write(&mut batch);
    messages(batch.bytes()).flatten().map(|message| message.payload.to_vec()).collect::<Vec<_>>().concat()
}
