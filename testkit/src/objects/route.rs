//! Routes.

use std::fmt;
use std::net::IpAddr;

use flannel_core::net::{Family, Prefix};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::{flag, number};
use crate::{Error, Namespace};

/// A route, to be made or as listed.
///
/// A new one is unicast, in the main table, of protocol `boot`, without metric: what `ip route add` makes, but for its
/// scope.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Route {
    /// Destination.
    #[serde(rename = "dst", deserialize_with = "prefix")]
    pub to: Prefix,
    /// What it does, as `blackhole`.
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
    /// Scope; IPv6 knows only the widest, 0.
    #[serde(deserialize_with = "number")]
    pub scope: u8,
    /// Preferred source.
    #[serde(rename = "prefsrc")]
    pub source: Option<IpAddr>,
    /// Metric; 0 is none, and reads back as 1024 in IPv6.
    #[serde(default)]
    pub metric: u32,
    /// `onlink`, `linkdown` and the like.
    pub flags: Vec<String>,
    /// The next hops of a multipath route as listed, beside `via` and `dev`, which it has not.
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
    /// Its share.
    pub weight: u16,
    /// `onlink` and the like.
    pub flags: Vec<String>,
}

/// What `ip -Numeric` prints for `RTN_*`, as `ip route add` takes it.
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

/// A prefix; a host has no length.
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

    /// A route to `prefix`.
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

    /// With this next hop.
    pub fn via(self, gateway: IpAddr) -> Self {
        Self { via: Some(gateway), ..self }
    }

    /// Through this link.
    pub fn dev(self, name: &str) -> Self {
        Self { dev: Some(name.to_owned()), ..self }
    }

    /// In this table.
    pub fn table(self, table: u32) -> Self {
        Self { table, ..self }
    }

    /// Of this protocol.
    pub fn protocol(self, protocol: u8) -> Self {
        Self { protocol, ..self }
    }

    /// Of this scope.
    pub fn scope(self, scope: u8) -> Self {
        Self { scope, ..self }
    }

    /// With this metric.
    pub fn metric(self, metric: u32) -> Self {
        Self { metric, ..self }
    }

    /// With this preferred source.
    pub fn source(self, source: IpAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Of this kind.
    pub fn kind(self, kind: &str) -> Self {
        Self { kind: kind.to_owned(), ..self }
    }

    /// Its next hop is on-link, whatever the addresses say.
    pub fn onlink(self) -> Self {
        Self { flags: vec!["onlink".to_owned()], ..self }
    }

    /// Whether the next hop is taken as on-link.
    pub fn is_onlink(&self) -> bool {
        self.flags.iter().any(|flag| flag == "onlink")
    }

    /// The command without what iproute2 would otherwise choose by itself.
    fn command(&self, verb: &str, scope: u8) -> String {
        // Other flags are the kernel's to give.
        let flags = if self.is_onlink() { vec!["onlink".to_owned()] } else { Vec::new() };
        let route = Self { flags, ..self.clone() };
        format!("route {verb} {route} proto {} scope {scope}", self.protocol)
    }
}

impl fmt::Display for Route {
    /// As `ip route`, with numbers for names.
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
    /// The routes of one family, of every table, in the order of the dump.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn routes(&self, family: Family) -> Result<Vec<Route>, Error> {
        let json = self.ip(&format!("-json -details -Numeric {} route show table all", flag(family)))?;
        // The one name that does not say its family.
        let all = match family {
            Family::V4 => "0.0.0.0/0",
            Family::V6 => "::/0",
        };
        self.parse("routes", &json.replace(r#""dst":"default""#, &format!(r#""dst":"{all}""#)))
    }

    /// `ip route add`
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` when destination and metric are taken, by whomever.
    pub fn add_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("add", route)
    }

    /// `ip route replace`
    ///
    /// # Errors
    /// As the kernel says.
    pub fn replace_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("replace", route)
    }

    /// `ip route VERB`, as `append` or `prepend`.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn put_route(&self, verb: &str, route: &Route) -> Result<(), Error> {
        self.ip(&route.command(verb, route.scope)).map(drop)
    }

    /// `ip route add`, each, in one process.
    ///
    /// # Errors
    /// The first refusal.
    pub fn add_routes(&self, routes: &[Route]) -> Result<(), Error> {
        self.batch("ip", routes.iter().map(|route| route.command("add", route.scope)))
    }

    /// `ip route del` of exactly this route: protocol 0 matches any, and so does the lack of a link or next hop.
    ///
    /// # Errors
    /// As the kernel says; `ESRCH` when there is none such.
    pub fn delete_route(&self, route: &Route) -> Result<(), Error> {
        const NOWHERE: u8 = 255;
        let scope = if route.to.family() == Family::V4 { NOWHERE } else { route.scope };
        self.ip(&route.command("del", scope)).map(drop)
    }

    /// `ip route flush table main`, both families.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn flush_main_routes(&self) -> Result<(), Error> {
        Family::BOTH
            .into_iter()
            .try_for_each(|family| self.ip(&format!("{} route flush table main", flag(family))).map(drop))
    }
}
