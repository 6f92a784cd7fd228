#![doc = include_str!("../docs/crate.md")]

#[doc(inline)]
pub use flannel_core::netlink::NetlinkKernel;
#[doc(inline)]
pub use flannel_core::overlay::*;
#[doc(inline)]
pub use flannel_core::{config, lease, net, subnet_env, uplink};

#[cfg(feature = "cached")]
#[doc(inline)]
pub use flannel_subnet_cached as cached;
#[cfg(feature = "etcd")]
#[doc(inline)]
pub use flannel_subnet_etcd as etcd;
#[cfg(feature = "file")]
#[doc(inline)]
pub use flannel_subnet_file as file;
#[cfg(feature = "kube")]
#[doc(inline)]
pub use flannel_subnet_kube as kube;

#[cfg(feature = "host-gw")]
#[doc(inline)]
pub use flannel_backend_hostgw as host_gw;
#[cfg(feature = "udp")]
#[doc(inline)]
pub use flannel_backend_udp as udp;
#[cfg(feature = "vxlan")]
#[doc(inline)]
pub use flannel_backend_vxlan as vxlan;

#[cfg(feature = "serde")]
#[doc(inline)]
pub use flannel_core::serialize;
#[cfg(feature = "testing")]
#[doc(inline)]
pub use flannel_core::testing;

/// Masquerade and forward rules: the tools that write them, and [`keep`](firewall::keep), which maintains them.
pub mod firewall {
    #[doc(inline)]
    pub use flannel_core::firewall::*;
    #[doc(inline)]
    pub use flannel_core::firewall_keeper::*;
    #[cfg(feature = "iptables")]
    #[doc(inline)]
    pub use flannel_firewall_iptables::Iptables;
    #[cfg(feature = "nft")]
    #[doc(inline)]
    pub use flannel_firewall_nft::Nft;
}

/// The traits to implement for a backend, lease store, kernel or clock, the types that they use, and the decision logic of the
/// agent. [`firewall::Firewall`] is beside its implementations.
pub mod spi {
    #[doc(inline)]
    pub use flannel_core::{admit, allocation, backend, backoff, clock, files, kernel, plan, subnet, text};
}

/// Guides. Their programs are compiled by the tests, and run where they need no privilege.
#[cfg(all(any(doc, doctest), feature = "testing", feature = "vxlan", feature = "file"))]
pub mod guides {
    #[doc = include_str!("../docs/guides/backend.md")]
    pub mod backend {}
    #[doc = include_str!("../docs/guides/store.md")]
    pub mod store {}
    #[doc = include_str!("../docs/guides/testing.md")]
    pub mod testing {}
    #[doc = include_str!("../docs/guides/several_overlays.md")]
    pub mod several_overlays {}
}

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
