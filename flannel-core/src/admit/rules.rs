//! Checks of a single record: by the network's rules, and by this node's.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::reason::{Covered, Reason};
use crate::allocation::fits_pools;
use crate::backend::{Backend, Skip};
use crate::config::{Network, NetworkConfig};
use crate::kernel::{HostFacts, OverlayName};
use crate::lease::{Lease, LeaseAttrs, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Prefix, is_public_unicast};

/// [`Backend::hardware_address`], or a replacement for it.
pub type HardwareAddress = dyn Fn(&LeaseAttrs, Family) -> Result<Option<MacAddr>, Skip> + Send + Sync;

/// The rules that are the same on every node.
///
/// A pool (`SubnetLen`, `SubnetMin`, `SubnetMax`) never rejects a record by itself. It only decides between records
/// that overlap: one that fits the pool wins over one that does not. The pools are those of the configuration at the
/// node's start. After an operator changes them, nodes that started before and after may choose different winners of
/// such an overlap, which only exists if a program writes records without using an allocator. They agree again once all
/// nodes have started with one configuration.
#[non_exhaustive]
pub struct Rules {
    /// The network of each family in use.
    pub networks: Dual<Network>,
    /// The required `BackendType`.
    pub wire_type: &'static str,
    /// Returns the MAC address of a record's node.
    pub hardware_address: Box<HardwareAddress>,
}

impl Rules {
    /// Creates the rules of a network and a backend.
    pub fn new(config: &NetworkConfig, backend: Arc<dyn Backend>) -> Self {
        Self {
            networks: config.networks.clone(),
            wire_type: backend.wire_type(),
            hardware_address: Box::new(move |attrs, family| backend.hardware_address(attrs, family)),
        }
    }

    /// Returns the MAC addresses of a lease, or what is wrong with the lease in itself. Families not in use are
    /// ignored.
    pub(super) fn judge(&self, lease: &Lease) -> Result<Dual<MacAddr>, Reason> {
        let attrs = &lease.attrs;
        let size =
            attrs.backend_type.len() + attrs.backend_data.iter().map(|(_, data)| data.as_str().len()).sum::<usize>();
        if size > LeaseAttrs::MAX_BYTES {
            return Err(Reason::TooLarge(size));
        }
        if *attrs.backend_type != *self.wire_type {
            let found = attrs.backend_type.chars().take(32).collect();
            return Err(Reason::WrongType { found, expected: self.wire_type });
        }
        let mut macs = Dual::default();
        let mut subnets = 0;
        for (family, network) in self.networks.iter() {
            let Some(subnet) = lease.subnets.get(family) else { continue };
            judge_subnet(network.prefix, *subnet)?;
            judge_public(network.prefix, family, attrs)?;
            let mac = (self.hardware_address)(attrs, family).map_err(Reason::BackendData)?;
            if let Some(mac) = mac.filter(|mac| mac.is_zero() || mac.is_multicast()) {
                return Err(Reason::BadMac(mac));
            }
            *macs.slot(family) = mac;
            subnets += 1;
        }
        if subnets == 0 { Err(Reason::NoSubnet) } else { Ok(macs) }
    }
}

impl Rules {
    /// Returns whether the pools can allocate a lease's subnets: such a lease wins over one whose subnets they cannot
    /// allocate.
    pub(super) fn fits(&self, lease: &Lease) -> bool {
        fits_pools(&self.networks, &lease.subnets)
    }

    /// Returns those of `subnets` that a peer may have.
    pub(super) fn holdable(&self, subnets: &Dual<Prefix>) -> Dual<Prefix> {
        let mut holdable = *subnets;
        for family in Family::BOTH {
            let may_hold = |subnet: &Prefix| {
                self.networks.get(family).is_some_and(|network| judge_subnet(network.prefix, *subnet).is_ok())
            };
            let slot = holdable.slot(family);
            *slot = slot.filter(may_hold);
        }
        holdable
    }
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules")
            .field("networks", &self.networks)
            .field("wire_type", &self.wire_type)
            .finish_non_exhaustive()
    }
}

/// Checks whether a peer may have `subnet`. Pools restrict new allocations, not existing subnets: an operator may
/// change them while nodes with subnets of the old pools run.
fn judge_subnet(network: Prefix, subnet: Prefix) -> Result<(), Reason> {
    // Room for the network address, the broadcast address and two pods.
    let longest = subnet.family().bits() - 2;
    if !network.covers(&subnet) {
        return Err(Reason::OutsideNetwork { subnet, network });
    }
    if subnet == network {
        return Err(Reason::WholeNetwork(subnet));
    }
    if subnet.len() > longest {
        return Err(Reason::TooSmall { subnet, longest });
    }
    Ok(())
}

fn judge_public(network: Prefix, family: Family, attrs: &LeaseAttrs) -> Result<(), Reason> {
    let addr = *attrs.public_ip.get(family).ok_or(Reason::NoPublicAddress(family))?;
    if Family::of(addr) != family || !is_public_unicast(addr) {
        return Err(Reason::NotUnicast(addr));
    }
    // This also keeps every peer's public address outside every peer's subnet, which is in the network.
    if network.contains(addr) {
        return Err(Reason::PublicInsideNetwork { addr, network });
    }
    Ok(())
}

/// What this node needs. No peer may take over any of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HostView {
    /// The node's addresses, except those on the overlay's own devices.
    pub addresses: BTreeSet<IpAddr>,
    /// The next hops of the node's routes, except those through the overlay's own devices.
    pub next_hops: BTreeSet<IpAddr>,
    /// The prefixes of the node's addresses, except those on the overlay's own devices. A foreign route to a peer's
    /// prefix may be a route conflict, but is not a reason to reject the peer.
    pub connected: BTreeSet<Prefix>,
    /// The lease store's addresses.
    pub store: BTreeSet<IpAddr>,
    /// The node's own record.
    pub own: Own,
}

/// What a node itself has leased and publishes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Own {
    /// The key of its record. The watch reports this record like any other, but it is never a peer.
    pub key: Option<LeaseKey>,
    /// Its subnets.
    pub subnets: Dual<Prefix>,
    /// Its public addresses.
    pub public: Dual<IpAddr>,
    /// Its MAC addresses.
    pub macs: Dual<MacAddr>,
}

impl Own {
    /// Returns the values of a node with this lease. A MAC address that does not parse is left out.
    pub fn new(lease: &Lease, rules: &Rules) -> Self {
        let mut macs = Dual::default();
        for family in lease.subnets.families() {
            *macs.slot(family) = (rules.hardware_address)(&lease.attrs, family).ok().flatten();
        }
        Self { key: Some(lease.key.clone()), subnets: lease.subnets, public: lease.attrs.public_ip, macs }
    }
}

impl HostView {
    /// Creates the view of a host from a snapshot, without addresses and next hops on devices of `overlay`: an address
    /// left by a former lease must not reject the subnet's new owner.
    pub fn new(facts: &HostFacts, overlay: &OverlayName, store: BTreeSet<IpAddr>, own: Own) -> Self {
        let ours =
            |index: u32| facts.links.get(&index).is_some_and(|link| overlay.owns(link.group, link.alias.as_deref()));
        let foreign = || facts.addresses.iter().filter(|address| !ours(address.link));
        let connected = foreign().filter_map(|address| Prefix::masked(address.addr, address.len).ok()).collect();
        let addresses = foreign().map(|address| address.addr).collect();
        let next_hops = facts.next_hops.iter().filter(|hop| !hop.link.is_some_and(ours)).map(|hop| hop.addr).collect();
        Self { addresses, next_hops, connected, store, own }
    }

    /// Returns why this node cannot have `lease` as a peer, although other nodes may.
    pub(super) fn judge(&self, lease: &Lease, macs: &Dual<MacAddr>, families: &Dual<Network>) -> Result<(), Reason> {
        for family in families.families() {
            let Some(subnet) = lease.subnets.get(family) else { continue };
            self.judge_subnet(*subnet)?;
            if let Some(addr) = lease.attrs.public_ip.get(family)
                && (self.own.public.get(family) == Some(addr) || self.addresses.contains(addr))
            {
                return Err(Reason::OwnAddress(*addr));
            }
            if let Some((addr, connected)) =
                lease.attrs.public_ip.get(family).and_then(|addr| Some((*addr, self.without_host(*addr)?)))
            {
                return Err(Reason::NoHost { addr, connected });
            }
            if let Some(mac) = macs.get(family).filter(|mac| self.own.macs.get(family) == Some(mac)) {
                return Err(Reason::OwnMac(*mac));
            }
        }
        Ok(())
    }

    /// Returns the connected prefix whose first or last address this is. The kernel accepts neither as a next hop. A
    /// /31 and a /32 have no such addresses (RFC 3021), and neither does IPv6.
    fn without_host(&self, addr: IpAddr) -> Option<Prefix> {
        let IpAddr::V4(v4) = addr else { return None };
        let bits = u32::from(v4);
        // Only with these lengths are the host bits all zeros or all ones.
        let host_bits = bits.trailing_zeros().max(bits.trailing_ones()).min(32) as u8;
        (32 - host_bits..31)
            .filter_map(|len| Prefix::masked(addr, len).ok())
            .find(|prefix| self.connected.contains(prefix))
    }

    fn judge_subnet(&self, subnet: Prefix) -> Result<(), Reason> {
        if let Some(own) = self.own.subnets.get(subnet.family()).filter(|own| own.overlaps(&subnet)) {
            return Err(Reason::OverlapsOwn { subnet, own: *own });
        }
        for (addresses, what) in [
            (&self.addresses, Covered::HostAddress),
            (&self.next_hops, Covered::NextHop),
            (&self.store, Covered::Store),
        ] {
            if let Some(addr) = addresses.range(subnet.addr()..=subnet.last()).next() {
                return Err(Reason::Covers { subnet, addr: *addr, what });
            }
        }
        // Prefixes are sorted by address and length: if the first one that is not lower is not covered, none is.
        match self.connected.range(subnet..).next() {
            Some(connected) if subnet.covers(connected) => {
                Err(Reason::CoversConnected { subnet, connected: *connected })
            }
            _ => Ok(()),
        }
    }
}
