//! The routing table of the fake kernel.

use super::*;

pub(super) enum Announce {
    Yes,
    No,
}

impl Tables {
    pub(in super::super) fn add_route(&mut self, slot: Slot, entry: Entry, placement: Placement) -> Outcome {
        self.check_route(slot, &entry)?;
        let notice = self.notice_of(slot, &entry);
        if placement == Placement::Replace && !self.routes.contains_key(&slot) {
            return Err(ENOENT);
        }
        let family = slot.prefix.family();
        let entries = self.routes.entry(slot).or_default();
        let merges =
            family == Family::V6 && entry.can_have_siblings() && entries.first().is_some_and(Entry::can_have_siblings);
        match placement {
            Placement::Exclusive if entries.is_empty() => entries.push(entry),
            Placement::Exclusive => return Err(EEXIST),
            // The kernel compares only prefix, TOS and metric (docs/kernel-facts.md, "IPv4 replace", "Route keys are
            // not unique").
            Placement::Replace => entries[0] = entry,
            Placement::Append | Placement::Prepend
                if entries.iter().any(|other| other.is_same_route(&entry, family)) =>
            {
                return Err(EEXIST);
            }
            Placement::Append | Placement::Prepend if merges => {
                entries[0].siblings.push(entry);
            }
            Placement::Append => entries.push(entry),
            Placement::Prepend => entries.insert(0, entry),
        }
        self.notices.push(notice);
        Ok(())
    }

    /// Returns whether any route except the default route leads to an IPv6 address through another interface
    /// (docs/kernel-facts.md, "IPv6 onlink gateways").
    fn leads_elsewhere(&self, gateway: IpAddr, index: u32) -> bool {
        if gateway.is_ipv4() {
            return false;
        }
        let covering = (1..=128).rev().filter_map(|len| Prefix::masked(gateway, len).ok());
        let to = |prefix| {
            let slot = |metric| Slot { prefix, table: MAIN, metric };
            self.routes.range(slot(0)..=slot(u32::MAX)).flat_map(|(_, entries)| entries).next()
        };
        let best = covering.filter_map(to).next();
        best.is_some_and(|entry| entry.kind != RouteKind::Blackhole && entry.link != Some(index))
    }

    fn check_route(&self, slot: Slot, entry: &Entry) -> Outcome {
        if entry.source.is_some_and(|source| !self.addresses.iter().any(|address| address.addr == source)) {
            return Err(EINVAL);
        }
        if entry.kind == RouteKind::Blackhole {
            return Ok(());
        }
        let Some(index) = entry.link else { return Err(ENODEV) };
        let link = self.links.get(&index).ok_or(ENODEV)?;
        if !link.up {
            return Err(ENETDOWN);
        }
        let Some(gateway) = entry.gateway else { return Ok(()) };
        if entry.onlink {
            let own = self.addresses.iter().any(|address| address.addr == gateway);
            return if own || self.leads_elsewhere(gateway, index) { Err(EINVAL) } else { Ok(()) };
        }
        let link_local = matches!(gateway, IpAddr::V6(addr) if addr.is_unicast_link_local());
        let reached = self.routes.iter().any(|(other, entries)| {
            let through = |entry: &Entry| entry.gateway.is_none() && entry.link == Some(index);
            other.table == MAIN && other.prefix.contains(gateway) && entries.iter().any(through)
        });
        match (reached || link_local, slot.prefix.family()) {
            (true, _) => Ok(()),
            (false, Family::V4) => Err(ENETUNREACH),
            (false, Family::V6) => Err(EHOSTUNREACH),
        }
    }

    /// Deletes a route that matches in full: another protocol or next hop is another route (docs/kernel-facts.md,
    /// "Replace and exclusive create", "IPv4 replace").
    pub(in super::super) fn delete_route(&mut self, slot: Slot, entry: &Entry) -> Outcome {
        let family = slot.prefix.family();
        let entries = self.routes.get_mut(&slot).ok_or(ESRCH)?;
        if let Some(place) = entries.iter().position(|other| !other.is_multipath() && other.is_asked_for(entry, family))
        {
            entries.remove(place);
        } else if !take_next_hop(entries, entry) {
            return Err(ESRCH);
        }
        self.sweep(slot, entry);
        Ok(())
    }

    pub(in super::super) fn flush_main(&mut self, family: Family) {
        let mut routes = std::mem::take(&mut self.routes);
        routes.retain(|slot, entries| {
            let keep = slot.table != MAIN || slot.prefix.family() != family;
            if !keep {
                let gone: Vec<_> = entries.iter().map(|entry| self.notice_of(*slot, entry)).collect();
                self.notices.extend(gone);
            }
            keep
        });
        self.routes = routes;
    }

    pub(super) fn drop_routes_through(&mut self, link: u32, family: Family, announce: Announce) {
        let mut routes = std::mem::take(&mut self.routes);
        routes.retain(|slot, entries| {
            if slot.prefix.family() != family {
                return true;
            }
            entries.retain_mut(|entry| {
                let before = entry.siblings.len();
                let notice = self.notice_of(*slot, entry);
                entry.siblings.retain(|sibling| sibling.link != Some(link));
                let keep = entry.link != Some(link) || entry.promote();
                if (!keep || entry.siblings.len() < before) && matches!(announce, Announce::Yes) {
                    self.notices.push(notice);
                }
                keep
            });
            !entries.is_empty()
        });
        self.routes = routes;
    }

    /// The host has lost an address: IPv4 routes of the main table with this source are deleted; IPv6 routes lose the
    /// source without a notification (docs/kernel-facts.md, "Sources of routes").
    pub(super) fn drop_source(&mut self, addr: IpAddr) {
        let mut routes = std::mem::take(&mut self.routes);
        for (slot, entries) in &mut routes {
            if addr.is_ipv4() && slot.table == MAIN {
                let gone = entries.extract_if(.., |entry| entry.source == Some(addr));
                self.notices.extend(gone.map(|entry| self.notice_of(*slot, &entry)).collect::<Vec<_>>());
            } else if addr.is_ipv6() {
                entries.iter_mut().filter(|entry| entry.source == Some(addr)).for_each(|entry| entry.source = None);
            }
        }
        routes.retain(|_, entries| !entries.is_empty());
        self.routes = routes;
    }

    pub(super) fn sweep(&mut self, slot: Slot, entry: &Entry) {
        self.notices.push(self.notice_of(slot, entry));
        if self.routes.get(&slot).is_some_and(Vec::is_empty) {
            self.routes.remove(&slot);
        }
    }
}

/// Removes one sibling of a multipath route, as a deletion by next hop does.
fn take_next_hop(entries: &mut [Entry], wanted: &Entry) -> bool {
    for entry in entries.iter_mut().filter(|entry| entry.is_multipath()) {
        if entry.is_same_hop(wanted) {
            return entry.promote();
        }
        if let Some(place) = entry.siblings.iter().position(|sibling| sibling.is_same_hop(wanted)) {
            entry.siblings.remove(place);
            return true;
        }
    }
    false
}
