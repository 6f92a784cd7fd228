//! Kernel objects as values: listed, made, changed, deleted, and printed as people know them from iproute2.

mod address;
mod link;
mod neighbour;
mod route;
mod rule;

use std::collections::BTreeMap;
use std::fmt::Write;

use flannel_core::net::{Family, MacAddr};
use rtnetlink::packet_route::{AddressFamily, link::LinkAttribute};

pub use address::Address;
pub use link::{Link, VxlanLink};
pub use neighbour::{Fdb, Neighbour};
pub use route::{Hop, Route};
pub use rule::Rule;

use crate::{Error, Namespace};

/// What to list, by the command that people know it from.
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

impl Namespace {
    /// The listing as iproute2 prints it, without its trailing spaces.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn show(&self, listing: Listing) -> Result<String, Error> {
        match listing {
            Listing::Links => lines(self.links()?),
            Listing::Addresses => {
                let addresses = self.addresses()?;
                let mut text = String::new();
                for link in self.links()? {
                    text.push_str(&link.details());
                    text.push_str(&lines(addresses.iter().filter(|address| address.dev == link.name))?);
                }
                Ok(text)
            }
            Listing::Routes(family) => {
                lines(self.routes(family)?.into_iter().filter(|route| route.table == Route::MAIN))
            }
            Listing::Neighbours => lines(self.neighbours()?),
            Listing::Fdb => lines(self.fdb()?),
        }
    }

    /// The name of each link by its index.
    pub(crate) fn link_names(&self) -> Result<BTreeMap<u32, String>, Error> {
        let mut names = BTreeMap::new();
        for (index, attributes) in self.link_messages()? {
            names.extend(attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some((index, name)),
                _ => None,
            }));
        }
        Ok(names)
    }

    /// The index of a link.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn index_of(&self, name: &str) -> Result<u32, Error> {
        let found = self.link_names()?.into_iter().find(|(_, link)| link == name);
        found.map(|(index, _)| index).ok_or_else(|| Error::new(format!("{}: there is no link {name}", self.name())))
    }
}

fn lines<T: std::fmt::Display>(objects: impl IntoIterator<Item = T>) -> Result<String, Error> {
    let mut text = String::new();
    for object in objects {
        writeln!(text, "{object}").map_err(|_| Error::new("formatting a listing"))?;
    }
    Ok(text)
}

fn name_of(names: &BTreeMap<u32, String>, index: u32) -> String {
    names.get(&index).cloned().unwrap_or_else(|| format!("if{index}"))
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn mac_of(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}

/// How iproute2 names a route protocol (`/etc/iproute2/rt_protos`).
fn protocol_name(protocol: u8) -> String {
    let name = match protocol {
        0 => "unspec",
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        8 => "gated",
        9 => "ra",
        10 => "mrt",
        11 => "zebra",
        12 => "bird",
        13 => "dnrouted",
        14 => "xorp",
        15 => "ntk",
        16 => "dhcp",
        18 => "keepalived",
        42 => "babel",
        186 => "bgp",
        187 => "isis",
        188 => "ospf",
        189 => "rip",
        192 => "eigrp",
        other => return other.to_string(),
    };
    name.to_owned()
}
