//! Admission: which records of the store become peers, and why the others do not.
//!
//! A record is judged in three steps. What is wrong with it *in itself* is found by [`Rules`]. Of records that are in
//! *conflict*, because they overlap or share a MAC address, one that fits the pool wins over one that does not,
//! then the one created first, then the lower key. Only accepted records reject others. Both steps are functions of the
//! current records and of the configuration alone, so all nodes that started with one configuration agree. Last come the
//! rules that depend on *this node* ([`HostView`]); they never promote anybody.
//!
//! There is one memory: when a record goes bad in itself, its last version that was not keeps its place as long as no
//! current record wants it, that is, it loses every conflict with a current record, whatever their age. Without that
//! memory (after a restart) the same records give the same peers less those kept so.
//!
//! What is held is bounded: records beyond [`MAX_RECORDS`] are dropped, the youngest first,
//! and those with keys longer than [`LeaseKey::MAX_BYTES`]. They are counted ([`Admission::dropped`]) and else unknown
//! until the store lists everything again.
//!
//! Two rules need no code. No peer's subnet contains another's public address: the one lies in the network, the other
//! does not. And an equal public address is no fault (a node re-created under a new name has it): see
//! [`Admission::shared_addresses`].

mod conflicts;
mod index;
mod reason;
mod rules;
mod table;
mod withheld;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::lease::{BadRecord, Fence, Lease, LeaseKey, MAX_RECORDS, Record, keep_oldest, weight};
use crate::net::{Dual, Family, MacAddr, Prefix};

use table::{Bad, Table};
use withheld::Withheld;

pub use reason::{Covered, Reason};
pub use rules::{HardwareAddress, HostView, Own, Rules};

/// All current records, and which of them are peers.
///
/// A change costs that of the records it is in conflict with at most, not of all. Ten thousand records cost about 0.8 MiB
/// beside their leases. Leases that nobody else holds lose their fence here: only its holder writes a record again, so
/// look at the own record's fence before it goes in.
pub struct Admission {
    rules: Rules,
    host: HostView,
    table: Table,
    withheld: Withheld,
    changed_withheld: BTreeSet<Prefix>,
    /// [`MAX_RECORDS`], or less in tests.
    limit: usize,
    /// The age of the oldest record that was dropped: what is younger is dropped too.
    horizon: Option<(u64, LeaseKey)>,
    dropped: usize,
    /// Whether the own record is among them, or was left out by the store because there are too many.
    own_dropped: bool,
    /// How many bad records have a text.
    texts: usize,
}

/// The most bad records whose text is kept; of the others only the rule they break is.
const MAX_TEXTS: usize = 1024;

/// A key whose accepted peer is not what it was. Changes of expiry and fence alone are none.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Change {
    /// The record's key.
    pub key: LeaseKey,
    /// The peer before.
    pub old: Option<Arc<Lease>>,
    /// The peer now.
    pub new: Option<Arc<Lease>>,
}

/// What a record says of its node.
pub(crate) struct Claim<'a> {
    pub(crate) key: &'a LeaseKey,
    pub(crate) subnets: Dual<Prefix>,
    pub(crate) public: Dual<IpAddr>,
}

impl Admission {
    /// The most prefixes that bad records name and that are taken in: see [`withheld`](Self::withheld). Each peer that comes
    /// or goes has those judged again that overlap its subnet.
    pub const MAX_WITHHELD: usize = 16_384;

    /// No records yet.
    pub fn new(rules: Rules, host: HostView) -> Self {
        let families = Family::BOTH.map(|family| rules.networks.get(family).map(|_| family));
        Self {
            rules,
            host,
            table: Table::new(families),
            withheld: Withheld::default(),
            changed_withheld: BTreeSet::new(),
            limit: MAX_RECORDS,
            horizon: None,
            dropped: 0,
            own_dropped: false,
            texts: 0,
        }
    }

    /// Takes `records` as everything there is. Of equal keys the last counts. The changes are in the order of keys.
    pub fn reset(&mut self, mut records: Vec<Record>) -> Vec<Change> {
        self.withheld.overflow = 0;
        let count = records.len();
        // A store that lists too many leaves the youngest out, which may be the own one: other nodes lack it then.
        let is_all = records.iter().map(Record::weight).sum::<usize>() <= self.limit;
        let may_exist = self.host.own.key.is_some() && (!is_all || self.lists_own(&records));
        // First of all, so that what cannot be held takes no other's place.
        records.retain(|record| record.key.as_str().len() <= LeaseKey::MAX_BYTES);
        let dropped = keep_oldest(&mut records, self.limit);
        self.horizon = dropped.map(|dropped| (dropped.created, dropped.key));
        self.dropped = count - records.len();
        self.own_dropped = may_exist && !self.lists_own(&records);
        records.sort_by(|a, b| a.key.cmp(&b.key));
        let gone = self.table.ids().filter_map(|id| self.table.entry(id).key());
        let listed = |key: &LeaseKey| records.binary_search_by(|record| record.key.cmp(key)).is_ok();
        let gone: Vec<_> = gone.filter(|key| !listed(key)).cloned().collect();
        gone.iter().for_each(|key| self.forget(key));
        self.table.reserve(records.len());
        let mut records = records.into_iter().peekable();
        while let Some(record) = records.next() {
            if records.peek().is_none_or(|next| next.key != record.key) {
                self.put(record);
            }
        }
        // A version that is only kept may be larger than the one that was listed.
        self.drop_youngest();
        self.finish()
    }

    /// Takes a record that is new or changed. The changes, also of those in conflict with it, are in the order of keys.
    pub fn upsert(&mut self, record: Record) -> Vec<Change> {
        self.put(record);
        self.drop_youngest();
        self.finish()
    }

    /// Forgets a record. The changes are in the order of keys.
    pub fn remove(&mut self, key: &LeaseKey) -> Vec<Change> {
        self.own_dropped &= !self.is_own(key);
        self.forget(key);
        self.finish()
    }

    /// Judges all anew for what this node has become. The changes are in the order of keys.
    pub fn set_host(&mut self, host: HostView) -> Vec<Change> {
        if self.host == host {
            self.changed_withheld.clear();
            return Vec::new();
        }
        self.own_dropped &= self.host.own.key == host.own.key;
        self.host = host;
        self.withheld.doubt_all();
        let ids: Vec<_> = self.table.ids().collect();
        for id in ids {
            let entry = self.table.entry(id);
            let Some(lease) = &entry.lease else { continue };
            let suits = self.suits(lease, &entry.macs());
            if suits != entry.suits {
                self.table.amend(id, |entry| entry.suits = suits);
            }
        }
        self.finish()
    }

    /// Prefixes that came to [`withheld`](Self::withheld) with the last change, or left it.
    pub fn changed_withheld(&self) -> &BTreeSet<Prefix> {
        &self.changed_withheld
    }

    /// How often a record was dropped since the store last listed everything, for there are too many or its key is too
    /// long. One that is written again counts again.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Whether there is room again for records that were dropped, so that the store should list everything anew.
    pub fn has_room_again(&self) -> bool {
        self.horizon.is_some() && self.table.weight() <= self.limit - self.limit / 8
    }

    /// The node as it was last set.
    pub fn host(&self) -> &HostView {
        &self.host
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// How many records there are, the own one too.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there are no records at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The accepted peers, in the order of keys.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Lease>> {
        self.table.ids().filter_map(|id| self.table.entry(id).accepted())
    }

    /// The accepted peer of a key.
    pub fn peer(&self, key: &LeaseKey) -> Option<&Arc<Lease>> {
        self.table.entry(self.table.find(key)?).accepted()
    }

    /// The accepted peer that holds exactly this subnet.
    pub fn peer_by_subnet(&self, subnet: &Prefix) -> Option<&Arc<Lease>> {
        self.table.holder(subnet)
    }

    /// The records whose current version is no peer, with the rule it breaks, in the order of keys. The own record is
    /// not among them: see [`own_trouble`](Self::own_trouble).
    pub fn quarantined(&self) -> impl Iterator<Item = (LeaseKey, Reason)> + '_ {
        let keyed = self.table.troubled().filter_map(|id| Some((id, self.table.entry(id).key()?)));
        let others = keyed.filter(|(_, key)| !self.is_own(key));
        others.filter_map(|(id, key)| Some((key.clone(), self.reason(id)?)))
    }

    /// How many they are.
    pub fn quarantined_count(&self) -> usize {
        let own = self.host.own.key.as_ref().and_then(|own| self.table.find(own));
        self.table.troubled_count() - usize::from(own.is_some_and(|own| self.table.is_troubled(own)))
    }

    /// Why a record's current version is no peer; `None` when it is one, is the own record, or does not exist.
    pub fn why_not(&self, key: &LeaseKey) -> Option<Reason> {
        if self.is_own(key) {
            return None;
        }
        self.table.find(key).and_then(|id| self.reason(id))
    }

    /// What every record says of itself, in any order: the current version, peer or not, and the one still in force.
    pub(crate) fn claims(&self) -> impl Iterator<Item = Claim<'_>> {
        self.table.ids().flat_map(|id| {
            let entry = self.table.entry(id);
            let kept = entry.lease.as_deref().map(|lease| Claim {
                key: &lease.key,
                subnets: lease.subnets,
                public: lease.attrs.public_ip,
            });
            let bad = entry.bad.as_deref().map(|bad| Claim { key: &bad.key, subnets: bad.subnets, public: bad.public });
            [bad, kept].into_iter().flatten()
        })
    }

    /// Why other nodes do not take our own record for a peer, as far as that can be known here.
    pub fn own_trouble(&self) -> Option<Reason> {
        if self.own_dropped {
            return Some(Reason::TooMany);
        }
        let id = self.table.find(self.host.own.key.as_ref()?)?;
        let entry = self.table.entry(id);
        match &entry.bad {
            Some(bad) => Some(bad.reason.clone()),
            None if entry.winner => None,
            None => self.table.conflict(id),
        }
    }

    /// The MAC address that our own record shares with an older one. Other nodes accept the older of the two.
    pub fn mac_shared_with_older(&self) -> Option<MacAddr> {
        self.table.mac_shared_with_older(self.table.find(self.host.own.key.as_ref()?)?)
    }

    /// The prefixes that records which are bad in themselves name: kernel objects for exactly these (not for
    /// what lies inside) are not to be deleted, since their owner may still be there. Only such as a peer could hold,
    /// and none does.
    pub fn withheld(&self) -> &BTreeSet<Prefix> {
        self.withheld.found()
    }

    /// How many prefixes that bad records name are not withheld because there are too many. Counted since the store
    /// last listed everything.
    pub fn withheld_overflow(&self) -> usize {
        self.withheld.overflow
    }

    /// Public addresses that several peers have, with their keys: worth a warning, not a fault. Walks over all.
    pub fn shared_addresses(&self) -> Vec<(IpAddr, Vec<LeaseKey>)> {
        let mut holders: Vec<_> = self
            .peers()
            .flat_map(|peer| peer.attrs.public_ip.iter().map(move |(_, addr)| (*addr, &peer.key)))
            .collect();
        holders.sort();
        holders
            .chunk_by(|a, b| a.0 == b.0)
            .filter(|same| same.len() > 1)
            .filter_map(|same| Some((same.first()?.0, same.iter().map(|(_, key)| (*key).clone()).collect())))
            .collect()
    }

    fn put(&mut self, record: Record) {
        let weighs = u32::try_from(record.weight()).unwrap_or(u32::MAX);
        let Record { key, created, lease } = record;
        let is_beyond = self.horizon.as_ref().is_some_and(|(age, least)| (created, &key) >= (*age, least));
        if is_beyond || key.as_str().len() > LeaseKey::MAX_BYTES {
            return self.drop_record(&key);
        }
        if self.is_own(&key) {
            self.own_dropped = false;
        }
        self.unname(&key);
        let judged = match lease {
            Ok(lease) if lease.key != key => {
                let reason = Reason::Unreadable(format!("its lease names the record {}", lease.key));
                Err(Bad::new(key, reason, lease.subnets, lease.attrs.public_ip))
            }
            Ok(lease) => match self.rules.judge(&lease) {
                Ok(macs) => Ok((lease, macs)),
                Err(reason) => Err(Bad::new(key, reason, lease.subnets, lease.attrs.public_ip)),
            },
            Err(bad) => {
                let BadRecord { reason, subnets } = *bad;
                Err(Bad::new(key, Reason::Unreadable(reason), subnets, Dual::default()))
            }
        };
        match judged {
            Ok((lease, macs)) => self.put_good(lease, created, macs, weighs),
            Err(bad) => self.put_bad(bad, created, weighs),
        }
    }

    /// The bad version of a record, if that is its current one, says nothing any more.
    fn unname(&mut self, key: &LeaseKey) {
        let Some(bad) = self.table.find(key).and_then(|id| self.table.entry(id).bad.as_ref()) else { return };
        self.withheld.unname(&bad.named);
        self.texts -= usize::from(bad.reason.has_text());
    }

    /// Forgets a record that there is no room for.
    fn drop_record(&mut self, key: &LeaseKey) {
        self.dropped = self.dropped.saturating_add(1);
        self.own_dropped |= self.is_own(key);
        self.forget(key);
    }

    /// Drops records until what is left is within the limit.
    fn drop_youngest(&mut self) {
        while self.table.weight() > self.limit
            && let Some(id) = self.table.youngest()
            && let Some(key) = self.table.entry(id).key().cloned()
        {
            self.horizon = Some((self.table.entry(id).created, key.clone()));
            self.drop_record(&key);
        }
    }

    fn put_good(&mut self, mut lease: Arc<Lease>, created: u64, macs: Dual<MacAddr>, weighs: u32) {
        // Only its holder writes a record again; ten thousand fences are 0.3 MiB.
        if let Some(lease) = Arc::get_mut(&mut lease) {
            lease.fence = Fence::default();
        }
        let (suits, fits) = (self.suits(&lease, &macs), self.rules.fits(&lease));
        let id = self.table.place(&lease.key);
        let entry = self.table.entry(id);
        let same_subnets = entry.lease.as_ref().is_some_and(|old| old.subnets == lease.subnets);
        if same_subnets && entry.bad.is_none() && entry.created == created && entry.macs() == macs {
            // A renewal, or a new public address: no conflict comes or goes.
            self.table.amend(id, |entry| (entry.lease, entry.suits, entry.weight) = (Some(lease), suits, weighs));
            return;
        }
        self.table.replace(id, |entry| {
            (entry.lease, entry.bad) = (Some(lease), None);
            (entry.created, entry.suits, entry.fits, entry.weight) = (created, suits, fits, weighs);
            entry.set_macs(&macs);
        });
    }

    fn put_bad(&mut self, mut bad: Bad, created: u64, weighs: u32) {
        bad.named = self.withheld.name(&self.rules.holdable(&bad.subnets));
        bad.reason = bad.reason.cut();
        if self.texts >= MAX_TEXTS {
            bad.reason.text().map(std::mem::take);
        }
        self.texts += usize::from(bad.reason.has_text());
        let id = self.table.place(&bad.key);
        let bad = Some(Box::new(bad));
        let entry = self.table.entry(id);
        let kept = entry.lease.as_deref().map_or(0, |lease| weight(&lease.key, Ok(lease)));
        let weighs = u32::try_from(kept).unwrap_or(u32::MAX).saturating_add(weighs);
        if entry.lease.is_some() && entry.bad.is_some() {
            return self.table.amend(id, |entry| (entry.bad, entry.weight) = (bad, weighs));
        }
        // What was good until now is only kept from now on: its rank changes.
        self.table.replace(id, |entry| {
            if entry.lease.is_none() {
                entry.created = created;
            }
            (entry.bad, entry.weight) = (bad, weighs);
        });
    }

    fn forget(&mut self, key: &LeaseKey) {
        let Some(id) = self.table.find(key) else { return };
        self.unname(key);
        self.table.remove(id);
    }

    fn finish(&mut self) -> Vec<Change> {
        let found = self.table.finish();
        for (old, new) in &found {
            let [old, new] = [old, new].map(|lease| lease.as_ref().map(|lease| lease.subnets));
            if old != new {
                [old, new].iter().flatten().for_each(|subnets| self.withheld.doubt(subnets));
            }
        }
        let (host, table) = (&self.host, &self.table);
        let is_free = |prefix: &Prefix| {
            table.count_visit();
            let own = host.own.subnets.get(prefix.family()).is_some_and(|own| own.overlaps(prefix));
            !own && !table.is_held(*prefix)
        };
        self.changed_withheld = self.withheld.settle(is_free);
        let mut changes = Vec::with_capacity(found.len());
        for (old, new) in found {
            let key = old.as_ref().or(new.as_ref()).map(|lease| lease.key.clone());
            if let Some(key) = key.filter(|_| !same_peer(old.as_deref(), new.as_deref())) {
                changes.push(Change { key, old, new });
            }
        }
        changes.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        changes
    }

    fn suits(&self, lease: &Lease, macs: &Dual<MacAddr>) -> bool {
        !self.is_own(&lease.key) && self.host.judge(lease, macs, &self.rules.networks).is_ok()
    }

    fn lists_own(&self, records: &[Record]) -> bool {
        records.iter().any(|record| self.is_own(&record.key))
    }

    fn is_own(&self, key: &LeaseKey) -> bool {
        self.host.own.key.as_ref() == Some(key)
    }

    fn reason(&self, id: u32) -> Option<Reason> {
        let entry = self.table.entry(id);
        let lease = match (&entry.bad, &entry.lease) {
            (Some(bad), _) => return Some(bad.reason.clone()),
            (None, Some(lease)) => lease,
            (None, None) => return None,
        };
        if !entry.winner {
            return self.table.conflict(id);
        }
        self.host.judge(lease, &entry.macs(), &self.rules.networks).err()
    }
}

fn same_peer(old: Option<&Lease>, new: Option<&Lease>) -> bool {
    match (old, new) {
        (Some(old), Some(new)) => old.subnets == new.subnets && old.attrs == new.attrs,
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("rules", &self.rules).field("records", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
