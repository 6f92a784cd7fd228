//! Checks of parsers that are not public, for fuzz targets and property tests. Each panics where a law does not hold.

/// The networks beside `subnet.env`.
pub fn places(text: &str) {
    crate::overlay::check_places(text);
}

/// A state file of the store [`STATE_ORIGIN`].
pub fn state_file(bytes: &[u8]) {
    crate::subnet::check_state_file(bytes);
}

/// The store of the state files that [`state_file`] reads.
pub const STATE_ORIGIN: &str = "etcd";

/// A datagram from the kernel.
#[cfg(all(target_os = "linux", feature = "netlink"))]
pub fn datagram(bytes: &[u8]) {
    crate::netlink::check_datagram(bytes);
}
