//! The network's configuration: flannel's JSON document (contract 1).

use std::net::IpAddr;

use crate::net::{Dual, Prefix};

/// The network every node agrees on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The network of each enabled family. At least one.
    pub networks: Dual<Network>,
    /// Whether masquerade and forward rules go through nftables rather than iptables. Default: false.
    pub enable_nftables: bool,
    /// Which backend, and its own settings.
    pub backend: BackendConfig,
}

/// One family's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The range all pods of this family are in.
    pub prefix: Prefix,
    /// How nodes' subnets are cut from it; `None` where the store does not allocate (Kubernetes).
    pub pool: Option<Pool>,
}

/// How subnets are cut from a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Length of each subnet's prefix, in bits.
    pub len: u8,
    /// Address of the first subnet.
    pub min: IpAddr,
    /// Address of the last subnet.
    pub max: IpAddr,
}

/// The `Backend` object of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendConfig {
    /// `Type` in lower case: `vxlan`, `host-gw`, `udp`, `alloc`, ….
    pub kind: String,
}
