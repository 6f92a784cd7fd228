//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property does not hold.

/// Checks the parser of the networks file beside `subnet.env`.
pub fn former_networks(text: &str) {
    crate::overlay::check_former_networks(text);
}

/// Checks the parser of datagrams from the kernel.
#[cfg(all(target_os = "linux", feature = "netlink"))]
pub fn datagram(bytes: &[u8]) {
    crate::netlink::check_datagram(bytes);
}
