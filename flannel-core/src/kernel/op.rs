//! What a kernel can be asked to write.

use std::net::IpAddr;

use super::data_plane::{Forward, ForwardKey};
use super::link_kind::LinkKind;
use super::objects::{AddressKey, FdbKey, Link, LinkId, NeighbourKey, Route};
use crate::net::{MacAddr, Prefix};

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Deletes a device of ours, with all that is on it.
    DeleteLink {
        /// Its id.
        id: LinkId,
        /// As last seen.
        link: Box<Link>,
    },
    /// Creates a device, marked as ours in the same message; fails if there is one of the name.
    CreateLink {
        /// Its id.
        id: LinkId,
        /// As wanted.
        link: Box<Link>,
    },
    /// Changes one part of a device of ours.
    UpdateLink {
        /// Its id.
        id: LinkId,
        /// The part.
        part: LinkPart,
        /// As last seen, with the parts that were to be changed before.
        from: Box<Link>,
        /// The same with this part as wanted.
        to: Box<Link>,
    },
    /// Adds an address; fails if it is there.
    AddAddress(AddressKey),
    /// Writes a forwarding entry, whatever stood there.
    PutFdb {
        /// Where.
        key: FdbKey,
        /// Outer destination.
        dst: IpAddr,
    },
    /// Writes a permanent neighbour, whatever stood there.
    PutNeighbour {
        /// Where.
        key: NeighbourKey,
        /// Its MAC address.
        mac: MacAddr,
        /// The one last seen.
        was: Option<MacAddr>,
    },
    /// Has a data plane forward packets, wherever it sent them before.
    PutForward {
        /// Which.
        key: ForwardKey,
        /// Where to.
        forward: Box<Forward>,
    },
    /// Creates a route; fails if its key holds any.
    CreateRoute {
        /// Destination.
        prefix: Prefix,
        /// As wanted.
        route: Route,
    },
    /// Replaces the one route of its key, which is ours, without a moment between.
    ReplaceRoute {
        /// Destination.
        prefix: Prefix,
        /// As last seen, and as wanted.
        change: Box<(Route, Route)>,
    },
    /// Deletes a route of ours, given in full.
    DeleteRoute {
        /// Destination.
        prefix: Prefix,
        /// As last seen.
        route: Route,
    },
    /// Ends a forward of ours.
    DeleteForward {
        /// Which.
        key: ForwardKey,
        /// As last seen.
        forward: Box<Forward>,
    },
    /// Deletes a permanent neighbour of ours.
    DeleteNeighbour {
        /// Where.
        key: NeighbourKey,
        /// As last seen.
        mac: MacAddr,
    },
    /// Deletes a forwarding entry of ours.
    DeleteFdb {
        /// Where.
        key: FdbKey,
        /// As last seen.
        dst: IpAddr,
    },
    /// Deletes an address of ours.
    DeleteAddress(AddressKey),
}

/// A part of a device. Each is written by itself, so that what becomes of one concerns no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkPart {
    /// Its name.
    Name,
    /// Its MTU.
    Mtu,
    /// Its MAC address. The kernel drops the device's neighbours when it changes.
    Mac,
    /// Its group and its alias, which say whose it is.
    Mark,
    /// Whether it learns peers from received packets.
    Learning,
    /// Where it sends frames that no forwarding entry is for.
    Remote,
    /// How a data plane carries its packets.
    Tunnel,
    /// Whether it is up.
    State,
}

impl LinkPart {
    /// All, in the order in which they are written: a device comes up when it is as it should be.
    pub const ALL: [Self; 8] =
        [Self::Name, Self::Mtu, Self::Mac, Self::Mark, Self::Learning, Self::Remote, Self::Tunnel, Self::State];

    /// Makes this part of `to` what it is in `from`.
    pub(crate) fn copy(self, from: &Link, to: &mut Link) {
        match self {
            Self::Name => to.name = from.name.clone(),
            Self::Mtu => to.mtu = from.mtu,
            Self::Mac => to.mac = from.mac,
            Self::Mark => (to.group, to.alias) = (from.group, from.alias.clone()),
            Self::Learning => {
                if let (LinkKind::Vxlan(from), LinkKind::Vxlan(to)) = (&from.kind, &mut to.kind) {
                    to.learning = from.learning;
                }
            }
            Self::Remote => {
                if let (LinkKind::Vxlan(from), LinkKind::Vxlan(to)) = (&from.kind, &mut to.kind) {
                    to.remote = from.remote;
                }
            }
            Self::Tunnel => {
                if let (LinkKind::Tun(from), LinkKind::Tun(to)) = (&from.kind, &mut to.kind) {
                    to.tunnel = from.tunnel;
                }
            }
            Self::State => to.up = from.up,
        }
    }
}

/// The name of an object, whatever its value: what refusals, conflicts and changes by others are counted by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A device.
    Link(LinkId),
    /// A part of a device.
    LinkPart(LinkId, LinkPart),
    /// An address.
    Address(AddressKey),
    /// A forwarding entry.
    Fdb(FdbKey),
    /// A neighbour.
    Neighbour(NeighbourKey),
    /// A forward of a data plane.
    Forward(ForwardKey),
    /// The routes to a destination.
    Route(Prefix),
}

impl Op {
    /// What it writes.
    pub fn object(&self) -> Object {
        match self {
            Self::DeleteLink { id, .. } | Self::CreateLink { id, .. } => Object::Link(*id),
            Self::UpdateLink { id, part, .. } => Object::LinkPart(*id, *part),
            Self::AddAddress(key) | Self::DeleteAddress(key) => Object::Address(*key),
            Self::PutFdb { key, .. } | Self::DeleteFdb { key, .. } => Object::Fdb(*key),
            Self::PutNeighbour { key, .. } | Self::DeleteNeighbour { key, .. } => Object::Neighbour(*key),
            Self::PutForward { key, .. } | Self::DeleteForward { key, .. } => Object::Forward(*key),
            Self::CreateRoute { prefix, .. } | Self::ReplaceRoute { prefix, .. } | Self::DeleteRoute { prefix, .. } => {
                Object::Route(*prefix)
            }
        }
    }

    /// The device that the kernel keeps it on; of a route the one it leads through.
    pub fn link(&self) -> Option<LinkId> {
        match self {
            Self::DeleteLink { id, .. } | Self::CreateLink { id, .. } | Self::UpdateLink { id, .. } => Some(*id),
            Self::AddAddress(key) | Self::DeleteAddress(key) => Some(key.link),
            Self::PutFdb { key, .. } | Self::DeleteFdb { key, .. } => Some(key.link),
            Self::PutNeighbour { key, .. } | Self::DeleteNeighbour { key, .. } => Some(key.link),
            Self::PutForward { key, .. } | Self::DeleteForward { key, .. } => Some(key.link),
            Self::CreateRoute { route, .. } | Self::DeleteRoute { route, .. } => route.link,
            Self::ReplaceRoute { change, .. } => change.1.link,
        }
    }

    /// Whether it takes something away.
    pub fn is_delete(&self) -> bool {
        match self {
            Self::DeleteLink { .. }
            | Self::DeleteRoute { .. }
            | Self::DeleteForward { .. }
            | Self::DeleteNeighbour { .. }
            | Self::DeleteFdb { .. }
            | Self::DeleteAddress(_) => true,
            Self::CreateLink { .. }
            | Self::UpdateLink { .. }
            | Self::AddAddress(_)
            | Self::PutFdb { .. }
            | Self::PutNeighbour { .. }
            | Self::PutForward { .. }
            | Self::CreateRoute { .. }
            | Self::ReplaceRoute { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A start plans three writes for each peer and holds them all until the last is made: at 100 000 peers, eight bytes
    /// more are 2.3 MiB of peak memory. What few writes have is boxed.
    #[test]
    fn a_write_is_small() {
        assert!(size_of::<Op>() <= 64, "{} bytes", size_of::<Op>());
    }
}
