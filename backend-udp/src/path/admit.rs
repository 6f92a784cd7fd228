//! Decides which packets of a peer are accepted.
//!
//! A peer sends from the address and port that it receives at: Go flannel uses one socket for both directions, and so
//! does this crate. The port is checked as well as the address, because a packet that a peer's pod sends to this node
//! may leave with the address of the peer's node, but not with a port that is in use there. The subnets limit what a
//! peer's packets can do: a peer can use the source addresses of its own pods only, and reach this node's pods only.

use std::net::SocketAddr;

use super::counters::Reason;
use super::header::{self, Ip};
use super::table::Lookup;

/// Decrements the TTL of a packet that the peer `sender` may send. Otherwise returns the reason to drop it.
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
