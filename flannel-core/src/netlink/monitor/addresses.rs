//! The addresses of the host, as last heard of.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::kernel::{HostAddress, HostFacts};
use crate::net::{Family, Prefix, is_automatic};

/// Those that the kernel does not give by itself, no more than [`HostFacts::MOST_ADDRESSES`], and of one family on one
/// link no more than [`HostFacts::MOST_OF_A_LINK`]. Of others every change is news.
#[derive(Debug, Clone, Default)]
pub(super) struct Addresses {
    known: BTreeMap<(u32, IpAddr, u8), Lifetime>,
    /// How many of each link and family are known.
    counts: BTreeMap<(u32, Family), usize>,
    /// Whether there were ever more than are kept.
    left_out: bool,
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
        let holder = (link, Family::of(addr));
        let count = self.counts.get(&holder).copied().unwrap_or_default();
        if !there {
            let was_known = self.known.remove(&id).is_some();
            match count - usize::from(was_known) {
                0 => drop(self.counts.remove(&holder)),
                left => drop(self.counts.insert(holder, left)),
            }
            return was_known || self.left_out;
        }
        if let Some(known) = self.known.get_mut(&id) {
            // Duplicate address detection and router advertisements repeat what is known.
            return std::mem::replace(known, lifetime) != lifetime;
        }
        if self.known.len() < HostFacts::MOST_ADDRESSES && count < HostFacts::MOST_OF_A_LINK {
            self.known.insert(id, lifetime);
            self.counts.insert(holder, count + 1);
        } else {
            self.left_out = true;
        }
        true
    }

    /// A link is gone, and its addresses with it.
    pub(super) fn forget(&mut self, index: u32) {
        self.known.retain(|(link, ..), _| *link != index);
        self.counts.retain(|(link, _), _| *link != index);
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
    pub(super) fn counts(&self) -> &BTreeMap<(u32, Family), usize> {
        &self.counts
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }
}
