//! Checks of the packet path, for fuzz targets and property tests. Each panics where a property fails.

use crate::path::checks;

/// A header of the TUN, then a packet: what it is split into are packets, and no more than is said.
pub fn split(bytes: &[u8]) {
    checks::split(bytes);
}

/// How many packets are received at a time, what is merged, and packets, each after its length in two bytes and a byte whose
/// lowest bit says whether its checksums are made right: splitting gives back what was coalesced, in order for each flow.
pub fn coalesce(bytes: &[u8]) {
    checks::coalesce(bytes);
}

/// A packet: its header is read and edited, and it is answered.
pub fn header(bytes: &[u8]) {
    checks::header(bytes);
}
