//! Small nodes, leases and hosts to build tests from.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::backend::{Local, Situation, Uplink};
use crate::config::{Allocation, ConfigError, NetworkConfig};
use crate::kernel::{HostAddress, HostFacts, HostLink, HostRoute, OverlayName};
use crate::lease::{Fence, Lease, LeaseAttrs, LeaseKey};
use crate::net::{Dual, Family, Mtu, Prefix};
use crate::state::{LinkKind, LinkName, LinkNameError};
use crate::subnet::{NodeIdentity, NodeIdentityError};

/// Something a sample is made of is not valid: the test that asked for it is wrong.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
#[non_exhaustive]
pub enum SampleError {
    /// The network's configuration.
    Config(#[from] ConfigError),
    /// An interface name.
    LinkName(#[from] LinkNameError),
    /// A node's name.
    Node(#[from] NodeIdentityError),
}

/// Interface index of the sample uplink, `eth0`.
pub const UPLINK: u32 = 2;

/// The subnet of node `n`: `10.5.n.0/24` counted through two bytes, `fd00:5:0:n::/64`.
pub fn subnets(n: u16, families: &Dual<()>) -> Dual<Prefix> {
    let [high, low] = n.to_be_bytes();
    let v4 = IpAddr::V4(Ipv4Addr::new(10, 5 + high, low, 0));
    let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 5, 0, n, 0, 0, 0, 0));
    families.map(|family, ()| match family {
        Family::V4 => Prefix::masked(v4, 24).unwrap_or_else(|_| Prefix::host(v4)),
        Family::V6 => Prefix::masked(v6, 64).unwrap_or_else(|_| Prefix::host(v6)),
    })
}

/// The public addresses of node `n`: `192.168.0.1` and on, counted through two bytes, `fd01::n`.
pub fn public(n: u16, families: &Dual<()>) -> Dual<IpAddr> {
    let n = n.wrapping_add(1);
    let [high, low] = n.to_be_bytes();
    families.map(|family, ()| match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 168, high, low)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, n)),
    })
}

/// The lease of node `n` with these attributes besides its public addresses.
pub fn lease(n: u16, attrs: LeaseAttrs) -> Lease {
    let families = attrs.public_ip.map(|_, _| ());
    Lease {
        key: LeaseKey::new(&format!("node-{n}")),
        subnets: subnets(n, &families),
        attrs,
        expires: None,
        fence: Fence::default(),
    }
}

/// Node 0 on a host whose `eth0` carries a /16 and a /64 with the nodes' public addresses, under this configuration.
///
/// # Errors
/// [`SampleError`] when `config` is not valid.
pub fn situation(config: &str) -> Result<Situation, SampleError> {
    let config = NetworkConfig::parse(config.as_bytes(), Allocation::Pool)?;
    let families = config.networks.map(|_, _| ());
    let addrs = public(0, &families);
    let name = LinkName::new("eth0")?;
    let link = HostLink {
        name: name.clone(),
        kind: LinkKind::Other("veth".into()),
        mac: None,
        mtu: 1500,
        up: true,
        group: 0,
        alias: None,
    };
    let len = |family| match family {
        Family::V4 => 16,
        Family::V6 => 64,
    };
    let addresses = addrs.iter().map(|(family, addr)| HostAddress {
        link: UPLINK,
        addr: *addr,
        len: len(family),
        permanent: true,
        temporary: false,
        deprecated: false,
    });
    let on_link = addrs.iter().filter_map(|(family, addr)| {
        let prefix = Prefix::masked(*addr, len(family)).ok()?;
        Some(HostRoute { prefix, link: Some(UPLINK), gateway: None, metric: 0 })
    });
    let host = HostFacts {
        links: BTreeMap::from([(UPLINK, link)]),
        addresses: addresses.collect(),
        on_link: on_link.collect(),
        ..HostFacts::default()
    };
    Ok(Situation {
        overlay: OverlayName::default(),
        config: Arc::new(config),
        node: NodeIdentity::new("node-0")?,
        uplink: Uplink { index: UPLINK, name, mtu: Mtu(1500), addrs },
        public: addrs,
        host: Arc::new(host),
        previous: None,
    })
}

/// Node 0 with its lease of these attributes.
pub fn local(situation: Situation, attrs: LeaseAttrs) -> Local {
    Local { situation, lease: Arc::new(lease(0, attrs)) }
}
