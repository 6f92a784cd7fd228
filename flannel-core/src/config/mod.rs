//! The network's configuration: flannel's JSON document (docs/compatibility.md, "Network configuration").

mod json;
pub(crate) mod pool;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::net::{Dual, Family, Prefix, split_cidr};
use crate::text::{Plain, cut};

pub use json::Object;

/// The network configuration that all nodes share.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetworkConfig {
    /// The network of each enabled family. At least one.
    pub networks: Dual<Network>,
    /// Whether masquerade and forward rules use nftables instead of iptables. Default: false.
    pub enable_nftables: bool,
    /// The backend and its settings.
    pub backend: BackendConfig,
    /// The keys that flannel does not define. They have no effect; most are misspelt.
    pub ignored: Box<Object>,
}

/// One family's network.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Network {
    /// The prefix that all pods of this family are in.
    pub prefix: Prefix,
    /// How nodes' subnets are allocated from it; `None` if the store does not allocate (Kubernetes).
    pub pool: Option<Pool>,
}

/// How subnets are allocated from a network.
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
#[non_exhaustive]
pub struct BackendConfig {
    /// `Type` in lower case: `vxlan`, `host-gw`, `udp`, `alloc`, ….
    pub kind: String,
    /// The other keys, which the backend parses. Its errors name `$.Backend.KEY`.
    pub settings: Object,
    /// Whether the document has no `Backend`, so that flannel's default is used: `udp`.
    pub is_default: bool,
}

impl BackendConfig {
    /// Creates the configuration of a backend with default settings. `kind` is converted to lower case.
    pub fn new(kind: &str) -> Self {
        Self { kind: kind.to_ascii_lowercase(), settings: Object::new(BACKEND), is_default: false }
    }
}

/// What allocates nodes' subnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// The lease store, from a [`Pool`] in the document: its length and range are checked.
    Pool,
    /// Another program (Kubernetes): `SubnetLen`, `SubnetMin` and `SubnetMax` are parsed and ignored.
    External,
}

/// The configuration is not valid.
///
/// Do not retry until the document changes. Read later versions of the document: an operator may correct it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}; {}", Plain(path), Plain(problem), Plain(remedy))]
#[non_exhaustive]
pub struct ConfigError {
    /// The JSON path, such as `$.Backend.VNI`; `$` is the whole document.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// What to write instead.
    pub remedy: String,
}

impl ConfigError {
    /// The longest [`problem`](Self::problem), in bytes: it may quote a long part of the document.
    const MAX_PROBLEM: usize = 512;

    /// Creates an error at `path`. For code that parses keys of an [`Object`].
    pub fn new(path: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        let mut problem = problem.into();
        cut(&mut problem, Self::MAX_PROBLEM);
        Self { path: path.into(), problem, remedy: remedy.into() }
    }
}

const BACKEND: &str = "$.Backend";

/// The longest backend name, in bytes: errors show it.
const MAX_KIND: usize = 64;

impl NetworkConfig {
    /// The keys of the document.
    pub const KEYS: [&str; 12] = [
        "EnableIPv4",
        "EnableIPv6",
        "EnableNFTables",
        "Network",
        "SubnetLen",
        "SubnetMin",
        "SubnetMax",
        "IPv6Network",
        "IPv6SubnetLen",
        "IPv6SubnetMin",
        "IPv6SubnetMax",
        "Backend",
    ];

    /// The largest document that is parsed, in bytes.
    pub const MAX_BYTES: usize = 64 * 1024;

    /// Parses the document as flannel does: keys match in any case, unknown keys are ignored, and defaults are filled
    /// in.
    ///
    /// # Errors
    /// [`ConfigError`] names the JSON path. Final for this text.
    pub fn parse(json: &[u8], allocation: Allocation) -> Result<Self, ConfigError> {
        if json.len() > Self::MAX_BYTES {
            let problem = format!("larger than {} bytes", Self::MAX_BYTES);
            return Err(ConfigError::new("$", problem, "write the network's configuration only"));
        }
        let document = Object::parse(json)?;
        let keys = Keys::read(&document)?;
        let mut networks = Dual::default();
        for (family, enabled) in [(Family::V4, keys.enable_v4), (Family::V6, keys.enable_v6)] {
            let family_keys = FamilyKeys::read(&document, family)?;
            if enabled {
                *networks.slot(family) = Some(family_keys.network(allocation)?);
            }
        }
        if networks.is_empty() {
            let remedy = "set EnableIPv4 or EnableIPv6 to true";
            return Err(ConfigError::new("$.EnableIPv4", "neither IPv4 nor IPv6 is enabled", remedy));
        }
        let mut ignored = document;
        NetworkConfig::KEYS.iter().for_each(|key| ignored.remove(key));
        Ok(Self { networks, enable_nftables: keys.enable_nftables, backend: keys.backend, ignored: Box::new(ignored) })
    }

    /// Returns whether an agent started with one configuration can continue with the other: the same networks, and the
    /// same backend with the same settings. Pools may differ, because they only determine which subnets are allocated.
    pub fn is_same_overlay(&self, other: &Self) -> bool {
        let prefixes = |config: &Self| config.networks.map(|_, network| network.prefix);
        prefixes(self) == prefixes(other)
            && self.backend.kind == other.backend.kind
            && self.backend.settings.means(&other.backend.settings)
    }

    /// Returns the document as compact JSON, with derived values included. [`parse`](Self::parse) returns the same
    /// value from it.
    pub fn to_json(&self) -> String {
        let mut fields = Vec::new();
        for family in Family::BOTH {
            let names = Names::of(family);
            let network = self.networks.get(family);
            fields.push(format!("\"{}\":{}", names.enable, network.is_some()));
            let Some(network) = network else { continue };
            fields.push(format!("\"{}\":\"{}\"", names.network, network.prefix));
            let Some(pool) = &network.pool else { continue };
            fields.push(format!("\"{}\":{}", names.len, pool.len));
            fields.push(format!("\"{}\":\"{}\"", names.min, pool.min));
            fields.push(format!("\"{}\":\"{}\"", names.max, pool.max));
        }
        if self.enable_nftables {
            fields.push("\"EnableNFTables\":true".to_owned());
        }
        if !self.backend.is_default {
            let kind = serde_json::Value::from(self.backend.kind.as_str());
            let settings = self.backend.settings.members();
            let comma = if settings.is_empty() { "" } else { "," };
            fields.push(format!("\"Backend\":{{\"Type\":{kind}{comma}{settings}}}"));
        }
        let ignored = self.ignored.members();
        fields.extend((!ignored.is_empty()).then_some(ignored));
        format!("{{{}}}", fields.join(","))
    }
}

/// The keys that do not depend on the family.
struct Keys {
    enable_v4: bool,
    enable_v6: bool,
    enable_nftables: bool,
    backend: BackendConfig,
}

impl Keys {
    fn read(document: &Object) -> Result<Self, ConfigError> {
        Ok(Self {
            enable_v4: document.bool("EnableIPv4")?.unwrap_or(true),
            enable_v6: document.bool("EnableIPv6")?.unwrap_or(false),
            enable_nftables: document.bool("EnableNFTables")?.unwrap_or(false),
            backend: backend(document)?,
        })
    }
}

fn backend(document: &Object) -> Result<BackendConfig, ConfigError> {
    if !document.contains("Backend") {
        // flannel's behaviour; its documentation says vxlan (docs/compatibility.md, "Network configuration").
        return Ok(BackendConfig { is_default: true, ..BackendConfig::new("udp") });
    }
    let mut settings = document.object("Backend")?.unwrap_or_else(|| Object::new(BACKEND));
    let kind = settings.string("Type")?.unwrap_or_default().to_ascii_lowercase();
    if kind.is_empty() {
        let remedy = "name a backend, as {\"Type\":\"vxlan\"}";
        return Err(ConfigError::new(format!("{BACKEND}.Type"), "missing", remedy));
    }
    if kind.len() > MAX_KIND {
        let remedy = "name a backend, as {\"Type\":\"vxlan\"}";
        return Err(ConfigError::new(
            format!("{BACKEND}.Type"),
            format!("{kind} is longer than {MAX_KIND} bytes"),
            remedy,
        ));
    }
    settings.remove("Type");
    Ok(BackendConfig { kind, settings, is_default: false })
}

/// The key names of a family.
struct Names {
    enable: &'static str,
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
}

impl Names {
    fn of(family: Family) -> Self {
        match family {
            Family::V4 => {
                Self { enable: "EnableIPv4", network: "Network", len: "SubnetLen", min: "SubnetMin", max: "SubnetMax" }
            }
            Family::V6 => Self {
                enable: "EnableIPv6",
                network: "IPv6Network",
                len: "IPv6SubnetLen",
                min: "IPv6SubnetMin",
                max: "IPv6SubnetMax",
            },
        }
    }
}

/// A family's keys from the document; unset ones are `None`. Also parsed if the family is disabled, because flannel
/// rejects keys of the wrong type there too.
struct FamilyKeys {
    family: Family,
    names: Names,
    prefix: Option<Prefix>,
    len: Option<u64>,
    min: Option<IpAddr>,
    max: Option<IpAddr>,
}

impl FamilyKeys {
    fn read(document: &Object, family: Family) -> Result<Self, ConfigError> {
        let names = Names::of(family);
        Ok(Self {
            family,
            prefix: network_prefix(document, names.network, family)?,
            len: document.u64(names.len)?.filter(|len| *len != 0),
            min: bound(document, names.min, family)?,
            max: bound(document, names.max, family)?,
            names,
        })
    }

    fn network(&self, allocation: Allocation) -> Result<Network, ConfigError> {
        let path = || format!("$.{}", self.names.network);
        let remedy = || format!("give the pods' {} network as \"ADDRESS/LENGTH\"", self.family);
        let Some(prefix) = self.prefix else {
            return Err(ConfigError::new(path(), format!("missing while {} is enabled", self.family), remedy()));
        };
        if prefix.len() == 0 {
            return Err(ConfigError::new(path(), format!("{prefix} contains all addresses"), remedy()));
        }
        let pool = match allocation {
            Allocation::Pool => Some(self.pool(prefix)?),
            Allocation::External => None,
        };
        Ok(Network { prefix, pool })
    }
}

/// Parses a network: host bits are allowed and cleared, `null` is not allowed.
fn network_prefix(document: &Object, key: &str, family: Family) -> Result<Option<Prefix>, ConfigError> {
    let Some(text) = document.string_not_null(key)? else { return Ok(None) };
    let error = |problem: String| {
        let example = match family {
            Family::V4 => "10.244.0.0/16",
            Family::V6 => "fd00:10:244::/56",
        };
        ConfigError::new(document.path_of(key), problem, format!("write an {family} network as \"{example}\""))
    };
    let (addr, len) = split_cidr(&text).map_err(|source| error(source.to_string()))?;
    let prefix = Prefix::masked(addr, len).map_err(|source| error(source.to_string()))?;
    let mapped = matches!(addr, IpAddr::V6(addr) if addr.to_ipv4_mapped().is_some());
    if prefix.family() != family || mapped {
        return Err(error(format!("{text:?} is not an {family} network")));
    }
    Ok(Some(prefix))
}

/// Parses `SubnetMin` or `SubnetMax`: the unspecified address counts as unset.
fn bound(document: &Object, key: &str, family: Family) -> Result<Option<IpAddr>, ConfigError> {
    let text = match family {
        Family::V4 => document.string_not_null(key)?,
        Family::V6 => document.string(key)?,
    };
    let Some(text) = text else { return Ok(None) };
    let addr = match family {
        Family::V4 => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        // flannel accepts IPv4 text here and maps it to IPv6; the result is outside any network.
        Family::V6 => match text.parse::<IpAddr>() {
            Ok(IpAddr::V6(addr)) => Some(addr.into()),
            Ok(IpAddr::V4(addr)) => Some(addr.to_ipv6_mapped().into()),
            Err(_) => None,
        },
    };
    let Some(addr) = addr else {
        let remedy = format!("write the {family} address of a subnet, or leave the key out");
        return Err(ConfigError::new(document.path_of(key), format!("{text:?} is not an {family} address"), remedy));
    };
    let unset = match addr {
        IpAddr::V4(addr) => addr == Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(addr) => addr == Ipv6Addr::UNSPECIFIED,
    };
    Ok((!unset).then_some(addr))
}
