//! Defaults of the pool (docs/compatibility.md, "Pool").

use std::net::IpAddr;

use super::{ConfigError, FamilyKeys, Pool};
use crate::net::{Family, Prefix};

impl FamilyKeys {
    /// Checks the keys of the pool and fills in unset ones.
    pub(super) fn pool(&self, network: Prefix) -> Result<Pool, ConfigError> {
        let len = self.len(network)?;
        let size = 1_u128 << (self.family.bits() - len);
        let first = number(network.addr());
        // The subnet at the network's own address is skipped.
        let min = self.bound(self.names.min, self.min, network, len, first + size)?;
        let max = self.bound(self.names.max, self.max, network, len, number(network.last()) & !(size - 1))?;
        if min > max {
            let problem = format!("{min} is above {} ({max})", self.names.max);
            return Err(self.error(self.names.min, problem, format!("give a {} not below it", self.names.max)));
        }
        Ok(Pool { len, min, max })
    }

    fn len(&self, network: Prefix) -> Result<u8, ConfigError> {
        let longest = self.family.bits() - 2;
        let (usual_network, usual) = match self.family {
            Family::V4 => (22, 24),
            Family::V6 => (62, 64),
        };
        // Room for four subnets.
        let shortest = network.len().saturating_add(2);
        let Some(len) = self.len else {
            if shortest > longest {
                let problem = format!("{network} has no room for four subnets of at least four addresses");
                let remedy = format!("give a network of length {} or less", longest - 2);
                return Err(self.error(self.names.network, problem, remedy));
            }
            return Ok(if network.len() <= usual_network { usual } else { shortest });
        };
        match u8::try_from(len) {
            Ok(len) if (shortest..=longest).contains(&len) => Ok(len),
            _ if shortest > longest => {
                let problem = format!("{len} does not fit the network {network}, which has no room for four subnets");
                Err(self.error(
                    self.names.len,
                    problem,
                    format!("give a {} of length {} or less", self.names.network, longest - 2),
                ))
            }
            _ => {
                let problem = format!("{len} does not fit the network {network}");
                Err(self.error(self.names.len, problem, format!("give a length from {shortest} to {longest}")))
            }
        }
    }

    fn bound(
        &self,
        key: &str,
        given: Option<IpAddr>,
        network: Prefix,
        len: u8,
        default: u128,
    ) -> Result<IpAddr, ConfigError> {
        let Some(addr) = given else { return Ok(address(default, self.family)) };
        let remedy = || format!("give the address of a subnet of length {len} in {network}, or leave the key out");
        if !network.contains(addr) {
            return Err(self.error(key, format!("{addr} is outside the network {network}"), remedy()));
        }
        if Prefix::new(addr, len).is_err() {
            return Err(self.error(key, format!("{addr} is not the address of a subnet of length {len}"), remedy()));
        }
        Ok(addr)
    }

    fn error(&self, key: &str, problem: String, remedy: String) -> ConfigError {
        ConfigError::new(format!("$.{key}"), problem, remedy)
    }
}

/// Converts an address of either family to a number.
pub(crate) fn number(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => u32::from(addr).into(),
        IpAddr::V6(addr) => addr.into(),
    }
}

/// Converts a number to an address; for IPv4, only the low 32 bits are used.
pub(crate) fn address(number: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4((number as u32).into()),
        Family::V6 => IpAddr::V6(number.into()),
    }
}
