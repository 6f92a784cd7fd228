//! The device that another program makes: what the host says of it.

use std::net::IpAddr;

use flannelkit::net::{Family, is_public_unicast};
use flannelkit::spi::kernel::{HostFacts, HostLink, LinkName};

/// The device as it is now.
pub(crate) struct Device<'a> {
    /// Its interface index, which is another one each time it is made.
    pub(crate) index: u32,
    pub(crate) link: &'a HostLink,
}

impl<'a> Device<'a> {
    /// Returns the device of this name, if there is one.
    pub(crate) fn find(host: &'a HostFacts, name: &LinkName) -> Option<Self> {
        let (index, link) = host.links.iter().find(|(_, link)| link.name == *name)?;
        Some(Self { index: *index, link })
    }

    /// Returns its first address that peers on the same network can send to.
    pub(crate) fn address(&self, host: &HostFacts, family: Family) -> Option<IpAddr> {
        let usable = host.addresses.iter().filter(|it| it.link == self.index && !it.deprecated && !it.temporary);
        usable.map(|it| it.addr).find(|addr| Family::of(*addr) == family && is_public_unicast(*addr))
    }

    /// Returns whether it has this address.
    pub(crate) fn has(&self, host: &HostFacts, addr: IpAddr) -> bool {
        host.addresses.iter().any(|it| it.link == self.index && it.addr == addr)
    }
}
