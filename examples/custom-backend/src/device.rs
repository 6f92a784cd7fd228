//! The state of the device that another program creates.

use std::net::IpAddr;

use flannelkit::net::{Family, is_public_unicast};
use flannelkit::spi::kernel::{HostFacts, HostLink, LinkName};

/// The device on the host.
pub(crate) struct Device<'a> {
    /// The interface index, which changes each time the device is created.
    pub(crate) index: u32,
    pub(crate) link: &'a HostLink,
}

impl<'a> Device<'a> {
    /// Returns the device with this name.
    pub(crate) fn find(host: &'a HostFacts, name: &LinkName) -> Option<Self> {
        let (index, link) = host.links.iter().find(|(_, link)| link.name == *name)?;
        Some(Self { index: *index, link })
    }

    /// Returns the device's first address that peers can send to.
    pub(crate) fn address(&self, host: &HostFacts, family: Family) -> Option<IpAddr> {
        let usable = host.addresses.iter().filter(|it| it.link == self.index && !it.deprecated && !it.temporary);
        usable.map(|it| it.addr).find(|addr| Family::of(*addr) == family && is_public_unicast(*addr))
    }

    /// Returns whether the device has this address.
    pub(crate) fn has(&self, host: &HostFacts, addr: IpAddr) -> bool {
        host.addresses.iter().any(|it| it.link == self.index && it.addr == addr)
    }
}
