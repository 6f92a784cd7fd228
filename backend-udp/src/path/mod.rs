//! The packet path: from a TUN to peers and back.
#![expect(dead_code, reason = "the threads that use it are still to come")]

mod admit;
mod checksum;
mod coalesce;
mod counters;
mod header;
mod icmp;
mod outbox;
#[cfg(test)]
mod packets;
#[cfg(test)]
mod properties;
mod split;
mod table;

pub use counters::{Counters, Reason, Traffic};
pub use table::Table;
