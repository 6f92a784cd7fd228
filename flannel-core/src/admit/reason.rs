//! Why a record is no peer.

use std::net::IpAddr;

use crate::backend::Skip;
use crate::lease::{BadRecord, LeaseAttrs, LeaseKey, MAX_RECORDS};
use crate::net::{Family, MacAddr, Prefix};
use crate::text::Plain;

/// The rule a record breaks, with the value that breaks it. Its writer has to mend it; nothing is to be retried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// It does not parse. The text is empty where there are too many such records to keep one of each.
    #[error("unreadable: {}", Plain(if .0.is_empty() { "there are too many such records to keep a text of each" } else { .0 }))]
    Unreadable(String),
    /// The store holds more than [`MAX_RECORDS`], and older ones.
    #[error("the store holds more than {MAX_RECORDS} records, and this is one of the youngest")]
    TooMany,
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
    /// Its subnet is the whole network.
    #[error("subnet {0} is the whole network")]
    WholeNetwork(Prefix),
    /// Its subnet has no room for pods.
    #[error("subnet {subnet} is longer than /{longest}")]
    TooSmall {
        /// The record's.
        subnet: Prefix,
        /// The longest prefix of its family, in bits.
        longest: u8,
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
    /// Its MAC address is zero or a group's.
    #[error("MAC address {0} is not a device's own")]
    BadMac(MacAddr),
    /// Its subnet overlaps that of another record, which comes first.
    #[error("subnet {subnet} overlaps {other}, which the record {with} holds")]
    Overlap {
        /// The record's.
        subnet: Prefix,
        /// The other's.
        other: Prefix,
        /// The other record.
        with: LeaseKey,
    },
    /// Its MAC address is that of another record, which comes first.
    #[error("MAC address {mac} is that of the record {with}")]
    SameMac {
        /// The address.
        mac: MacAddr,
        /// The other record.
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
    /// Its public address is the first or the last of a prefix that this node is connected to: no host has it.
    #[error("public address {addr} is no host's: it is the first or the last address of {connected}")]
    NoHost {
        /// The record's.
        addr: IpAddr,
        /// The prefix.
        connected: Prefix,
    },
    /// Its public address is ours.
    #[error("public address {0} is our own")]
    OwnAddress(IpAddr),
    /// Its MAC address is ours.
    #[error("MAC address {0} is our own")]
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
    /// The same with a text of bounded length.
    pub(super) fn cut(mut self) -> Self {
        if let Some(text) = self.text() {
            *text = BadRecord::cut(&*text);
        }
        self
    }

    /// What it quotes of the record, at length.
    pub(super) fn text(&mut self) -> Option<&mut String> {
        match self {
            Self::Unreadable(text) | Self::BackendData(Skip::BadData(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn has_text(&self) -> bool {
        matches!(self, Self::Unreadable(text) | Self::BackendData(Skip::BadData(text)) if !text.is_empty())
    }

    /// The rule's name in short, to count by.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadable",
            Self::TooMany => "too-many",
            Self::TooLarge(_) => "too-large",
            Self::WrongType { .. } => "wrong-type",
            Self::NoSubnet => "no-subnet",
            Self::OutsideNetwork { .. } => "outside-network",
            Self::WholeNetwork(_) => "whole-network",
            Self::TooSmall { .. } => "too-small",
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
            Self::NoHost { .. } => "no-host",
            Self::OwnAddress(_) => "own-address",
            Self::OwnMac(_) => "own-mac",
        }
    }

    /// Returns its kind in one word, as status pages name it. Stable.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unreadable(..) => "unreadable",
            Self::TooMany => "too_many",
            Self::TooLarge(..) => "too_large",
            Self::WrongType { .. } => "wrong_type",
            Self::NoSubnet => "no_subnet",
            Self::OutsideNetwork { .. } => "outside_network",
            Self::WholeNetwork(..) => "whole_network",
            Self::TooSmall { .. } => "too_small",
            Self::NoPublicAddress(..) => "no_public_address",
            Self::NotUnicast(..) => "not_unicast",
            Self::PublicInsideNetwork { .. } => "public_inside_network",
            Self::BackendData(..) => "backend_data",
            Self::BadMac(..) => "bad_mac",
            Self::Overlap { .. } => "overlap",
            Self::SameMac { .. } => "same_mac",
            Self::OverlapsOwn { .. } => "overlaps_own",
            Self::Covers { .. } => "covers",
            Self::CoversConnected { .. } => "covers_connected",
            Self::NoHost { .. } => "no_host",
            Self::OwnAddress(..) => "own_address",
            Self::OwnMac(..) => "own_mac",
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) | Self::TooLarge(_) | Self::NoSubnet => {
                "delete the record if no node wrote it, else restart that node's agent"
            }
            Self::WrongType { .. } => "run one backend on all nodes, and restart the agent that wrote the record",
            Self::TooMany => "delete the records that no node wrote",
            Self::OutsideNetwork { .. } | Self::WholeNetwork(_) | Self::TooSmall { .. } => {
                "restart that node's agent with the present configuration, or delete the record if the node is gone"
            }
            Self::NoPublicAddress(_) | Self::NotUnicast(_) | Self::NoHost { .. } => {
                "give that node's agent a public address that other nodes can send to"
            }
            Self::PublicInsideNetwork { .. } => "choose a network that contains no address of a node",
            Self::BackendData(_) | Self::BadMac(_) => "restart that node's agent: it publishes its data anew",
            Self::Overlap { .. } | Self::SameMac { .. } => {
                "delete the record whose node is gone, or restart the agent that wrote this one"
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
