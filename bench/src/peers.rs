//! The peers of a benchmark.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, LazyLock};

use flannel_core::lease::{Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use flannel_core::net::{Dual, MacAddr, Prefix};

/// The network, with room for 200 000 peers.
pub const NETWORK: &str = "10.0.0.0/8";
/// Length of a peer's subnet, in bits.
pub const LEN: u8 = 26;
/// More peers than these do not fit.
pub const MOST: u32 = 200_000;

/// What carries packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The kernel, in VXLAN.
    Vxlan,
    /// A program, in UDP.
    Udp,
}

impl Backend {
    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Udp => "udp",
        }
    }
}

/// The network configuration.
pub fn config(backend: Backend) -> String {
    format!(r#"{{"Network":"{NETWORK}","SubnetLen":{LEN},"Backend":{{"Type":"{}"}}}}"#, backend.name())
}

/// The MAC address of peer `n`'s VTEP.
pub fn mac(n: u32) -> MacAddr {
    let [_, a, b, c] = n.to_be_bytes();
    MacAddr([0x02, 0xfe, 0, a, b, c])
}

/// Shared by all leases, as a store's parser has it.
static TYPE: LazyLock<Arc<str>> = LazyLock::new(|| "vxlan".into());

/// The lease of peer `n` on VXLAN.
pub fn peer(n: u32) -> Lease {
    lease(Backend::Vxlan, n)
}

/// The lease of peer `n`.
pub fn lease(backend: Backend, n: u32) -> Lease {
    let attrs = LeaseAttrs::new(v4(public(n)));
    let attrs = match backend {
        Backend::Vxlan => {
            let mac = mac(n).to_string();
            let data = Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac))]);
            attrs.with_backend(Arc::clone(&TYPE), Dual { v4: Some(data), v6: None })
        }
        Backend::Udp => attrs,
    };
    Lease::new(LeaseKey::new(&format!("node-{n}")), Dual { v4: Some(prefix(n)), v6: None }, attrs)
}

/// The subnet of peer `n`.
pub fn prefix(n: u32) -> Prefix {
    Prefix::masked(subnet(n).into(), LEN).unwrap_or_else(|_| Prefix::host(subnet(n).into()))
}

/// The first address of peer `n`'s subnet.
pub fn subnet(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 5, 0, 0)) + (n << (32 - LEN)))
}

/// The address peer `n` is reached at; node 0 is ours.
pub fn public(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + n)
}

fn v4(addr: Ipv4Addr) -> Dual<IpAddr> {
    Dual { v4: Some(addr.into()), v6: None }
}
