//! Checks of parsers that are not public, for fuzz targets and property tests. Each panics where a property fails.

/// The networks beside `subnet.env`.
pub fn former_networks(text: &str) {
    crate::overlay::check_former_networks(text);
}

/// A datagram from the kernel.
#[cfg(all(target_os = "linux", feature = "netlink"))]
pub fn datagram(bytes: &[u8]) {
    crate::netlink::check_datagram(bytes);
}
