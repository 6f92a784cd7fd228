//! Neighbours and forwarding entries: the kernel has one message for both.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::net::{Family, MacAddr};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{address_family, mac_of, name_of, protocol_name};
use crate::netlink::{Raw, Request};
use crate::{Error, Namespace};

/// An entry of the ARP or NDP table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The link.
    pub dev: String,
    /// Its IP address.
    pub addr: IpAddr,
    /// Its Ethernet address, if known.
    pub mac: Option<MacAddr>,
    /// `NUD_*`.
    pub state: NeighbourState,
    /// Who made it (`NDA_PROTOCOL`); 0: unsaid.
    pub protocol: u8,
}

impl Neighbour {
    /// A permanent one.
    pub fn permanent(dev: &str, addr: IpAddr, mac: MacAddr) -> Self {
        Self { dev: dev.to_owned(), addr, mac: Some(mac), state: NeighbourState::Permanent, protocol: 0 }
    }
}

impl fmt::Display for Neighbour {
    /// As `ip neigh`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev {}", self.addr, self.dev)?;
        if let Some(mac) = self.mac {
            write!(f, " lladdr {mac}")?;
        }
        if self.protocol != 0 {
            write!(f, " proto {}", protocol_name(self.protocol))?;
        }
        let state = match self.state {
            NeighbourState::Incomplete => "INCOMPLETE",
            NeighbourState::Reachable => "REACHABLE",
            NeighbourState::Stale => "STALE",
            NeighbourState::Delay => "DELAY",
            NeighbourState::Probe => "PROBE",
            NeighbourState::Failed => "FAILED",
            NeighbourState::Noarp => "NOARP",
            NeighbourState::Permanent => "PERMANENT",
            _ => "NONE",
        };
        write!(f, " {state}")
    }
}

/// A forwarding entry of a VXLAN device or of a bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fdb {
    /// The device.
    pub dev: String,
    /// Inner destination.
    pub mac: MacAddr,
    /// Outer destination; none on a bridge.
    pub dst: Option<IpAddr>,
    /// `NUD_*`.
    pub state: NeighbourState,
    /// Held by the device itself (`self`).
    pub own: bool,
    /// The bridge it is held by.
    pub master: Option<String>,
}

impl Fdb {
    /// A permanent one of a VXLAN device.
    pub fn permanent(dev: &str, mac: MacAddr, dst: IpAddr) -> Self {
        Self { dev: dev.to_owned(), mac, dst: Some(dst), state: NeighbourState::Permanent, own: true, master: None }
    }
}

impl fmt::Display for Fdb {
    /// As `bridge fdb`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev {}", self.mac, self.dev)?;
        if let Some(dst) = self.dst {
            write!(f, " dst {dst}")?;
        }
        if self.own {
            f.write_str(" self")?;
        }
        if let Some(master) = &self.master {
            write!(f, " master {master}")?;
        }
        match self.state {
            NeighbourState::Permanent => f.write_str(" permanent"),
            NeighbourState::Noarp => f.write_str(" static"),
            NeighbourState::Stale => f.write_str(" stale"),
            _ => Ok(()),
        }
    }
}

impl Namespace {
    /// The neighbours of both families, without those that need none (`NOARP`).
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn neighbours(&self) -> Result<Vec<Neighbour>, Error> {
        Ok(self.neighbours_raw()?.into_iter().map(|(neighbour, _)| neighbour).collect())
    }

    pub(crate) fn neighbours_raw(&self) -> Result<Vec<(Neighbour, Raw)>, Error> {
        let names = self.link_names()?;
        let mut neighbours = Vec::new();
        for family in Family::BOTH {
            for (message, raw) in self.neighbour_messages(address_family(family))? {
                let neighbour = parse_neighbour(message, &names).filter(|it| it.state != NeighbourState::Noarp);
                neighbours.extend(neighbour.map(|neighbour| (neighbour, raw)));
            }
        }
        Ok(neighbours)
    }

    /// The forwarding entries of all devices.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn fdb(&self) -> Result<Vec<Fdb>, Error> {
        Ok(self.fdb_raw()?.into_iter().map(|(entry, _)| entry).collect())
    }

    pub(crate) fn fdb_raw(&self) -> Result<Vec<(Fdb, Raw)>, Error> {
        let names = self.link_names()?;
        let messages = self.neighbour_messages(AddressFamily::Bridge)?;
        Ok(messages.into_iter().filter_map(|(message, raw)| Some((parse_fdb(message, &names)?, raw))).collect())
    }

    fn neighbour_messages(&self, family: AddressFamily) -> Result<Vec<(NeighbourMessage, Raw)>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        let mut found = Vec::new();
        for raw in self.dump(RouteNetlinkMessage::GetNeighbour(message), "neighbours")? {
            if let RouteNetlinkMessage::NewNeighbour(message) = raw.decode()? {
                found.push((message, raw));
            }
        }
        Ok(found)
    }

    /// `ip neigh replace …`, each.
    ///
    /// # Errors
    /// The first refusal.
    pub fn put_neighbours(&self, neighbours: &[Neighbour]) -> Result<(), Error> {
        let requests = self.with_indices(neighbours, |it| (&it.dev, neighbour_message(it)))?;
        self.request_all(requests, "ip neigh replace")
    }

    /// `ip neigh del …`
    ///
    /// # Errors
    /// As the kernel says; `ENOENT` if there is none.
    pub fn delete_neighbour(&self, neighbour: &Neighbour) -> Result<(), Error> {
        let mut message = neighbour_message(neighbour);
        message.header.ifindex = self.index_of(&neighbour.dev)?;
        self.request(RouteNetlinkMessage::DelNeighbour(message), 0, &format!("ip neigh del {neighbour}"))
    }

    /// `ip neigh flush dev DEV nud permanent`, both families.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn flush_permanent_neighbours(&self, dev: &str) -> Result<(), Error> {
        let gone = |it: &Neighbour| it.dev == dev && it.state == NeighbourState::Permanent;
        for neighbour in self.neighbours()?.iter().filter(|it| gone(it)) {
            self.delete_neighbour(neighbour)?;
        }
        Ok(())
    }

    /// `bridge fdb replace …`, each.
    ///
    /// # Errors
    /// The first refusal.
    pub fn put_fdb(&self, entries: &[Fdb]) -> Result<(), Error> {
        let requests = self.with_indices(entries, |it| (&it.dev, fdb_message(it)))?;
        self.request_all(requests, "bridge fdb replace")
    }

    /// `bridge fdb del …`
    ///
    /// # Errors
    /// As the kernel says; `ENOENT` if there is none.
    pub fn delete_fdb(&self, entry: &Fdb) -> Result<(), Error> {
        let mut message = fdb_message(entry);
        message.header.ifindex = self.index_of(&entry.dev)?;
        message.header.state = NeighbourState::None;
        self.request(RouteNetlinkMessage::DelNeighbour(message), 0, &format!("bridge fdb del {entry}"))
    }

    /// `bridge fdb flush dev DEV`; entry by entry where the kernel cannot flush a VXLAN device (before 6.7).
    ///
    /// # Errors
    /// As the kernel says.
    pub fn flush_fdb(&self, dev: &str) -> Result<(), Error> {
        const NLM_F_BULK: u16 = 0x200;
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.flags = NeighbourFlags::Own;
        message.header.ifindex = self.index_of(dev)?;
        let what = format!("bridge fdb flush dev {dev}");
        match self.request(RouteNetlinkMessage::DelNeighbour(message), NLM_F_BULK, &what) {
            Err(error) if error.is(nix::Error::EOPNOTSUPP) || error.is(nix::Error::EINVAL) => {}
            done => return done,
        }
        for entry in self.fdb()?.iter().filter(|entry| entry.dev == dev) {
            self.delete_fdb(entry)?;
        }
        Ok(())
    }

    fn with_indices<'a, T>(
        &self,
        entries: &'a [T],
        message: impl Fn(&'a T) -> (&'a str, NeighbourMessage),
    ) -> Result<Vec<Request>, Error> {
        let mut indices = BTreeMap::new();
        let mut requests = Vec::with_capacity(entries.len());
        for entry in entries {
            let (dev, mut message) = message(entry);
            if !indices.contains_key(dev) {
                indices.insert(dev, self.index_of(dev)?);
            }
            message.header.ifindex = indices.get(dev).copied().unwrap_or_default();
            requests.push((RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE));
        }
        Ok(requests)
    }
}

fn neighbour_message(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = address_family(Family::of(neighbour.addr));
    message.header.state = neighbour.state;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::Destination(neighbour.addr.into()));
    if let Some(mac) = neighbour.mac {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    }
    if neighbour.protocol != 0 {
        message.attributes.push(NeighbourAttribute::Protocol(neighbour.protocol.into()));
    }
    message
}

fn fdb_message(entry: &Fdb) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.state = entry.state;
    message.header.flags.set(NeighbourFlags::Own, entry.own);
    message.header.flags.set(NeighbourFlags::Controller, entry.master.is_some());
    message.attributes.extend(entry.dst.map(|dst| NeighbourAttribute::Destination(dst.into())));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
    message
}

fn parse_neighbour(message: NeighbourMessage, names: &BTreeMap<u32, String>) -> Option<Neighbour> {
    let (mut addr, mut mac, mut protocol) = (None, None, 0);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(dst)) => addr = Some(dst.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(dst)) => addr = Some(dst.into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_of(&bytes),
            NeighbourAttribute::Protocol(number) => protocol = number.into(),
            _ => {}
        }
    }
    let dev = name_of(names, message.header.ifindex);
    Some(Neighbour { dev, addr: addr?, mac, state: message.header.state, protocol })
}

fn parse_fdb(message: NeighbourMessage, names: &BTreeMap<u32, String>) -> Option<Fdb> {
    let (mut dst, mut mac, mut master) = (None, None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)) => dst = Some(addr.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) => dst = Some(addr.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => dst = ip_of(&bytes),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_of(&bytes),
            NeighbourAttribute::Controller(index) => master = Some(name_of(names, index)),
            _ => {}
        }
    }
    Some(Fdb {
        dev: name_of(names, message.header.ifindex),
        mac: mac?,
        dst,
        state: message.header.state,
        own: message.header.flags.contains(NeighbourFlags::Own),
        master,
    })
}

/// The header's family is the bridge's, so an outer destination comes as bytes.
fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into())).ok()
}
