//! What the kernel does for many packets at once, and what of it is missing here.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A thing that makes the path fast. Each is done without where it is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Offload {
    /// The TUN says what each packet is (`IFF_VNET_HDR`). The others on the TUN need it.
    VnetHeader,
    /// The TUN hands over TCP in super-packets, and checksums that are not finished.
    TunTcp,
    /// The TUN hands over UDP in super-packets, and takes them: kernels from 6.2 on.
    TunUdp,
    /// The TUN takes super-packets.
    TunSuperPackets,
    /// The socket sends many datagrams at once (`UDP_SEGMENT`).
    UdpSegment,
    /// The socket receives many datagrams at once (`UDP_GRO`).
    UdpGro,
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VnetHeader => "packet headers of the TUN",
            Self::TunTcp => "TCP segmentation at the TUN",
            Self::TunUdp => "UDP segmentation at the TUN",
            Self::TunSuperPackets => "writing super-packets to the TUN",
            Self::UdpSegment => "UDP segmentation offload of the socket",
            Self::UdpGro => "UDP receive offload of the socket",
        })
    }
}

/// An offload that is done without.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Degraded {
    /// Which.
    pub what: Offload,
    /// What the kernel said.
    pub because: String,
}

/// Which offloads are not used: each is listed, and not used again for as long as the path lives.
#[derive(Debug, Default)]
pub(crate) struct Offloads {
    is_udp_segment_off: AtomicBool,
    degraded: Mutex<Vec<Degraded>>,
}

impl Offloads {
    pub(crate) fn new(degraded: &[Degraded]) -> Self {
        let offloads = Self::default();
        for Degraded { what, because } in degraded {
            offloads.degrade(*what, because);
        }
        offloads
    }

    /// Stops using an offload. Returns whether it was used until now.
    pub(crate) fn degrade(&self, what: Offload, because: impl fmt::Display) -> bool {
        if what == Offload::UdpSegment {
            self.is_udp_segment_off.store(true, Ordering::Relaxed);
        }
        let mut degraded = self.degraded.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = degraded.iter().all(|known| known.what != what);
        if is_new {
            degraded.push(Degraded { what, because: because.to_string() });
        }
        is_new
    }

    /// Whether an offload is used, as far as is known. Not for each packet.
    pub(crate) fn has(&self, what: Offload) -> bool {
        let degraded = self.degraded.lock().unwrap_or_else(PoisonError::into_inner);
        degraded.iter().all(|known| known.what != what)
    }

    /// Whether the sockets send many datagrams at once.
    pub(crate) fn has_udp_segment(&self) -> bool {
        !self.is_udp_segment_off.load(Ordering::Relaxed)
    }

    pub(crate) fn list(&self) -> Vec<Degraded> {
        self.degraded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
