//! All Nodes as they were last seen: what of a list or a watch is news.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flannel_core::lease::{LeaseEvent, LeaseKey, MAX_RECORDS, Record, keep_oldest};

use crate::annotations::Keys;
use crate::node::{Node, Published};

/// The most records held of a list: the oldest. More than the agent holds, so that it sees that there are too many.
const MOST: usize = MAX_RECORDS + MAX_RECORDS / 8;

/// What a watch says of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Put,
    Deleted,
}

/// The managed Nodes, each with a fingerprint of what counts: a heartbeat has the same one.
pub(crate) struct Nodes {
    keys: Keys,
    published: Arc<Mutex<Published>>,
    hasher: RandomState,
    prints: HashMap<Box<str>, u64>,
    /// The records of a list that is being read.
    records: Vec<Record>,
    weight: usize,
}

impl Nodes {
    pub(crate) fn new(keys: Keys, published: Arc<Mutex<Published>>) -> Self {
        Self { keys, published, hasher: RandomState::new(), prints: HashMap::new(), records: Vec::new(), weight: 0 }
    }

    /// A list begins: what was known is as good as unknown.
    pub(crate) fn begin_list(&mut self) {
        self.prints.clear();
        self.records.clear();
        self.weight = 0;
    }

    /// A Node of a list.
    pub(crate) fn list(&mut self, node: &Node<'_>) {
        let annotations = node.annotations(&self.keys);
        if !annotations.is_managed() {
            return;
        }
        let print = node.fingerprint(&annotations, &self.hasher);
        self.remember(&node.metadata.name, print);
        let record = node.record(&annotations, &locked(&self.published));
        self.weight += record.weight();
        self.records.push(record);
        // Sorting each time would cost a list of millions its time.
        if self.weight > 2 * MOST {
            self.prune();
        }
    }

    /// The list is complete.
    pub(crate) fn end_list(&mut self) -> LeaseEvent {
        self.prune();
        LeaseEvent::Reset(std::mem::take(&mut self.records))
    }

    /// A Node changed. Returns what of it is news.
    pub(crate) fn change(&mut self, change: Change, node: &Node<'_>) -> Option<LeaseEvent> {
        let name = &*node.metadata.name;
        let annotations = node.annotations(&self.keys);
        if change == Change::Deleted || !annotations.is_managed() {
            let was_known = self.prints.remove(name).is_some();
            return was_known.then(|| LeaseEvent::Remove(LeaseKey::of_bytes(name.as_bytes())));
        }
        let print = node.fingerprint(&annotations, &self.hasher);
        if !self.remember(name, print) {
            return None;
        }
        Some(LeaseEvent::Upsert(node.record(&annotations, &locked(&self.published))))
    }

    /// Keeps the fingerprint of a Node. Returns whether it is another than before.
    fn remember(&mut self, name: &str, print: u64) -> bool {
        if let Some(known) = self.prints.get_mut(name) {
            return std::mem::replace(known, print) != print;
        }
        if self.prints.len() < MOST
            && let Entry::Vacant(entry) = self.prints.entry(name.into())
        {
            entry.insert(print);
        }
        true
    }

    fn prune(&mut self) {
        keep_oldest(&mut self.records, MOST);
        self.weight = self.records.iter().map(Record::weight).sum();
    }
}

/// A panic of another thread leaves nothing half done here.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
