//! How each kind of canary is found again, and what of it counts.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::process::Command;

use flannel_core::net::{Family, MacAddr};

use crate::netlink::{Attributes, Raw};
use crate::{Address, Context, Error, Fdb, Link, Namespace, Neighbour, Route};

/// One object of a stranger's, by what identifies it.
#[derive(Debug, Clone)]
pub(super) enum Canary {
    Link(String),
    Address(String, IpAddr),
    Route(Route),
    Neighbour(String, IpAddr),
    Fdb(String, MacAddr),
    Rule(Family, u32),
    Sysctl(String),
    Nft(String),
}

/// Everything a namespace holds at one moment.
pub(super) struct Dumps {
    links: Vec<(Link, Raw)>,
    addresses: Vec<(Address, Raw)>,
    routes: Vec<(Route, Raw)>,
    neighbours: Vec<(Neighbour, Raw)>,
    fdb: Vec<(Fdb, Raw)>,
    rules: Vec<((Family, u32), Raw)>,
}

impl Dumps {
    pub(super) fn read(ns: &Namespace) -> Result<Self, Error> {
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for family in Family::BOTH {
            routes.extend(ns.routes_raw(family)?);
            rules.extend(ns.rules_raw(family)?.into_iter().map(|(priority, raw)| ((family, priority), raw)));
        }
        Ok(Self {
            links: ns.links_raw()?,
            addresses: ns.addresses_raw()?,
            neighbours: ns.neighbours_raw()?,
            fdb: ns.fdb_raw()?,
            routes,
            rules,
        })
    }

    /// The canaries' routes in the order of the dump, by their place among `canaries`.
    pub(super) fn route_order(&self, canaries: &[Canary]) -> Vec<usize> {
        let place = |route: &Route| {
            canaries.iter().position(|canary| matches!(canary, Canary::Route(wanted) if same_route(wanted, route)))
        };
        self.routes.iter().filter_map(|(route, _)| place(route)).collect()
    }
}

impl Canary {
    /// What the kernel says of it, without what changes by itself; nothing if it is gone.
    pub(super) fn bytes(&self, dumps: &Dumps, ns: &Namespace) -> Result<Option<Vec<u8>>, Error> {
        Ok(match self {
            Self::Link(name) => find(&dumps.links, |link| link.name == *name)
                .map(|(link, raw)| if link.kind == "bridge" { (&BRIDGE, raw) } else { (&LINK, raw) })
                .map(|(stable, raw)| stable.of(raw)),
            Self::Address(dev, addr) => {
                find(&dumps.addresses, |it| it.dev == *dev && it.addr == *addr).map(|(_, raw)| ADDRESS.of(raw))
            }
            Self::Route(route) => find(&dumps.routes, |it| same_route(route, it)).map(|(_, raw)| ROUTE.of(raw)),
            Self::Neighbour(dev, addr) => {
                find(&dumps.neighbours, |it| it.dev == *dev && it.addr == *addr).map(|(_, raw)| NEIGHBOUR.of(raw))
            }
            Self::Fdb(dev, mac) => {
                find(&dumps.fdb, |it| it.dev == *dev && it.mac == *mac).map(|(_, raw)| NEIGHBOUR.of(raw))
            }
            Self::Rule(family, priority) => {
                find(&dumps.rules, |it| *it == (*family, *priority)).map(|(_, raw)| RULE.of(raw))
            }
            Self::Sysctl(name) => ns.sysctl(name).ok().map(String::into_bytes),
            Self::Nft(table) => nft_table(ns, table)?,
        })
    }
}

impl fmt::Display for Canary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "link {name}"),
            Self::Address(dev, addr) => write!(f, "address {addr} dev {dev}"),
            Self::Route(route) => write!(f, "route {route}"),
            Self::Neighbour(dev, addr) => write!(f, "neighbour {addr} dev {dev}"),
            Self::Fdb(dev, mac) => write!(f, "FDB entry {mac} dev {dev}"),
            Self::Rule(family, priority) => write!(f, "{family} rule {priority}"),
            Self::Sysctl(name) => write!(f, "sysctl {name}"),
            Self::Nft(table) => write!(f, "nft table {table}"),
        }
    }
}

fn find<T>(objects: &[(T, Raw)], is: impl Fn(&T) -> bool) -> Option<&(T, Raw)> {
    objects.iter().find(|(object, _)| is(object))
}

/// Flags come and go with the carrier.
fn same_route(wanted: &Route, seen: &Route) -> bool {
    (wanted.to, wanted.table, wanted.metric, wanted.protocol, wanted.via, &wanted.dev)
        == (seen.to, seen.table, seen.metric, seen.protocol, seen.via, &seen.dev)
}

/// What of a message does not change by itself: its header, and all attributes but some.
struct Stable {
    header: usize,
    volatile: &'static [u16],
}

// Statistics, what of the address families' own settings counts packets, how often the carrier changed.
const LINK: Stable = Stable { header: 16, volatile: &[7, 23, 26, 35, 47, 48] };
/// A bridge shows its timers in IFLA_LINKINFO (18) too.
const BRIDGE: Stable = Stable { header: 16, volatile: &[7, 18, 23, 26, 35, 47, 48] };
/// The time of its making is in: an address that was away is not the same.
const ADDRESS: Stable = Stable { header: 8, volatile: &[] };
/// RTA_CACHEINFO counts uses.
const ROUTE: Stable = Stable { header: 12, volatile: &[12] };
/// NDA_CACHEINFO and NDA_PROBES.
const NEIGHBOUR: Stable = Stable { header: 12, volatile: &[3, 4] };
const RULE: Stable = Stable { header: 12, volatile: &[] };

impl Stable {
    fn of(&self, raw: &Raw) -> Vec<u8> {
        let (header, attributes) = raw.body.split_at(self.header.min(raw.body.len()));
        let mut bytes = header.to_vec();
        for (kind, value) in Attributes(attributes).filter(|(kind, _)| !self.volatile.contains(kind)) {
            bytes.extend(kind.to_ne_bytes());
            bytes.extend((value.len() as u32).to_ne_bytes());
            bytes.extend(value);
        }
        bytes
    }
}

/// Makes an nft table with a chain and a rule; not where there is no `nft`.
pub(super) fn add_nft_table(ns: &Namespace, table: &str) -> Result<bool, Error> {
    let commands = format!(
        "add table inet {table}; add chain inet {table} c {{ type filter hook forward priority 42; }}; \
         add rule inet {table} c ip daddr 192.0.2.42 accept"
    );
    match ns.run(|| Command::new("nft").arg(&commands).output())? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("running nft", error)),
        Ok(done) if done.status.success() => Ok(true),
        Ok(done) => Err(Error::new(format!("nft {commands}: {}", String::from_utf8_lossy(&done.stderr).trim()))),
    }
}

fn nft_table(ns: &Namespace, table: &str) -> Result<Option<Vec<u8>>, Error> {
    let listed = ns.run(|| Command::new("nft").args(["list", "table", "inet", table]).output())?;
    let listed = listed.context(|| "running nft".to_owned())?;
    Ok(listed.status.success().then_some(listed.stdout))
}
