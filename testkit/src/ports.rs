//! Ports for servers on the loopback.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Error;

/// Returns free ports below the kernel's range for outgoing connections, so that they stay free while a server is down.
pub(crate) fn free<const N: usize>() -> Result<[u16; N], Error> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Parallel test processes begin at different ports.
    let start = std::process::id().wrapping_mul(61);
    let mut found = Vec::new();
    for _ in 0..10_000 {
        let number = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        let port = 20_000 + u16::try_from(number).unwrap_or_default();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            found.push(port);
        }
        if let Ok(ports) = <[u16; N]>::try_from(found.as_slice()) {
            return Ok(ports);
        }
    }
    Err(Error::new("no free ports between 20000 and 32000"))
}
