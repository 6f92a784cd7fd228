//! Kernel offloads for many packets at once, and which of them are not available.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A kernel offload that makes the path faster. The path works without each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Offload {
    /// The TUN describes each packet in a header (`IFF_VNET_HDR`). The other TUN offloads need it.
    VnetHeader,
    /// The TUN passes TCP in super-packets and with unfinished checksums.
    TunTcp,
    /// The TUN passes and accepts UDP in super-packets: kernel 6.2 or later.
    TunUdp,
    /// The TUN accepts super-packets.
    TunSuperPackets,
    /// The socket sends many datagrams in one message (`UDP_SEGMENT`).
    UdpSegment,
    /// The socket receives many datagrams in one message (`UDP_GRO`).
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

/// An offload that is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Degraded {
    /// The offload.
    pub(crate) what: Offload,
    /// The reason, such as the kernel's error.
    pub(crate) because: String,
}

/// The offloads that are not used. An offload that is listed is not used again during the life of the path.
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

    /// Stops using an offload. Returns whether it was in use.
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

    /// Whether an offload is in use. Too slow to call for each packet.
    pub(crate) fn has(&self, what: Offload) -> bool {
        let degraded = self.degraded.lock().unwrap_or_else(PoisonError::into_inner);
        degraded.iter().all(|known| known.what != what)
    }

    /// Whether the sockets send many datagrams in one message.
    pub(crate) fn has_udp_segment(&self) -> bool {
        !self.is_udp_segment_off.load(Ordering::Relaxed)
    }

    pub(crate) fn list(&self) -> Vec<Degraded> {
        self.degraded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
