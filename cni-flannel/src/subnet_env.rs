//! `subnet.env` as Go flannel's plug-in reads it: `KEY=value` lines without quotes.
//!
//! Unlike `flannel_core::subnet_env`, which ignores what it cannot read in the agent's former file, this reader returns an
//! error: pods get their addresses from these values.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::files::{self, Trust};
use flannel_core::net::{Dual, Family, Prefix, split_cidr};

/// The largest file that is read, in bytes.
const MAX: u64 = 64 << 10;

/// The values of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SubnetEnv {
    /// The pods' networks, IPv4 first.
    pub(crate) networks: Vec<Prefix>,
    pub(crate) subnets: Dual<Prefix>,
    pub(crate) mtu: u32,
    pub(crate) ip_masq: bool,
}

impl SubnetEnv {
    /// Reads the file, again and again until it is complete or `patience` has passed. The error is the last one of
    /// [`read`](Self::read).
    pub(crate) fn wait(path: &Path, patience: Duration, poll_every: Duration) -> Result<Self, String> {
        let until = Instant::now() + patience;
        loop {
            match Self::read(path) {
                Err(_) if Instant::now() < until => thread::sleep(poll_every),
                outcome => return outcome,
            }
        }
    }

    /// Reads the file. The error says what is wrong with it.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        match files::read(path, Trust::Anyone, MAX) {
            Ok(Some(bytes)) => {
                let text = String::from_utf8(bytes).map_err(|_| format!("{shown} is not UTF-8"))?;
                Self::parse(&text).map_err(|problem| format!("{shown}: {problem}"))
            }
            Ok(None) => Err(format!("{shown} does not exist")),
            Err(error) => Err(format!("{shown}: {error}")),
        }
    }

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (mut networks, mut networks_v6) = (Vec::new(), Vec::new());
        let (mut subnets, mut mtu, mut ip_masq) = (Dual::default(), None, None);
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            match key {
                "FLANNEL_NETWORK" => networks = list(key, value, Family::V4)?,
                "FLANNEL_IPV6_NETWORK" => networks_v6 = list(key, value, Family::V6)?,
                "FLANNEL_SUBNET" => subnets.v4 = Some(prefix(key, value, Family::V4)?),
                "FLANNEL_IPV6_SUBNET" => subnets.v6 = Some(prefix(key, value, Family::V6)?),
                "FLANNEL_MTU" => mtu = Some(value.parse().map_err(|_| format!("{key}={value} is not an MTU"))?),
                "FLANNEL_IPMASQ" => ip_masq = Some(value == "true"),
                _ => {}
            }
        }
        networks.append(&mut networks_v6);
        let missing = [
            (networks.is_empty(), "FLANNEL_NETWORK or FLANNEL_IPV6_NETWORK"),
            (subnets == Dual::default(), "FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET"),
            (mtu.is_none(), "FLANNEL_MTU"),
            (ip_masq.is_none(), "FLANNEL_IPMASQ"),
        ];
        let missing: Vec<_> = missing.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
        match (mtu, ip_masq) {
            (Some(mtu), Some(ip_masq)) if missing.is_empty() => Ok(Self { networks, subnets, mtu, ip_masq }),
            _ => Err(format!("{} missing", missing.join(", "))),
        }
    }
}

/// Parses a comma-separated list of CIDRs and drops duplicates.
fn list(key: &str, value: &str, family: Family) -> Result<Vec<Prefix>, String> {
    let mut prefixes = Vec::new();
    for cidr in value.split(',') {
        let prefix = prefix(key, cidr, family)?;
        if !prefixes.contains(&prefix) {
            prefixes.push(prefix);
        }
    }
    Ok(prefixes)
}

/// Parses a CIDR and clears its host bits.
fn prefix(key: &str, cidr: &str, family: Family) -> Result<Prefix, String> {
    let prefix = split_cidr(cidr).and_then(|(addr, len)| Prefix::masked(addr, len));
    prefix
        .ok()
        .filter(|prefix| prefix.family() == family)
        .ok_or_else(|| format!("{key}: {cidr:?} is not a CIDR of {family}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str =
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

    #[test]
    fn a_subnet_is_its_network_and_networks_are_a_list() {
        let env = SubnetEnv::parse(&WHOLE.replace("/16", "/16,10.9.0.0/16,10.1.2.3/16")).unwrap();
        assert_eq!(env.subnets.v4, Some("10.1.17.0/24".parse().unwrap()));
        assert_eq!(env.networks, ["10.1.0.0/16".parse().unwrap(), "10.9.0.0/16".parse().unwrap()]);
        assert_eq!((env.mtu, env.ip_masq), (1472, true));
        let both =
            format!("{WHOLE}FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:7::1/64\nOTHER=x\nnone\n");
        let env = SubnetEnv::parse(&both).unwrap();
        assert_eq!((env.networks.len(), env.subnets.v6), (2, Some("fc00:0:0:7::/64".parse().unwrap())));
        assert!(!SubnetEnv::parse(&WHOLE.replace("=true", "=\"true\"")).unwrap().ip_masq);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for name in ["FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ"] {
            let lacking: String =
                WHOLE.lines().filter(|line| !line.starts_with(name)).map(|line| format!("{line}\n")).collect();
            assert!(SubnetEnv::parse(&lacking).unwrap_err().contains(name), "{name}");
        }
        for bad in ["10.1.0.0", "10.1.0.0/33", "10.1.0.0/+8", "x/8", "", "fc00::/48", "10.1.0.0/16,"] {
            let error = SubnetEnv::parse(&WHOLE.replace("10.1.0.0/16", bad)).unwrap_err();
            assert!(error.contains("FLANNEL_NETWORK"), "{bad:?}: {error}");
        }
        assert!(SubnetEnv::parse(&WHOLE.replace("1472", "-1")).unwrap_err().contains("FLANNEL_MTU"));
        assert!(SubnetEnv::read(Path::new("/nowhere/subnet.env")).unwrap_err().contains("does not exist"));
    }
}
