//! Why a record is no peer.

use std::net::IpAddr;

use crate::backend::Skip;
use crate::lease::{LeaseAttrs, LeaseKey};
use crate::net::{Family, MacAddr, Prefix};

/// The rule a record breaks, with the value that breaks it. Its writer has to mend it; nothing is to be retried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// It does not parse.
    #[error("unreadable: {0}")]
    Unreadable(String),
    /// It is larger than [`LeaseAttrs::MAX_BYTES`].
    #[error("record of {0} bytes is larger than {max}", max = LeaseAttrs::MAX_BYTES)]
    TooLarge(usize),
    /// It is another backend's.
    #[error("backend type is {found:?}, ours is {expected:?}")]
    WrongType {
        /// What the record says.
        found: String,
        /// Our [`wire_type`](crate::backend::Backend::wire_type).
        expected: &'static str,
    },
    /// It has no subnet in any family in use.
    #[error("has no subnet in any enabled family")]
    NoSubnet,
    /// Its subnet is not in the network.
    #[error("subnet {subnet} is outside the network {network}")]
    OutsideNetwork {
        /// The record's.
        subnet: Prefix,
        /// Ours.
        network: Prefix,
    },
    /// Its subnet has not the pool's length.
    #[error("subnet {subnet} does not have the network's subnet length {len}")]
    WrongLength {
        /// The record's.
        subnet: Prefix,
        /// The pool's, in bits.
        len: u8,
    },
    /// Its subnet is outside the pool's range.
    #[error("subnet {subnet} is not between SubnetMin {min} and SubnetMax {max}")]
    OutsidePool {
        /// The record's.
        subnet: Prefix,
        /// The pool's first subnet.
        min: IpAddr,
        /// The pool's last subnet.
        max: IpAddr,
    },
    /// It has a subnet of the family, and no address to send to.
    #[error("has an {0} subnet but no public {0} address")]
    NoPublicAddress(Family),
    /// Its public address is unspecified, loopback, link-local, multicast or broadcast.
    #[error("public address {0} is not one that can be sent to")]
    NotUnicast(IpAddr),
    /// Its public address is a pod's.
    #[error("public address {addr} is inside the network {network}")]
    PublicInsideNetwork {
        /// The record's.
        addr: IpAddr,
        /// Ours.
        network: Prefix,
    },
    /// The backend cannot read its data.
    #[error("{0}")]
    BackendData(Skip),
    /// Its Ethernet address is zero or a group's.
    #[error("Ethernet address {0} is not a device's own")]
    BadMac(MacAddr),
    /// Its subnet overlaps that of an older record.
    #[error("subnet {subnet} overlaps {other} of the older record {with}")]
    Overlap {
        /// The record's.
        subnet: Prefix,
        /// The other's.
        other: Prefix,
        /// The other, which is accepted.
        with: LeaseKey,
    },
    /// Its Ethernet address is that of an older record.
    #[error("Ethernet address {mac} is also that of the older record {with}")]
    SameMac {
        /// The address.
        mac: MacAddr,
        /// The other, which is accepted.
        with: LeaseKey,
    },
    /// Its subnet overlaps ours.
    #[error("subnet {subnet} overlaps our own {own}")]
    OverlapsOwn {
        /// The record's.
        subnet: Prefix,
        /// Ours.
        own: Prefix,
    },
    /// Its subnet would draw away what this node needs.
    #[error("subnet {subnet} contains {addr}, {what}")]
    Covers {
        /// The record's.
        subnet: Prefix,
        /// The address in it.
        addr: IpAddr,
        /// What that is to us.
        what: Covered,
    },
    /// Its subnet equals or contains a prefix that this node is connected to.
    #[error("subnet {subnet} would hide the connected prefix {connected}")]
    CoversConnected {
        /// The record's.
        subnet: Prefix,
        /// Ours.
        connected: Prefix,
    },
    /// Its public address is ours.
    #[error("public address {0} is our own")]
    OwnAddress(IpAddr),
    /// Its Ethernet address is ours.
    #[error("Ethernet address {0} is our own")]
    OwnMac(MacAddr),
}

/// What an address is to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Covered {
    /// One of its own.
    HostAddress,
    /// A gateway of one of its routes.
    NextHop,
    /// The lease store's.
    Store,
}

impl std::fmt::Display for Covered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HostAddress => "an address of this node",
            Self::NextHop => "a next hop of this node",
            Self::Store => "the lease store's address",
        })
    }
}

impl Reason {
    /// The rule's name in short, to count by.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadable",
            Self::TooLarge(_) => "too-large",
            Self::WrongType { .. } => "wrong-type",
            Self::NoSubnet => "no-subnet",
            Self::OutsideNetwork { .. } => "outside-network",
            Self::WrongLength { .. } => "wrong-length",
            Self::OutsidePool { .. } => "outside-pool",
            Self::NoPublicAddress(_) => "no-public-address",
            Self::NotUnicast(_) => "not-unicast",
            Self::PublicInsideNetwork { .. } => "public-inside-network",
            Self::BackendData(_) => "backend-data",
            Self::BadMac(_) => "bad-mac",
            Self::Overlap { .. } => "overlap",
            Self::SameMac { .. } => "same-mac",
            Self::OverlapsOwn { .. } => "overlaps-own",
            Self::Covers { .. } => "covers-address",
            Self::CoversConnected { .. } => "covers-connected",
            Self::OwnAddress(_) => "own-address",
            Self::OwnMac(_) => "own-mac",
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) | Self::TooLarge(_) | Self::NoSubnet => {
                "delete the record if no node wrote it, else restart that node's agent"
            }
            Self::WrongType { .. } => "run one backend on all nodes, and restart the agent that wrote the record",
            Self::OutsideNetwork { .. } | Self::WrongLength { .. } | Self::OutsidePool { .. } => {
                "restart that node's agent with the present configuration, or delete the record if the node is gone"
            }
            Self::NoPublicAddress(_) | Self::NotUnicast(_) => {
                "give that node's agent a public address that other nodes can send to"
            }
            Self::PublicInsideNetwork { .. } => "choose a network that contains no address of a node",
            Self::BackendData(_) | Self::BadMac(_) => "restart that node's agent: it publishes its data anew",
            Self::Overlap { .. } | Self::SameMac { .. } => {
                "delete the younger record, or the older one if its node is gone"
            }
            Self::OverlapsOwn { .. } | Self::OwnAddress(_) | Self::OwnMac(_) => {
                "find the node that says so: two nodes must not be one; delete its record if it is gone"
            }
            Self::Covers { .. } | Self::CoversConnected { .. } => {
                "delete the record, and choose a network that contains nothing of the nodes' own"
            }
        }
    }
}
