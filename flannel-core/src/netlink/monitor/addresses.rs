//! The addresses of the host, as last heard of.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::kernel::{HostAddress, HostFacts};
use crate::net::{Prefix, is_automatic};

/// Those that the kernel does not give by itself, and no more than [`HostFacts::MOST_ADDRESSES`]. Of others every change
/// is news.
#[derive(Debug, Clone, Default)]
pub(super) struct Addresses {
    known: BTreeMap<(u32, IpAddr, u8), Lifetime>,
}

/// What of an address's flags anybody looks at: refreshed lifetimes are not news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lifetime {
    permanent: bool,
    temporary: bool,
    deprecated: bool,
}

impl Addresses {
    /// Takes in that an address is there, or no more. Whether that is news.
    pub(super) fn is_news(&mut self, seen: &HostAddress, there: bool) -> bool {
        if is_automatic(seen.addr) {
            return false;
        }
        let HostAddress { link, addr, len, permanent, temporary, deprecated } = *seen;
        let (id, lifetime) = ((link, addr, len), Lifetime { permanent, temporary, deprecated });
        let room = self.known.len() < HostFacts::MOST_ADDRESSES;
        let before = match there {
            true if room || self.known.contains_key(&id) => self.known.insert(id, lifetime),
            true => None,
            false => self.known.remove(&id),
        };
        // Duplicate address detection and router advertisements repeat what is known.
        if there { before != Some(lifetime) } else { before.is_some() || !room }
    }

    /// A link is gone, and its addresses with it.
    pub(super) fn forget(&mut self, index: u32) {
        self.known.retain(|(link, ..), _| *link != index);
    }

    /// Those of a link.
    pub(super) fn of(&self, index: u32) -> impl Iterator<Item = IpAddr> {
        let from = self.known.range((index, IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)..);
        from.take_while(move |((link, ..), _)| *link == index).map(|((_, addr, _), _)| *addr)
    }

    /// Whether `prefix` lies in that of an address.
    pub(super) fn connect(&self, prefix: &Prefix) -> bool {
        self.known.keys().any(|(_, addr, len)| {
            *len <= prefix.len() && Prefix::masked(*addr, *len).is_ok_and(|connected| connected.covers(prefix))
        })
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }
}
