//! Links.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use flannel_core::net::MacAddr;
use serde::{Deserialize, Deserializer};

use super::{mac, number};
use crate::{Error, Namespace};

/// A link.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Link {
    /// Interface index.
    #[serde(rename = "ifindex")]
    pub index: u32,
    /// Name.
    #[serde(rename = "ifname")]
    pub name: String,
    /// MAC address.
    #[serde(default, rename = "address", deserialize_with = "mac")]
    pub mac: Option<MacAddr>,
    /// Ethernet broadcast address.
    #[serde(default, deserialize_with = "mac")]
    pub broadcast: Option<MacAddr>,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFF_*`, such as `UP`.
    pub flags: Vec<String>,
    /// Operational state, such as `UP`.
    #[serde(rename = "operstate")]
    pub state: String,
    /// Queueing discipline.
    #[serde(default)]
    pub qdisc: String,
    /// Length of the transmit queue, in packets.
    #[serde(default, rename = "txqlen")]
    pub queue: u32,
    /// Link group.
    #[serde(deserialize_with = "number")]
    pub group: u32,
    /// Alias.
    #[serde(rename = "ifalias")]
    pub alias: Option<String>,
    /// The bridge it is a port of.
    pub master: Option<String>,
    /// The lower link, or the other end of a veth pair in the same namespace.
    #[serde(rename = "link")]
    pub lower: Option<String>,
    /// The id of the other end's namespace.
    #[serde(rename = "link_netnsid")]
    pub netns: Option<i32>,
    /// The settings of a VXLAN device.
    #[serde(default, rename = "linkinfo", deserialize_with = "vxlan")]
    pub vxlan: Option<VxlanLink>,
}

/// A VXLAN device's own settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct VxlanLink {
    /// Network identifier.
    #[serde(rename = "id")]
    pub vni: u32,
    /// UDP port; `None` for the kernel's, 8472.
    pub port: Option<u16>,
    /// Outer source address.
    #[serde(alias = "local6")]
    pub local: Option<IpAddr>,
    /// The lower device.
    #[serde(rename = "link")]
    pub lower: Option<String>,
    /// Whether it learns peers from received packets.
    pub learning: bool,
    /// The destination of frames without a matching FDB entry.
    #[serde(alias = "remote6", alias = "group", alias = "group6")]
    pub remote: Option<IpAddr>,
}

/// Returns the details of a VXLAN link, or `None` for other kinds.
fn vxlan<'de, D: Deserializer<'de>>(from: D) -> Result<Option<VxlanLink>, D::Error> {
    let info = serde_json::Value::deserialize(from)?;
    let is_vxlan = info["info_kind"] == "vxlan";
    is_vxlan.then(|| VxlanLink::deserialize(&info["info_data"])).transpose().map_err(serde::de::Error::custom)
}

impl Link {
    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|it| it == flag)
    }

    /// Whether it is administratively up.
    pub fn is_up(&self) -> bool {
        self.has("UP")
    }

    /// Whether it and its lower link are up.
    pub fn has_carrier(&self) -> bool {
        self.has("UP") && self.has("LOWER_UP") && !self.has("NO-CARRIER")
    }
}

impl Namespace {
    /// Returns all links, by index.
    ///
    /// # Errors
    /// If the kernel refuses the dump.
    pub fn links(&self) -> Result<Vec<Link>, Error> {
        self.list("link")
    }

    /// Returns one link.
    ///
    /// # Errors
    /// If there is no link of that name.
    pub fn link(&self, name: &str) -> Result<Link, Error> {
        let found = self.list(&format!("link show dev {name}"))?.into_iter().next();
        found.ok_or_else(|| Error::new(format!("{}: there is no link {name}", self.name())))
    }

    /// Returns the index of a link.
    ///
    /// # Errors
    /// If there is no link of that name.
    pub fn index_of(&self, name: &str) -> Result<u32, Error> {
        Ok(self.link(name)?.index)
    }

    /// Creates a veth pair: one end here, the other in `peer`.
    ///
    /// # Errors
    /// The kernel's error; `EEXIST` for a name in use.
    pub fn add_veth(&self, name: &str, peer: &Self, peer_name: &str) -> Result<(), Error> {
        let netns = format!("/proc/{}/fd/{}", std::process::id(), peer.as_fd().as_raw_fd());
        self.ip(&format!("link add dev {name} type veth peer name {peer_name} netns {netns}")).map(drop)
    }

    /// Creates a bridge.
    ///
    /// # Errors
    /// The kernel's error; `EEXIST` for a name in use.
    pub fn add_bridge(&self, name: &str) -> Result<(), Error> {
        self.ip(&format!("link add dev {name} type bridge")).map(drop)
    }

    /// Creates a VXLAN device; without an MTU, the kernel chooses it.
    ///
    /// # Errors
    /// The kernel's error; `EEXIST` for a name, or for VNI, port and family, in use.
    pub fn add_vxlan(&self, name: &str, vxlan: &VxlanLink, mtu: Option<u32>) -> Result<(), Error> {
        fn option<T: std::fmt::Display>(name: &str, value: Option<T>) -> String {
            value.map(|value| format!(" {name} {value}")).unwrap_or_default()
        }
        let VxlanLink { vni, port, local, lower, learning, remote } = vxlan;
        let settings = [
            option("dev", lower.as_ref()),
            option("local", *local),
            option("remote", *remote),
            // Port 0 is the kernel's choice.
            option("dstport", Some(port.unwrap_or(0))),
        ];
        let learning = if *learning { "learning" } else { "nolearning" };
        let mtu = option("mtu", mtu);
        self.ip(&format!("link add dev {name}{mtu} type vxlan id {vni}{} {learning}", settings.concat())).map(drop)
    }

    /// Deletes a link, and the links on top of it.
    ///
    /// # Errors
    /// If there is no link of that name.
    pub fn delete_link(&self, name: &str) -> Result<(), Error> {
        self.ip(&format!("link delete dev {name}")).map(drop)
    }

    /// `ip link set NAME up`
    ///
    /// # Errors
    /// If there is no link of that name, or the kernel's error.
    pub fn set_up(&self, name: &str) -> Result<(), Error> {
        self.set_link(name, "up")
    }

    /// `ip link set NAME down`
    ///
    /// # Errors
    /// If there is no link of that name, or the kernel's error.
    pub fn set_down(&self, name: &str) -> Result<(), Error> {
        self.set_link(name, "down")
    }

    /// `ip link set NAME mtu MTU`
    ///
    /// # Errors
    /// If there is no link of that name, or the kernel's error.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), Error> {
        self.set_link(name, &format!("mtu {mtu}"))
    }

    /// `ip link set NAME address MAC`
    ///
    /// # Errors
    /// If there is no link of that name, or the kernel's error.
    pub fn set_mac(&self, name: &str, mac: MacAddr) -> Result<(), Error> {
        self.set_link(name, &format!("address {mac}"))
    }

    /// `ip link set NAME alias ALIAS`; an empty alias removes it.
    ///
    /// # Errors
    /// If there is no link of that name, or the kernel's error.
    pub fn set_alias(&self, name: &str, alias: &str) -> Result<(), Error> {
        self.iproute("ip", &["link", "set", "dev", name, "alias", alias], "").map(drop)
    }

    /// `ip link set NAME CHANGE`, such as `master br0`, `arp off`, `type vxlan learning`.
    ///
    /// # Errors
    /// If there is no link of that name, or the kernel's error; kernels before 6.2 rename only links that are down.
    pub fn set_link(&self, name: &str, change: &str) -> Result<(), Error> {
        self.ip(&format!("link set dev {name} {change}")).map(drop)
    }
}
