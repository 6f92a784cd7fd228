//! The keys of the `Backend` object.

use flannel_core::config::{ConfigError, NetworkConfig};
use flannel_core::kernel::LinkName;
use flannel_core::net::{Family, Mtu, Vni};

/// The settings of the VXLAN backend.
///
/// flannel does not check these settings; it fails later with the kernel's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// `VNI`: the same on all nodes. Default: 1. The device name limits it: at most 9999999, or 9999 with IPv6.
    pub vni: Vni,
    /// `Port`: the UDP port, the same on all nodes. Default, and 0: the kernel's default, 8472.
    pub port: Option<u16>,
    /// `MTU`: the MTU of the underlay. Default, and 0: the uplink's MTU. Devices get 50 bytes less, or 70 for IPv6.
    pub mtu: Option<Mtu>,
    /// `GBP`: whether packets carry group policies. Default: false.
    pub gbp: bool,
    /// `Learning`: whether the devices learn peers from received packets. Default: false.
    pub learning: bool,
    /// `DirectRouting`: whether peers on this node's own links are reached without encapsulation. Default: false.
    pub direct_routing: bool,
}

/// The largest MTU a device can have (`IP_MAX_MTU`, include/net/ip.h).
const MAX_MTU: u64 = 65_535;

impl Config {
    /// The keys of the `Backend` object besides `Type`. The last two are for Go flannel on Windows and have no effect
    /// here.
    pub const KEYS: [&str; 8] = ["VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting", "Name", "MacPrefix"];

    pub(crate) fn read(network: &NetworkConfig) -> Result<Self, ConfigError> {
        let settings = &network.backend.settings;
        let range =
            |key: &str, problem: String, remedy: String| ConfigError::new(settings.path_of(key), problem, remedy);
        let vni = settings.u64("VNI")?.unwrap_or(1);
        let id = u32::try_from(vni).ok().and_then(Vni::new);
        let id =
            id.ok_or_else(|| range("VNI", format!("{vni} is out of range"), format!("write 0 to {}", Vni::MAX)))?;
        for family in network.networks.families() {
            let largest = match family {
                Family::V4 => 9_999_999,
                Family::V6 => 9_999,
            };
            if device_name(family, id).is_none() {
                let problem = format!("{vni} makes the {family} device's name longer than the kernel's 15 bytes");
                return Err(range("VNI", problem, format!("write {largest} or less")));
            }
        }
        let port = settings.u64("Port")?.unwrap_or(0);
        let port = u16::try_from(port).map_err(|_| {
            range("Port", format!("{port} is no UDP port"), "write 1 to 65535, or 0 for 8472".to_owned())
        })?;
        let mtu = settings.u64("MTU")?.unwrap_or(0);
        if mtu > MAX_MTU {
            let remedy = format!("write the underlay's MTU, at most {MAX_MTU}, or 0 for the uplink's");
            return Err(range("MTU", format!("{mtu} is more than any device has"), remedy));
        }
        Ok(Self {
            vni: id,
            port: (port > 0).then_some(port),
            mtu: (mtu > 0).then_some(Mtu(mtu as u32)),
            gbp: settings.bool("GBP")?.unwrap_or(false),
            learning: settings.bool("Learning")?.unwrap_or(false),
            direct_routing: settings.bool("DirectRouting")?.unwrap_or(false),
        })
    }

    /// Returns the underlay MTU that devices are sized for.
    pub(crate) fn underlay_mtu(&self, uplink: Mtu) -> Mtu {
        self.mtu.unwrap_or(uplink)
    }
}

/// Returns the name of a family's device, or `None` if it would be too long.
pub(crate) fn device_name(family: Family, vni: Vni) -> Option<LinkName> {
    let prefix = match family {
        Family::V4 => "flannel.",
        Family::V6 => "flannel-v6.",
    };
    LinkName::new(&format!("{prefix}{vni}")).ok()
}
