//! The packet path: from a TUN to peers and back.
#![expect(dead_code, reason = "the threads that use it are still to come")]

mod admit;
mod checksum;
mod coalesce;
mod counters;
mod header;
mod icmp;
mod offload;
mod outbox;
#[cfg(test)]
mod packets;
#[cfg(test)]
mod properties;
mod socket;
mod split;
#[expect(unused_imports, reason = "the threads that use it are still to come")]
mod sys;
mod table;
mod tun;

pub use counters::{Counters, Reason, Traffic};
pub use offload::{Degraded, Offload};
pub use socket::{Buffers, SocketError};
pub use table::Table;
pub use tun::{OpenMode, Tun, TunError};
