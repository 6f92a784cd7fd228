//! What is judged of one record alone: by the network's rules, and by this node's.

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

/// [`Backend::hardware_address`], or a stand-in.
pub type HardwareAddress = dyn Fn(&LeaseAttrs, Family) -> Result<Option<MacAddr>, Skip> + Send + Sync;

/// The rules that are the same on every node.
///
/// A pool (`SubnetLen`, `SubnetMin`, `SubnetMax`) keeps nobody out. It only decides between records that overlap: one
/// that fits wins over one that does not. These are the pools of the configuration that the node started with. While an
/// operator moves them, nodes that started before and after may find another winner of such an overlap, which is there
/// only if somebody writes records past the allocators; they agree again once all have started with one configuration.
#[non_exhaustive]
pub struct Rules {
    /// The network of each family in use.
    pub networks: Dual<Network>,
    /// What `BackendType` has to be.
    pub wire_type: &'static str,
    /// The MAC address a record's node answers to.
    pub hardware_address: Box<HardwareAddress>,
}

impl Rules {
    /// The rules of a network and a backend.
    pub fn new(config: &NetworkConfig, backend: Arc<dyn Backend>) -> Self {
        Self {
            networks: config.networks.clone(),
            wire_type: backend.wire_type(),
            hardware_address: Box::new(move |attrs, family| backend.hardware_address(attrs, family)),
        }
    }

    /// What is wrong with a lease in itself, or its MAC addresses. Families not in use are not looked at.
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
    /// Whether the pools would give out a lease's subnets: such a lease wins over one they would not.
    pub(super) fn fits(&self, lease: &Lease) -> bool {
        fits_pools(&self.networks, &lease.subnets)
    }

    /// Those of `subnets` that a peer may hold.
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

/// Whether a peer may hold `subnet`. Pools govern what is given out from now on, and not what is held: an operator may
/// move them while nodes run that go by the old ones.
fn judge_subnet(network: Prefix, subnet: Prefix) -> Result<(), Reason> {
    // Room for the network's own address, the broadcast address and two pods.
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
    // This also keeps every peer's public address out of every peer's subnet, which lies in the network.
    if network.contains(addr) {
        return Err(Reason::PublicInsideNetwork { addr, network });
    }
    Ok(())
}

/// What this node is and needs: no peer may take it away.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HostView {
    /// Its addresses, those on the overlay's own devices left out.
    pub addresses: BTreeSet<IpAddr>,
    /// The gateways of its routes, those through the overlay's own devices left out.
    pub next_hops: BTreeSet<IpAddr>,
    /// The prefixes of its addresses, those on the overlay's own devices left out. A foreign route to a peer's
    /// prefix is a conflict of routes or none at all, but no reason to be without the peer.
    pub connected: BTreeSet<Prefix>,
    /// The lease store's addresses.
    pub store: BTreeSet<IpAddr>,
    /// What it holds.
    pub own: Own,
}

/// What a node holds and publishes itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Own {
    /// Its record. It comes back through the watch like any other and is never a peer.
    pub key: Option<LeaseKey>,
    /// Its subnets.
    pub subnets: Dual<Prefix>,
    /// Its public addresses.
    pub public: Dual<IpAddr>,
    /// Its MAC addresses.
    pub macs: Dual<MacAddr>,
}

impl Own {
    /// What a node with this lease holds. A MAC address that does not parse is left out.
    pub fn new(lease: &Lease, rules: &Rules) -> Self {
        let mut macs = Dual::default();
        for family in lease.subnets.families() {
            *macs.slot(family) = (rules.hardware_address)(&lease.attrs, family).ok().flatten();
        }
        Self { key: Some(lease.key.clone()), subnets: lease.subnets, public: lease.attrs.public_ip, macs }
    }
}

impl HostView {
    /// The view of a host as read, without what stands on devices of `overlay`: an address left there by a former
    /// lease must not keep the subnet's new owner out.
    pub fn new(facts: &HostFacts, overlay: &OverlayName, store: BTreeSet<IpAddr>, own: Own) -> Self {
        let ours =
            |index: u32| facts.links.get(&index).is_some_and(|link| overlay.owns(link.group, link.alias.as_deref()));
        let foreign = || facts.addresses.iter().filter(|address| !ours(address.link));
        let connected = foreign().filter_map(|address| Prefix::masked(address.addr, address.len).ok()).collect();
        let addresses = foreign().map(|address| address.addr).collect();
        let next_hops = facts.next_hops.iter().filter(|hop| !hop.link.is_some_and(ours)).map(|hop| hop.addr).collect();
        Self { addresses, next_hops, connected, store, own }
    }

    /// Why this node cannot have `lease` as a peer, though it may be one to others.
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

    /// The connected prefix whose first or last address this is. The kernel takes neither for a gateway. A /31 and a /32
    /// have no such addresses (RFC 3021), nor does IPv6.
    fn without_host(&self, addr: IpAddr) -> Option<Prefix> {
        let IpAddr::V4(v4) = addr else { return None };
        let bits = u32::from(v4);
        // Only these leave nothing but zeros or ones behind the prefix.
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
        // Prefixes are in the order of address and length: the first one not below is covered, or none is.
        match self.connected.range(subnet..).next() {
            Some(connected) if subnet.covers(connected) => {
                Err(Reason::CoversConnected { subnet, connected: *connected })
            }
            _ => Ok(()),
        }
    }
}
