//! The cached answers of the store. Pure.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use flannel_core::allocation;
use flannel_core::clock::BootTime;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{BadRecord, Lease, LeaseEvent, LeaseKey, MAX_RECORDS, Record, is_complete, keep_oldest};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, ThisNode};

use crate::records::Records;

/// The cached data of a store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Known {
    pub(crate) this_node: Option<ThisNode>,
    pub(crate) config: Option<NetworkConfig>,
    pub(crate) own: Own,
    pub(crate) records: Option<Records>,
    /// The public addresses in the last renewal request: the store may show them before it answers, or without an
    /// answer.
    pub(crate) asked: Option<Dual<IpAddr>>,
}

/// This node's own lease.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Own {
    /// The store has not been asked.
    #[default]
    Unasked,
    /// There is none, or no longer one.
    None,
    /// The lease as stored.
    Held(NodeIdentity, Lease),
    /// The lease was held, and the store shows something else under its key, which may be older than the last write.
    /// Not used unless the store confirms that it belongs to this node.
    Doubted(NodeIdentity, Lease),
}

/// A record without its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) created: u64,
    pub(crate) lease: Result<Arc<Lease>, Box<BadRecord>>,
}

/// Whether data that is kept on disk changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changed {
    Yes,
    No,
}

impl Changed {
    fn when(changed: bool) -> Self {
        if changed { Self::Yes } else { Self::No }
    }

    fn or(self, other: Self) -> Self {
        Self::when(self == Self::Yes || other == Self::Yes)
    }
}

impl Known {
    /// Records the store's answer about this node.
    pub(crate) fn identified(&mut self, node: &ThisNode) -> Changed {
        Changed::when(self.this_node.replace(node.clone()).as_ref() != Some(node))
    }

    /// Whether a state file could add nothing, so that it may be overwritten.
    pub(crate) fn is_whole(&self) -> bool {
        self.config.is_some() && self.own != Own::Unasked && self.records.is_some()
    }

    /// Fills missing data from the earlier data `before`.
    pub(crate) fn recall(&mut self, before: Self) {
        self.this_node = self.this_node.take().or(before.this_node);
        self.config = self.config.take().or(before.config);
        self.records = self.records.take().or(before.records);
        if self.own == Own::Unasked {
            self.own = before.own;
        }
    }

    /// Returns the weight of the records.
    pub(crate) fn weight(&self) -> usize {
        self.records.as_ref().map_or(0, Records::weight)
    }

    pub(crate) fn configured(&mut self, config: &NetworkConfig) -> Changed {
        let changed = self.config.as_ref() != Some(config);
        if changed {
            self.config = Some(config.clone());
        }
        Changed::when(changed)
    }

    /// Records that `node` holds `lease`.
    pub(crate) fn held(&mut self, node: &NodeIdentity, lease: &Lease) -> Changed {
        let own = Own::Held(node.clone(), lease.clone());
        let changed = self.own != own;
        self.own = own;
        Changed::when(changed)
    }

    /// Records the leases found under the identity of `node`. The next acquire decides which of them is the node's own;
    /// until then it is the one that was known as its own, or else the first.
    pub(crate) fn found(&mut self, node: &NodeIdentity, leases: &[Lease]) -> Changed {
        let known = match &self.own {
            Own::Held(_, own) | Own::Doubted(_, own) => leases.iter().find(|lease| lease.key == own.key),
            Own::Unasked | Own::None => None,
        };
        match known.or(leases.first()) {
            Some(lease) => self.held(node, lease),
            None => self.without_lease(node),
        }
    }

    /// Records that `node` has no lease.
    pub(crate) fn without_lease(&mut self, node: &NodeIdentity) -> Changed {
        match &self.own {
            Own::Held(holder, lease) | Own::Doubted(holder, lease) if !is_holder(node, holder, lease) => Changed::No,
            Own::None => Changed::No,
            Own::Held(..) | Own::Doubted(..) | Own::Unasked => self.give_up(),
        }
    }

    /// Called before the store is asked to renew this lease.
    pub(crate) fn renewing(&mut self, lease: &Lease) {
        self.asked = Some(lease.attrs.public_ip);
    }

    /// Records that the store renewed this lease.
    pub(crate) fn renewed(&mut self, lease: &Lease) -> Changed {
        match &self.own {
            Own::Held(node, own) | Own::Doubted(node, own) if own.key == lease.key => {
                let node = node.clone();
                self.held(&node, lease)
            }
            Own::Held(..) | Own::Doubted(..) | Own::Unasked | Own::None => Changed::No,
        }
    }

    /// Records that this node no longer holds the lease of this key.
    pub(crate) fn lost(&mut self, key: &LeaseKey) -> Changed {
        match &self.own {
            Own::Held(_, own) | Own::Doubted(_, own) if own.key == *key => self.give_up(),
            Own::Held(..) | Own::Doubted(..) | Own::Unasked | Own::None => Changed::No,
        }
    }

    /// Returns the own lease of `node`, if it may be used at `now`.
    pub(crate) fn own_lease(&self, node: &NodeIdentity, now: BootTime) -> Option<Lease> {
        let Own::Held(holder, lease) = &self.own else { return None };
        let runs = lease.expires.is_none_or(|expires| expires > now);
        let fits = self.config.as_ref().is_some_and(|config| allocation::all_compatible(config, &lease.subnets));
        (is_holder(node, holder, lease) && runs && fits).then(|| lease.clone())
    }

    /// Returns all records in the order of keys, followed by an own lease that is newer than the list.
    ///
    /// The own record is the own lease itself: its fence and expiry in the list may be older.
    pub(crate) fn snapshot(&self) -> Option<Vec<Record>> {
        let records = self.records.as_ref()?;
        let mut own = match &self.own {
            Own::Held(_, lease) => Some(Arc::new(lease.clone())),
            Own::Unasked | Own::None | Own::Doubted(..) => None,
        };
        let mut snapshot = Vec::with_capacity(records.len() + 1);
        for (key, Entry { created, lease }) in records.iter() {
            let lease = match own.take_if(|own| own.key == *key) {
                Some(own) => Ok(own),
                None => lease.clone(),
            };
            snapshot.push(Record { key: key.clone(), created: *created, lease });
        }
        // Acquired after the list was made, so it is the newest record.
        snapshot.extend(own.map(|own| Record { key: own.key.clone(), created: u64::MAX, lease: Ok(own) }));
        Some(snapshot)
    }

    /// Records an event of the watch.
    pub(crate) fn event(&mut self, event: &LeaseEvent) -> Changed {
        match event {
            LeaseEvent::Reset(records) => self.reset(records),
            LeaseEvent::Upsert(record) => {
                let own = self.own_record(&record.key, Some(record));
                let Some(records) = &mut self.records else { return own };
                let old = records.put(&record.key, Entry::of(record));
                let same = match (&old, records.get(&record.key)) {
                    (Some(old), Some(new)) => new.says_what(old),
                    (None, None) => true,
                    (Some(_), None) | (None, Some(_)) => false,
                };
                own.or(Changed::when(!same))
            }
            LeaseEvent::Remove(key) => {
                let own = self.own_record(key, None);
                let removed = self.records.as_mut().and_then(|records| records.remove(key)).is_some();
                own.or(Changed::when(removed))
            }
            LeaseEvent::Resumed | LeaseEvent::ConfigChanged => Changed::when(false),
            LeaseEvent::ThisNode(public) => match &mut self.this_node {
                Some(node) => Changed::when(std::mem::replace(&mut node.public, *public) != *public),
                None => Changed::No,
            },
        }
    }

    fn reset(&mut self, records: &[Record]) -> Changed {
        let mut kept = Cow::Borrowed(records);
        let is_complete = is_complete(records);
        if !is_complete {
            keep_oldest(kept.to_mut(), MAX_RECORDS);
        }
        let entries: Records = kept.iter().map(|record| (record.key.clone(), Entry::of(record))).collect();
        let same = self.records.as_ref().is_some_and(|old| {
            old.len() == entries.len()
                && old.iter().zip(entries.iter()).all(|((a, old), (b, new))| a == b && new.says_what(old))
        });
        self.records = Some(entries);
        let own = match &self.own {
            Own::Held(_, lease) | Own::Doubted(_, lease) => {
                let key = lease.key.clone();
                match records.iter().find(|record| record.key == key) {
                    None if !is_complete => Changed::No,
                    record => self.own_record(&key, record),
                }
            }
            Own::Unasked | Own::None => Changed::No,
        };
        own.or(Changed::when(!same))
    }

    /// Handles the record of `key`, or its absence: the own lease may be gone or belong to another node.
    fn own_record(&mut self, key: &LeaseKey, record: Option<&Record>) -> Changed {
        let (Own::Held(node, own) | Own::Doubted(node, own)) = &self.own else { return Changed::No };
        if own.key != *key {
            return Changed::No;
        }
        let is_ours = |seen: &Lease| {
            let public = &seen.attrs.public_ip;
            seen.subnets == own.subnets && (*public == own.attrs.public_ip || Some(public) == self.asked.as_ref())
        };
        let shown = record.and_then(|record| record.lease.as_ref().ok()).filter(|seen| is_ours(seen));
        let now = match shown {
            // A store may show a record without its expiry; then the known expiry stays.
            Some(seen) => Own::Held(node.clone(), Lease::clone(seen).expiring(seen.expires.max(own.expires))),
            None => Own::Doubted(node.clone(), own.clone()),
        };
        let changed = self.own != now;
        self.own = now;
        Changed::when(changed)
    }

    fn give_up(&mut self) -> Changed {
        self.own = Own::None;
        Changed::Yes
    }
}

/// Whether `node` is the holder of this lease. A store that identifies a node by its address sees another identity once
/// the node has moved and published its new address.
fn is_holder(node: &NodeIdentity, holder: &NodeIdentity, lease: &Lease) -> bool {
    let Dual { v4, v6 } = lease.attrs.public_ip;
    node == holder || v4.or(v6).is_some_and(|public| *node == NodeIdentity::of_address(public))
}

impl Entry {
    fn of(record: &Record) -> Self {
        let lease = match &record.lease {
            Ok(lease) => Ok(Arc::clone(lease)),
            // The store's message may quote a hostile record at length.
            Err(bad) => Err(Box::new(BadRecord::new(&bad.reason, bad.subnets))),
        };
        Self { created: record.created, lease }
    }

    /// Whether both are the same on disk: a renewal changes nothing there.
    fn says_what(&self, other: &Self) -> bool {
        let same = match (&self.lease, &other.lease) {
            (Ok(a), Ok(b)) => Arc::ptr_eq(a, b) || a.subnets == b.subnets && a.attrs == b.attrs,
            (Err(a), Err(b)) => a == b,
            (Ok(_), Err(_)) | (Err(_), Ok(_)) => false,
        };
        same && self.created == other.created
    }
}
