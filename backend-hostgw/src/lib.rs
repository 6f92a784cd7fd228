//! host-gw backend of flannelkit, compatible with flannel (docs/compatibility.md, "host-gw").
//!
//! There is no device and no encapsulation. Each peer's subnet is routed to the peer's public address, which therefore
//! has to be on one of this node's own links. A peer that is not on such a link is skipped and reported in the status.
//! Packets keep the MTU of the link.
//!
//! [`HostGw`] has no settings:
//!
//! ```
//! use flannel_backend_hostgw::HostGw;
//! use flannel_core::overlay::Overlay;
//!
//! let builder = Overlay::builder().backend(HostGw::TYPE, |_| Ok(HostGw));
//! # drop(builder);
//! ```
//!
//! The crate `flannelkit` exports this crate under its feature `host-gw`. Tests run an overlay with this backend on
//! `flannel_core::testing::FakeKernel`.

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{Device, LinkId, PeerState, Route, RouteSlot, State};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Dual, Family, MacAddr, Mtu};

/// The host-gw backend. It has no settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostGw;

impl HostGw {
    /// The backend's name in the configuration and in leases.
    pub const TYPE: &'static str = "host-gw";

    /// The keys of the `Backend` object besides `Type`. They are for Go flannel on Windows and have no effect here.
    pub const KEYS: [&str; 2] = ["Name", "DNSServerList"];
}

const NO_CONNECTED_ROUTE: &str =
    "the connected route is missing although an address has its prefix: add it; what was programmed stays until then";
const NOT_ON_LINK: &str = "host-gw needs all nodes on one link; use vxlan, with DirectRouting where nodes share a link";

impl Backend for HostGw {
    fn name(&self) -> &'static str {
        Self::TYPE
    }

    fn wire_type(&self) -> &'static str {
        Self::TYPE
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, _local: &LocalNode) -> Vec<Device> {
        Vec::new()
    }

    fn mtu(&self, _: &NodeContext) -> Option<Mtu> {
        None
    }

    /// The public addresses have to be the uplink's own addresses: peers send pods' packets to them unchanged, and a
    /// NAT in between could not tell where the packets belong. flannel checks IPv4 only.
    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        let mut attrs = LeaseAttrs::default().with_backend(Self::TYPE, Dual::default());
        for family in context.config.networks.families() {
            let name = &context.uplink.name;
            let own = context.uplink.addrs.get(family).copied().ok_or_else(|| BackendError::Host {
                what: format!("{name} has no {family} address"),
                remedy: format!("give it one, or turn {family} off in the network config"),
            })?;
            if let Some(public) = context.public.get(family).filter(|public| **public != own) {
                return Err(BackendError::Host {
                    what: format!("the public {family} address {public} is not {name}'s own {own}"),
                    remedy: "host-gw does not work across NAT: leave the public address out, or use vxlan".to_owned(),
                });
            }
            *attrs.public_ip.slot(family) = Some(own);
        }
        Ok(attrs)
    }

    fn hardware_address(&self, _: &LeaseAttrs, _: Family) -> Result<Option<MacAddr>, Skip> {
        Ok(None)
    }

    fn base(&self, _: &LocalNode) -> State {
        State::default()
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let context = &local.context;
        let (Some(_), Some(subnet), Some(addr)) =
            (context.config.networks.get(family), peer.subnets.get(family), peer.attrs.public_ip.get(family))
        else {
            return Err(Skip::NoAddress(family));
        };
        let link = match context.host.on_link(*addr) {
            Some(index) if index == context.uplink.index => LinkId::Uplink,
            Some(index) => LinkId::Other(index),
            None if context.host.is_connected(*addr) => {
                return Err(Skip::NotOnLink { addr: *addr, remedy: NO_CONNECTED_ROUTE });
            }
            None => return Err(Skip::NotOnLink { addr: *addr, remedy: NOT_ON_LINK }),
        };
        Ok(PeerState::default().with_route(*subnet, Route::direct(*subnet, *addr, link)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use flannel_core::kernel::HostFacts;
    use flannel_core::testing::backend_contract::{self, Made};
    use flannel_core::testing::samples::{self, UPLINK, lease, node_address, node_subnet};

    fn local(families: &[Family]) -> LocalNode {
        let context = samples::context(samples::config(families, r#"{"Type":"host-gw"}"#));
        let attrs = HostGw.advertise(&context).unwrap();
        samples::local(context, attrs)
    }

    fn peer(n: u8) -> Peer {
        lease(n, &Family::BOTH, HostGw::TYPE)
    }

    #[test]
    fn the_backend_contract_holds() {
        backend_contract::all(&Made::new(r#"{"Type":"host-gw"}"#, |_| Ok(HostGw)));
    }

    #[test]
    fn a_peers_subnet_is_routed_to_the_peer_in_each_family() {
        let local = local(&Family::BOTH);
        for family in Family::BOTH {
            let state = HostGw.peer(&local, &peer(2), family).unwrap();
            let (prefix, route) = state.routes[0].clone();
            assert_eq!((prefix, state.fdb, state.neighbour), (node_subnet(family, 2), None, None));
            assert_eq!(
                (route.gateway, route.link, route.onlink),
                (Some(node_address(family, 2)), Some(LinkId::Uplink), false)
            );
            assert!(route.has_own_protocol() && local.scope(&HostGw, &[]).covers(&prefix));
        }
        assert!(HostGw.base(&local).is_empty() && HostGw.devices(&local).is_empty());
        assert_eq!(HostGw.mtu(&local.context), None);
    }

    #[test]
    fn the_route_leaves_by_the_link_that_the_peer_is_on() {
        let mut local = local(&[Family::V4]);
        let mut host = HostFacts::clone(&local.context.host);
        host.on_link = [samples::on_link("192.0.2.0/25", UPLINK + 1)].into_iter().collect();
        local.context.host = Arc::new(host);
        let route = HostGw.peer(&local, &peer(2), Family::V4).unwrap().routes.remove(0).1;
        assert_eq!(route.link, Some(LinkId::Other(UPLINK + 1)));
        let says = |local: &LocalNode| {
            let skip = HostGw.peer(local, &peer(200), Family::V4).unwrap_err();
            assert!(matches!(skip, Skip::NotOnLink { .. }), "{skip:?}");
            skip.to_string()
        };
        assert!(says(&local).contains("the connected route is missing"), "{}", says(&local));
        let mut host = HostFacts::clone(&local.context.host);
        host.addresses.clear();
        local.context.host = Arc::new(host);
        assert!(says(&local).contains("vxlan"), "{}", says(&local));
    }

    #[test]
    fn a_family_that_is_off_or_not_published_is_skipped() {
        let local = local(&[Family::V4]);
        assert_eq!(HostGw.peer(&local, &peer(2), Family::V6), Err(Skip::NoAddress(Family::V6)));
        let without = lease(2, &[Family::V6], HostGw::TYPE);
        assert_eq!(HostGw.peer(&local, &without, Family::V4), Err(Skip::NoAddress(Family::V4)));
    }

    #[test]
    fn the_lease_has_the_uplinks_addresses_and_no_data() {
        assert_eq!(
            local(&[Family::V4]).lease.attrs.to_json(),
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#
        );
        assert_eq!(
            local(&Family::BOTH).lease.attrs.to_json(),
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}"#
        );
    }

    #[test]
    fn a_public_address_behind_nat_is_refused_with_its_remedy() {
        for family in Family::BOTH {
            let mut context = local(&Family::BOTH).context;
            *context.public.slot(family) = Some(node_address(family, 99));
            let error = HostGw.advertise(&context).unwrap_err();
            assert!(matches!(error, BackendError::Host { .. }) && error.to_string().contains("NAT"), "{error}");
            *context.public.slot(family) = None;
            assert!(HostGw.advertise(&context).is_ok());
            *context.uplink.addrs.slot(family) = None;
            assert!(matches!(HostGw.advertise(&context), Err(BackendError::Host { .. })));
        }
    }
}
