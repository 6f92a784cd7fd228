//! The cached records of a store, limited in size.

use std::collections::BTreeMap;
use std::ops::Deref;

use flannel_core::lease::{LeaseKey, MAX_RECORDS, weight};

use crate::known::Entry;

/// Records whose weight is limited to that of [`MAX_RECORDS`] records of ordinary size when added one by one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Records {
    by_key: BTreeMap<LeaseKey, Entry>,
    /// The weight of all records.
    weight: usize,
}

impl Records {
    /// Returns the weight of all records.
    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// Adds a record if there is room. Returns the former record, which is removed in any case because it is outdated.
    pub(crate) fn put(&mut self, key: &LeaseKey, entry: Entry) -> Option<Entry> {
        let old = self.remove(key);
        let weight = self.weight + weight_of(key, &entry);
        // The store's next list determines which records are the oldest.
        if weight <= MAX_RECORDS {
            self.weight = weight;
            self.by_key.insert(key.clone(), entry);
        }
        old
    }

    pub(crate) fn remove(&mut self, key: &LeaseKey) -> Option<Entry> {
        let old = self.by_key.remove(key)?;
        self.weight -= weight_of(key, &old);
        Some(old)
    }
}

impl FromIterator<(LeaseKey, Entry)> for Records {
    fn from_iter<T: IntoIterator<Item = (LeaseKey, Entry)>>(records: T) -> Self {
        let by_key: BTreeMap<_, _> = records.into_iter().collect();
        let weight = by_key.iter().map(|(key, entry)| weight_of(key, entry)).sum();
        Self { by_key, weight }
    }
}

impl Deref for Records {
    type Target = BTreeMap<LeaseKey, Entry>;

    fn deref(&self) -> &Self::Target {
        &self.by_key
    }
}

fn weight_of(key: &LeaseKey, entry: &Entry) -> usize {
    weight(key, entry.lease.as_deref().map_err(|bad| &**bad))
}
