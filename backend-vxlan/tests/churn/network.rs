//! The network and its pool, as stored and as changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::net::{Dual, Family, Prefix};

/// The highest number of a subnet in either half of the network.
pub(crate) const LAST: u8 = 120;

/// The beginning of the network's upper half, as a number of subnets.
const UPPER: u16 = 0x80;
const UPPER_V6: u16 = 0x8000;

/// The configuration in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) families: Vec<Family>,
    /// Whether the network has its upper half.
    pub(crate) wide: bool,
    /// Whether subnets are assigned from the upper half.
    pub(crate) upper: bool,
    /// The assigned subnets, as numbers of subnets of the usual length.
    pub(crate) min: u8,
    pub(crate) max: u8,
    /// By how many bits subnets are longer than usual.
    pub(crate) longer: u8,
}

impl Setting {
    pub(crate) fn new(families: Vec<Family>, wide: bool) -> Self {
        Self { families, wide, upper: false, min: 1, max: LAST, longer: 0 }
    }

    pub(crate) fn config(&self) -> NetworkConfig {
        let half = self.wide && self.upper;
        let bound = |family, number| network_addr(family, half, number);
        let mut text = format!(r#"{{"EnableIPv4":{}"#, self.families.contains(&Family::V4));
        for family in &self.families {
            let (key, len) = match family {
                Family::V4 => ("", 24 + self.longer),
                Family::V6 => ("IPv6", 64 + self.longer),
            };
            if *family == Family::V6 {
                text += r#","EnableIPv6":true"#;
            }
            text += &format!(r#","{key}Network":"{}","{key}SubnetLen":{len}"#, self.network(*family));
            let (min, max) = (bound(*family, self.min), bound(*family, self.max));
            text += &format!(r#","{key}SubnetMin":"{min}","{key}SubnetMax":"{max}""#);
        }
        text += r#","Backend":{"Type":"vxlan"}}"#;
        // Keys are spelled as in flannel: IPv6SubnetLen, IPv6Network.
        NetworkConfig::parse(text.as_bytes(), Allocation::Pool).unwrap()
    }

    pub(crate) fn network(&self, family: Family) -> Prefix {
        let narrower = u8::from(!self.wide);
        let len = match family {
            Family::V4 => 16 + narrower,
            Family::V6 => 48 + narrower,
        };
        Prefix::new(network_addr(family, false, 0), len).unwrap()
    }

    pub(crate) fn networks(&self) -> Dual<Prefix> {
        let mut networks = Dual::default();
        for family in &self.families {
            *networks.slot(*family) = Some(self.network(*family));
        }
        networks
    }
}

fn network_addr(family: Family, upper: bool, number: u8) -> IpAddr {
    let number = u16::from(number);
    match family {
        Family::V4 => Ipv4Addr::new(10, 42, (number + if upper { UPPER } else { 0 }) as u8, 0).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x42, 0, number + if upper { UPPER_V6 } else { 0 }, 0, 0, 0, 0).into(),
    }
}

/// Returns a subnet of the usual length in the lower half.
pub(crate) fn subnet(family: Family, number: u8) -> Prefix {
    let len = match family {
        Family::V4 => 24,
        Family::V6 => 64,
    };
    Prefix::new(network_addr(family, false, number), len).unwrap()
}

/// Returns a host's address.
pub(crate) fn address(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, number).into(),
        Family::V6 => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, number.into()).into(),
    }
}

/// Returns the device of the overlay in a family.
pub(crate) fn device(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel.1",
        Family::V6 => "flannel-v6.1",
    }
}
