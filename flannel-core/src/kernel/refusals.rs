//! What a refusal takes with it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::data_plane::ForwardKey;
use super::link_kind::LinkKind;
use super::objects::{AddressKey, Link, LinkId, Route};
use super::op::{LinkPart, Op};
use crate::net::{MacAddr, Prefix};

/// What later writes stand on, so that a refusal skips just them. Every [`Kernel`](crate::kernel::Kernel) uses this,
/// so that they agree.
#[derive(Debug, Default)]
pub struct Refusals {
    links: BTreeSet<LinkId>,
    addresses: BTreeSet<AddressKey>,
    macs: BTreeSet<(LinkId, MacAddr)>,
    hops: BTreeSet<(LinkId, IpAddr)>,
    kept_hops: BTreeSet<(LinkId, IpAddr)>,
    kept_macs: BTreeSet<(LinkId, MacAddr)>,
    /// Devices whose packets are not carried: they take no forwards.
    unopened: BTreeSet<LinkId>,
    /// What later routes lead through.
    forwards: BTreeSet<ForwardKey>,
    /// Devices that are down and stay so: they take no routes (docs/kernel-facts.md, "Writes on a link that is down").
    down: BTreeSet<LinkId>,
    /// Devices that keep their MAC address, and so their neighbours.
    kept_address: BTreeSet<LinkId>,
}

impl Refusals {
    /// Whether `op` stands on something refused. The caller then skips it and tells [`refused`](Self::refused) too.
    pub fn block(&self, op: &Op) -> bool {
        match op {
            Op::DeleteLink { .. } => false,
            Op::CreateLink { id, .. } | Op::UpdateLink { id, .. } => self.links.contains(id),
            Op::AddAddress(key) => self.links.contains(&key.link),
            Op::PutFdb { key, .. } => self.links.contains(&key.link),
            Op::PutNeighbour { key, mac, .. } => {
                self.links.contains(&key.link) || self.macs.contains(&(key.link, *mac))
            }
            Op::PutForward { key, .. } => self.links.contains(&key.link) || self.unopened.contains(&key.link),
            Op::CreateRoute { prefix, route } => self.blocks_route(prefix, route),
            Op::ReplaceRoute { prefix, change } => self.blocks_route(prefix, &change.1),
            Op::DeleteRoute { .. } | Op::DeleteForward { .. } => false,
            Op::DeleteNeighbour { key, .. } => self.kept_hops.contains(&(key.link, key.addr)),
            Op::DeleteFdb { key, .. } => self.kept_macs.contains(&(key.link, key.mac)),
            // A new address that was refused leaves the old one as the last: the routes hang on it.
            Op::DeleteAddress(key) => self.addresses.iter().any(|refused| refused.link == key.link),
        }
    }

    /// Whether `op` only restores what a refused change of its device would have taken.
    pub fn makes_needless(&self, op: &Op) -> bool {
        matches!(op, Op::PutNeighbour { key, mac, was } if *was == Some(*mac) && self.kept_address.contains(&key.link))
    }

    fn blocks_route(&self, prefix: &Prefix, route: &Route) -> bool {
        let Some(link) = route.link else { return false };
        self.links.contains(&link)
            || self.down.contains(&link)
            || self.forwards.contains(&ForwardKey { link, prefix: *prefix })
            || route.gateway.is_some_and(|gateway| self.hops.contains(&(link, gateway)))
    }

    /// Notes that `op` was refused or skipped.
    pub fn refused(&mut self, op: &Op) {
        match op {
            Op::DeleteLink { id, .. } | Op::CreateLink { id, .. } => {
                self.links.insert(*id);
            }
            Op::UpdateLink { id, part, from, to } => self.keep_part(*id, *part, from, to),
            Op::AddAddress(key) => {
                self.addresses.insert(*key);
            }
            Op::PutFdb { key, .. } => {
                self.macs.insert((key.link, key.mac));
            }
            Op::PutNeighbour { key, mac, was } => {
                self.hops.insert((key.link, key.addr));
                self.kept_macs.extend([Some(*mac), *was].into_iter().flatten().map(|mac| (key.link, mac)));
            }
            Op::PutForward { key, .. } => {
                self.forwards.insert(*key);
            }
            Op::ReplaceRoute { change, .. } => self.keep_hop(&change.0),
            Op::DeleteRoute { route, .. } => self.keep_hop(route),
            Op::DeleteNeighbour { key, mac } => {
                self.kept_macs.insert((key.link, *mac));
            }
            Op::CreateRoute { .. } | Op::DeleteForward { .. } | Op::DeleteFdb { .. } | Op::DeleteAddress(_) => {}
        }
    }

    /// A device that is not changed is there all the same: whatever does not need the change can stand on it.
    fn keep_part(&mut self, id: LinkId, part: LinkPart, from: &Link, to: &Link) {
        match part {
            LinkPart::State if to.up => {
                self.down.insert(id);
            }
            LinkPart::Mac => {
                self.kept_address.insert(id);
            }
            LinkPart::Tunnel if matches!(&from.kind, LinkKind::Tun(tun) if tun.tunnel.is_none()) => {
                self.unopened.insert(id);
            }
            LinkPart::State
            | LinkPart::Tunnel
            | LinkPart::Name
            | LinkPart::Mtu
            | LinkPart::Mark
            | LinkPart::Learning
            | LinkPart::Remote => {}
        }
    }

    fn keep_hop(&mut self, route: &Route) {
        if let (Some(link), Some(gateway)) = (route.link, route.gateway) {
            self.kept_hops.insert((link, gateway));
        }
    }
}
