//! How much of a store is held, however much it holds.

use super::{Lease, LeaseKey, Record};

/// The most records of ordinary size that are held of a store: room for 100 000 peers, and less than 64 MiB whatever they
/// hold. What is larger than [`RECORD_BYTES`] counts as several. The youngest are dropped.
pub const MAX_RECORDS: usize = 114_688;

/// The bytes of a record's key and backend data that count as one record. An ordinary record has 50 to 120.
pub const RECORD_BYTES: usize = 128;

impl Record {
    /// How many records of ordinary size this is.
    pub fn weight(&self) -> usize {
        weight(&self.key, self.lease.as_deref().ok())
    }

    /// Who is dropped where there are too many: the greatest. As `created` is the store's, all nodes drop the same.
    pub fn age(&self) -> (u64, &str) {
        (self.created, self.key.as_str())
    }
}

/// [`Record::weight`] of a record's parts; `lease` is `None` where the record is bad.
pub fn weight(key: &LeaseKey, lease: Option<&Lease>) -> usize {
    let data = lease.map_or(0, |lease| lease.attrs.backend_data.iter().map(|(_, data)| data.as_str().len()).sum());
    1 + (key.as_str().len() + data) / RECORD_BYTES
}

/// Whether a list of a store can be everything there is. A store that leaves the youngest out lists more than
/// [`MAX_RECORDS`] all the same: what such a list lacks may exist.
pub fn is_complete(records: &[Record]) -> bool {
    records.iter().map(Record::weight).sum::<usize>() <= MAX_RECORDS
}

/// Drops the youngest of `records` until they count as at most `limit`. Where something is dropped, what is left is in
/// the order of age. Returns how many were dropped, and the oldest of those.
pub fn keep_oldest(records: &mut Vec<Record>, limit: usize) -> Option<Dropped> {
    if records.iter().map(Record::weight).sum::<usize>() <= limit {
        return None;
    }
    records.sort_unstable_by(|a, b| a.age().cmp(&b.age()));
    let mut left = limit;
    let fits = |record: &Record| match left.checked_sub(record.weight()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    let kept = records.iter().map(fits).take_while(|fits| *fits).count();
    let first = records.get(kept)?;
    let dropped = Dropped { count: records.len() - kept, created: first.created, key: first.key.clone() };
    records.truncate(kept);
    Some(dropped)
}

/// What [`keep_oldest`] dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// How many records.
    pub count: usize,
    /// When the oldest of them was created.
    pub created: u64,
    /// Its key.
    pub key: LeaseKey,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::BadRecord;

    fn record(created: u64, key: &str) -> Record {
        let bad = BadRecord { reason: String::new(), subnets: Default::default() };
        Record { key: LeaseKey::new(key), created, lease: Err(Box::new(bad)) }
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
}
