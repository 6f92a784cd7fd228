//! The write operations of a kernel.

use std::net::IpAddr;

use super::data_plane::{Forward, ForwardKey};
use super::link_kind::LinkKind;
use super::objects::{AddressKey, FdbKey, Link, LinkId, NeighbourKey, Route};
use crate::net::{MacAddr, Prefix};

/// One write operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Deletes one of the overlay's devices, with everything on it.
    DeleteLink {
        /// Its id.
        id: LinkId,
        /// As last seen.
        link: Box<Link>,
    },
    /// Creates a device and marks it as the overlay's in the same message (a TUN device: before it is made persistent);
    /// fails if the name is taken.
    CreateLink {
        /// Its id.
        id: LinkId,
        /// As wanted.
        link: Box<Link>,
    },
    /// Changes one part of one of the overlay's devices.
    UpdateLink {
        /// Its id.
        id: LinkId,
        /// The part.
        part: LinkPart,
        /// As last seen, with the parts changed that earlier operations change.
        from: Box<Link>,
        /// The same with this part as wanted.
        to: Box<Link>,
    },
    /// Adds an address; fails if it exists.
    AddAddress(AddressKey),
    /// Writes an FDB entry, replacing an existing one.
    PutFdb {
        /// The key.
        key: FdbKey,
        /// The outer destination.
        dst: IpAddr,
    },
    /// Writes a permanent neighbour, replacing an existing one.
    PutNeighbour {
        /// The key.
        key: NeighbourKey,
        /// Its MAC address.
        mac: MacAddr,
        /// The MAC address last seen, if any.
        was: Option<MacAddr>,
    },
    /// Sets a forward of a data plane, replacing an existing one.
    PutForward {
        /// The key.
        key: ForwardKey,
        /// The new forward.
        forward: Box<Forward>,
    },
    /// Creates a route; fails if its key is taken.
    CreateRoute {
        /// Destination.
        prefix: Prefix,
        /// As wanted.
        route: Route,
    },
    /// Replaces the only route of its key, which is the overlay's, without an interruption.
    ReplaceRoute {
        /// Destination.
        prefix: Prefix,
        /// The route as last seen, and as wanted.
        change: Box<(Route, Route)>,
    },
    /// Deletes one of the overlay's routes, matched in full.
    DeleteRoute {
        /// Destination.
        prefix: Prefix,
        /// As last seen.
        route: Route,
    },
    /// Deletes one of the overlay's forwards.
    DeleteForward {
        /// The key.
        key: ForwardKey,
        /// As last seen.
        forward: Box<Forward>,
    },
    /// Deletes one of the overlay's permanent neighbours.
    DeleteNeighbour {
        /// The key.
        key: NeighbourKey,
        /// As last seen.
        mac: MacAddr,
    },
    /// Deletes one of the overlay's FDB entries.
    DeleteFdb {
        /// The key.
        key: FdbKey,
        /// As last seen.
        dst: IpAddr,
    },
    /// Deletes one of the overlay's addresses.
    DeleteAddress(AddressKey),
}

/// A part of a device. Each is written separately, so that a failure of one does not affect the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkPart {
    /// Its name.
    Name,
    /// Its MTU.
    Mtu,
    /// Its MAC address. The kernel drops the device's neighbours when it changes.
    Mac,
    /// Its group and its alias, which mark the overlay that owns it.
    Mark,
    /// Whether it learns peers from received packets.
    Learning,
    /// The destination of frames without an FDB entry.
    Remote,
    /// How a data plane carries its packets.
    Tunnel,
    /// Whether it is administratively up.
    State,
}

impl LinkPart {
    /// All parts, in the order in which they are written: a device is set up last, once the other parts are as wanted.
    pub const ALL: [Self; 8] =
        [Self::Name, Self::Mtu, Self::Mac, Self::Mark, Self::Learning, Self::Remote, Self::Tunnel, Self::State];

    /// Copies this part from `from` to `to`.
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

/// Identifies an object, whatever its value: refusals, conflicts and changes by other programs are counted by it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A device.
    Link(LinkId),
    /// A part of a device.
    LinkPart(LinkId, LinkPart),
    /// An address.
    Address(AddressKey),
    /// An FDB entry.
    Fdb(FdbKey),
    /// A neighbour.
    Neighbour(NeighbourKey),
    /// A forward of a data plane.
    Forward(ForwardKey),
    /// The routes to a destination.
    Route(Prefix),
}

impl Op {
    /// Returns the object that the operation writes.
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

    /// Returns the device that the object is on; for a route, its output device.
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

    /// Returns whether the operation deletes an object.
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

    /// A start plans three writes for each peer and keeps them all until the last one is made: at 100 000 peers, eight
    /// bytes more are 2.3 MiB of peak memory. Large fields that few writes have are boxed.
    #[test]
    fn a_write_is_small() {
        assert!(size_of::<Op>() <= 64, "{} bytes", size_of::<Op>());
    }
}
