//! Sample values: a small dual-stack network of nodes 1, 2, 3, …, all on one link.
//!
//! Node `n` has the lease of 10.42.n.0/24 and fd00:42:0:n::/64 and the public addresses 192.0.2.n and 2001:db8::n.

#![expect(clippy::unwrap_used, reason = "samples for tests: the texts are right, or the test has to fail")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{LocalNode, NodeContext, Uplink};
use crate::clock::BootTime;
use crate::config::{Allocation, NetworkConfig};
use crate::kernel::{HostAddress, HostFacts, HostRoute, Link, LinkKind, LinkName, OverlayName};
use crate::lease::{Lease, LeaseAttrs, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix};
use crate::subnet::NodeIdentity;

/// Interface index of the samples' uplink, `eth0`.
pub const UPLINK: u32 = 2;

/// Returns the configuration of the samples' network with this `Backend` object, in the given families.
///
/// # Panics
/// When `backend` is not a valid `Backend` object.
pub fn config(families: &[Family], backend: &str) -> NetworkConfig {
    let text = format!(
        r#"{{"EnableIPv4":{},"EnableIPv6":{},"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/48","Backend":{backend}}}"#,
        families.contains(&Family::V4),
        families.contains(&Family::V6),
    );
    NetworkConfig::parse(text.as_bytes(), Allocation::Pool).unwrap()
}

/// Returns node 1 before it has a lease.
pub fn context(config: NetworkConfig) -> NodeContext {
    let addrs = config.networks.map(|family, _| node_address(family, 1));
    NodeContext {
        overlay: OverlayName::default(),
        config: Arc::new(config),
        node: NodeIdentity::new("node-1").unwrap(),
        uplink: Uplink { index: UPLINK, name: LinkName::new("eth0").unwrap(), mtu: Mtu(1500), addrs },
        public: addrs,
        host: Arc::new(host()),
        previous: None,
        taken: BTreeSet::new(),
    }
}

/// Returns node 1 with its lease.
pub fn local(context: NodeContext, attrs: LeaseAttrs) -> LocalNode {
    let families: Vec<_> = context.config.networks.families().collect();
    let lease = Arc::new(Lease { attrs, ..lease(1, &families, "") });
    LocalNode { context, lease }
}

/// Returns the host of node 1: `eth0` with its addresses, and the links' prefixes.
pub fn host() -> HostFacts {
    let address = |family, len| HostAddress::new(UPLINK, node_address(family, 1), len);
    HostFacts {
        links: BTreeMap::from([(UPLINK, link("eth0").into())]),
        addresses: vec![address(Family::V4, 24), address(Family::V6, 64)],
        on_link: ["192.0.2.0/24", "2001:db8::/64"].map(|prefix| on_link(prefix, UPLINK)).into_iter().collect(),
        ..HostFacts::default()
    }
}

/// Returns an interface that is up.
///
/// # Panics
/// When `name` is not a valid name.
pub fn link(name: &str) -> Link {
    let link = Link::new(LinkName::new(name).unwrap(), LinkKind::Other("".into()), 1500);
    Link { mac: Some(MacAddr([0x52, 0x54, 0, 0, 0, 1])), ..link }
}

/// Returns values of both families. A text that does not parse, such as the empty one, gives `None`.
pub fn dual<T: FromStr>(v4: &str, v6: &str) -> Dual<T> {
    Dual { v4: v4.parse().ok(), v6: v6.parse().ok() }
}

/// Returns the time `seconds` after boot.
pub fn at(seconds: u64) -> BootTime {
    at_millis(1000 * seconds)
}

/// Returns the time `millis` milliseconds after boot.
pub fn at_millis(millis: u64) -> BootTime {
    BootTime(Duration::from_millis(millis))
}

/// Returns a route without a gateway.
///
/// # Panics
/// When `prefix` does not parse.
pub fn on_link(prefix: &str, link: u32) -> HostRoute {
    HostRoute::new(prefix.parse().unwrap(), Some(link), None)
}

/// Returns node `n`'s lease in the given families, without backend data.
pub fn lease(n: u8, families: &[Family], wire_type: &str) -> Lease {
    let attrs = LeaseAttrs { backend_type: wire_type.into(), ..LeaseAttrs::default() };
    let mut lease = Lease::new(LeaseKey::new(&format!("node-{n}")), Dual::default(), attrs);
    for family in families {
        *lease.subnets.slot(*family) = Some(node_subnet(*family, n));
        *lease.attrs.public_ip.slot(*family) = Some(node_address(*family, n));
    }
    lease
}

/// Returns the public address of node `n`.
pub fn node_address(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, n).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()).into(),
    }
}

/// Returns the subnet of node `n`.
pub fn node_subnet(family: Family, n: u8) -> Prefix {
    match family {
        Family::V4 => Prefix::masked(Ipv4Addr::new(10, 42, n, 0).into(), 24).unwrap(),
        Family::V6 => Prefix::masked(Ipv6Addr::new(0xfd00, 0x42, 0, n.into(), 0, 0, 0, 0).into(), 64).unwrap(),
    }
}
