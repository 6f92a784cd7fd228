//! The sockets: one for each family of the underlay, used in both directions.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flannel_core::net::{Dual, Family};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, socket};

use super::offload::{Offload, Offloads};
use super::sys;

/// A bound socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    local: SocketAddr,
    is_lost: AtomicBool,
}

/// The sockets in use.
pub(crate) type Sockets = Dual<Arc<Socket>>;

/// A socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The address does not belong to this node, at least not yet.
    #[error("{local} is no address of this node: give it to an interface, or select another one")]
    NotHere {
        /// The address.
        local: SocketAddr,
    },
    /// Another program uses the port, or a socket of this path does that is to be replaced and one of the two addresses
    /// is unspecified. In that case, close that socket first.
    #[error("{local} is in use: stop the program that `ss -ulpn sport = :{}` names, or set another $.Backend.Port on all nodes", local.port())]
    InUse {
        /// The address.
        local: SocketAddr,
    },
    /// The address family is not the one that the address was given for.
    #[error("{local} is of the other family")]
    Family {
        /// The address.
        local: SocketAddr,
    },
    /// Another error from the kernel.
    #[error("no socket for {local}")]
    Refused {
        /// The address.
        local: SocketAddr,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

impl SocketError {
    pub(crate) fn is_in_use(&self) -> bool {
        matches!(self, Self::InUse { .. })
    }
}

/// Socket buffer sizes, in bytes. The kernel may grant less without `CAP_NET_ADMIN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Buffers {
    /// For received data that has not been read.
    pub receive: usize,
    /// For data to be sent.
    pub send: usize,
}

impl Buffers {
    /// Sets both sizes, in bytes.
    pub fn new(receive: usize, send: usize) -> Self {
        Self { receive, send }
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self { receive: 8 << 20, send: 4 << 20 }
    }
}

/// Binds a socket and closes it, in the network namespace of the calling thread.
pub(crate) fn check(local: SocketAddr, family: Family) -> Result<(), SocketError> {
    if Family::of(local.ip()) != family {
        return Err(SocketError::Family { local });
    }
    Socket::bind(local, Buffers::default(), &Offloads::default()).map(drop)
}

impl Socket {
    /// Binds a socket in the network namespace of the calling thread.
    pub(crate) fn bind(local: SocketAddr, buffers: Buffers, offloads: &Offloads) -> Result<Self, SocketError> {
        let failed = |errno: Errno| match errno {
            Errno::EADDRNOTAVAIL => SocketError::NotHere { local },
            Errno::EADDRINUSE => SocketError::InUse { local },
            errno => SocketError::Refused { local, source: errno.into() },
        };
        let family = if local.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(family, SockType::Datagram, flags, None).map_err(failed)?;
        let set = |level, name, value| sys::set_option(fd.as_fd(), level, name, value);
        match local.ip() {
            // Datagrams are fragmented if the path requires it, as with Go flannel.
            IpAddr::V4(_) => set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_WANT).map_err(failed)?,
            IpAddr::V6(_) => {
                set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1).map_err(failed)?;
                set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_WANT).map_err(failed)?;
            }
        }
        let size = |size: usize| i32::try_from(size / 2).unwrap_or(i32::MAX / 2);
        let buffer = |forced, normal, bytes| {
            // The kernel doubles the given value. A smaller buffer than requested is not an error.
            let level = libc::SOL_SOCKET;
            let _ = set(level, forced, size(bytes)).or_else(|_| set(level, normal, size(bytes)));
        };
        buffer(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, buffers.receive);
        buffer(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, buffers.send);
        set_offloads(fd.as_fd(), offloads);
        bind(fd.as_raw_fd(), &SockaddrStorage::from(local)).map_err(failed)?;
        Ok(Self { fd, local, is_lost: AtomicBool::new(false) })
    }

    /// Returns the number of messages that the kernel dropped instead of receiving them, as in
    /// [`Counters::overflowed`](super::Counters::overflowed).
    pub(crate) fn overflowed(&self) -> u64 {
        // Kernels before 4.12 do not report it.
        sys::overflowed(self.fd.as_fd()).map_or(0, u64::from)
    }

    /// Records that another process destroyed it (`ss --kill`). The kernel reports that only once, to the thread that
    /// sends or receives first.
    pub(crate) fn set_lost(&self) {
        self.is_lost.store(true, Ordering::Release);
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Acquire)
    }

    /// Returns the bound address and port.
    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sets the socket's offloads, and degrades those that the kernel lacks.
fn set_offloads(socket: BorrowedFd<'_>, offloads: &Offloads) {
    // Each message says its segment size, and zero is that of the others. The option is set to learn whether the kernel
    // knows it: kernels before 4.18 ignore what a message says, and would send a run as one datagram.
    let options = [(Offload::UdpSegment, libc::UDP_SEGMENT, 0), (Offload::UdpGro, libc::UDP_GRO, 1)];
    for (what, name, value) in options {
        if offloads.has(what)
            && let Err(errno) = sys::set_option(socket, libc::SOL_UDP, name, value)
        {
            offloads.degrade(what, errno);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::{getsockopt, sockopt};
    use testkit::Namespace;

    use super::*;

    #[test]
    fn an_offload_that_the_kernel_does_not_know_is_not_used() {
        // It refuses the options of UDP, as the sockets of an old kernel do.
        let old = UnixDatagram::unbound().unwrap();
        let offloads = Offloads::default();
        set_offloads(old.as_fd(), &offloads);
        let missing: Vec<_> = offloads.list().iter().map(|degraded| degraded.what).collect();
        assert_eq!(missing, [Offload::UdpSegment, Offload::UdpGro]);
        assert!(!offloads.has_udp_segment());
    }

    #[test]
    fn a_bound_socket_has_all_offloads_and_cuts_only_messages_that_say_so() {
        let ns = Namespace::new("offloads").unwrap();
        let (local, offloads) = (SocketAddr::from(([127, 0, 0, 1], 8285)), Offloads::default());
        let socket = ns.run(|| Socket::bind(local, Buffers::default(), &offloads).unwrap()).unwrap();
        assert!(offloads.list().is_empty() && offloads.has_udp_segment());
        assert_eq!(getsockopt(&socket, sockopt::UdpGsoSegment), Ok(0));
    }
}
