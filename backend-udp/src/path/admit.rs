//! Decides which packets of a peer are accepted.
//!
//! A peer sends from the address and port that it receives at: Go flannel uses one socket for both directions, and so
//! does this crate. Both are checked. If the underlay lets no host use the address of another, the address shows that a
//! datagram comes from the peer's host. The port does not show that the peer's program sent it: if a packet of a pod on
//! that host is masqueraded, it has the host's address, and it may get the program's port, because connection tracking
//! does not look at the host's sockets. Such a pod could be taken for the peer, so nodes must not masquerade what pods
//! send to this backend's port (docs/compatibility.md, "udp").
//!
//! The addresses inside the datagram limit what a peer can do. Its sources are the addresses of its own pods, and the
//! address that it sends from: programs on its host answer pods with that address, and the datagram shows that it is the
//! peer's. It reaches this node's pods only.

use std::net::SocketAddr;

use super::counters::Reason;
use super::header::{self, Ip};
use super::table::Lookup;

/// Decrements the TTL of a packet that `sender`, the endpoint of a peer, may send. Otherwise returns the reason to drop
/// it.
pub(crate) fn admit(packet: &mut [u8], sender: SocketAddr, lookup: &mut Lookup) -> Result<Ip, Reason> {
    let ip = Ip::parse(packet).map_err(|_| Reason::Malformed)?;
    let is_senders = match lookup.peer(ip.source) {
        Some(owner) => owner == sender,
        None => ip.source == sender.ip() && !lookup.table().is_own(ip.source),
    };
    if !is_senders {
        return Err(Reason::WrongSource);
    }
    if !lookup.table().is_own(ip.destination) {
        return Err(Reason::WrongDestination);
    }
    header::decrement_ttl(packet, &ip).ok_or(Reason::Expired)?;
    Ok(ip)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use arc_swap::ArcSwap;
    use flannel_core::net::{Dual, Prefix};

    use super::*;
    use crate::path::packets::Spec;
    use crate::path::table::Table;

    const V4: &str = "192.0.2.3:8285";
    const V6: &str = "[2001:db8::4]:8285";
    /// Endpoints inside of a peer's subnet and of this node's own.
    const IN_PEERS: &str = "10.5.3.9:8285";
    const IN_OWN: &str = "10.5.2.9:8285";

    fn lookup() -> Lookup {
        let prefix = |text: &str| text.parse::<Prefix>().unwrap();
        let own = Dual { v4: Some(prefix("10.5.2.0/24")), v6: Some(prefix("fd00:5:2::/64")) };
        let peers = [
            ("10.5.3.0/24", V4),
            ("fd00:5:3::/64", V4),
            ("10.5.4.0/24", V6),
            ("fd00:5:4::/64", V6),
            ("10.5.5.0/24", IN_PEERS),
            ("10.5.6.0/24", IN_OWN),
        ];
        let changes = peers.map(|(subnet, endpoint)| (prefix(subnet), Some(endpoint.parse().unwrap())));
        Lookup::new(Arc::new(ArcSwap::from_pointee(Table::new(own).with(&changes))))
    }

    /// Returns what becomes of a packet with this source to a pod of this node.
    fn admitted(source: &str, sender: &str) -> Result<(), Reason> {
        let source: IpAddr = source.parse().unwrap();
        let mut packet = Spec { is_v4: source.is_ipv4(), ..Spec::tcp(10) }.packet();
        match source {
            IpAddr::V4(source) => packet[12..16].copy_from_slice(&source.octets()),
            IpAddr::V6(source) => packet[8..24].copy_from_slice(&source.octets()),
        }
        admit(&mut packet, sender.parse().unwrap(), &mut lookup()).map(|ip| assert_eq!(ip.source, source))
    }

    #[test]
    fn a_peer_sends_from_its_subnets() {
        for (source, owner, other) in
            [("10.5.3.7", V4, V6), ("fd00:5:3::7", V4, V6), ("10.5.4.7", V6, V4), ("fd00:5:4::7", V6, V4)]
        {
            assert_eq!(admitted(source, owner), Ok(()), "{source}");
            assert_eq!(admitted(source, other), Err(Reason::WrongSource), "{source}");
        }
    }

    #[test]
    fn a_peer_sends_from_its_own_address_and_from_that_of_no_other_host() {
        for (source, owner, other) in [("192.0.2.3", V4, V6), ("2001:db8::4", V6, V4)] {
            assert_eq!(admitted(source, owner), Ok(()), "{source}");
            assert_eq!(admitted(source, other), Err(Reason::WrongSource), "{source}");
        }
        // This node's addresses, and those of hosts that are no peers.
        for source in ["10.5.2.7", "192.0.2.2", "192.0.2.9", "127.0.0.1", "fd00:5:2::7", "2001:db8::2", "::1"] {
            for sender in [V4, V6] {
                assert_eq!(admitted(source, sender), Err(Reason::WrongSource), "{source}");
            }
        }
    }

    #[test]
    fn an_address_inside_of_a_subnet_is_that_of_the_subnets_owner_whoever_sends_with_it() {
        assert_eq!(admitted("10.5.3.9", IN_PEERS), Err(Reason::WrongSource));
        assert_eq!(admitted("10.5.2.9", IN_OWN), Err(Reason::WrongSource));
        assert_eq!(admitted("10.5.5.7", IN_PEERS), Ok(()));
        assert_eq!(admitted("10.5.6.7", IN_OWN), Ok(()));
    }
}
