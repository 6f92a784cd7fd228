//! Links.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use flannel_core::net::MacAddr;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, State,
};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use super::{mac_of, name_of};
use crate::netlink::Raw;
use crate::{Error, Namespace};

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind, as `veth`; empty for a physical one.
    pub kind: String,
    /// Ethernet address.
    pub mac: Option<MacAddr>,
    /// Ethernet broadcast address.
    pub broadcast: Option<MacAddr>,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFF_*`.
    pub flags: LinkFlags,
    /// Operational state, as `UP`.
    pub state: &'static str,
    /// Queueing discipline.
    pub qdisc: String,
    /// Length of the transmit queue, in packets.
    pub queue: u32,
    /// Link group.
    pub group: u32,
    /// Alias.
    pub alias: Option<String>,
    /// The bridge it is a port of.
    pub master: Option<String>,
    /// What it is on top of, or the other end of a veth pair: a name, or `if<INDEX>` in another namespace.
    pub lower: Option<String>,
    /// The id of the other end's namespace.
    pub netns: Option<i32>,
    /// For a VXLAN device.
    pub vxlan: Option<VxlanLink>,
}

/// A VXLAN device's own settings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VxlanLink {
    /// Network identifier.
    pub vni: u32,
    /// UDP port; `None`: the kernel's, 8472.
    pub port: Option<u16>,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// The lower device.
    pub lower: Option<String>,
    /// Learns peers from received packets.
    pub learning: bool,
    /// Where frames go that no forwarding entry is for.
    pub remote: Option<IpAddr>,
}

impl Link {
    /// Administratively up.
    pub fn is_up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }

    /// Up, and so is what is below it.
    pub fn has_carrier(&self) -> bool {
        self.flags.contains(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Running)
    }

    /// Name as iproute2 prints it: with what it is on top of.
    fn full_name(&self) -> String {
        match &self.lower {
            Some(lower) => format!("{}@{lower}", self.name),
            None => self.name.clone(),
        }
    }

    fn flag_text(&self) -> String {
        const NAMES: [(LinkFlags, &str); 18] = [
            (LinkFlags::Loopback, "LOOPBACK"),
            (LinkFlags::Broadcast, "BROADCAST"),
            (LinkFlags::Pointopoint, "POINTOPOINT"),
            (LinkFlags::Multicast, "MULTICAST"),
            (LinkFlags::Noarp, "NOARP"),
            (LinkFlags::Allmulti, "ALLMULTI"),
            (LinkFlags::Promisc, "PROMISC"),
            (LinkFlags::Controller, "MASTER"),
            (LinkFlags::Port, "SLAVE"),
            (LinkFlags::Debug, "DEBUG"),
            (LinkFlags::Dynamic, "DYNAMIC"),
            (LinkFlags::Automedia, "AUTOMEDIA"),
            (LinkFlags::Portsel, "PORTSEL"),
            (LinkFlags::Notrailers, "NOTRAILERS"),
            (LinkFlags::Up, "UP"),
            (LinkFlags::LowerUp, "LOWER_UP"),
            (LinkFlags::Dormant, "DORMANT"),
            (LinkFlags::Echo, "ECHO"),
        ];
        let no_carrier = self.is_up() && !self.flags.contains(LinkFlags::Running);
        let set = NAMES.into_iter().filter(|(flag, _)| self.flags.contains(*flag)).map(|(_, name)| name);
        no_carrier.then_some("NO-CARRIER").into_iter().chain(set).collect::<Vec<_>>().join(",")
    }

    /// Its two lines in `ip addr`.
    pub(super) fn details(&self) -> String {
        let master = self.master.as_ref().map(|master| format!(" master {master}")).unwrap_or_default();
        let group = if self.group == 0 { "default".to_owned() } else { self.group.to_string() };
        let layer = if self.flags.contains(LinkFlags::Loopback) { "loopback" } else { "ether" };
        let mac = |mac: Option<MacAddr>| mac.map(|mac| mac.to_string()).unwrap_or_default();
        let queue = if self.queue == 0 { String::new() } else { format!(" qlen {}", self.queue) };
        let netns = self.netns.map(|id| format!(" link-netnsid {id}")).unwrap_or_default();
        let alias = self.alias.as_ref().map(|alias| format!("    alias {alias}\n")).unwrap_or_default();
        format!(
            "{}: {}: <{}> mtu {} qdisc {}{master} state {} group {group}{queue}\n    link/{layer} {} brd {}{netns}\n{alias}",
            self.index,
            self.full_name(),
            self.flag_text(),
            self.mtu,
            self.qdisc,
            self.state,
            mac(self.mac),
            mac(self.broadcast),
        )
    }
}

impl fmt::Display for Link {
    /// As `ip -br link`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mac = self.mac.map(|mac| mac.to_string()).unwrap_or_default();
        write!(f, "{:<16} {:<14} {mac} <{}>", self.full_name(), self.state, self.flag_text())
    }
}

impl Namespace {
    /// All links, by index.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn links(&self) -> Result<Vec<Link>, Error> {
        Ok(self.links_raw()?.into_iter().map(|(link, _)| link).collect())
    }

    /// One link.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn link(&self, name: &str) -> Result<Link, Error> {
        let found = self.links()?.into_iter().find(|link| link.name == name);
        found.ok_or_else(|| Error::new(format!("{}: there is no link {name}", self.name())))
    }

    pub(crate) fn links_raw(&self) -> Result<Vec<(Link, Raw)>, Error> {
        let names = self.link_names()?;
        let dumped = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), "links")?;
        let mut links = Vec::with_capacity(dumped.len());
        for raw in dumped {
            if let RouteNetlinkMessage::NewLink(message) = raw.decode()? {
                links.push((parse(message, &names), raw));
            }
        }
        Ok(links)
    }

    pub(super) fn link_messages(&self) -> Result<Vec<(u32, Vec<LinkAttribute>)>, Error> {
        let mut links = Vec::new();
        for raw in self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), "links")? {
            if let RouteNetlinkMessage::NewLink(message) = raw.decode()? {
                links.push((message.header.index, message.attributes));
            }
        }
        Ok(links)
    }

    /// A veth pair: one end here, the other in `peer`.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` for a name in use.
    pub fn add_veth(&self, name: &str, peer: &Self, peer_name: &str) -> Result<(), Error> {
        let end = LinkMessageBuilder::<LinkUnspec>::new().name(peer_name).setns_by_fd(peer.as_fd().as_raw_fd());
        let message = LinkVeth::new(name, peer_name).set_info_data(InfoData::Veth(InfoVeth::Peer(end.build())));
        self.create_link(message.build(), &format!("ip link add {name} type veth peer name {peer_name}"))
    }

    /// A bridge.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` for a name in use.
    pub fn add_bridge(&self, name: &str) -> Result<(), Error> {
        self.create_link(LinkBridge::new(name).build(), &format!("ip link add {name} type bridge"))
    }

    /// A VXLAN device; without an MTU, the kernel's choice.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` for a name, or for VNI, port and family, in use.
    pub fn add_vxlan(&self, name: &str, vxlan: &VxlanLink, mtu: Option<u32>) -> Result<(), Error> {
        let mut message = LinkVxlan::new(name, vxlan.vni).learning(vxlan.learning);
        if let Some(lower) = &vxlan.lower {
            message = message.dev(self.index_of(lower)?);
        }
        message = match vxlan.remote {
            Some(IpAddr::V4(remote)) => message.remote(remote),
            Some(IpAddr::V6(remote)) => message.remote6(remote),
            None => message,
        };
        message = match vxlan.local {
            Some(IpAddr::V4(local)) => message.local(local),
            Some(IpAddr::V6(local)) => message.local6(local),
            None => message,
        };
        if let Some(port) = vxlan.port {
            message = message.port(port);
        }
        if let Some(mtu) = mtu {
            message = message.mtu(mtu);
        }
        self.create_link(message.build(), &format!("ip link add {name} type vxlan id {}", vxlan.vni))
    }

    fn create_link(&self, message: LinkMessage, what: &str) -> Result<(), Error> {
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, what)
    }

    /// Deletes a link, and what is on top of it.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn delete_link(&self, name: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(self.index_of(name)?).build();
        self.request(RouteNetlinkMessage::DelLink(message), 0, &format!("ip link delete {name}"))
    }

    /// `ip link set NAME up`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_up(&self, name: &str) -> Result<(), Error> {
        self.change_link(name, "up", |link| link.up())
    }

    /// `ip link set NAME down`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_down(&self, name: &str) -> Result<(), Error> {
        self.change_link(name, "down", |link| link.down())
    }

    /// `ip link set NAME mtu MTU`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), Error> {
        self.change_link(name, &format!("mtu {mtu}"), |link| link.mtu(mtu))
    }

    /// `ip link set NAME address MAC`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_mac(&self, name: &str, mac: MacAddr) -> Result<(), Error> {
        self.change_link(name, &format!("address {mac}"), |link| link.address(mac.0.to_vec()))
    }

    /// `ip link set NAME group GROUP`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_group(&self, name: &str, group: u32) -> Result<(), Error> {
        self.change_link(name, &format!("group {group}"), |link| {
            link.append_extra_attribute(LinkAttribute::Group(group))
        })
    }

    /// `ip link set NAME alias ALIAS`; an empty one removes it.
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_alias(&self, name: &str, alias: &str) -> Result<(), Error> {
        self.change_link(name, &format!("alias {alias:?}"), |link| {
            link.append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned()))
        })
    }

    /// `ip link set NAME name NEW`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says; kernels before 6.2 rename only links that are down.
    pub fn rename_link(&self, name: &str, new: &str) -> Result<(), Error> {
        self.change_link(name, &format!("name {new}"), |link| link.name(new))
    }

    /// `ip link set NAME master BRIDGE`
    ///
    /// # Errors
    /// When there is none of these names, or as the kernel says.
    pub fn set_master(&self, name: &str, bridge: &str) -> Result<(), Error> {
        let index = self.index_of(bridge)?;
        self.change_link(name, &format!("master {bridge}"), |link| link.controller(index))
    }

    /// `ip link set NAME arp off`: removes the permanent neighbours too.
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn arp_off(&self, name: &str) -> Result<(), Error> {
        self.change_link(name, "arp off", |link| link.arp(false))
    }

    /// `ip link set NAME arp on`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn arp_on(&self, name: &str) -> Result<(), Error> {
        self.change_link(name, "arp on", |link| link.arp(true))
    }

    /// `ip link set NAME type vxlan learning`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_learning(&self, name: &str) -> Result<(), Error> {
        self.change_vxlan(name, "learning", InfoVxlan::Learning(true))
    }

    /// `ip link set NAME type vxlan remote REMOTE`
    ///
    /// # Errors
    /// When there is none of that name, or as the kernel says.
    pub fn set_remote(&self, name: &str, remote: IpAddr) -> Result<(), Error> {
        let value = match remote {
            IpAddr::V4(remote) => InfoVxlan::Group(remote),
            IpAddr::V6(remote) => InfoVxlan::Group6(remote),
        };
        self.change_vxlan(name, &format!("remote {remote}"), value)
    }

    fn change_vxlan(&self, name: &str, what: &str, value: InfoVxlan) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = self.index_of(name)?;
        let info = vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(vec![value]))];
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.request(RouteNetlinkMessage::NewLink(message), 0, &format!("ip link set {name} type vxlan {what}"))
    }

    fn change_link(
        &self,
        name: &str,
        what: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), Error> {
        let message = change(LinkUnspec::new_with_index(self.index_of(name)?)).build();
        self.request(RouteNetlinkMessage::SetLink(message), 0, &format!("ip link set {name} {what}"))
    }
}

fn parse(message: LinkMessage, names: &std::collections::BTreeMap<u32, String>) -> Link {
    let ethernet = matches!(message.header.link_layer_type, LinkLayerType::Ether | LinkLayerType::Loopback);
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mac: None,
        broadcast: None,
        mtu: 0,
        flags: message.header.flags,
        state: "UNKNOWN",
        qdisc: String::new(),
        queue: 0,
        group: 0,
        alias: None,
        master: None,
        lower: None,
        netns: None,
        vxlan: None,
    };
    let mut lower = None;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) if ethernet => link.mac = mac_of(&bytes),
            LinkAttribute::Broadcast(bytes) if ethernet => link.broadcast = mac_of(&bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::OperState(state) => link.state = state_name(state),
            LinkAttribute::Qdisc(qdisc) => link.qdisc = qdisc,
            LinkAttribute::TxQueueLen(queue) => link.queue = queue,
            LinkAttribute::Group(group) => link.group = group,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Controller(index) => link.master = Some(name_of(names, index)),
            LinkAttribute::Link(index) => lower = (index != link.index).then_some(index),
            LinkAttribute::LinkNetNsId(id) => link.netns = Some(id),
            LinkAttribute::LinkInfo(infos) => parse_kind(&mut link, infos, names),
            _ => {}
        }
    }
    link.lower = lower.map(|index| match link.netns {
        Some(_) => format!("if{index}"),
        None => name_of(names, index),
    });
    link
}

fn parse_kind(link: &mut Link, infos: Vec<LinkInfo>, names: &std::collections::BTreeMap<u32, String>) {
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Other(kind)) => link.kind = kind,
            LinkInfo::Kind(kind) => link.kind = kind.to_string(),
            LinkInfo::Data(InfoData::Vxlan(values)) => {
                let mut vxlan = VxlanLink::default();
                for value in values {
                    match value {
                        InfoVxlan::Id(vni) => vxlan.vni = vni,
                        InfoVxlan::Port(port) => vxlan.port = Some(port),
                        InfoVxlan::Local(local) => vxlan.local = Some(local.into()),
                        InfoVxlan::Local6(local) => vxlan.local = Some(local.into()),
                        InfoVxlan::Link(index) => vxlan.lower = Some(name_of(names, index)),
                        InfoVxlan::Learning(learning) => vxlan.learning = learning,
                        InfoVxlan::Group(remote) => vxlan.remote = Some(remote.into()),
                        InfoVxlan::Group6(remote) => vxlan.remote = Some(remote.into()),
                        _ => {}
                    }
                }
                link.vxlan = Some(vxlan);
            }
            _ => {}
        }
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::NotPresent => "NOTPRESENT",
        State::Down => "DOWN",
        State::LowerLayerDown => "LOWERLAYERDOWN",
        State::Testing => "TESTING",
        State::Dormant => "DORMANT",
        State::Up => "UP",
        _ => "UNKNOWN",
    }
}
