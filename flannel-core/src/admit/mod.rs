//! Admission: which records of the store become peers, and why the others do not.
//!
//! A record is judged in three steps. What is wrong with it *in itself* is found by [`Rules`]. Of records that are in
//! *conflict*, because they overlap or share an Ethernet address, the one created first wins (then the lower key); who
//! loses to a loser is a winner. Both steps are functions of the current records alone, so all nodes agree. Last come
//! the rules that depend on *this node* ([`HostView`]); they never promote anybody.
//!
//! There is one memory: when a record goes bad in itself, its last version that was not keeps its place as long as no
//! current record wants it, that is, it loses every conflict with a current record, whatever their age. Without that
//! memory (after a restart) the same records give the same peers less those kept so.
//!
//! Two rules need no code. No peer's subnet contains another's public address: the one lies in the network, the other
//! does not. And an equal public address is no fault (a node re-created under a new name has it): see
//! [`Admission::shared_addresses`].

mod index;
mod reason;
mod rules;
mod table;
mod withheld;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::alloc::compatible;
use crate::lease::{Fence, Lease, LeaseKey, Record};
use crate::net::{Dual, Family, MacAddr, Prefix};

use table::{Bad, Table};
use withheld::Withheld;

pub use reason::{Covered, Reason};
pub use rules::{HardwareAddress, HostView, Own, Rules};

/// All current records, and which of them are peers.
///
/// A change costs that of the records it is in conflict with, not of all. Ten thousand records cost about 0.6 MiB
/// beside their leases. Leases that nobody else holds lose their fence here: only its holder writes a record again, so
/// look at the own record's fence before it goes in.
pub struct Admission {
    rules: Rules,
    host: HostView,
    table: Table,
    withheld: Withheld,
    news: News,
}

/// What a change did beside that to the peers: whoever shows it need not walk over all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct News {
    /// Records whose [`Admission::why_not`] may say something else than before, those that are gone too.
    pub reasons: BTreeSet<LeaseKey>,
    /// Prefixes that came to [`Admission::withheld`], or left it.
    pub withheld: BTreeSet<Prefix>,
}

/// A key whose accepted peer is not what it was. Changes of expiry and fence alone are none.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// No records yet.
    pub fn new(rules: Rules, host: HostView) -> Self {
        let families = Family::BOTH.map(|family| rules.networks.get(family).map(|_| family));
        Self { rules, host, table: Table::new(families), withheld: Withheld::default(), news: News::default() }
    }

    /// Takes `records` as everything there is. Of equal keys the last counts. The changes are in the order of keys.
    pub fn reset(&mut self, mut records: Vec<Record>) -> Vec<Change> {
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
        self.finish()
    }

    /// Takes a record that is new or changed. The changes, also of those in conflict with it, are in the order of keys.
    pub fn upsert(&mut self, record: Record) -> Vec<Change> {
        self.put(record);
        self.finish()
    }

    /// Forgets a record. The changes are in the order of keys.
    pub fn remove(&mut self, key: &LeaseKey) -> Vec<Change> {
        self.forget(key);
        self.finish()
    }

    /// Judges all anew for what this node has become. The changes are in the order of keys.
    pub fn set_host(&mut self, host: HostView) -> Vec<Change> {
        if self.host == host {
            self.news = News::default();
            return Vec::new();
        }
        let owns = [&self.host.own.key, &host.own.key].map(Clone::clone);
        self.host = host;
        // Why a record does not suit is told in terms of the host.
        self.table.retell_troubled();
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
        let changes = self.finish();
        self.news.reasons.extend(owns.into_iter().flatten());
        changes
    }

    /// What the last change did beside that to the peers.
    pub fn news(&self) -> &News {
        &self.news
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
    pub fn quarantined(&self) -> Vec<(LeaseKey, Reason)> {
        let keyed = self.table.troubled().filter_map(|id| Some((id, self.table.entry(id).key()?)));
        let others = keyed.filter(|(_, key)| !self.is_own(key));
        let mut found: Vec<_> = others.filter_map(|(id, key)| Some((key.clone(), self.reason(id)?))).collect();
        found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        found
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
        let id = self.table.find(self.host.own.key.as_ref()?)?;
        let entry = self.table.entry(id);
        match &entry.bad {
            Some(bad) => Some(bad.reason.clone()),
            None if entry.is_winner() => None,
            None => self.table.conflict(id),
        }
    }

    /// The prefixes that records which are bad in themselves name: kernel objects for exactly these (not for
    /// what lies inside) are not to be deleted, since their owner may still be there. Only such as a peer could hold,
    /// and none does.
    pub fn withheld(&self) -> &BTreeSet<Prefix> {
        self.withheld.found()
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
        let Record { key, created, lease } = record;
        let former = self.table.find(&key).and_then(|id| self.table.entry(id).bad.as_ref());
        if let Some(former) = former {
            self.withheld.unname(&former.subnets);
        }
        let judged = match lease {
            Ok(lease) if lease.key != key => {
                let reason = Reason::Unreadable(format!("its lease names the record {}", lease.key));
                Err(Bad { key, reason, subnets: lease.subnets, public: lease.attrs.public_ip })
            }
            Ok(lease) => match self.rules.judge(&lease) {
                Ok(macs) => Ok((lease, macs)),
                Err(reason) => Err(Bad { key, reason, subnets: lease.subnets, public: lease.attrs.public_ip }),
            },
            Err(bad) => {
                // A store's words may quote a hostile record at length.
                let reason = Reason::Unreadable(bad.reason.chars().take(256).collect());
                Err(Bad { key, reason, subnets: bad.subnets, public: Dual::default() })
            }
        };
        match judged {
            Ok((lease, macs)) => self.put_good(lease, created, macs),
            Err(bad) => self.put_bad(bad),
        }
    }

    fn put_good(&mut self, mut lease: Arc<Lease>, created: u64, macs: Dual<MacAddr>) {
        // Only its holder writes a record again; ten thousand fences are 0.3 MiB.
        if let Some(lease) = Arc::get_mut(&mut lease) {
            lease.fence = Fence::default();
        }
        let suits = self.suits(&lease, &macs);
        let id = self.table.place(&lease.key);
        let entry = self.table.entry(id);
        let same_subnets = entry.lease.as_ref().is_some_and(|old| old.subnets == lease.subnets);
        if same_subnets && entry.bad.is_none() && entry.created == created && entry.macs() == macs {
            // A renewal, or a new public address: no conflict comes or goes.
            self.table.amend(id, |entry| (entry.lease, entry.suits) = (Some(lease), suits));
            return;
        }
        self.table.replace(id, |entry| {
            (entry.lease, entry.bad) = (Some(lease), None);
            (entry.created, entry.suits) = (created, suits);
            entry.set_macs(&macs);
        });
    }

    fn put_bad(&mut self, bad: Bad) {
        self.withheld.name(&bad.subnets);
        let id = self.table.place(&bad.key);
        let bad = Some(Box::new(bad));
        if self.table.entry(id).bad.is_some() {
            self.table.amend(id, |entry| entry.bad = bad);
        } else {
            // What was good until now is only kept from now on: its rank changes.
            self.table.replace(id, |entry| entry.bad = bad);
        }
    }

    fn forget(&mut self, key: &LeaseKey) {
        let Some(id) = self.table.find(key) else { return };
        if let Some(bad) = &self.table.entry(id).bad {
            self.withheld.unname(&bad.subnets);
        }
        self.table.remove(id);
    }

    fn finish(&mut self) -> Vec<Change> {
        let found = self.table.finish();
        for lease in found.iter().flat_map(|(old, new)| [old, new]).flatten() {
            self.withheld.doubt(&lease.subnets);
        }
        let (host, table, rules) = (&self.host, &self.table, &self.rules);
        let possible = |prefix: &Prefix| {
            let family = prefix.family();
            let own = host.own.subnets.get(family).is_some_and(|own| own.overlaps(prefix));
            let network = rules.networks.get(family);
            !own && network.is_some_and(|network| compatible(network, prefix)) && !table.is_held(*prefix)
        };
        self.news.withheld = self.withheld.settle(possible);
        self.news.reasons = self.table.take_retold();
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
        if !entry.is_winner() {
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
mod tests;
