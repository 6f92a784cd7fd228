//! The network's configuration: flannel's JSON document (docs/compatibility.md, "Network configuration").

mod json;
pub(crate) mod pool;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::net::{Dual, Family, Prefix, split_cidr};
use crate::text::{Plain, cut};

pub use json::Object;

/// The network every node agrees on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
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
#[non_exhaustive]
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
#[non_exhaustive]
pub struct BackendConfig {
    /// `Type` in lower case: `vxlan`, `host-gw`, `udp`, `alloc`, ….
    pub kind: String,
    /// The other keys, which the backend reads for itself. Its errors name `$.Backend.KEY`.
    pub settings: Object,
}

impl BackendConfig {
    /// A backend with all its settings at their defaults.
    pub fn new(kind: &str) -> Self {
        Self { kind: kind.to_ascii_lowercase(), settings: Object::new(BACKEND) }
    }
}

/// Who cuts nodes' subnets from the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// The store, from a [`Pool`] that the document describes: its length and range are checked.
    Pool,
    /// Somebody else (Kubernetes): `SubnetLen`, `SubnetMin` and `SubnetMax` are read and ignored.
    External,
}

/// The configuration cannot be used.
///
/// Retrying does not help until the document changes. Later versions of the document are worth reading: an operator
/// may mend it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}; {}", Plain(path), Plain(problem), Plain(remedy))]
#[non_exhaustive]
pub struct ConfigError {
    /// The JSON path, as `$.Backend.VNI`; `$` is the document.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// What to write instead.
    pub remedy: String,
}

impl ConfigError {
    /// The longest [`problem`](Self::problem), in bytes: it may quote the document at length.
    const MAX_PROBLEM: usize = 512;

    /// An error at `path`, for those who read their own keys of an [`Object`].
    pub fn new(path: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        let mut problem = problem.into();
        cut(&mut problem, Self::MAX_PROBLEM);
        Self { path: path.into(), problem, remedy: remedy.into() }
    }
}

const BACKEND: &str = "$.Backend";

/// The longest name of a backend, in bytes: it is shown in errors.
const MAX_KIND: usize = 64;

impl NetworkConfig {
    /// The largest document that is read, in bytes.
    pub const MAX_BYTES: usize = 64 * 1024;

    /// Reads the document as flannel does: keys in any case, unknown ones ignored, defaults filled in.
    ///
    /// # Errors
    /// [`ConfigError`] names the place. Final for this text.
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
        Ok(Self { networks, enable_nftables: keys.enable_nftables, backend: keys.backend })
    }

    /// Whether an agent that was started with one can go on with the other: the same networks, and the same backend with
    /// the same settings. Pools may differ, since they only say which subnets are given out.
    pub fn is_same_overlay(&self, other: &Self) -> bool {
        let prefixes = |config: &Self| config.networks.map(|_, network| network.prefix);
        prefixes(self) == prefixes(other)
            && self.backend.kind == other.backend.kind
            && self.backend.settings.means(&other.backend.settings)
    }

    /// The document, as compact JSON: [`parse`](Self::parse) makes the same value of it. Derived values are spelt
    /// out.
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
        let kind = serde_json::Value::from(self.backend.kind.as_str());
        let settings = self.backend.settings.members();
        let comma = if settings.is_empty() { "" } else { "," };
        fields.push(format!("\"Backend\":{{\"Type\":{kind}{comma}{settings}}}"));
        format!("{{{}}}", fields.join(","))
    }
}

/// The keys that are not a family's.
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
        // What flannel does; its documentation says vxlan (docs/compatibility.md, "Network configuration").
        return Ok(BackendConfig::new("udp"));
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
    Ok(BackendConfig { kind, settings })
}

/// A family's key names.
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

/// A family's keys as they stand in the document, unset ones `None`. Also read where the family is off: flannel
/// rejects a key of the wrong type there, too.
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
            return Err(ConfigError::new(path(), format!("{prefix} is everything there is"), remedy()));
        }
        let pool = match allocation {
            Allocation::Pool => Some(self.pool(prefix)?),
            Allocation::External => None,
        };
        Ok(Network { prefix, pool })
    }
}

/// A network: host bits are allowed and dropped, `null` is not allowed.
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

/// `SubnetMin` or `SubnetMax`: the unspecified address counts as unset.
fn bound(document: &Object, key: &str, family: Family) -> Result<Option<IpAddr>, ConfigError> {
    let text = match family {
        Family::V4 => document.string_not_null(key)?,
        Family::V6 => document.string(key)?,
    };
    let Some(text) = text else { return Ok(None) };
    let addr = match family {
        Family::V4 => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        // flannel takes IPv4 text here and maps it; it then lies outside any network.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<NetworkConfig, ConfigError> {
        NetworkConfig::parse(text.as_bytes(), Allocation::Pool)
    }

    fn pool(text: &str, family: Family) -> String {
        let config = parse(text).unwrap();
        let network = config.networks.get(family).unwrap();
        let pool = network.pool.as_ref().unwrap();
        format!("{} len {} {} {}", network.prefix, pool.len, pool.min, pool.max)
    }

    #[track_caller]
    fn rejects(text: &str, path: &str) {
        let error = parse(text).unwrap_err();
        assert_eq!(error.path, path, "{text}: {error}");
        assert!(!error.remedy.is_empty() && error.to_string().starts_with(path), "{error}");
    }

    #[test]
    fn what_an_error_quotes_of_a_document_is_bounded() {
        let config = |kind: &str| parse(&format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{kind}"}}}}"#));
        assert!(config(&"x".repeat(MAX_KIND)).is_ok());
        let error = config(&"x".repeat(MAX_KIND + 1)).unwrap_err();
        assert_eq!(error.path, "$.Backend.Type");
        assert!(error.problem.contains("longer than 64 bytes"), "{error}");
        let error = config(&"x".repeat(1 << 14)).unwrap_err();
        assert!(error.problem.len() < ConfigError::MAX_PROBLEM + 40, "{} bytes", error.problem.len());
        assert!(error.problem.ends_with(" more bytes)"), "{error}");
    }

    #[test]
    fn settings_mean_the_same_however_they_are_written() {
        let object = |text: &str| Object::parse(text.as_bytes()).unwrap();
        let one = object(r#"{"VNI":7,"Port":8472,"X":{"a":1,"b":2}}"#);
        assert!(one.means(&object(r#"{ "port" : 8472, "vni":7, "X": {"b":2, "a":1} }"#)));
        let deep = |depth| object(&format!("{{\"X\":{}{}}}", "[".repeat(depth), "]".repeat(depth)));
        assert!(deep(200).means(&deep(200)) && !deep(200).means(&deep(201)));
        for other in [r#"{"VNI":8,"Port":8472,"X":{"a":1,"b":2}}"#, r#"{"VNI":7,"Port":8472}"#, "{}"] {
            assert!(!one.means(&object(other)), "{other}");
        }
    }

    #[test]
    fn worked_examples_of_the_contract() {
        assert_eq!(pool(r#"{"network":"10.3.0.0/16"}"#, Family::V4), "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0");
        assert_eq!(
            pool(r#"{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false}"#, Family::V6),
            "fc00::/48 len 64 fc00:0:0:1:: fc00:0:0:ffff::"
        );
        let dual = r#"{"EnableIPv6":true,"Network":"10.42.7.9/16","IPv6Network":"2001:cafe:42::5/56"}"#;
        assert_eq!(pool(dual, Family::V4), "10.42.0.0/16 len 24 10.42.1.0 10.42.255.0");
        assert_eq!(pool(dual, Family::V6), "2001:cafe:42::/56 len 64 2001:cafe:42:1:: 2001:cafe:42:ff::");
    }

    #[test]
    fn the_default_length_leaves_room_for_four_subnets() {
        assert_eq!(pool(r#"{"Network":"10.3.0.0/22"}"#, Family::V4), "10.3.0.0/22 len 24 10.3.1.0 10.3.3.0");
        assert_eq!(pool(r#"{"Network":"10.3.0.0/23"}"#, Family::V4), "10.3.0.0/23 len 25 10.3.0.128 10.3.1.128");
        assert_eq!(pool(r#"{"Network":"10.3.0.0/28"}"#, Family::V4), "10.3.0.0/28 len 30 10.3.0.4 10.3.0.12");
        rejects(r#"{"Network":"10.3.0.0/29"}"#, "$.Network");
        let v6 = |len: u8| format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/{len}"}}"#);
        assert_eq!(pool(&v6(62), Family::V6), "fc00::/62 len 64 fc00:0:0:1:: fc00:0:0:3::");
        assert_eq!(pool(&v6(63), Family::V6), "fc00::/63 len 65 fc00::8000:0:0:0 fc00:0:0:1:8000::");
        assert_eq!(pool(&v6(124), Family::V6), "fc00::/124 len 126 fc00::4 fc00::c");
        rejects(&v6(125), "$.IPv6Network");
    }

    #[test]
    fn a_length_out_of_range_is_rejected() {
        for len in ["31", "17", "400", "18446744073709551615"] {
            rejects(&format!(r#"{{"Network":"10.3.0.0/16","SubnetLen":{len}}}"#), "$.SubnetLen");
        }
        assert_eq!(
            pool(r#"{"Network":"10.3.0.0/16","SubnetLen":18}"#, Family::V4),
            "10.3.0.0/16 len 18 10.3.64.0 10.3.192.0"
        );
        assert_eq!(
            pool(r#"{"Network":"10.3.0.0/16","SubnetLen":0}"#, Family::V4),
            "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0"
        );
        let v6 = |len: u8| {
            format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":{len}}}"#)
        };
        rejects(&v6(127), "$.IPv6SubnetLen");
        rejects(&v6(49), "$.IPv6SubnetLen");
        assert!(parse(&v6(50)).is_ok() && parse(&v6(126)).is_ok());
    }

    #[test]
    fn bounds_are_inside_aligned_and_in_order() {
        let with = |keys: &str| format!(r#"{{"Network":"10.3.0.0/16",{keys}}}"#);
        assert_eq!(
            pool(&with(r#""SubnetMin":"10.3.5.0","SubnetMax":"10.3.7.0""#), Family::V4),
            "10.3.0.0/16 len 24 10.3.5.0 10.3.7.0"
        );
        assert_eq!(
            pool(&with(r#""SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0""#), Family::V4),
            "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0"
        );
        rejects(&with(r#""SubnetMin":"10.4.0.0""#), "$.SubnetMin");
        rejects(&with(r#""SubnetMax":"10.4.0.0""#), "$.SubnetMax");
        rejects(&with(r#""SubnetMin":"10.3.5.1""#), "$.SubnetMin");
        rejects(&with(r#""SubnetMax":"10.3.5.128""#), "$.SubnetMax");
        rejects(&with(r#""SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0""#), "$.SubnetMin");
        rejects(&with(r#""SubnetMin":"fc00::""#), "$.SubnetMin");
        rejects(&with(r#""SubnetMin":null"#), "$.SubnetMin");
        let v6 = |keys: &str| format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48",{keys}}}"#);
        rejects(&v6(r#""IPv6SubnetMin":"1.2.3.4""#), "$.IPv6SubnetMin");
        rejects(&v6(r#""IPv6SubnetMax":"fc01::""#), "$.IPv6SubnetMax");
        rejects(&v6(r#""IPv6SubnetMin":"fc00::1""#), "$.IPv6SubnetMin");
        assert!(parse(&v6(r#""IPv6SubnetMin":null,"IPv6SubnetMax":"::""#)).is_ok());
    }

    #[test]
    fn a_family_needs_its_network_and_there_is_at_least_one() {
        rejects("{}", "$.Network");
        rejects(r#"{"Network":"0.0.0.0/0"}"#, "$.Network");
        rejects(r#"{"Network":null}"#, "$.Network");
        rejects(r#"{"Network":"10.0.0.0"}"#, "$.Network");
        rejects(r#"{"Network":"fc00::/48"}"#, "$.Network");
        rejects(r#"{"EnableIPv4":false,"EnableIPv6":true}"#, "$.IPv6Network");
        rejects(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"10.0.0.0/16"}"#, "$.IPv6Network");
        rejects(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::ffff:10.0.0.0/112"}"#, "$.IPv6Network");
        rejects(r#"{"EnableIPv4":false}"#, "$.EnableIPv4");
    }

    #[test]
    fn keys_match_in_any_case_and_the_exact_one_wins() {
        assert_eq!(
            pool(r#"{"Network":"10.3.0.0/16","network":"10.4.0.0/16"}"#, Family::V4),
            "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0"
        );
        assert_eq!(
            pool(r#"{"network":"10.3.0.0/16","NETWORK":"10.4.0.0/16","x":{"y":[]}}"#, Family::V4),
            "10.4.0.0/16 len 24 10.4.1.0 10.4.255.0"
        );
        assert_eq!(
            pool(r#"{"Network":"10.3.0.0/16","Network":"10.4.0.0/16"}"#, Family::V4),
            "10.4.0.0/16 len 24 10.4.1.0 10.4.255.0"
        );
    }

    #[test]
    fn a_document_without_end_is_rejected_in_few_words() {
        let long = "x".repeat(NetworkConfig::MAX_BYTES - 100);
        for (text, path) in [
            (format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{long}"}}}}"#), "$.Backend.Type"),
            (format!(r#"{{"Network":"{long}"}}"#), "$.Network"),
            (format!(r#"{{"Network":{long}}}"#), "$"),
            (format!(r#""{long}""#), "$"),
            (format!(r#"{{"Network":"10.5.0.0/16","Note":"{long}{long}"}}"#), "$"),
        ] {
            let error = parse(&text).unwrap_err();
            assert_eq!(error.path, path);
            assert!(error.to_string().len() < 1024, "{path}: {} bytes", error.to_string().len());
        }
    }

    #[test]
    fn a_document_of_the_largest_size_is_read_and_a_larger_one_is_refused() {
        let bytes = |size: usize| {
            let empty = r#"{"Network":"10.5.0.0/16","Note":""}"#;
            empty.replace(r#""""#, &format!(r#""{}""#, "x".repeat(size - empty.len())))
        };
        assert_eq!(bytes(NetworkConfig::MAX_BYTES).len(), NetworkConfig::MAX_BYTES);
        parse(&bytes(NetworkConfig::MAX_BYTES)).unwrap();
        let error = parse(&bytes(NetworkConfig::MAX_BYTES + 1)).unwrap_err();
        assert!(error.to_string().contains("larger than 65536 bytes"), "{error}");
    }

    #[test]
    fn types_are_strict_and_nothing_may_follow() {
        for text in ["", " ", "[]", "null", "7", r#"{"Network":"10.3.0.0/16"} x"#, r#"{"Network":"10.3.0.0/16"}{}"#] {
            rejects(text, "$");
        }
        for (key, value) in [
            ("EnableIPv4", "1"),
            ("EnableIPv6", "\"true\""),
            ("EnableNFTables", "0"),
            ("Network", "7"),
            ("SubnetLen", "-24"),
            ("SubnetLen", "24.5"),
            ("SubnetLen", "\"24\""),
            ("IPv6SubnetLen", "[]"),
            ("IPv6SubnetMin", "{}"),
            ("Backend", "\"vxlan\""),
        ] {
            rejects(&format!(r#"{{"network":"10.3.0.0/16","{key}":{value}}}"#), &format!("$.{key}"));
        }
        let nulls = r#"{"Network":"10.3.0.0/16","EnableIPv4":null,"EnableIPv6":null,"SubnetLen":null}"#;
        assert_eq!(pool(nulls, Family::V4), "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0");
    }

    #[test]
    fn the_backend_is_udp_only_where_none_is_given() {
        let kind = |backend: &str| parse(&format!(r#"{{"Network":"10.3.0.0/16"{backend}}}"#)).map(|c| c.backend.kind);
        assert_eq!(kind("").unwrap(), "udp");
        assert_eq!(kind(r#","Backend":{"type":"VXLAN","VNI":7}"#).unwrap(), "vxlan");
        for bad in ["null", "{}", r#"{"Type":""}"#, r#"{"Type":null}"#, r#"{"Type":7}"#] {
            assert_eq!(kind(&format!(r#","Backend":{bad}"#)).unwrap_err().path, "$.Backend.Type", "{bad}");
        }
    }

    #[test]
    fn a_backend_reads_its_own_keys_and_errors_name_them() {
        let text = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","vni":7,"GBP":true,"Port":"x","Name":"n"}}"#;
        let settings = parse(text).unwrap().backend.settings;
        assert_eq!(settings.u64("VNI"), Ok(Some(7)));
        assert_eq!(settings.bool("gbp"), Ok(Some(true)));
        assert_eq!(settings.string("Name"), Ok(Some("n".to_owned())));
        assert_eq!(settings.u64("MTU"), Ok(None));
        assert_eq!(settings.u64("Port").unwrap_err().path, "$.Backend.Port");
    }

    #[test]
    fn external_allocation_has_no_pool_and_judges_no_range() {
        let text = r#"{"Network":"10.3.0.0/30","SubnetLen":3,"SubnetMin":"9.9.9.9"}"#;
        let config = NetworkConfig::parse(text.as_bytes(), Allocation::External).unwrap();
        assert_eq!(config.networks.v4.unwrap(), Network { prefix: "10.3.0.0/30".parse().unwrap(), pool: None });
        assert!(NetworkConfig::parse(b"{}", Allocation::External).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_on_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = NetworkConfig::parse(&bytes, Allocation::Pool);
        }

        #[test]
        fn parsing_never_panics_on_known_keys_of_any_value(
            members in proptest::collection::vec((0usize..14, 0usize..22), 0..10), pool: bool,
        ) {
            const KEYS: [&str; 14] = [
                "EnableIPv4", "EnableIPv6", "EnableNFTables", "Network", "IPv6Network", "SubnetMin", "SubnetMax",
                "SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", "IPv6SubnetLen", "Backend", "network", "x",
            ];
            const VALUES: [&str; 22] = [
                "true", "false", "null", "0", "1", "31", "127", "255", "1e9", "-1", "[[]]", "{}", "\"\"", "\"0.0.0.0/0\"",
                "\"10.0.0.0/8\"", "\"255.255.255.255/31\"", "\"::/1\"", "\"ffff::/16\"", "\"10.255.255.0\"",
                "\"ffff:ffff:ffff:ffff::\"", "{\"Type\":\"vxlan\"}", "\"255.255.255.252\"",
            ];
            let text = members.iter().map(|(key, value)| format!("\"{}\":{}", KEYS[*key], VALUES[*value]));
            let text = format!("{{{}}}", text.collect::<Vec<_>>().join(","));
            let allocation = if pool { Allocation::Pool } else { Allocation::External };
            if let Ok(config) = NetworkConfig::parse(text.as_bytes(), allocation) {
                prop_assert_eq!(NetworkConfig::parse(config.to_json().as_bytes(), allocation), Ok(config));
            }
        }

        #[test]
        fn what_parses_round_trips(
            v4 in any::<Option<u32>>(), v4_len in 0u8..=33, v6 in any::<Option<u128>>(), v6_len in 0u8..=129,
            subnet_len in proptest::option::of(0u8..=40), min in any::<Option<u32>>(), nft: bool,
            backend in prop_oneof![
                Just(""), Just("{\"Type\":\"VXLAN\",\"VNI\": 7, \"x\" : [1.10, {}]}"), Just("null"), Just("{\"type\":\"a\\\"b\"}")],
        ) {
            let mut fields = vec![format!("\"EnableIPv6\":{},\"enableipv4\":{}", v6.is_some(), v4.is_some())];
            fields.extend(v4.map(|v4| format!("\"Network\":\"{}/{v4_len}\"", Ipv4Addr::from(v4))));
            fields.extend(v6.map(|v6| format!("\"IPv6Network\":\"{}/{v6_len}\"", Ipv6Addr::from(v6))));
            fields.extend(subnet_len.map(|len| format!("\"SubnetLen\":{len}")));
            fields.extend(min.map(|min| format!("\"SubnetMin\":\"{}\"", Ipv4Addr::from(min & 0xffff_0000))));
            fields.push(format!("\"EnableNFTables\":{nft}"));
            if !backend.is_empty() {
                fields.push(format!("\"Backend\":{backend}"));
            }
            let text = format!("{{{}}}", fields.join(","));
            for allocation in [Allocation::Pool, Allocation::External] {
                if let Ok(config) = NetworkConfig::parse(text.as_bytes(), allocation) {
                    let again = config.to_json();
                    prop_assert_eq!(NetworkConfig::parse(again.as_bytes(), allocation), Ok(config), "{}", again);
                }
            }
        }
    }
}
