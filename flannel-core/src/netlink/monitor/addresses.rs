//! The last known addresses of the host.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::kernel::{HostAddress, HostFacts};
use crate::net::{Family, Prefix, is_automatic};

/// Addresses that the kernel does not assign by itself: at most [`HostFacts::MOST_ADDRESSES`], and at most
/// [`HostFacts::MOST_OF_A_LINK`] of one family on one link. Every change of an address beyond that is reported.
#[derive(Debug, Clone, Default)]
pub(super) struct Addresses {
    known: BTreeMap<(u32, IpAddr, u8), Lifetime>,
    /// How many addresses of each link and family are known.
    counts: BTreeMap<(u32, Family), usize>,
    /// Whether addresses were ever left out.
    left_out: bool,
}

/// The relevant flags of an address: a refreshed lifetime is not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lifetime {
    permanent: bool,
    temporary: bool,
    deprecated: bool,
}

impl Addresses {
    /// Records that an address exists or was deleted. Returns whether that is a change.
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
            // Duplicate address detection and router advertisements repeat known addresses.
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

    /// Removes the addresses of a deleted link.
    pub(super) fn forget(&mut self, index: u32) {
        self.known.retain(|(link, ..), _| *link != index);
        self.counts.retain(|(link, _), _| *link != index);
    }

    /// Returns the addresses of a link.
    pub(super) fn of(&self, index: u32) -> impl Iterator<Item = IpAddr> {
        let from = self.known.range((index, IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)..);
        from.take_while(move |((link, ..), _)| *link == index).map(|((_, addr, _), _)| *addr)
    }

    /// Returns whether `prefix` is inside the prefix of an address.
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
