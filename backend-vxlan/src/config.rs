//! The `Backend` object.

use flannel_core::config::{BackendConfig, ConfigError};
use flannel_core::net::{Dual, Family, Mtu, Vni};
use flannel_core::state::{LinkName, LinkNameError};

/// Settings of the `Backend` object (contract 8.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `VNI`: the VXLAN network identifier; 0 to 2²⁴−1. Default 1. The device's name holds it, so with IPv6 it has at
    /// most 4 digits and with IPv4 at most 7.
    pub vni: Vni,
    /// `Port`: UDP destination port; 0 leaves it to the kernel (8472). Default 0. Equal on all nodes.
    pub port: Option<u16>,
    /// `MTU`: the MTU of the outer packets in bytes, at most the uplink's, which is the default.
    pub mtu: Option<Mtu>,
    /// `GBP`: carry group policies. Default false.
    pub gbp: bool,
    /// `Learning`: let the device learn from what it receives. Default false.
    pub learning: bool,
    /// `DirectRouting`: plain routes to peers on the same link. Default false.
    pub direct_routing: bool,
}

impl Config {
    pub(crate) fn read(backend: &BackendConfig, families: &Dual<()>) -> Result<Self, ConfigError> {
        let settings = &backend.settings;
        let number = |key: &str, most: u32| -> Result<Option<u32>, ConfigError> {
            let Some(value) = settings.u64(key)? else { return Ok(None) };
            match u32::try_from(value) {
                Ok(value) if value <= most => Ok(Some(value)),
                _ => Err(ConfigError::new(
                    settings.path_of(key),
                    format!("{value} is out of range"),
                    format!("use a number from 0 to {most}"),
                )),
            }
        };
        let config = Self {
            vni: number("VNI", Vni::MAX)?.and_then(Vni::new).unwrap_or(Vni::ONE),
            port: number("Port", u16::MAX.into())?.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0),
            mtu: number("MTU", u16::MAX.into())?.filter(|mtu| *mtu > 0).map(Mtu),
            gbp: settings.bool("GBP")?.unwrap_or(false),
            learning: settings.bool("Learning")?.unwrap_or(false),
            direct_routing: settings.bool("DirectRouting")?.unwrap_or(false),
        };
        for family in families.families() {
            config.device_name(family).map_err(|error| {
                let remedy = match family {
                    Family::V4 => "use a VNI of at most 7 digits",
                    Family::V6 => "use a VNI of at most 4 digits with IPv6",
                };
                ConfigError::new(settings.path_of("VNI"), error.to_string(), remedy)
            })?;
        }
        Ok(config)
    }

    pub(crate) fn device_name(&self, family: Family) -> Result<LinkName, LinkNameError> {
        let stem = match family {
            Family::V4 => "flannel",
            Family::V6 => "flannel-v6",
        };
        LinkName::new(&format!("{stem}.{}", self.vni))
    }
}
