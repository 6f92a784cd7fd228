//! Which writes have to be skipped after a refusal.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::data_plane::ForwardKey;
use super::link_kind::LinkKind;
use super::objects::{AddressKey, Link, LinkId, Route};
use super::op::{LinkPart, Op};
use crate::net::{MacAddr, Prefix};

/// Tracks refused writes, so that only writes that depend on them are skipped. Every [`Kernel`](crate::kernel::Kernel)
/// uses this, so that all behave alike.
#[derive(Debug, Default)]
pub struct Refusals {
    links: BTreeSet<LinkId>,
    addresses: BTreeSet<AddressKey>,
    macs: BTreeSet<(LinkId, MacAddr)>,
    hops: BTreeSet<(LinkId, IpAddr)>,
    kept_hops: BTreeSet<(LinkId, IpAddr)>,
    kept_macs: BTreeSet<(LinkId, MacAddr)>,
    /// Devices whose packets are not carried: forwards cannot be written to them.
    unopened: BTreeSet<LinkId>,
    /// Refused forwards, which later routes depend on.
    forwards: BTreeSet<ForwardKey>,
    /// Devices that stay down: the kernel refuses routes through them (docs/kernel-facts.md, "Writes on a link that is
    /// down").
    down: BTreeSet<LinkId>,
    /// Devices whose MAC address was not changed, so that their neighbours stay.
    kept_address: BTreeSet<LinkId>,
}

impl Refusals {
    /// Returns whether `op` depends on a refused write. The caller then skips it and passes it to
    /// [`refused`](Self::refused) too.
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
            // If a new address was refused, the old one is the last, and the routes depend on it.
            Op::DeleteAddress(key) => self.addresses.iter().any(|refused| refused.link == key.link),
        }
    }

    /// Returns whether `op` only restores what a refused change of its device would have removed.
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

    /// Records that `op` was refused or skipped.
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

    /// A device with a refused change still exists: only writes that need the change are blocked.
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
