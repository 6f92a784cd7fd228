//! Admission: decides which records of the store become peers, and why the others do not.
//!
//! A record is judged in three steps:
//!
//! 1. [`Rules`] finds errors in the record itself.
//! 2. Of records in *conflict*, which overlap or share a MAC address, one that fits the pool wins over one that does
//!    not, then the one created first, then the lower key. Only winners reject others.
//! 3. The rules that depend on *this node* ([`HostView`]) only reject records.
//!
//! Steps 1 and 2 depend only on the current records and the configuration, so all nodes that started with one
//! configuration agree.
//!
//! There is one piece of state: when a record becomes bad in itself, its last good version stays accepted as long as no
//! current record conflicts with it, regardless of age. Without that state (after a restart) the same records give the
//! same peers, except those kept in this way.
//!
//! Memory is bounded: records beyond [`MAX_RECORDS`] are dropped, the youngest first, and so are records with keys
//! longer than [`LeaseKey::MAX_BYTES`]. They are counted ([`Admission::dropped`]) and otherwise ignored until the store
//! sends a complete list again.
//!
//! Two rules need no code. No peer's subnet contains another peer's public address: the subnet is in the network, the
//! address is not. And equal public addresses are allowed (a node re-created under a new name has the same one): see
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
/// The cost of a change depends on the records it conflicts with, not on the number of all records. Ten thousand
/// records use about 0.8 MiB in addition to their leases. A lease without other references loses its fence here,
/// because only the node that holds a lease writes its record again. Read the fence of this node's record before adding
/// it.
pub struct Admission {
    rules: Rules,
    host: HostView,
    table: Table,
    withheld: Withheld,
    changed_withheld: BTreeSet<Prefix>,
    /// [`MAX_RECORDS`], or less in tests.
    limit: usize,
    /// The age of the oldest dropped record: records younger than it are dropped too.
    horizon: Option<(u64, LeaseKey)>,
    dropped: usize,
    /// Whether this node's record was dropped, or the store left it out because there are too many records.
    own_dropped: bool,
    /// How many bad records have a stored text.
    texts: usize,
}

/// The most bad records whose text is kept; of the others, only the violated rule is kept.
const MAX_TEXTS: usize = 1024;

/// A key whose accepted peer changed. A change of only the expiry or the fence does not count.
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

/// The address claims of a record.
pub(crate) struct Claim<'a> {
    pub(crate) key: &'a LeaseKey,
    pub(crate) subnets: Dual<Prefix>,
    pub(crate) public: Dual<IpAddr>,
}

impl Admission {
    /// The most prefixes named by bad records that are tracked: see [`withheld`](Self::withheld). Each peer that is
    /// added or removed causes those that overlap its subnet to be judged again.
    pub const MAX_WITHHELD: usize = 16_384;

    /// Creates an admission without records.
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

    /// Replaces all records by `records`. Of equal keys the last one counts. The changes are in the order of keys.
    pub fn reset(&mut self, mut records: Vec<Record>) -> Vec<Change> {
        self.withheld.overflow = 0;
        let count = records.len();
        // A store that lists too many records leaves the youngest out. If this node's record may be one of them, other
        // nodes may lack it.
        let is_all = records.iter().map(Record::weight).sum::<usize>() <= self.limit;
        let may_exist = self.host.own.key.is_some() && (!is_all || self.lists_own(&records));
        // First of all, so that records that cannot be stored do not displace others.
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
        // A version that is only kept may be larger than the listed one.
        self.drop_youngest();
        self.finish()
    }

    /// Adds or updates a record. The changes, including those of conflicting records, are in the order of keys.
    pub fn upsert(&mut self, record: Record) -> Vec<Change> {
        self.put(record);
        self.drop_youngest();
        self.finish()
    }

    /// Removes a record. The changes are in the order of keys.
    pub fn remove(&mut self, key: &LeaseKey) -> Vec<Change> {
        self.own_dropped &= !self.is_own(key);
        self.forget(key);
        self.finish()
    }

    /// Updates this node's view and judges all records again. The changes are in the order of keys.
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

    /// Returns the prefixes that the last change added to or removed from [`withheld`](Self::withheld).
    pub fn changed_withheld(&self) -> &BTreeSet<Prefix> {
        &self.changed_withheld
    }

    /// Returns how many records were dropped since the last complete list, because there were too many or their keys
    /// were too long. A dropped record that is written again is counted again.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Returns whether there is room again for dropped records, so that the store should send a complete list.
    pub fn has_room_again(&self) -> bool {
        self.horizon.is_some() && self.table.weight() <= self.limit - self.limit / 8
    }

    /// Returns the view of this node that was last set.
    pub fn host(&self) -> &HostView {
        &self.host
    }

    /// Returns the rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Returns the number of records, including this node's.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Returns whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the accepted peers, in the order of keys.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Lease>> {
        self.table.ids().filter_map(|id| self.table.entry(id).accepted())
    }

    /// Returns the accepted peer with this key.
    pub fn peer(&self, key: &LeaseKey) -> Option<&Arc<Lease>> {
        self.table.entry(self.table.find(key)?).accepted()
    }

    /// Returns the accepted peer with exactly this subnet.
    pub fn peer_by_subnet(&self, subnet: &Prefix) -> Option<&Arc<Lease>> {
        self.table.holder(subnet)
    }

    /// Returns the records whose current version is not a peer, with the violated rule, in the order of keys. This
    /// node's record is not included: see [`own_trouble`](Self::own_trouble).
    pub fn quarantined(&self) -> impl Iterator<Item = (LeaseKey, Reason)> + '_ {
        let keyed = self.table.troubled().filter_map(|id| Some((id, self.table.entry(id).key()?)));
        let others = keyed.filter(|(_, key)| !self.is_own(key));
        others.filter_map(|(id, key)| Some((key.clone(), self.reason(id)?)))
    }

    /// Returns the number of quarantined records.
    pub fn quarantined_count(&self) -> usize {
        let own = self.host.own.key.as_ref().and_then(|own| self.table.find(own));
        self.table.troubled_count() - usize::from(own.is_some_and(|own| self.table.is_troubled(own)))
    }

    /// Returns why a record's current version is not a peer; `None` if it is a peer, is this node's record, or does not
    /// exist.
    pub fn why_not(&self, key: &LeaseKey) -> Option<Reason> {
        if self.is_own(key) {
            return None;
        }
        self.table.find(key).and_then(|id| self.reason(id))
    }

    /// Returns the claims of all records, in any order: of the current version, peer or not, and of the version still
    /// in force.
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

    /// Returns why other nodes do not accept this node's record as a peer, as far as is known here.
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

    /// Returns the MAC address that this node's record shares with an older record. Other nodes accept the older one.
    pub fn mac_shared_with_older(&self) -> Option<MacAddr> {
        self.table.mac_shared_with_older(self.table.find(self.host.own.key.as_ref()?)?)
    }

    /// Returns the prefixes named by records that are bad in themselves. Kernel objects for exactly these prefixes (not
    /// for prefixes inside them) must not be deleted, because their owner may still exist. Contains only prefixes that
    /// a peer could have and that no peer has.
    pub fn withheld(&self) -> &BTreeSet<Prefix> {
        self.withheld.found()
    }

    /// Returns how many prefixes named by bad records are not withheld because there are too many. Counted since the
    /// last complete list.
    pub fn withheld_overflow(&self) -> usize {
        self.withheld.overflow
    }

    /// Returns public addresses that several peers have, with the peers' keys: worth a warning, but not an error.
    /// Iterates over all peers.
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

    /// Removes the prefixes and the text of a record's bad version, if that is the current version.
    fn unname(&mut self, key: &LeaseKey) {
        let Some(bad) = self.table.find(key).and_then(|id| self.table.entry(id).bad.as_ref()) else { return };
        self.withheld.unname(&bad.named);
        self.texts -= usize::from(bad.reason.has_text());
    }

    /// Removes a record for which there is no room.
    fn drop_record(&mut self, key: &LeaseKey) {
        self.dropped = self.dropped.saturating_add(1);
        self.own_dropped |= self.is_own(key);
        self.forget(key);
    }

    /// Drops the youngest records until the rest is within the limit.
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
        // Only the node that holds a lease writes its record again; ten thousand fences use 0.3 MiB.
        if let Some(lease) = Arc::get_mut(&mut lease) {
            lease.fence = Fence::default();
        }
        let (suits, fits) = (self.suits(&lease, &macs), self.rules.fits(&lease));
        let id = self.table.place(&lease.key);
        let entry = self.table.entry(id);
        let same_subnets = entry.lease.as_ref().is_some_and(|old| old.subnets == lease.subnets);
        if same_subnets && entry.bad.is_none() && entry.created == created && entry.macs() == macs {
            // A renewal or a new public address: conflicts do not change.
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
        // The version that was good until now is only kept from now on, so its rank changes.
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
