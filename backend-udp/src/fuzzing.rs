//! Checks of the packet path for fuzz targets and property tests. Each panics if a property fails.

use crate::path::checks;

/// Splits a packet that follows a TUN header, and checks that the parts are valid packets within the stated limits.
pub fn split(bytes: &[u8]) {
    checks::split(bytes);
}

/// Checks that splitting returns the coalesced packets, in order for each flow. The input is the number of packets
/// received at a time, what is merged, and the packets, each preceded by its length in two bytes and a byte whose
/// lowest bit selects whether its checksums are corrected.
pub fn coalesce(bytes: &[u8]) {
    checks::coalesce(bytes);
}

/// Reads and edits the header of a packet, and answers the packet.
pub fn header(bytes: &[u8]) {
    checks::header(bytes);
}
