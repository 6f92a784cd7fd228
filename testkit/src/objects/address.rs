//! Addresses.

use std::fmt;
use std::net::IpAddr;

use flannel_core::net::Family;
use rtnetlink::AddressMessageBuilder;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};

use super::name_of;
use crate::netlink::Raw;
use crate::{Error, Namespace};

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The link.
    pub dev: String,
    /// The address.
    pub addr: IpAddr,
    /// Length of its prefix, in bits.
    pub len: u8,
    /// Its broadcast address.
    pub broadcast: Option<IpAddr>,
    /// How far it is known.
    pub scope: AddressScope,
    /// `IFA_F_*`.
    pub flags: AddressFlags,
    /// Its label, as iproute2 prints after an IPv4 address.
    pub label: Option<String>,
}

impl Address {
    /// Made by the kernel for the link itself, as `fe80::1`.
    pub fn is_link_local(&self) -> bool {
        self.scope == AddressScope::Link
    }
}

impl fmt::Display for Address {
    /// As its two lines in `ip addr`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inet = if self.addr.is_ipv4() { "inet" } else { "inet6" };
        write!(f, "    {inet} {}/{}", self.addr, self.len)?;
        if let Some(broadcast) = self.broadcast {
            write!(f, " brd {broadcast}")?;
        }
        let scope = match self.scope {
            AddressScope::Universe => "global",
            AddressScope::Site => "site",
            AddressScope::Link => "link",
            AddressScope::Host => "host",
            _ => "nowhere",
        };
        write!(f, " scope {scope}")?;
        const NAMES: [(AddressFlags, &str); 5] = [
            (AddressFlags::Secondary, "secondary"),
            (AddressFlags::Nodad, "nodad"),
            (AddressFlags::Tentative, "tentative"),
            (AddressFlags::Dadfailed, "dadfailed"),
            (AddressFlags::Noprefixroute, "noprefixroute"),
        ];
        for (_, name) in NAMES.iter().filter(|(flag, _)| self.flags.contains(*flag)) {
            write!(f, " {name}")?;
        }
        if let Some(label) = &self.label {
            write!(f, " {label}")?;
        }
        write!(f, "\n       valid_lft forever preferred_lft forever")
    }
}

impl Namespace {
    /// All addresses.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn addresses(&self) -> Result<Vec<Address>, Error> {
        Ok(self.addresses_raw()?.into_iter().map(|(address, _)| address).collect())
    }

    pub(crate) fn addresses_raw(&self) -> Result<Vec<(Address, Raw)>, Error> {
        let names = self.link_names()?;
        let mut addresses = Vec::new();
        for raw in self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), "addresses")? {
            if let RouteNetlinkMessage::NewAddress(message) = raw.decode()? {
                let dev = name_of(&names, message.header.index);
                addresses.extend(parse(message, dev).map(|address| (address, raw)));
            }
        }
        Ok(addresses)
    }

    /// `ip addr add ADDR/LEN dev DEV nodad`: an IPv6 address can be used at once.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` if it is there.
    pub fn add_address(&self, dev: &str, addr: IpAddr, len: u8) -> Result<(), Error> {
        let mut message = self.address_message(dev, addr, len)?;
        if Family::of(addr) == Family::V6 {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let what = format!("ip addr add {addr}/{len} dev {dev}");
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL, &what)
    }

    /// `ip addr del ADDR/LEN dev DEV`
    ///
    /// # Errors
    /// As the kernel says; `EADDRNOTAVAIL` if it is not there.
    pub fn delete_address(&self, dev: &str, addr: IpAddr, len: u8) -> Result<(), Error> {
        let message = self.address_message(dev, addr, len)?;
        self.request(RouteNetlinkMessage::DelAddress(message), 0, &format!("ip addr del {addr}/{len} dev {dev}"))
    }

    fn address_message(&self, dev: &str, addr: IpAddr, len: u8) -> Result<AddressMessage, Error> {
        let index = self.index_of(dev)?;
        Ok(match addr {
            IpAddr::V4(addr) => AddressMessageBuilder::<std::net::Ipv4Addr>::new().index(index).address(addr, len),
            IpAddr::V6(addr) => {
                return Ok(AddressMessageBuilder::<std::net::Ipv6Addr>::new().index(index).address(addr, len).build());
            }
        }
        .build())
    }
}

fn parse(message: AddressMessage, dev: String) -> Option<Address> {
    let (mut local, mut address) = (None, None);
    let mut parsed = Address {
        dev,
        addr: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        len: message.header.prefix_len,
        broadcast: None,
        scope: message.header.scope,
        flags: AddressFlags::from_bits_retain(u32::from(message.header.flags.bits())),
        label: None,
    };
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(addr) => local = Some(addr),
            AddressAttribute::Address(addr) => address = Some(addr),
            AddressAttribute::Broadcast(addr) => parsed.broadcast = Some(addr.into()),
            AddressAttribute::Label(label) => parsed.label = Some(label),
            AddressAttribute::Flags(flags) => parsed.flags = flags,
            _ => {}
        }
    }
    parsed.addr = local.or(address)?;
    Some(parsed)
}
