//! The writes a plan is made of.

use std::net::IpAddr;

use crate::net::{MacAddr, Prefix};
use crate::state::{AddressKey, FdbKey, Link, LinkId, NeighbourKey, Route};

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
    /// Changes name, Ethernet address, MTU, state, mark or learning of a device of ours.
    UpdateLink {
        /// Its id.
        id: LinkId,
        /// As last seen.
        from: Box<Link>,
        /// As wanted.
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
        /// Its Ethernet address.
        mac: MacAddr,
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

/// The name of an object, whatever its value: what refusals, conflicts and contests are counted by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A device.
    Link(LinkId),
    /// An address.
    Address(AddressKey),
    /// A forwarding entry.
    Fdb(FdbKey),
    /// A neighbour.
    Neighbour(NeighbourKey),
    /// The routes to a destination.
    Route(Prefix),
}

impl Op {
    /// What it writes.
    pub fn object(&self) -> Object {
        match self {
            Self::DeleteLink { id, .. } | Self::CreateLink { id, .. } | Self::UpdateLink { id, .. } => {
                Object::Link(*id)
            }
            Self::AddAddress(key) | Self::DeleteAddress(key) => Object::Address(*key),
            Self::PutFdb { key, .. } | Self::DeleteFdb { key, .. } => Object::Fdb(*key),
            Self::PutNeighbour { key, .. } | Self::DeleteNeighbour { key, .. } => Object::Neighbour(*key),
            Self::CreateRoute { prefix, .. } | Self::ReplaceRoute { prefix, .. } | Self::DeleteRoute { prefix, .. } => {
                Object::Route(*prefix)
            }
        }
    }

    /// Whether it takes something away.
    pub fn is_delete(&self) -> bool {
        match self {
            Self::DeleteLink { .. }
            | Self::DeleteRoute { .. }
            | Self::DeleteNeighbour { .. }
            | Self::DeleteFdb { .. }
            | Self::DeleteAddress(_) => true,
            Self::CreateLink { .. }
            | Self::UpdateLink { .. }
            | Self::AddAddress(_)
            | Self::PutFdb { .. }
            | Self::PutNeighbour { .. }
            | Self::CreateRoute { .. }
            | Self::ReplaceRoute { .. } => false,
        }
    }
}
