//! Why a record is not a peer.

use std::net::IpAddr;

use crate::backend::Skip;
use crate::lease::{BadRecord, LeaseAttrs, LeaseKey, MAX_RECORDS};
use crate::net::{Family, MacAddr, Prefix};
use crate::text::Plain;

/// The rule that a record violates, with the offending value. The record's writer has to correct it; do not retry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// It does not parse. The text is empty if there are too many such records to keep each text.
    #[error("unreadable: {}", Plain(if .0.is_empty() { "there are too many such records to keep a text of each" } else { .0 }))]
    Unreadable(String),
    /// The store has more than [`MAX_RECORDS`] records, and this is one of the youngest.
    #[error("the store holds more than {MAX_RECORDS} records, and this is one of the youngest")]
    TooMany,
    /// It is larger than [`LeaseAttrs::MAX_BYTES`].
    #[error("record of {0} bytes is larger than {max}", max = LeaseAttrs::MAX_BYTES)]
    TooLarge(usize),
    /// It is for another backend.
    #[error("backend type is {found:?}, ours is {expected:?}")]
    WrongType {
        /// The record's backend type.
        found: String,
        /// This node's [`wire_type`](crate::backend::Backend::wire_type).
        expected: &'static str,
    },
    /// It has no subnet in any family in use.
    #[error("has no subnet in any enabled family")]
    NoSubnet,
    /// Its subnet is not in the network.
    #[error("subnet {subnet} is outside the network {network}")]
    OutsideNetwork {
        /// The record's subnet.
        subnet: Prefix,
        /// The network.
        network: Prefix,
    },
    /// Its subnet is the whole network.
    #[error("subnet {0} is the whole network")]
    WholeNetwork(Prefix),
    /// Its subnet is too small for pods.
    #[error("subnet {subnet} is longer than /{longest}")]
    TooSmall {
        /// The record's subnet.
        subnet: Prefix,
        /// The longest prefix of its family, in bits.
        longest: u8,
    },
    /// It has a subnet of the family but no public address.
    #[error("has an {0} subnet but no public {0} address")]
    NoPublicAddress(Family),
    /// Its public address is unspecified, loopback, link-local, multicast or broadcast.
    #[error("public address {0} is not one that can be sent to")]
    NotUnicast(IpAddr),
    /// Its public address is in the pod network.
    #[error("public address {addr} is inside the network {network}")]
    PublicInsideNetwork {
        /// The record's public address.
        addr: IpAddr,
        /// The network.
        network: Prefix,
    },
    /// Its backend data does not parse.
    #[error("{0}")]
    BackendData(Skip),
    /// Its MAC address is zero or a group address.
    #[error("MAC address {0} is zero or a group address")]
    BadMac(MacAddr),
    /// Its subnet overlaps that of another record, which takes precedence.
    #[error("subnet {subnet} overlaps {other} of the record {with}")]
    Overlap {
        /// The record's subnet.
        subnet: Prefix,
        /// The other record's subnet.
        other: Prefix,
        /// The other record.
        with: LeaseKey,
    },
    /// Its MAC address is that of another record, which takes precedence.
    #[error("MAC address {mac} is also in the record {with}")]
    SameMac {
        /// The MAC address.
        mac: MacAddr,
        /// The other record.
        with: LeaseKey,
    },
    /// Its subnet overlaps this node's own.
    #[error("subnet {subnet} overlaps this node's own {own}")]
    OverlapsOwn {
        /// The record's subnet.
        subnet: Prefix,
        /// This node's subnet.
        own: Prefix,
    },
    /// Its subnet contains an address that this node needs.
    #[error("subnet {subnet} contains {addr}, {what}")]
    Covers {
        /// The record's subnet.
        subnet: Prefix,
        /// The address in it.
        addr: IpAddr,
        /// What the address is to this node.
        what: Covered,
    },
    /// Its subnet equals or contains a prefix that this node is connected to.
    #[error("subnet {subnet} would hide the connected prefix {connected}")]
    CoversConnected {
        /// The record's subnet.
        subnet: Prefix,
        /// The connected prefix.
        connected: Prefix,
    },
    /// Its public address is the first or last address of a prefix that this node is connected to, which no host can
    /// have.
    #[error("public address {addr} is the first or the last address of {connected}, which no host can have")]
    NoHost {
        /// The record's public address.
        addr: IpAddr,
        /// The connected prefix.
        connected: Prefix,
    },
    /// Its public address is this node's own.
    #[error("public address {0} is this node's own")]
    OwnAddress(IpAddr),
    /// Its MAC address is this node's own.
    #[error("MAC address {0} is this node's own")]
    OwnMac(MacAddr),
}

/// The role of an address on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Covered {
    /// An address of the node.
    HostAddress,
    /// A next hop of one of the node's routes.
    NextHop,
    /// An address of the lease store.
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
    /// Returns the same reason with its text cut to a bounded length.
    pub(super) fn cut(mut self) -> Self {
        if let Some(text) = self.text() {
            *text = BadRecord::cut(&*text);
        }
        self
    }

    /// Returns the text that may quote a long part of the record.
    pub(super) fn text(&mut self) -> Option<&mut String> {
        match self {
            Self::Unreadable(text) | Self::BackendData(Skip::BadData(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn has_text(&self) -> bool {
        matches!(self, Self::Unreadable(text) | Self::BackendData(Skip::BadData(text)) if !text.is_empty())
    }

    /// Returns the short name of the rule, for counters.
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

    /// Returns the kind as one word, as status pages show it. Stable.
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

    /// Returns what to do about it.
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
            Self::BackendData(_) | Self::BadMac(_) => "restart that node's agent, which publishes its data again",
            Self::Overlap { .. } | Self::SameMac { .. } => {
                "delete the record whose node is gone, or restart the agent that wrote this one"
            }
            Self::OverlapsOwn { .. } | Self::OwnAddress(_) | Self::OwnMac(_) => {
                "two nodes publish the same: give one another name or address, or delete the record if its node is gone"
            }
            Self::Covers { .. } | Self::CoversConnected { .. } => {
                "delete the record, and choose a network that contains no address or route of the nodes"
            }
        }
    }
}
