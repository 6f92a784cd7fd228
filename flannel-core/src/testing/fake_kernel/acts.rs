//! Actions of other programs on the host: sabotage as named in `docs/kernel-facts.md`, and foreign objects.
//!
//! The kernel may refuse every action: the error contains its number.

use std::net::IpAddr;

use crate::kernel::{HostAddress, KernelError, Link, LinkKind, LinkName};
use crate::net::{Family, MacAddr, Mtu};

use super::tables::{EINVAL, ENODEV, Entry, Notice, Slot, Tables};
use super::{FakeKernel, FakeRoute, Nud, Placement, refused};

/// An address with its prefix length, host bits kept: `192.168.0.1/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub addr: IpAddr,
    /// The length in bits.
    pub len: u8,
}

impl std::str::FromStr for Address {
    type Err = crate::net::PrefixError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (addr, len) = crate::net::split_cidr(text)?;
        crate::net::Prefix::masked(addr, len)?;
        Ok(Self { addr, len })
    }
}

/// Whether an address is permanent or has a lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lifetime {
    Forever,
    Limited,
}

/// Actions of other programs. On failure, each returns [`KernelError::Refused`] with the kernel's `errno` (`ENODEV` if
/// no link has the name) and changes nothing.
#[expect(clippy::missing_errors_doc, reason = "said once, above")]
impl FakeKernel {
    /// Adds a physical interface that is up, with an address and an MTU of 1500 bytes; returns its index. Add a default
    /// route through it separately.
    pub fn add_uplink(&self, name: &str, address: Address) -> Result<u32, KernelError> {
        let link = Link::new(link_name(name)?, LinkKind::Other("".into()), 1500);
        let index = self.add_link(Link { mac: Some(MacAddr([0x52, 0x54, 0, 0, 0, 1])), ..link })?;
        self.add_address(name, address)?;
        Ok(index)
    }

    /// Adds any link; returns its index.
    pub fn add_link(&self, link: Link) -> Result<u32, KernelError> {
        self.act(format!("adding link {}", link.name), |tables| tables.add_link(link))
    }

    /// Returns the index of the link with this name, if there is one.
    pub fn link_index(&self, name: &str) -> Option<u32> {
        self.lock().tables.named(name)
    }

    /// `ip link delete`: deletes also all objects on it, routes through it, and the VXLAN devices over it.
    pub fn delete_link(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("deleting link", name, Tables::delete_link)
    }

    /// `ip link set up`.
    pub fn link_up(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("setting up", name, Tables::link_up)
    }

    /// `ip link set down`: deletes routes, permanent neighbours and IPv6 addresses; without notifications of the IPv4
    /// routes.
    pub fn link_down(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("setting down", name, Tables::link_down)
    }

    /// Changes the carrier: causes a notification, and nothing is lost.
    pub fn carrier_change(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("changing the carrier of", name, |tables, index| {
            tables.note_link(index);
            Ok(())
        })
    }

    /// Removes the carrier until [`carrier_back`](Self::carrier_back): nothing else is lost.
    pub fn carrier_lost(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("taking the carrier of", name, |tables, index| {
            tables.without_carrier.insert(index);
            tables.note_link(index);
            Ok(())
        })
    }

    /// Restores the carrier.
    pub fn carrier_back(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("giving a carrier to", name, |tables, index| {
            tables.without_carrier.remove(&index);
            tables.note_link(index);
            Ok(())
        })
    }

    /// `ip link set address`: deletes permanent neighbours.
    pub fn set_mac(&self, name: &str, mac: MacAddr) -> Result<(), KernelError> {
        self.on_link("setting the address of", name, |tables, index| tables.set_mac(index, Some(mac)))
    }

    /// `ip link set mtu`: `EINVAL` above what a VXLAN device's lower device allows.
    pub fn set_mtu(&self, name: &str, mtu: Mtu) -> Result<(), KernelError> {
        self.on_link("setting the MTU of", name, |tables, index| tables.set_mtu(index, mtu.0))
    }

    /// `ip link set name`.
    pub fn rename_link(&self, name: &str, to: &str) -> Result<(), KernelError> {
        let to = link_name(to)?;
        self.on_link("renaming", name, |tables, index| tables.rename(index, &to))
    }

    /// `ip link set group GROUP alias ALIAS`.
    pub fn mark_link(&self, name: &str, group: u32, alias: Option<&str>) -> Result<(), KernelError> {
        self.on_link("marking", name, |tables, index| tables.set_mark(index, group, alias))
    }

    /// Stops the data plane of a TUN device, as when its process ends: the device and its routes stay. `EOPNOTSUPP` on
    /// another kind of device.
    pub fn drop_tunnel(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("closing", name, Tables::drop_tunnel)
    }

    /// `ip link set type vxlan learning` or `nolearning`: `EOPNOTSUPP` on another kind of device.
    pub fn set_learning(&self, name: &str, learning: bool) -> Result<(), KernelError> {
        self.on_link("setting the learning of", name, |tables, index| tables.set_learning(index, learning))
    }

    /// `ip link set type vxlan remote`, or none: `EOPNOTSUPP` on another kind of device.
    pub fn set_remote(&self, name: &str, remote: Option<IpAddr>) -> Result<(), KernelError> {
        self.on_link("setting the remote of", name, |tables, index| tables.set_remote(index, remote))
    }

    /// `ip address add`.
    pub fn add_address(&self, name: &str, address: Address) -> Result<(), KernelError> {
        self.put_address(name, address, Lifetime::Forever)
    }

    /// Adds an address with a lifetime, as a DHCP client or a router advertisement does.
    pub fn lease_address(&self, name: &str, address: Address) -> Result<(), KernelError> {
        self.put_address(name, address, Lifetime::Limited)
    }

    fn put_address(&self, name: &str, address: Address, lifetime: Lifetime) -> Result<(), KernelError> {
        let Address { addr, len } = address;
        let permanent = lifetime == Lifetime::Forever;
        self.on_link("adding an address to", name, |tables, link| {
            tables.add_address(HostAddress { permanent, ..HostAddress::new(link, addr, len) })
        })
    }

    /// `ip address delete`: with the last IPv4 address, IPv4 routes and neighbours are deleted, the routes without
    /// notifications.
    pub fn remove_address(&self, name: &str, address: Address) -> Result<(), KernelError> {
        let Address { addr, len } = address;
        self.on_link("removing an address from", name, |tables, index| tables.delete_address(index, addr, len))
    }

    /// `ip route flush table main`, or the same with `-6`.
    pub fn flush_routes(&self, family: Family) {
        let _ = self.act(String::new(), |tables| {
            tables.flush_main(family);
            Ok(())
        });
    }

    /// `ip neigh flush dev NAME nud permanent`.
    pub fn flush_neighbours(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("flushing neighbours of", name, |tables, index| {
            tables.drop_neighbours(index, |_| true);
            Ok(())
        })
    }

    /// `ip link set arp off` and on again: as [`flush_neighbours`](Self::flush_neighbours).
    pub fn arp_off_on(&self, name: &str) -> Result<(), KernelError> {
        self.flush_neighbours(name)
    }

    /// `bridge fdb flush`.
    pub fn flush_fdb(&self, name: &str) -> Result<(), KernelError> {
        self.on_link("flushing the FDB of", name, |tables, index| {
            tables.fdb.retain(|(link, _), _| *link != index);
            tables.notices.push(Notice::Fdb(index));
            Ok(())
        })
    }

    /// Adds a route with the given placement.
    pub fn add_route(&self, route: FakeRoute, placement: Placement) -> Result<(), KernelError> {
        let doing = format!("adding a route to {}", route.prefix);
        self.act(doing, |tables| tables.add_route(Slot::of_fake(&route), Entry::of(&route), placement))
    }

    /// Deletes the route that matches in full; `ESRCH` if there is none.
    pub fn delete_route(&self, route: &FakeRoute) -> Result<(), KernelError> {
        let doing = format!("deleting a route to {}", route.prefix);
        self.act(doing, |tables| tables.delete_route(Slot::of_fake(route), &Entry::of(route)))
    }

    /// `ip neigh replace`.
    pub fn put_neighbour(&self, name: &str, addr: IpAddr, mac: MacAddr, nud: Nud) -> Result<(), KernelError> {
        self.on_link("adding a neighbour to", name, |tables, index| tables.put_neighbour(index, addr, mac, nud))
    }

    /// `ip neigh delete`.
    pub fn delete_neighbour(&self, name: &str, addr: IpAddr) -> Result<(), KernelError> {
        self.on_link("deleting a neighbour of", name, |tables, index| tables.delete_neighbour(index, addr))
    }

    /// `bridge fdb replace`.
    pub fn put_fdb(&self, name: &str, mac: MacAddr, dst: IpAddr, nud: Nud) -> Result<(), KernelError> {
        self.on_link("adding a forwarding entry to", name, |tables, index| tables.put_fdb(index, mac, dst, nud))
    }

    /// `bridge fdb append`: only the all-zero and multicast addresses can have several destinations.
    pub fn append_fdb(&self, name: &str, mac: MacAddr, dst: IpAddr) -> Result<(), KernelError> {
        self.on_link("appending a forwarding entry to", name, |tables, index| tables.append_fdb(index, mac, dst))
    }

    /// `bridge fdb delete`.
    pub fn delete_fdb(&self, name: &str, mac: MacAddr, dst: IpAddr) -> Result<(), KernelError> {
        self.on_link("deleting a forwarding entry of", name, |tables, index| tables.delete_fdb(index, mac, dst))
    }

    fn on_link<T>(
        &self,
        doing: &str,
        name: &str,
        act: impl FnOnce(&mut Tables, u32) -> Result<T, i32>,
    ) -> Result<T, KernelError> {
        self.act(format!("{doing} {name}"), |tables| {
            let index = tables.named(name).ok_or(ENODEV)?;
            act(tables, index)
        })
    }

    fn act<T>(&self, doing: String, act: impl FnOnce(&mut Tables) -> Result<T, i32>) -> Result<T, KernelError> {
        let mut inner = self.lock();
        let before = inner.ids(None);
        let outcome = act(&mut inner.tables).map_err(|errno| refused(doing, errno));
        inner.changes += u64::from(outcome.is_ok());
        inner.tell(None, &before);
        outcome
    }
}

fn link_name(name: &str) -> Result<LinkName, KernelError> {
    LinkName::new(name).map_err(|error| KernelError::Refused {
        doing: format!("naming a link {name:?}"),
        errno: EINVAL,
        message: error.to_string(),
    })
}
