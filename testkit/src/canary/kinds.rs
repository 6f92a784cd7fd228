//! How each kind of canary is found again, and what of it counts.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::process::Command;

use flannel_core::net::{Family, MacAddr};
use serde::Deserialize;
use serde_json::Value;

use crate::{Context, Error, Namespace, Route, objects};

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

/// Everything a namespace holds at one moment, as iproute2 lists it.
pub(super) struct Dumps {
    links: Vec<Value>,
    addresses: Vec<Vec<u8>>,
    routes: Vec<(Route, Value)>,
    neighbours: Vec<Value>,
    fdb: Vec<Value>,
    rules: Vec<(Family, Value)>,
}

impl Dumps {
    pub(super) fn read(ns: &Namespace) -> Result<Self, Error> {
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for family in Family::BOTH {
            for row in ns.list_routes::<Value>(family)? {
                routes.push((Route::deserialize(&row).map_err(|error| Error::new(error.to_string()))?, row));
            }
            let rows = ns.list(&format!("{} rule", objects::flag(family)))?;
            rules.extend(rows.into_iter().map(|row| (family, row)));
        }
        Ok(Self {
            links: ns.list("link")?,
            addresses: saved_addresses(ns)?,
            neighbours: ns.list("neigh show nud all")?,
            fdb: ns.parse("fdb", &ns.bridge("-json -details fdb")?)?,
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

/// The addresses as the kernel sent them, each with the index of its link and the time of its making, which iproute2
/// does not print: an address that was away is not the same.
fn saved_addresses(ns: &Namespace) -> Result<Vec<Vec<u8>>, Error> {
    const MAGIC: usize = 4;
    const HEADER: usize = 16;
    let saved = ns.iproute_output("ip", &["address", "save"], "")?.stdout;
    let mut rest = saved.get(MAGIC..).ok_or_else(|| Error::new("`ip address save` wrote nothing"))?;
    let mut messages = Vec::new();
    while let Some(word) = rest.first_chunk() {
        let len = u32::from_ne_bytes(*word) as usize;
        let body = rest.get(HEADER..len).ok_or_else(|| Error::new("`ip address save` wrote half a message"))?;
        messages.push(body.to_vec());
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

impl Canary {
    /// What the kernel says of it, without what changes by itself; nothing if it is gone.
    pub(super) fn bytes(&self, dumps: &Dumps, ns: &Namespace) -> Result<Option<Vec<u8>>, Error> {
        let find = |rows: &[Value], keys: &[(&str, &str)]| {
            rows.iter().find(|row| keys.iter().all(|(key, value)| row[*key] == **value)).cloned()
        };
        let found = match self {
            // A bridge's details show its timers.
            Self::Link(name) => find(&dumps.links, &[("ifname", name)]).map(|mut link| {
                if link["linkinfo"]["info_kind"] == "bridge" {
                    link["linkinfo"].take();
                }
                link
            }),
            Self::Address(dev, addr) => {
                let index = find(&dumps.links, &[("ifname", dev)]).and_then(|link| link["ifindex"].as_u64());
                let octets = match addr {
                    IpAddr::V4(addr) => addr.octets().to_vec(),
                    IpAddr::V6(addr) => addr.octets().to_vec(),
                };
                let is = |it: &&Vec<u8>| {
                    let link = it.get(4..8).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
                    link.map(u64::from) == index && it.windows(octets.len()).any(|part| part == octets)
                };
                return Ok(dumps.addresses.iter().find(is).cloned());
            }
            Self::Route(route) => dumps.routes.iter().find(|(it, _)| same_route(route, it)).map(|(_, row)| row.clone()),
            Self::Neighbour(dev, addr) => find(&dumps.neighbours, &[("dev", dev), ("dst", &addr.to_string())]),
            Self::Fdb(dev, mac) => find(&dumps.fdb, &[("ifname", dev), ("mac", &mac.to_string())]),
            Self::Rule(family, priority) => {
                let is = |(of, row): &&(Family, Value)| of == family && row["priority"] == *priority;
                dumps.rules.iter().find(is).map(|(_, row)| row.clone())
            }
            Self::Sysctl(name) => return Ok(ns.sysctl(name).ok().map(String::into_bytes)),
            Self::Nft(table) => return nft_table(ns, table),
        };
        Ok(found.map(|row| row.to_string().into_bytes()))
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

/// Flags come and go with the carrier.
fn same_route(wanted: &Route, seen: &Route) -> bool {
    (wanted.to, wanted.table, wanted.metric, wanted.protocol, wanted.via, &wanted.dev)
        == (seen.to, seen.table, seen.metric, seen.protocol, seen.via, &seen.dev)
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
