//! Limits on how many of a store's records are kept in memory.

use std::borrow::Borrow;

use super::{BadRecord, Lease, LeaseKey, Record};

/// The most records of ordinary size that are kept of a store: enough for 100 000 peers, in less than 64 MiB whatever
/// they contain. A record larger than [`RECORD_BYTES`] counts as several. The youngest are dropped.
pub const MAX_RECORDS: usize = 114_688;

/// The bytes that count as one record: those of its key, backend type and backend data, or of its key and the reason
/// why it is bad. An ordinary record has 50 to 90.
pub const RECORD_BYTES: usize = 96;

impl Record {
    /// Returns how many records of ordinary size this record counts as.
    pub fn weight(&self) -> usize {
        weight(&self.key, self.lease.as_deref().map_err(|bad| &**bad))
    }

    /// Returns the sort key by age: if there are too many records, the greatest are dropped. `created` comes from the
    /// store, so all nodes drop the same ones.
    pub fn age(&self) -> (u64, &str) {
        (self.created, self.key.as_str())
    }
}

/// [`Record::weight`] of a record's parts.
pub fn weight(key: &LeaseKey, lease: Result<&Lease, &BadRecord>) -> usize {
    let text = match lease {
        Ok(lease) => {
            let data = lease.attrs.backend_data.iter().map(|(_, data)| data.as_str().len());
            data.sum::<usize>() + lease.attrs.backend_type.len()
        }
        // A longer reason is cut.
        Err(bad) => bad.reason.len().min(BadRecord::MAX_BYTES),
    };
    1 + (key.as_str().len() + text) / RECORD_BYTES
}

/// Returns whether a list of records can be complete. A store that drops the youngest records must still list more than
/// [`MAX_RECORDS`]; a record missing from such a list may exist.
pub fn is_complete(records: &[Record]) -> bool {
    weight_of(records) <= MAX_RECORDS
}

/// Drops the youngest of `records` until they count as at most `limit`. If any are dropped, the remaining ones are
/// sorted by age. Returns how many were dropped, and the oldest of those.
pub fn keep_oldest<R: Borrow<Record>>(records: &mut Vec<R>, limit: usize) -> Option<Dropped> {
    if weight_of(records) <= limit {
        return None;
    }
    records.sort_unstable_by(|a, b| a.borrow().age().cmp(&b.borrow().age()));
    let mut left = limit;
    let fits = |record: &R| match left.checked_sub(record.borrow().weight()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    let kept = records.iter().map(fits).take_while(|fits| *fits).count();
    let first: &Record = records.get(kept)?.borrow();
    let dropped = Dropped { count: records.len() - kept, created: first.created, key: first.key.clone() };
    records.truncate(kept);
    Some(dropped)
}

fn weight_of<R: Borrow<Record>>(records: &[R]) -> usize {
    records.iter().map(|record| record.borrow().weight()).sum()
}

/// Collects the oldest records of a list while a store reads it: those that count as [`LIMIT`](Self::LIMIT) at the end,
/// and up to an eighth more before that. A store may keep its own data beside each record.
#[derive(Debug)]
pub struct OldestRecords<R = Record> {
    records: Vec<R>,
    weight: usize,
    limit: usize,
}

impl OldestRecords {
    /// More than [`MAX_RECORDS`], so that [`is_complete`] recognizes a list that was cut.
    pub const LIMIT: usize = MAX_RECORDS + MAX_RECORDS / 8;
}

impl<R> Default for OldestRecords<R> {
    fn default() -> Self {
        Self::within(OldestRecords::LIMIT)
    }
}

impl<R> OldestRecords<R> {
    /// Collects the oldest that count as `limit`.
    pub fn within(limit: usize) -> Self {
        Self { records: Vec::new(), weight: 0, limit }
    }
}

impl<R: Borrow<Record>> OldestRecords<R> {
    /// Adds a record, and drops the youngest if there are too many.
    pub fn push(&mut self, record: R) {
        self.weight += record.borrow().weight();
        self.records.push(record);
        // Sorting on each call would be slow for a list of millions.
        if self.weight > self.limit + self.limit / 8 {
            self.prune();
        }
    }

    /// Returns the collected records.
    pub fn finish(mut self) -> Vec<R> {
        self.prune();
        self.records
    }

    fn prune(&mut self) {
        keep_oldest(&mut self.records, self.limit);
        self.weight = weight_of(&self.records);
    }
}

/// What [`keep_oldest`] dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// How many records were dropped.
    pub count: usize,
    /// When the oldest of them was created.
    pub created: u64,
    /// The key of the oldest of them.
    pub key: LeaseKey,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(created: u64, key: &str) -> Record {
        Record::bad(LeaseKey::new(key), created, BadRecord::new("", Default::default()))
    }

    #[test]
    fn every_text_that_its_writer_chose_counts() {
        let text = |bytes: usize| "x".repeat(bytes);
        let key = LeaseKey::new("a");
        let lease = Lease::new(key.clone(), Default::default(), Default::default());
        assert_eq!(weight(&key, Ok(&lease)), 1);
        let mut of_type = lease.clone();
        of_type.attrs.backend_type = text(4000).into();
        let mut with_data = lease;
        with_data.attrs.backend_data.v6 = crate::lease::Json::parse(&format!("\"{}\"", text(4000))).ok();
        assert_eq!(
            [of_type, with_data].map(|lease| weight(&key, Ok(&lease))),
            [1 + 4001 / RECORD_BYTES, 1 + 4003 / RECORD_BYTES]
        );
        let bad = BadRecord::new(text(4000), Default::default());
        assert_eq!(weight(&key, Err(&bad)), 1 + (1 + BadRecord::MAX_BYTES) / RECORD_BYTES);
    }

    #[test]
    fn the_youngest_are_dropped_and_what_is_large_counts_several_times() {
        let large = "x".repeat(RECORD_BYTES);
        let all = vec![record(3, "c"), record(1, "b"), record(2, &large), record(1, "a")];
        let kept = |limit: usize| {
            let mut records = all.clone();
            let dropped = keep_oldest(&mut records, limit);
            (records.len(), dropped.map(|dropped| (dropped.count, dropped.created)))
        };
        assert_eq!(kept(5), (4, None));
        assert_eq!(kept(4), (3, Some((1, 3))));
        assert_eq!(kept(3), (2, Some((2, 2))), "nothing younger takes the place of what was dropped");
        assert_eq!(kept(1), (1, Some((3, 1))));
        assert_eq!(kept(0), (0, Some((4, 1))));
    }

    #[test]
    fn of_a_list_without_end_the_oldest_are_held_and_few_more() {
        let most = OldestRecords::LIMIT as u64;
        let mut oldest = OldestRecords::default();
        // Keys are not in the order of age: 7919 is prime to the number of records.
        for nth in 0..3 * most {
            let created = nth * 7919 % (3 * most);
            oldest.push(record(created, &format!("{created}")));
            assert!(oldest.records.len() <= OldestRecords::LIMIT + OldestRecords::LIMIT / 8);
        }
        let mut ages: Vec<u64> = oldest.finish().iter().map(|record| record.created).collect();
        ages.sort_unstable();
        assert!(ages.into_iter().eq(0..most));
        // A large record counts as several.
        let mut oldest = OldestRecords::default();
        (0..most).for_each(|created| oldest.push(record(created, &format!("{created:0>250}"))));
        assert_eq!(oldest.finish().len(), OldestRecords::LIMIT / 3);
    }
}
