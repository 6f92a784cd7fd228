//! Socket addresses in the kernel's format.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// Room for an address of either family.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Address {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Address {
    /// The largest length, in bytes.
    pub(super) const ROOM: libc::socklen_t = size_of::<Self>() as libc::socklen_t;

    pub(super) fn none() -> Self {
        // SAFETY: all fields are numbers, which may be zero.
        unsafe { std::mem::zeroed() }
    }

    /// Returns the address and its length in bytes.
    pub(super) fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
        let mut made = Self::none();
        match address {
            SocketAddr::V4(address) => {
                // SAFETY: as in `none`.
                let mut v4: libc::sockaddr_in = unsafe { std::mem::zeroed() };
                v4.sin_family = libc::AF_INET as libc::sa_family_t;
                v4.sin_port = address.port().to_be();
                v4.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
                made.v4 = v4;
                (made, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(address) => {
                // SAFETY: as in `none`.
                let mut v6: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
                v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                v6.sin6_port = address.port().to_be();
                v6.sin6_addr.s6_addr = address.ip().octets();
                v6.sin6_scope_id = address.scope_id();
                made.v6 = v6;
                (made, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// Reads what the kernel wrote, without flow information and scope.
    pub(super) fn read(&self) -> Option<SocketAddr> {
        // SAFETY: any bytes are a value of each of the fields, the whole was initialised, and a family is at the
        // beginning of all of them.
        match i32::from(unsafe { self.family }) {
            libc::AF_INET => {
                // SAFETY: as above.
                let v4 = unsafe { self.v4 };
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddr::new(ip.into(), u16::from_be(v4.sin_port)))
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let v6 = unsafe { self.v6 };
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                Some(SocketAddr::new(ip.into(), u16::from_be(v6.sin6_port)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_was_written() {
        for text in ["192.0.2.7:8285", "[2001:db8::7]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(Address::new(address).0.read(), Some(address));
        }
        assert_eq!(Address::none().read(), None);
    }
}
