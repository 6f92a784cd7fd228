//! The records, their conflicts, and who wins them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::sync::Arc;

use super::index::Index;
use super::reason::Reason;
use crate::lease::{Lease, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Prefix};

/// All records, with indices by key, subnet and Ethernet address.
pub(super) struct Table {
    /// Those in use: what records say of others is not looked at.
    families: [Option<Family>; 2],
    entries: Vec<Entry>,
    free: Vec<u32>,
    by_key: Index,
    /// In the order of subnet, then rank.
    by_subnet: [Index; 2],
    /// In the order of Ethernet address, then rank.
    by_mac: [Index; 2],
    /// How many subnets there are of each length: which wider ones to look for.
    lengths: BTreeMap<(Family, u8), u32>,
    /// Entries whose current version is not accepted: usually few, so that showing them costs no walk.
    troubled: BTreeSet<u32>,
    /// Keys of entries that are troubled or were, and may be so for another reason.
    retold: BTreeSet<LeaseKey>,
    /// Entries to be judged again.
    pending: Vec<u32>,
    /// Entries that had nothing accepted before this round, and may have now.
    touched: Vec<u32>,
    /// What was accepted before this round, and may not be now.
    before: Vec<Arc<Lease>>,
}

/// One record.
#[derive(Default)]
pub(super) struct Entry {
    /// The last version that is good in itself.
    pub(super) lease: Option<Arc<Lease>>,
    /// The current version where that is not it.
    pub(super) bad: Option<Box<Bad>>,
    /// Order of creation of `lease`.
    pub(super) created: u64,
    /// Ethernet addresses of `lease`, zero for none: ten thousand times two bytes less than a [`Dual`].
    macs: [[u8; 6]; 2],
    /// Whether this node can have `lease` as a peer.
    pub(super) suits: bool,
    /// Whether `lease` wins all its conflicts.
    winner: bool,
    /// Whether it waits to be judged.
    queued: bool,
    touched: bool,
}

/// A version that is bad in itself.
pub(super) struct Bad {
    pub(super) key: LeaseKey,
    pub(super) reason: Reason,
    pub(super) subnets: Dual<Prefix>,
    pub(super) public: Dual<IpAddr>,
}

/// What was accepted before a round, and after it.
pub(super) type BeforeAfter = (Option<Arc<Lease>>, Option<Arc<Lease>>);

/// A rank with its entry.
type Affected = Reverse<(bool, u64, LeaseKey, u32)>;

/// Who wins a conflict: the least. A version that is only kept loses to all current ones.
type Rank<'a> = (bool, u64, &'a str);

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

    pub(super) fn is_winner(&self) -> bool {
        self.winner
    }

    fn subnet(&self, family: Family) -> Option<Prefix> {
        self.lease.as_ref().and_then(|lease| lease.subnets.get(family).copied())
    }

    fn mac(&self, family: Family) -> Option<MacAddr> {
        let mac = MacAddr(self.macs[family as usize]);
        (!mac.is_zero()).then_some(mac)
    }

    fn rank(&self) -> Rank<'_> {
        (self.bad.is_some(), self.created, self.key().map_or("", LeaseKey::as_str))
    }
}

impl Table {
    /// An empty one, for these families.
    pub(super) fn new(families: [Option<Family>; 2]) -> Self {
        Self {
            families,
            entries: Vec::new(),
            free: Vec::new(),
            by_key: Index::default(),
            by_subnet: Default::default(),
            by_mac: Default::default(),
            lengths: BTreeMap::new(),
            troubled: BTreeSet::new(),
            retold: BTreeSet::new(),
            pending: Vec::new(),
            touched: Vec::new(),
            before: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn reserve(&mut self, records: usize) {
        self.entries.reserve_exact(records.saturating_sub(self.entries.len()));
    }

    /// Those whose current version is not accepted.
    pub(super) fn troubled(&self) -> impl Iterator<Item = u32> + '_ {
        self.troubled.iter().copied()
    }

    /// All, in the order of keys.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_key.iter()
    }

    pub(super) fn entry(&self, id: u32) -> &Entry {
        &self.entries[id as usize]
    }

    pub(super) fn find(&self, key: &LeaseKey) -> Option<u32> {
        let first = self.by_key.from(|id| self.entry(id).key() < Some(key)).next()?;
        (self.entry(first).key() == Some(key)).then_some(first)
    }

    /// The place of a key, new if need be. To be changed in this round.
    pub(super) fn place(&mut self, key: &LeaseKey) -> u32 {
        let id = self.find(key).unwrap_or_else(|| self.occupy(key));
        self.touch(id);
        id
    }

    fn occupy(&mut self, key: &LeaseKey) -> u32 {
        // Until its first version stands here, the key has to.
        let reason = Reason::Unreadable(String::new());
        let bad = Some(Box::new(Bad { key: key.clone(), reason, subnets: Dual::default(), public: Dual::default() }));
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

    /// Takes a record away.
    pub(super) fn remove(&mut self, id: u32) {
        self.touch(id);
        self.unlink(id);
        self.retell(id);
        let entries = &self.entries;
        let key = entries[id as usize].key();
        self.by_key.remove(id, |other| entries[other as usize].key() < key);
        self.entries[id as usize] = Entry::default();
        self.troubled.remove(&id);
        self.free.push(id);
    }

    /// Changes what the conflicts of an entry depend on: subnets, Ethernet addresses, rank.
    pub(super) fn replace(&mut self, id: u32, change: impl FnOnce(&mut Entry)) {
        self.unlink(id);
        change(&mut self.entries[id as usize]);
        self.link(id);
    }

    /// All troubled entries may be so for another reason.
    pub(super) fn retell_troubled(&mut self) {
        self.retold.extend(self.troubled.iter().filter_map(|id| self.entries[*id as usize].key()).cloned());
    }

    /// Takes the keys of those that may be troubled for another reason than at the last call, or not any more.
    pub(super) fn take_retold(&mut self) -> BTreeSet<LeaseKey> {
        std::mem::take(&mut self.retold)
    }

    /// Notes a troubled entry whose reason may be another.
    fn retell(&mut self, id: u32) {
        if self.troubled.contains(&id) {
            self.retold.extend(self.entries[id as usize].key().cloned());
        }
    }

    /// Changes what its conflicts do not depend on.
    pub(super) fn amend(&mut self, id: u32, change: impl FnOnce(&mut Entry)) {
        self.touch(id);
        change(&mut self.entries[id as usize]);
    }

    /// The accepted entry of exactly this subnet.
    pub(super) fn holder(&self, subnet: &Prefix) -> Option<&Arc<Lease>> {
        self.of_subnet(*subnet).find_map(|id| self.entry(id).accepted())
    }

    /// Whether an accepted entry's subnet overlaps `prefix`.
    pub(super) fn is_held(&self, prefix: Prefix) -> bool {
        self.any_overlapping(prefix, &mut |id| self.entry(id).accepted().is_some())
    }

    /// Why an entry that is no winner is none.
    pub(super) fn conflict(&self, id: u32) -> Option<Reason> {
        let rank = self.entry(id).rank();
        let mut best: Option<u32> = None;
        self.any_neighbour(id, &mut |other| {
            let found = self.entry(other);
            let better = best.is_none_or(|best| found.rank() < self.entry(best).rank());
            if found.winner && found.rank() < rank && better {
                best = Some(other);
            }
            false
        });
        let other = self.entry(best?);
        let with = other.key()?.clone();
        let entry = self.entry(id);
        for family in self.families.into_iter().flatten() {
            if let (Some(subnet), Some(other)) = (entry.subnet(family), other.subnet(family))
                && subnet.overlaps(&other)
            {
                return Some(Reason::Overlap { subnet, other, with });
            }
        }
        let mac = self
            .families
            .into_iter()
            .flatten()
            .find_map(|family| entry.mac(family).filter(|_| entry.mac(family) == other.mac(family)));
        mac.map(|mac| Reason::SameMac { mac, with })
    }

    /// Judges what this round made doubtful. Returns what was accepted before and what is now, of each entry where the
    /// two may differ.
    pub(super) fn finish(&mut self) -> Vec<BeforeAfter> {
        self.settle();
        let mut touched = std::mem::take(&mut self.touched);
        // A place that was left and taken in one round stands here twice.
        touched.sort_unstable();
        touched.dedup();
        let before = std::mem::take(&mut self.before);
        let mut found = Vec::with_capacity(touched.len() + before.len());
        for id in touched {
            found.push((None, self.untouch(id)));
        }
        for old in before {
            let new = self.find(&old.key).and_then(|id| self.untouch(id));
            found.push((Some(old), new));
        }
        found
    }

    fn untouch(&mut self, id: u32) -> Option<Arc<Lease>> {
        let entry = &mut self.entries[id as usize];
        entry.touched = false;
        let accepted = entry.accepted().cloned();
        let troubled = entry.key().is_some() && (entry.bad.is_some() || accepted.is_none());
        self.retell(id);
        if troubled {
            self.troubled.insert(id);
            self.retell(id);
        } else {
            self.troubled.remove(&id);
        }
        accepted
    }

    /// A verdict depends on those of lesser rank alone, so one pass in the order of ranks settles all.
    fn settle(&mut self) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.sort_unstable_by(|a, b| self.entry(*b).rank().cmp(&self.entry(*a).rank()));
        let mut affected = BinaryHeap::new();
        let mut losers = Vec::new();
        while let Some(id) = self.next(&mut pending, &mut affected) {
            let entry = &mut self.entries[id as usize];
            // Taken away since, or judged already.
            if !std::mem::take(&mut entry.queued) {
                continue;
            }
            let rank = self.entry(id).rank();
            let loses = self.any_neighbour(id, &mut |other| {
                let other = self.entry(other);
                other.winner && other.rank() < rank
            });
            if self.entry(id).winner != loses {
                self.retell(id);
                continue;
            }
            self.any_neighbour(id, &mut |other| {
                let found = self.entry(other);
                if found.rank() > rank && !found.queued {
                    losers.push(other);
                }
                false
            });
            self.touch(id);
            self.entries[id as usize].winner = !loses;
            for other in losers.drain(..) {
                let entry = &mut self.entries[other as usize];
                if !std::mem::replace(&mut entry.queued, true)
                    && let Some(key) = entry.key()
                {
                    affected.push(Reverse((entry.bad.is_some(), entry.created, key.clone(), other)));
                }
            }
        }
    }

    /// The entry of least rank.
    fn next(&self, pending: &mut Vec<u32>, affected: &mut BinaryHeap<Affected>) -> Option<u32> {
        let first_pending = pending.last().map(|id| self.entry(*id).rank());
        let first_affected = affected.peek().map(|Reverse((kept, created, key, _))| (*kept, *created, key.as_str()));
        match (first_pending, first_affected) {
            (Some(a), Some(b)) if b < a => affected.pop().map(|Reverse((.., id))| id),
            (Some(_), _) => pending.pop(),
            (None, _) => affected.pop().map(|Reverse((.., id))| id),
        }
    }

    fn touch(&mut self, id: u32) {
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

    fn enqueue(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        if entry.lease.is_some() && !std::mem::replace(&mut entry.queued, true) {
            self.pending.push(id);
        }
    }

    /// Enters an entry into the indices, and has it judged.
    fn link(&mut self, id: u32) {
        self.reindex(id, Act::Insert);
        self.enqueue(id);
    }

    /// Takes an entry out of the indices, and has those judged again that lost to it.
    fn unlink(&mut self, id: u32) {
        if self.entry(id).winner {
            let mut losers = Vec::new();
            self.any_neighbour(id, &mut |other| {
                losers.push(other);
                false
            });
            losers.into_iter().for_each(|other| self.enqueue(other));
            self.touch(id);
        }
        self.reindex(id, Act::Remove);
        self.entries[id as usize].winner = false;
    }

    fn reindex(&mut self, id: u32, act: Act) {
        let entries = &self.entries;
        let entry = &entries[id as usize];
        let rank = entry.rank();
        for family in self.families.into_iter().flatten() {
            if let Some(subnet) = entry.subnet(family) {
                let key = (Some(subnet), rank);
                let before = |other: u32| {
                    let other = &entries[other as usize];
                    (other.subnet(family), other.rank()) < key
                };
                let count = self.lengths.entry((family, subnet.len())).or_default();
                match act {
                    Act::Insert => {
                        self.by_subnet[family as usize].insert(id, before);
                        *count += 1;
                    }
                    Act::Remove => {
                        self.by_subnet[family as usize].remove(id, before);
                        *count = count.saturating_sub(1);
                        if *count == 0 {
                            self.lengths.remove(&(family, subnet.len()));
                        }
                    }
                }
            }
            if let Some(mac) = entry.mac(family) {
                let key = (Some(mac), rank);
                let before = |other: u32| {
                    let other = &entries[other as usize];
                    (other.mac(family), other.rank()) < key
                };
                match act {
                    Act::Insert => self.by_mac[family as usize].insert(id, before),
                    Act::Remove => self.by_mac[family as usize].remove(id, before),
                }
            }
        }
    }

    /// Whether `accept` holds for any that an entry is in conflict with; stops there. Some are shown twice.
    fn any_neighbour(&self, id: u32, accept: &mut dyn FnMut(u32) -> bool) -> bool {
        let mut accept = |other: u32| other != id && accept(other);
        let entry = self.entry(id);
        for family in self.families.into_iter().flatten() {
            if entry.subnet(family).is_some_and(|subnet| self.any_overlapping(subnet, &mut accept)) {
                return true;
            }
            let Some(mac) = entry.mac(family) else { continue };
            let mut same = self.by_mac[family as usize]
                .from(|other| self.entry(other).mac(family) < Some(mac))
                .take_while(|other| self.entry(*other).mac(family) == Some(mac));
            if same.any(&mut accept) {
                return true;
            }
        }
        false
    }

    fn any_overlapping(&self, prefix: Prefix, accept: &mut dyn FnMut(u32) -> bool) -> bool {
        let family = prefix.family();
        for (_, len) in self.lengths.range((family, 0)..=(family, prefix.len())).map(|(length, _)| length) {
            let Ok(wider) = Prefix::masked(prefix.addr(), *len) else { continue };
            if self.of_subnet(wider).any(&mut *accept) {
                return true;
            }
        }
        let mut narrower = self.by_subnet[family as usize]
            .from(|other| self.entry(other).subnet(family) <= Some(prefix))
            .take_while(|other| self.entry(*other).subnet(family).is_some_and(|other| prefix.covers(&other)));
        narrower.any(accept)
    }

    /// All of exactly this subnet, the least rank first.
    fn of_subnet(&self, subnet: Prefix) -> impl Iterator<Item = u32> + '_ {
        let family = subnet.family();
        self.by_subnet[family as usize]
            .from(move |id| self.entry(id).subnet(family) < Some(subnet))
            .take_while(move |id| self.entry(*id).subnet(family) == Some(subnet))
    }
}

/// What to do to the indices.
#[derive(Clone, Copy)]
enum Act {
    Insert,
    Remove,
}
