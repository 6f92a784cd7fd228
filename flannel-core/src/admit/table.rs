//! The records with their indexes; [`conflicts`](super::conflicts) decides between them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::conflicts::Ground;
use super::index::Index;
use super::reason::Reason;
use crate::lease::{Lease, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Prefix};

/// All records, with indexes by key, age, subnet and MAC address.
pub(super) struct Table {
    /// The families in use. Values of other families are ignored.
    pub(super) families: [Option<Family>; 2],
    pub(super) entries: Vec<Entry>,
    free: Vec<u32>,
    by_key: Index,
    /// In the order of creation, then key.
    by_age: Index,
    /// In the order of subnet, then rank.
    pub(super) by_subnet: [Index; 2],
    /// In the order of MAC address, then rank.
    pub(super) by_mac: [Index; 2],
    /// How many subnets there are of each length: tells which wider ones to search.
    pub(super) lengths: BTreeMap<(Family, u8), u32>,
    /// Winners, whose subnets are disjoint, in the order of subnet.
    pub(super) won_subnets: [Index; 2],
    /// Winners, whose MAC addresses are distinct, in the order of MAC address.
    pub(super) won_macs: [Index; 2],
    /// Entries whose current version is not accepted, in the order of keys.
    troubled: Index,
    troubled_count: usize,
    /// The sum of [`Entry::weight`].
    weight: usize,
    /// Entries to be judged again.
    pub(super) pending: Vec<u32>,
    /// The subnets and addresses of removed winners, with the winners' ranks.
    pub(super) freed: Vec<(Ground, OwnedRank)>,
    /// Entries that had no accepted lease before this round, and may have one now.
    touched: Vec<u32>,
    /// Leases that were accepted before this round, and may no longer be.
    before: Vec<Arc<Lease>>,
    /// How many records were visited.
    #[cfg(test)]
    visits: AtomicUsize,
}

/// One record.
#[derive(Default)]
pub(super) struct Entry {
    /// The last version that is good in itself.
    pub(super) lease: Option<Arc<Lease>>,
    /// The current version, if it is bad.
    pub(super) bad: Option<Box<Bad>>,
    /// Order of creation of `lease`, or of `bad` if there is no lease.
    pub(super) created: u64,
    /// MAC addresses of `lease`, zero if absent: two bytes less per record than a [`Dual`].
    macs: [[u8; 6]; 2],
    /// How many records of ordinary size the entry counts as: the weight of the current version as the store listed it,
    /// however much of it is kept, plus that of a `lease` that is not the current version.
    pub(super) weight: u32,
    /// Whether this node can have `lease` as a peer.
    pub(super) suits: bool,
    /// Whether `lease` fits the pool.
    pub(super) fits: bool,
    /// Whether `lease` wins all its conflicts.
    pub(super) winner: bool,
    /// Whether it was a winner until this round, and has to be judged again.
    pub(super) was_winner: bool,
    /// Whether it is queued to be judged.
    pub(super) queued: bool,
    /// Whether it is in the indexes.
    linked: bool,
    touched: bool,
    /// Whether the current version is not accepted.
    troubled: bool,
}

/// A version that is bad in itself.
pub(super) struct Bad {
    pub(super) key: LeaseKey,
    pub(super) reason: Reason,
    pub(super) subnets: Dual<Prefix>,
    pub(super) public: Dual<IpAddr>,
    /// Those of `subnets` that [`Withheld`](super::withheld::Withheld) tracks.
    pub(super) named: Dual<Prefix>,
}

impl Bad {
    pub(super) fn new(key: LeaseKey, reason: Reason, subnets: Dual<Prefix>, public: Dual<IpAddr>) -> Self {
        Self { key, reason, subnets, public, named: Dual::default() }
    }
}

/// The accepted lease before and after a round.
pub(super) type BeforeAfter = (Option<Arc<Lease>>, Option<Arc<Lease>>);

/// The order of conflicts: the lowest rank wins. A kept version loses to all current ones, then one that does not fit
/// the pool to those that do, then the younger to the older, then the greater key to the lower.
pub(super) type Rank<'a> = (bool, bool, u64, &'a str);

/// A [`Rank`] that owns its key.
pub(super) type OwnedRank = (bool, bool, u64, LeaseKey);

impl Entry {
    pub(super) fn key(&self) -> Option<&LeaseKey> {
        match (&self.lease, &self.bad) {
            (Some(lease), _) => Some(&lease.key),
            (None, Some(bad)) => Some(&bad.key),
            (None, None) => None,
        }
    }

    pub(super) fn accepted(&self) -> Option<&Arc<Lease>> {
        self.lease.as_ref().filter(|_| self.winner && self.suits)
    }

    pub(super) fn macs(&self) -> Dual<MacAddr> {
        Dual { v4: self.mac(Family::V4), v6: self.mac(Family::V6) }
    }

    pub(super) fn set_macs(&mut self, macs: &Dual<MacAddr>) {
        self.macs = Family::BOTH.map(|family| macs.get(family).map_or([0; 6], |mac| mac.0));
    }

    pub(super) fn subnet(&self, family: Family) -> Option<Prefix> {
        self.lease.as_ref().and_then(|lease| lease.subnets.get(family).copied())
    }

    pub(super) fn mac(&self, family: Family) -> Option<MacAddr> {
        let mac = MacAddr(self.macs[family as usize]);
        (!mac.is_zero()).then_some(mac)
    }

    pub(super) fn rank(&self) -> Rank<'_> {
        (self.bad.is_some(), !self.fits, self.created, self.key_text())
    }

    pub(super) fn owned_rank(&self) -> Option<OwnedRank> {
        Some((self.bad.is_some(), !self.fits, self.created, self.key()?.clone()))
    }

    pub(super) fn age(&self) -> (u64, &str) {
        (self.created, self.key_text())
    }

    fn key_text(&self) -> &str {
        self.key().map_or("", LeaseKey::as_str)
    }
}

impl Table {
    /// Creates an empty table for these families.
    pub(super) fn new(families: [Option<Family>; 2]) -> Self {
        Self {
            families,
            entries: Vec::new(),
            free: Vec::new(),
            by_key: Index::default(),
            by_age: Index::default(),
            by_subnet: Default::default(),
            by_mac: Default::default(),
            lengths: BTreeMap::new(),
            won_subnets: Default::default(),
            won_macs: Default::default(),
            troubled: Index::default(),
            troubled_count: 0,
            weight: 0,
            pending: Vec::new(),
            freed: Vec::new(),
            touched: Vec::new(),
            before: Vec::new(),
            #[cfg(test)]
            visits: AtomicUsize::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Returns how many records of ordinary size all entries count as.
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    pub(super) fn reserve(&mut self, records: usize) {
        self.entries.reserve_exact(records.saturating_sub(self.entries.len()));
    }

    /// Returns the entries whose current version is not accepted, in the order of keys.
    pub(super) fn troubled(&self) -> impl Iterator<Item = u32> + '_ {
        self.troubled.iter()
    }

    pub(super) fn troubled_count(&self) -> usize {
        self.troubled_count
    }

    pub(super) fn is_troubled(&self, id: u32) -> bool {
        self.entry(id).troubled
    }

    /// Returns the entry that was created last.
    pub(super) fn youngest(&self) -> Option<u32> {
        self.by_age.last()
    }

    /// Returns all entries, in the order of keys.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_key.iter()
    }

    pub(super) fn entry(&self, id: u32) -> &Entry {
        &self.entries[id as usize]
    }

    /// Returns an entry, and counts the visit.
    pub(super) fn visit(&self, id: u32) -> &Entry {
        self.count_visit();
        self.entry(id)
    }

    /// Counts a visit of a record, or of a prefix that a record names.
    pub(super) fn count_visit(&self) {
        #[cfg(test)]
        self.visits.fetch_add(1, Relaxed);
    }

    /// Returns and resets the number of visits.
    #[cfg(test)]
    pub(super) fn take_visits(&self) -> usize {
        self.visits.swap(0, Relaxed)
    }

    pub(super) fn find(&self, key: &LeaseKey) -> Option<u32> {
        let first = self.by_key.from(|id| self.entry(id).key() < Some(key)).next()?;
        (self.entry(first).key() == Some(key)).then_some(first)
    }

    /// Returns the ID of a key's entry, creating it if needed. The caller changes the entry in this round.
    pub(super) fn place(&mut self, key: &LeaseKey) -> u32 {
        let id = self.find(key).unwrap_or_else(|| self.occupy(key));
        self.touch(id);
        id
    }

    fn occupy(&mut self, key: &LeaseKey) -> u32 {
        // A placeholder that has the key, until the first version is stored.
        let reason = Reason::Unreadable(String::new());
        let bad = Some(Box::new(Bad::new(key.clone(), reason, Dual::default(), Dual::default())));
        let entry = Entry { bad, ..Entry::default() };
        let id = match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        let entries = &self.entries;
        self.by_key.insert(id, |other| entries[other as usize].key() < Some(key));
        id
    }

    /// Removes a record.
    pub(super) fn remove(&mut self, id: u32) {
        self.touch(id);
        self.unlink(id);
        self.set_troubled(id, false);
        let entries = &self.entries;
        let key = entries[id as usize].key();
        self.by_key.remove(id, |other| entries[other as usize].key() < key);
        self.weight -= self.entry(id).weight as usize;
        self.entries[id as usize] = Entry::default();
        self.free.push(id);
    }

    /// Changes values that conflicts depend on: subnets, MAC addresses, rank.
    pub(super) fn replace(&mut self, id: u32, change: impl FnOnce(&mut Entry)) {
        self.unlink(id);
        self.change(id, change);
        self.link(id);
    }

    /// Changes values that conflicts do not depend on.
    pub(super) fn amend(&mut self, id: u32, change: impl FnOnce(&mut Entry)) {
        self.touch(id);
        self.change(id, change);
    }

    fn change(&mut self, id: u32, change: impl FnOnce(&mut Entry)) {
        self.weight -= self.entry(id).weight as usize;
        change(&mut self.entries[id as usize]);
        self.weight += self.entry(id).weight as usize;
    }

    /// Judges the entries affected by this round. Returns the accepted lease before and after, for each entry where the
    /// two may differ.
    pub(super) fn finish(&mut self) -> Vec<BeforeAfter> {
        self.settle();
        let mut touched = std::mem::take(&mut self.touched);
        // An ID that was freed and reused in one round is in the list twice.
        touched.sort_unstable();
        touched.dedup();
        let before = std::mem::take(&mut self.before);
        let mut found = Vec::with_capacity(before.len());
        for id in touched {
            // Skip entries that were not accepted before and are not now: there may be 100 000.
            found.extend(self.untouch(id).map(|new| (None, Some(new))));
        }
        for old in before {
            let new = self.find(&old.key).and_then(|id| self.untouch(id));
            found.push((Some(old), new));
        }
        found
    }

    /// Notes the accepted lease of an entry before it may change.
    pub(super) fn touch(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        if entry.touched {
            return;
        }
        entry.touched = true;
        match entry.accepted().cloned() {
            Some(lease) => self.before.push(lease),
            None => self.touched.push(id),
        }
    }

    fn untouch(&mut self, id: u32) -> Option<Arc<Lease>> {
        let entry = &mut self.entries[id as usize];
        entry.touched = false;
        let accepted = entry.accepted().cloned();
        let troubled = entry.key().is_some() && (entry.bad.is_some() || accepted.is_none());
        self.set_troubled(id, troubled);
        accepted
    }

    fn set_troubled(&mut self, id: u32, troubled: bool) {
        if std::mem::replace(&mut self.entries[id as usize].troubled, troubled) == troubled {
            return;
        }
        let entries = &self.entries;
        let key = entries[id as usize].key();
        let before = |other: u32| entries[other as usize].key() < key;
        if troubled {
            self.troubled.insert(id, before);
            self.troubled_count += 1;
        } else {
            self.troubled.remove(id, before);
            self.troubled_count -= 1;
        }
    }

    fn enqueue(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        if entry.lease.is_some() && !std::mem::replace(&mut entry.queued, true) {
            self.pending.push(id);
        }
    }

    /// Adds an entry to the indexes, and queues it to be judged.
    fn link(&mut self, id: u32) {
        self.entries[id as usize].linked = true;
        self.reindex(id, Act::Insert);
        self.enqueue(id);
    }

    /// Removes an entry from the indexes, and queues the entries that lost to it.
    fn unlink(&mut self, id: u32) {
        if !std::mem::take(&mut self.entries[id as usize].linked) {
            return;
        }
        if self.entry(id).winner {
            self.touch(id);
            self.unset_winner(id);
            if let Some(rank) = self.entry(id).owned_rank() {
                let freed: Vec<_> = self.grounds(id).collect();
                self.freed.extend(freed.into_iter().map(|ground| (ground, rank.clone())));
            }
        }
        self.reindex(id, Act::Remove);
    }

    fn reindex(&mut self, id: u32, act: Act) {
        let entries = &self.entries;
        let entry = &entries[id as usize];
        let (age, rank) = (entry.age(), entry.rank());
        act.on(&mut self.by_age, id, |other| entries[other as usize].age() < age);
        for family in self.families.into_iter().flatten() {
            if let Some(subnet) = entry.subnet(family) {
                let key = (Some(subnet), rank);
                act.on(&mut self.by_subnet[family as usize], id, |other| {
                    let other = &entries[other as usize];
                    (other.subnet(family), other.rank()) < key
                });
                let count = self.lengths.entry((family, subnet.len())).or_default();
                match act {
                    Act::Insert => *count += 1,
                    Act::Remove => *count = count.saturating_sub(1),
                }
                if *count == 0 {
                    self.lengths.remove(&(family, subnet.len()));
                }
            }
            if let Some(mac) = entry.mac(family) {
                let key = (Some(mac), rank);
                act.on(&mut self.by_mac[family as usize], id, |other| {
                    let other = &entries[other as usize];
                    (other.mac(family), other.rank()) < key
                });
            }
        }
    }
}

/// A change of an index.
#[derive(Clone, Copy)]
pub(super) enum Act {
    Insert,
    Remove,
}

impl Act {
    pub(super) fn on(self, index: &mut Index, id: u32, before: impl Fn(u32) -> bool) {
        match self {
            Self::Insert => index.insert(id, before),
            Self::Remove => index.remove(id, before),
        }
    }
}
