//! Kernel objects as values: listed, created, changed and deleted through iproute2.

mod address;
mod link;
mod neighbour;
mod route;

use flannel_core::net::{Family, MacAddr, Prefix};
use serde::{Deserialize, Deserializer};

pub use address::Address;
pub use link::{Link, VxlanLink};
pub use neighbour::{Fdb, Neighbour};
pub use route::{Hop, Route};

use crate::{Error, Namespace};

/// What to list, named by its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// `ip -br link`
    Links,
    /// `ip addr`
    Addresses,
    /// `ip route` or `ip -6 route`: the main table.
    Routes(Family),
    /// `ip neigh`
    Neighbours,
    /// `bridge fdb`
    Fdb,
}

/// A rule that selects a table by source address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The rule's priority; unique in the lab.
    pub priority: u32,
    /// The source prefix.
    pub from: Prefix,
    /// The table.
    pub table: u8,
}

impl Namespace {
    /// Returns the listing as iproute2 prints it, without trailing spaces.
    ///
    /// # Errors
    /// If the kernel refuses the dump.
    pub fn show(&self, listing: Listing) -> Result<String, Error> {
        let text = match listing {
            Listing::Links => self.ip("-brief link"),
            Listing::Addresses => self.ip("addr"),
            Listing::Routes(family) => self.ip(&format!("{} route", flag(family))),
            Listing::Neighbours => self.ip("neigh"),
            Listing::Fdb => self.bridge("fdb"),
        }?;
        Ok(text.lines().flat_map(|line| [line.trim_end(), "\n"]).collect())
    }

    /// `ip rule add from FROM lookup TABLE pref PRIORITY`
    ///
    /// # Errors
    /// The kernel's error.
    pub fn add_rule(&self, Rule { priority, from, table }: &Rule) -> Result<(), Error> {
        let family = flag(from.family());
        self.ip(&format!("{family} rule add from {from} lookup {table} pref {priority}")).map(drop)
    }
}

/// Returns the option of `ip` for a family.
pub(crate) fn flag(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

/// Parses a number that iproute2 prints as text.
fn number<'de, D: Deserializer<'de>, N: std::str::FromStr>(from: D) -> Result<N, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|_| serde::de::Error::custom(format!("{text:?} is not a number")))
}

/// Parses a MAC address; `None` for a link with an address of another kind.
fn mac<'de, D: Deserializer<'de>>(from: D) -> Result<Option<MacAddr>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.and_then(|text| text.parse().ok()))
}
