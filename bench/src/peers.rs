//! The peers of a benchmark.

use std::net::{IpAddr, Ipv4Addr};

use flannel_core::lease::{Fence, Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use flannel_core::net::{Dual, MacAddr, Prefix};

/// The Ethernet address of peer `n`'s VTEP.
pub fn mac(n: u16) -> MacAddr {
    let [high, low] = n.to_be_bytes();
    MacAddr([0x02, 0xfe, 0, 0, high, low])
}

/// The lease of peer `n`.
pub fn peer(n: u16) -> Lease {
    let mac = mac(n).to_string();
    let data = Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac))]);
    let attrs = LeaseAttrs {
        public_ip: v4(public(n)),
        backend_type: "vxlan".into(),
        backend_data: Dual { v4: Some(data), v6: None },
    };
    let subnet = Prefix::masked(subnet(n).into(), 24).unwrap_or_else(|_| Prefix::host(subnet(n).into()));
    Lease {
        key: LeaseKey::new(&format!("node-{n}")),
        subnets: Dual { v4: Some(subnet), v6: None },
        attrs,
        expires: None,
        fence: Fence::default(),
    }
}

/// The first address of peer `n`'s subnet, a /24.
pub fn subnet(n: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 5, 0, 0)) + (u32::from(n) << 8))
}

/// The address peer `n` is reached at; node 0 is ours.
pub fn public(n: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(192, 168, 0, 1)) + u32::from(n))
}

fn v4(addr: Ipv4Addr) -> Dual<IpAddr> {
    Dual { v4: Some(addr.into()), v6: None }
}
