//! Routes.

use std::fmt;
use std::net::IpAddr;

use flannel_core::net::{Family, Prefix};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::{flag, number};
use crate::{Error, Namespace};

/// A route, to be created or as listed.
///
/// A new one is unicast, in the main table, of protocol `boot`, without metric: as `ip route add` creates it, except
/// for its scope.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Route {
    /// Destination.
    #[serde(rename = "dst", deserialize_with = "prefix")]
    pub to: Prefix,
    /// Its kind, such as `blackhole`.
    #[serde(rename = "type", deserialize_with = "kind")]
    pub kind: String,
    /// Next hop.
    #[serde(rename = "gateway")]
    pub via: Option<IpAddr>,
    /// Output link.
    pub dev: Option<String>,
    /// Table.
    #[serde(deserialize_with = "number")]
    pub table: u32,
    /// `rtm_protocol`.
    #[serde(deserialize_with = "number")]
    pub protocol: u8,
    /// Scope; IPv6 has only the widest, 0.
    #[serde(deserialize_with = "number")]
    pub scope: u8,
    /// Preferred source.
    #[serde(rename = "prefsrc")]
    pub source: Option<IpAddr>,
    /// Metric; 0 means none, and reads back as 1024 in IPv6.
    #[serde(default)]
    pub metric: u32,
    /// `onlink`, `linkdown` and the like.
    pub flags: Vec<String>,
    /// The next hops of a listed multipath route, which has neither `via` nor `dev`.
    #[serde(default, rename = "nexthops")]
    pub hops: Vec<Hop>,
}

/// One next hop of several.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Hop {
    /// Next hop.
    #[serde(rename = "gateway")]
    pub via: Option<IpAddr>,
    /// Output link.
    pub dev: String,
    /// Its weight.
    pub weight: u16,
    /// `onlink` and the like.
    pub flags: Vec<String>,
}

/// Returns the name of a `RTN_*` number that `ip -Numeric` prints, as `ip route add` takes it.
fn kind<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let kind = match number(from)? {
        1u8 => "unicast",
        2 => "local",
        3 => "broadcast",
        4 => "anycast",
        5 => "multicast",
        6 => "blackhole",
        7 => "unreachable",
        8 => "prohibit",
        9 => "throw",
        other => return Err(D::Error::custom(format!("a route of type {other}"))),
    };
    Ok(kind.to_owned())
}

/// Parses a prefix; a host has no length.
fn prefix<'de, D: Deserializer<'de>>(from: D) -> Result<Prefix, D::Error> {
    let text = String::deserialize(from)?;
    let host = || text.parse().map(Prefix::host).map_err(D::Error::custom);
    if text.contains('/') { text.parse().map_err(D::Error::custom) } else { host() }
}

impl Route {
    /// The main table.
    pub const MAIN: u32 = 254;
    /// `RTPROT_KERNEL`
    pub const KERNEL: u8 = 2;
    /// `RTPROT_BOOT`
    pub const BOOT: u8 = 3;
    /// `RTPROT_STATIC`
    pub const STATIC: u8 = 4;
    /// `RT_SCOPE_LINK`
    pub const LINK: u8 = 253;

    /// Creates a route to `prefix`.
    pub fn to(prefix: Prefix) -> Self {
        Self {
            to: prefix,
            kind: "unicast".to_owned(),
            via: None,
            dev: None,
            table: Self::MAIN,
            protocol: Self::BOOT,
            scope: 0,
            source: None,
            metric: 0,
            flags: Vec::new(),
            hops: Vec::new(),
        }
    }

    /// Sets the next hop.
    pub fn via(self, gateway: IpAddr) -> Self {
        Self { via: Some(gateway), ..self }
    }

    /// Sets the output link.
    pub fn dev(self, name: &str) -> Self {
        Self { dev: Some(name.to_owned()), ..self }
    }

    /// Sets the table.
    pub fn table(self, table: u32) -> Self {
        Self { table, ..self }
    }

    /// Sets the protocol.
    pub fn protocol(self, protocol: u8) -> Self {
        Self { protocol, ..self }
    }

    /// Sets the scope.
    pub fn scope(self, scope: u8) -> Self {
        Self { scope, ..self }
    }

    /// Sets the metric.
    pub fn metric(self, metric: u32) -> Self {
        Self { metric, ..self }
    }

    /// Sets the preferred source.
    pub fn source(self, source: IpAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Sets the kind.
    pub fn kind(self, kind: &str) -> Self {
        Self { kind: kind.to_owned(), ..self }
    }

    /// Marks the next hop as on-link, whatever the addresses.
    pub fn onlink(self) -> Self {
        Self { flags: vec!["onlink".to_owned()], ..self }
    }

    /// Whether the next hop is on-link.
    pub fn is_onlink(&self) -> bool {
        self.flags.iter().any(|flag| flag == "onlink")
    }

    /// Returns the command with explicit values for what iproute2 would otherwise choose.
    fn command(&self, verb: &str, scope: u8) -> String {
        // The kernel sets the other flags.
        let flags = if self.is_onlink() { vec!["onlink".to_owned()] } else { Vec::new() };
        let route = Self { flags, ..self.clone() };
        format!("route {verb} {route} proto {} scope {scope}", self.protocol)
    }
}

impl fmt::Display for Route {
    /// In the form of `ip route`, with numbers instead of names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind != "unicast" {
            write!(f, "{} ", self.kind)?;
        }
        write!(f, "{}", self.to)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if let Some(dev) = &self.dev {
            write!(f, " dev {dev}")?;
        }
        if self.table != Self::MAIN {
            write!(f, " table {}", self.table)?;
        }
        if self.protocol != Self::BOOT {
            write!(f, " proto {}", self.protocol)?;
        }
        if self.scope != 0 {
            write!(f, " scope {}", self.scope)?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        for Hop { via, dev, weight, flags } in &self.hops {
            let via = via.map(|via| format!(" via {via}")).unwrap_or_default();
            write!(f, " nexthop{via} dev {dev} weight {weight}")?;
            flags.iter().try_for_each(|flag| write!(f, " {flag}"))?;
        }
        self.flags.iter().try_for_each(|flag| write!(f, " {flag}"))
    }
}

impl Namespace {
    /// Returns the routes of one family in all tables, in the order of the dump.
    ///
    /// # Errors
    /// If the kernel refuses the dump.
    pub fn routes(&self, family: Family) -> Result<Vec<Route>, Error> {
        let json = self.ip(&format!("-json -details -Numeric {} route show table all", flag(family)))?;
        // The only name without its family.
        let all = match family {
            Family::V4 => "0.0.0.0/0",
            Family::V6 => "::/0",
        };
        self.parse("routes", &json.replace(r#""dst":"default""#, &format!(r#""dst":"{all}""#)))
    }

    /// `ip route add`
    ///
    /// # Errors
    /// The kernel's error; `EEXIST` if any route has this destination and metric.
    pub fn add_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("add", route)
    }

    /// `ip route replace`
    ///
    /// # Errors
    /// The kernel's error.
    pub fn replace_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("replace", route)
    }

    /// `ip route VERB`, such as `append` or `prepend`.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn put_route(&self, verb: &str, route: &Route) -> Result<(), Error> {
        self.ip(&route.command(verb, route.scope)).map(drop)
    }

    /// `ip route add` for each, in one process.
    ///
    /// # Errors
    /// The first refusal.
    pub fn add_routes(&self, routes: &[Route]) -> Result<(), Error> {
        self.batch("ip", routes.iter().map(|route| route.command("add", route.scope)))
    }

    /// `ip route del` of exactly this route: protocol 0 matches any, and so does a missing link or next hop.
    ///
    /// # Errors
    /// The kernel's error; `ESRCH` if there is no such route.
    pub fn delete_route(&self, route: &Route) -> Result<(), Error> {
        const NOWHERE: u8 = 255;
        let scope = if route.to.family() == Family::V4 { NOWHERE } else { route.scope };
        self.ip(&route.command("del", scope)).map(drop)
    }

    /// `ip route flush table main`, both families.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn flush_main_routes(&self) -> Result<(), Error> {
        Family::BOTH
            .into_iter()
            .try_for_each(|family| self.ip(&format!("{} route flush table main", flag(family))).map(drop))
    }
}
