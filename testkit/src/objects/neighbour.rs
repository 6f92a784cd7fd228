//! Neighbours and FDB entries.

use std::fmt;
use std::net::IpAddr;

use flannel_core::net::MacAddr;
use serde::{Deserialize, Deserializer};

use super::{mac, number};
use crate::{Error, Namespace};

/// An entry of the ARP or NDP table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Neighbour {
    /// The link.
    pub dev: String,
    /// Its IP address.
    #[serde(rename = "dst")]
    pub addr: IpAddr,
    /// Its MAC address, if known.
    #[serde(default, rename = "lladdr", deserialize_with = "mac")]
    pub mac: Option<MacAddr>,
    /// Its state, such as `permanent`.
    #[serde(default = "none", deserialize_with = "state")]
    pub state: String,
    /// The protocol that created it (`NDA_PROTOCOL`); 0 if not given.
    #[serde(default, deserialize_with = "number")]
    pub protocol: u8,
}

/// Returns the first state; there is only one at a time.
fn state<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let states = Vec::<String>::deserialize(from)?;
    Ok(states.first().map_or_else(none, |state| state.to_lowercase()))
}

fn none() -> String {
    "none".to_owned()
}

impl Neighbour {
    /// Creates a permanent neighbour.
    pub fn permanent(dev: &str, addr: IpAddr, mac: MacAddr) -> Self {
        Self { dev: dev.to_owned(), addr, mac: Some(mac), state: "permanent".to_owned(), protocol: 0 }
    }

    /// Whether it is permanent.
    pub fn is_permanent(&self) -> bool {
        self.state == "permanent"
    }
}

impl fmt::Display for Neighbour {
    /// In the form of `ip neigh replace`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev {}", self.addr, self.dev)?;
        if let Some(mac) = self.mac {
            write!(f, " lladdr {mac}")?;
        }
        if self.protocol != 0 {
            write!(f, " protocol {}", self.protocol)?;
        }
        write!(f, " nud {}", self.state)
    }
}

/// An FDB entry of a VXLAN device or of a bridge.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Fdb {
    /// The device.
    #[serde(rename = "ifname")]
    pub dev: String,
    /// Inner destination.
    #[serde(deserialize_with = "some_mac")]
    pub mac: MacAddr,
    /// Outer destination; `None` on a bridge.
    pub dst: Option<IpAddr>,
    /// Its state, such as `permanent`; empty for a learned one.
    pub state: String,
    /// Its flags; `self` means that the device itself holds it.
    pub flags: Vec<String>,
    /// The bridge that holds it.
    pub master: Option<String>,
}

fn some_mac<'de, D: Deserializer<'de>>(from: D) -> Result<MacAddr, D::Error> {
    mac(from)?.ok_or_else(|| serde::de::Error::custom("not a MAC address"))
}

impl Fdb {
    /// Creates a permanent entry of a VXLAN device.
    pub fn permanent(dev: &str, mac: MacAddr, dst: IpAddr) -> Self {
        let (state, flags) = ("permanent".to_owned(), vec!["self".to_owned()]);
        Self { dev: dev.to_owned(), mac, dst: Some(dst), state, flags, master: None }
    }

    /// Returns the identifying fields.
    fn key(&self) -> String {
        let dst = self.dst.map(|dst| format!(" dst {dst}")).unwrap_or_default();
        format!("{} dev {}{dst}{}", self.mac, self.dev, if self.master.is_some() { " master" } else { " self" })
    }
}

impl fmt::Display for Fdb {
    /// In the form of `bridge fdb`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mac, dev, state, .. } = self;
        let dst = self.dst.map(|dst| format!(" dst {dst}")).unwrap_or_default();
        let master = self.master.as_ref().map(|name| format!(" master {name}")).unwrap_or_default();
        write!(f, "{mac} dev {dev}{dst} {}{master} {state}", self.flags.join(" "))
    }
}

impl Namespace {
    /// Returns the neighbours of both families, without those of state `NOARP`.
    ///
    /// # Errors
    /// If the kernel refuses the dump.
    pub fn neighbours(&self) -> Result<Vec<Neighbour>, Error> {
        let all: Vec<Neighbour> = self.list("neigh show nud all")?;
        Ok(all.into_iter().filter(|it| it.state != "noarp").collect())
    }

    /// Returns the FDB entries of all devices.
    ///
    /// # Errors
    /// If the kernel refuses the dump.
    pub fn fdb(&self) -> Result<Vec<Fdb>, Error> {
        self.parse("fdb", &self.bridge("-json fdb")?)
    }

    /// `ip neigh replace …` for each.
    ///
    /// # Errors
    /// The first refusal.
    pub fn put_neighbours(&self, neighbours: &[Neighbour]) -> Result<(), Error> {
        self.batch("ip", neighbours.iter().map(|it| format!("neigh replace {it}")))
    }

    /// `ip neigh del …`
    ///
    /// # Errors
    /// The kernel's error; `ENOENT` if there is none.
    pub fn delete_neighbour(&self, neighbour: &Neighbour) -> Result<(), Error> {
        self.ip(&format!("neigh del {} dev {}", neighbour.addr, neighbour.dev)).map(drop)
    }

    /// `ip neigh flush dev DEV nud permanent`, both families.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn flush_permanent_neighbours(&self, dev: &str) -> Result<(), Error> {
        self.ip(&format!("neigh flush dev {dev} nud permanent")).map(drop)
    }

    /// `bridge fdb replace …` for each.
    ///
    /// # Errors
    /// The first refusal.
    pub fn put_fdb(&self, entries: &[Fdb]) -> Result<(), Error> {
        self.batch("bridge", entries.iter().map(|it| format!("fdb replace {} {}", it.key(), it.state)))
    }

    /// `bridge fdb del …`
    ///
    /// # Errors
    /// The kernel's error; `ENOENT` if there is none.
    pub fn delete_fdb(&self, entry: &Fdb) -> Result<(), Error> {
        self.bridge(&format!("fdb del {}", entry.key())).map(drop)
    }

    /// `bridge fdb flush dev DEV`; entry by entry if the kernel cannot flush a VXLAN device (before 6.7).
    ///
    /// # Errors
    /// The kernel's error.
    pub fn flush_fdb(&self, dev: &str) -> Result<(), Error> {
        match self.bridge(&format!("fdb flush dev {dev}")) {
            Err(error) if error.is(nix::Error::EOPNOTSUPP) || error.is(nix::Error::EINVAL) => {}
            done => return done.map(drop),
        }
        let entries = self.fdb()?.into_iter().filter(|entry| entry.dev == dev);
        self.batch("bridge", entries.map(|entry| format!("fdb del {}", entry.key())))
    }
}
