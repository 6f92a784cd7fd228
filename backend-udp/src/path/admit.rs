//! Which packets of a peer are let in.
//!
//! A peer's datagrams come from the address and port that it receives at: Go flannel has one socket for both, as has this
//! crate. The port is checked as well as the address, because what a pod of a peer sends to this node may leave with that
//! node's address, but not with a port that is in use there. What a peer may say with its packets is bounded by its
//! subnets: it can pose as its own pods, and reach ours.

use std::net::SocketAddr;

use super::counters::Reason;
use super::header::{self, Ip};
use super::table::Lookup;

/// Takes one from the TTL of a packet that `sender`, a known peer, may send; why not, where it may not.
pub(crate) fn admit(packet: &mut [u8], sender: SocketAddr, lookup: &mut Lookup) -> Result<Ip, Reason> {
    let ip = Ip::parse(packet).map_err(|_| Reason::Malformed)?;
    if lookup.peer(ip.source) != Some(sender) {
        return Err(Reason::WrongSource);
    }
    if !lookup.table().is_own(ip.destination) {
        return Err(Reason::WrongDestination);
    }
    header::decrement_ttl(packet, &ip).ok_or(Reason::Expired)?;
    Ok(ip)
}
