//! The records, and how a node's lease is chosen.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Fault;
use super::watching::Watcher;
use crate::allocation::{self, Taken};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::lease::{BadRecord, Fence, Lease, LeaseEvent, LeaseKey, Record};
use crate::net::{Dual, Prefix};
use crate::subnet::{NodeIdentity, SubnetError, ThisNode, Want};

/// How nodes are identified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// By the node's name, which is also the record's key.
    Name,
    /// By the published address; the record's key is made from its subnets.
    Address,
}

pub(super) struct Inner {
    pub(super) known_by: Known,
    pub(super) config: NetworkConfig,
    /// The assigned subnets by node name, if nodes do not choose them.
    pub(super) assigned: Option<BTreeMap<String, Dual<Prefix>>>,
    /// The addresses that an operator set, by node name.
    public: BTreeMap<String, Dual<IpAddr>>,
    /// How long a lease lasts; `None`: no expiry.
    ttl: Option<Duration>,
    revision: u64,
    pub(super) records: BTreeMap<LeaseKey, Record>,
    /// Whether the store is unavailable.
    pub(super) away: bool,
    pub(super) faults: VecDeque<Fault>,
    watchers: Vec<std::sync::Weak<Watcher>>,
    random: u64,
}

impl Inner {
    pub(super) fn new(known_by: Known, config: NetworkConfig, ttl: Option<Duration>) -> Self {
        Self {
            known_by,
            config,
            assigned: None,
            public: BTreeMap::new(),
            ttl,
            revision: 0,
            records: BTreeMap::new(),
            away: false,
            faults: VecDeque::new(),
            watchers: Vec::new(),
            random: 0x5eed,
        }
    }

    pub(super) fn put(&mut self, key: LeaseKey, lease: Result<Arc<Lease>, BadRecord>) {
        self.revision += 1;
        let created = self.records.get(&key).map_or(self.revision, |record| record.created);
        let record = Record { key: key.clone(), created, lease: lease.map_err(Box::new) };
        self.records.insert(key, record.clone());
        self.tell(LeaseEvent::Upsert(record));
    }

    pub(super) fn delete(&mut self, key: &LeaseKey) -> bool {
        let deleted = self.records.remove(key).is_some();
        if deleted {
            self.revision += 1;
            self.tell(LeaseEvent::Remove(key.clone()));
        }
        deleted
    }

    /// Removes expired records.
    pub(super) fn sweep(&mut self, now: BootTime) {
        let expired = |record: &Record| expiry(record).is_some_and(|expires| expires <= now);
        if self.ttl.is_none() {
            return;
        }
        let keys: Vec<_> = self.records.values().filter(|record| expired(record)).map(|r| r.key.clone()).collect();
        for key in keys {
            self.delete(&key);
        }
    }

    pub(super) fn next_expiry(&self) -> Option<BootTime> {
        self.ttl?;
        self.records.values().filter_map(expiry).min()
    }

    pub(super) fn watch(&mut self, watcher: &Arc<Watcher>) {
        self.watchers.push(Arc::downgrade(watcher));
    }

    pub(super) fn watchers(&mut self) -> Vec<Arc<Watcher>> {
        self.watchers.retain(|watcher| watcher.strong_count() > 0);
        self.watchers.iter().filter_map(std::sync::Weak::upgrade).collect()
    }

    fn tell(&mut self, event: LeaseEvent) {
        for watcher in self.watchers() {
            watcher.tell(&event);
        }
    }

    /// Returns the leases of `node` that fit the current network.
    pub(super) fn previous(&self, node: &NodeIdentity) -> Vec<Lease> {
        let fits = |lease: &&Arc<Lease>| allocation::all_compatible(&self.config, &lease.subnets);
        self.leases_of(node).iter().filter(fits).map(|lease| Lease::clone(lease)).collect()
    }

    /// Acquires a lease. If nodes are identified by address, the result is the same as in an etcd store.
    pub(super) fn acquire(&mut self, node: &NodeIdentity, want: Want, now: BootTime) -> Result<Lease, SubnetError> {
        match self.assigned_to(node.as_str()) {
            None => {}
            Some(Some(subnets)) => return Ok(self.write_assigned(LeaseKey::new(node.as_str()), subnets, want, now)),
            Some(None) => {
                return Err(SubnetError::Unconfigured {
                    at: format!("node {}", node.as_str()),
                    reason: "no subnets were assigned to it yet".to_owned(),
                });
            }
        }
        let mut own = self.leases_of(node);
        let is_reserved = |lease: &Lease| lease.expires.is_none() && lease.attrs.are_addresses_alone();
        own.retain(|lease| self.known_by == Known::Name || want.is_own(lease) || is_reserved(lease));
        let kept = want.kept(&own, |lease| self.fits(lease)).map(|place| own.remove(place));
        let dropped: Vec<LeaseKey> = match (self.known_by, &kept) {
            // Also a record that does not parse.
            (Known::Name, None) => vec![LeaseKey::new(node.as_str())],
            (Known::Name, Some(_)) => Vec::new(),
            (Known::Address, _) => {
                // Only an operator deletes a reservation.
                let gives_up = |it: &&Arc<Lease>| want.gives_up(it) && !is_reserved(it);
                own.iter().filter(gives_up).map(|it| it.key.clone()).collect()
            }
        };
        let (key, subnets, fence) = match kept {
            Some(lease) => (lease.key.clone(), lease.subnets, lease.fence.clone()),
            None => {
                let subnets = self.choose(&dropped, &want.preferred)?;
                (self.new_key(node, &subnets), subnets, Fence::default())
            }
        };
        for key in dropped {
            self.delete(&key);
        }
        Ok(self.write(Lease::new(key, subnets, want.attrs).fenced(fence), now))
    }

    pub(super) fn renew(&mut self, lease: &Lease, now: BootTime) -> Result<Lease, SubnetError> {
        let current = self.records.get(&lease.key).and_then(|record| record.lease.as_ref().ok());
        match current {
            None => Err(SubnetError::Lost(format!("there is no record {}", lease.key))),
            Some(current) if current.subnets != lease.subnets || current.fence != lease.fence => {
                Err(SubnetError::Lost(format!("record {} was written by another", lease.key)))
            }
            Some(_) => match self.assigned_to(lease.key.as_str()) {
                Some(subnets) if subnets != Some(lease.subnets) => {
                    Err(SubnetError::Lost(format!("node {} was assigned other subnets", lease.key)))
                }
                _ => Ok(self.write(lease.clone(), now)),
            },
        }
    }

    /// Returns the subnets assigned to the node of this name, if any yet; `None` if nodes choose them.
    fn assigned_to(&self, name: &str) -> Option<Option<Dual<Prefix>>> {
        self.assigned.as_ref().map(|assigned| assigned.get(name).copied())
    }

    pub(super) fn assign(&mut self, node: &NodeIdentity, subnets: Dual<Prefix>) {
        let Some(assigned) = &mut self.assigned else { return };
        assigned.insert(node.as_str().to_owned(), subnets);
        self.tell_of_node(node);
        let key = LeaseKey::new(node.as_str());
        let Some(Ok(lease)) = self.records.get(&key).map(|record| record.lease.clone()) else { return };
        if lease.subnets != subnets {
            let fence = Fence::new(&(self.revision + 1).to_string());
            self.put(key, Ok(Arc::new(Lease { subnets, fence, ..Lease::clone(&lease) })));
        }
    }

    pub(super) fn set_config(&mut self, config: NetworkConfig) {
        self.config = config;
        for watcher in self.watchers() {
            watcher.lock().config = true;
            watcher.changed.notify_one();
        }
    }

    pub(super) fn public_of(&self, node: &ThisNode) -> Option<Dual<IpAddr>> {
        self.public.get(node.name.as_ref()?.as_str()).copied()
    }

    pub(super) fn set_public(&mut self, node: &NodeIdentity, public: Dual<IpAddr>) {
        self.public.insert(node.as_str().to_owned(), public);
        self.tell_of_node(node);
    }

    fn tell_of_node(&mut self, node: &NodeIdentity) {
        for watcher in self.watchers().iter().filter(|watcher| watcher.node.name.as_ref() == Some(node)) {
            watcher.lock().this_node = true;
            watcher.changed.notify_one();
        }
    }

    fn write_assigned(&mut self, key: LeaseKey, subnets: Dual<Prefix>, want: Want, now: BootTime) -> Lease {
        let current = self.records.get(&key).and_then(|record| record.lease.as_ref().ok());
        let same = current.filter(|current| current.subnets == subnets);
        let fence = same.map(|current| current.fence.clone()).unwrap_or_default();
        self.write(Lease::new(key, subnets, want.attrs).fenced(fence), now)
    }

    pub(super) fn release(&mut self, lease: &Lease) {
        let current = self.records.get(&lease.key).and_then(|record| record.lease.as_ref().ok());
        if current.is_some_and(|current| current.subnets == lease.subnets && current.fence == lease.fence) {
            self.delete(&lease.key);
        }
    }

    /// Returns the leases under the identity of `node`, in the order of their keys.
    fn leases_of(&self, node: &NodeIdentity) -> Vec<Arc<Lease>> {
        let is_of = |record: &Record, lease: &Lease| match self.known_by {
            Known::Name => record.key.as_str() == node.as_str(),
            Known::Address => lease.attrs.public_ip.iter().any(|(_, addr)| addr.to_string() == node.as_str()),
        };
        let lease = |record: &Record| record.lease.as_ref().ok().filter(|lease| is_of(record, lease)).cloned();
        self.records.values().filter_map(lease).collect()
    }

    /// Returns whether a lease fits the current network and peers do not prefer an older lease.
    fn fits(&self, own: &Lease) -> bool {
        let is_compatible = |lease: &Lease| allocation::all_compatible(&self.config, &lease.subnets);
        let overlaps = |lease: &Lease| {
            let subnets = || lease.subnets.iter().map(|(_, subnet)| subnet);
            own.subnets.iter().any(|(_, ours)| subnets().any(|theirs| ours.overlaps(theirs)))
        };
        let created = self.records.get(&own.key).map(|record| record.created);
        let beats = |record: &Record| {
            record
                .lease
                .as_ref()
                .is_ok_and(|lease| Some(record.created) < created && overlaps(lease) && is_compatible(lease))
        };
        is_compatible(own) && (self.known_by == Known::Name || !self.records.values().any(beats))
    }

    /// Returns the key of a new record.
    fn new_key(&self, node: &NodeIdentity, subnets: &Dual<Prefix>) -> LeaseKey {
        match self.known_by {
            Known::Name => LeaseKey::new(node.as_str()),
            Known::Address => {
                let parts: Vec<_> = subnets.iter().map(|(_, subnet)| subnet.to_string().replace('/', "-")).collect();
                LeaseKey::new(&parts.join("&"))
            }
        }
    }

    fn choose(&mut self, own: &[LeaseKey], preferred: &Dual<Prefix>) -> Result<Dual<Prefix>, SubnetError> {
        let mut taken = Taken::of(&self.config);
        for record in self.records.values().filter(|record| !own.contains(&record.key)) {
            taken.add(record.lease.as_ref().map_or_else(|bad| &bad.subnets, |lease| &lease.subnets), ());
        }
        let random = &mut self.random;
        let mut random = move || {
            // xorshift64: any sequence is sufficient.
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            *random
        };
        Ok(taken.choose(&[preferred], &mut random)?)
    }

    /// Writes the lease of `node` and returns the stored lease. The fence identifies the acquisition, not the last
    /// write, so a renewal whose answer was lost can be repeated.
    fn write(&mut self, mut lease: Lease, now: BootTime) -> Lease {
        lease.expires = self.ttl.map(|ttl| now.after(ttl));
        if lease.fence == Fence::default() {
            lease.fence = Fence::new(&(self.revision + 1).to_string());
        }
        self.put(lease.key.clone(), Ok(Arc::new(lease.clone())));
        lease
    }
}

fn expiry(record: &Record) -> Option<BootTime> {
    record.lease.as_ref().ok().and_then(|lease| lease.expires)
}
