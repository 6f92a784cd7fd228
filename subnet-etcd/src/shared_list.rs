//! The list that a start reads first. Later steps use it again while it is valid.
//!
//! A start needs all records three times: to find the previous lease, to acquire a lease, and to begin the watch. They
//! are the same as long as cluster, term and revision are, which each answer of etcd contains, or only this store has
//! written since.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flannel_core::lease::Record;
use tokio::time::Instant;

use crate::connect::Header;
use crate::list::Listing;

/// How long a list is used. The first call after that drops it, so that a program that renews a lease but never watches
/// does not keep it in memory.
const LIFETIME: Duration = Duration::from_secs(60);

/// The list of all records, for the steps of a start.
#[derive(Debug, Default)]
pub(crate) struct SharedList(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    /// Nothing was read yet, or it is outdated.
    #[default]
    Missing,
    Kept {
        listing: Listing,
        since: Instant,
    },
    /// A watch has begun. Nothing is kept from then on: the watch reports changes, and the records would use memory for
    /// as long as the program runs.
    Over,
}

impl SharedList {
    /// Keeps a complete list, unless a watch has begun.
    pub(crate) fn keep(&self, listing: Listing) {
        let mut state = self.lock();
        // The default is an answer without a header.
        if !matches!(*state, State::Over) && listing.header != Header::default() {
            *state = State::Kept { listing, since: Instant::now() };
        }
    }

    /// Returns whether [`keep`](Self::keep) keeps anything.
    pub(crate) fn is_wanted(&self) -> bool {
        !matches!(*self.lock(), State::Over)
    }

    /// Calls `visit` for each record, if the kept ones are those of the state `now` of the store. Otherwise drops them,
    /// and returns false.
    pub(crate) fn visit(&self, now: Header, visit: impl FnMut(&Record)) -> bool {
        let mut state = self.lock();
        let Some(listing) = state.listing().filter(|listing| listing.header == now) else {
            state.drop_listing();
            return false;
        };
        listing.records.iter().for_each(visit);
        true
    }

    /// Adds a record that this store wrote, after which etcd's state was `after`. Drops all records if another client
    /// wrote since they were read.
    pub(crate) fn wrote(&self, record: Record, after: Header) {
        let mut state = self.lock();
        let next = |before: Header| Header { revision: before.revision.saturating_add(1), ..before };
        let Some(listing) = state.listing().filter(|listing| next(listing.header) == after) else {
            state.drop_listing();
            return;
        };
        match listing.records.iter_mut().find(|kept| kept.key == record.key) {
            Some(kept) => *kept = record,
            None => {
                let place = listing.records.partition_point(|kept| kept.key < record.key);
                listing.records.insert(place, record);
            }
        }
        listing.header = after;
    }

    /// Drops the list: a write that relied on it was refused.
    pub(crate) fn forget(&self) {
        self.lock().drop_listing();
    }

    /// Returns what was kept, and keeps nothing from now on: a watch begins.
    pub(crate) fn end(&self) -> Option<Listing> {
        let mut state = self.lock();
        // Drops it if it is too old.
        state.listing();
        match std::mem::replace(&mut *state, State::Over) {
            State::Kept { listing, .. } => Some(listing),
            State::Missing | State::Over => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of `visit` leaves the state as it was. In `wrote` the header is set last: until then the list does
        // not match the store, and is dropped.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the list, if there is one that is not too old.
    fn listing(&mut self) -> Option<&mut Listing> {
        if matches!(self, Self::Kept { since, .. } if since.elapsed() > LIFETIME) {
            self.drop_listing();
        }
        match self {
            Self::Kept { listing, .. } => Some(listing),
            Self::Missing | Self::Over => None,
        }
    }

    fn drop_listing(&mut self) {
        if matches!(self, Self::Kept { .. }) {
            *self = Self::Missing;
        }
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::lease::{BadRecord, LeaseKey};

    use super::*;

    fn header(revision: i64) -> Header {
        Header { cluster: 1, term: 2, revision }
    }

    fn record(key: &str, created: u64) -> Record {
        Record::bad(LeaseKey::new(key), created, BadRecord::new("", Default::default()))
    }

    fn kept(revision: i64) -> SharedList {
        let list = SharedList::default();
        list.keep(Listing { header: header(revision), records: vec![record("a", 1), record("b", 2)] });
        list
    }

    fn visited(list: &SharedList, now: Header) -> Option<Vec<u64>> {
        let mut created = Vec::new();
        list.visit(now, |record| created.push(record.created)).then_some(created)
    }

    #[test]
    fn records_are_used_again_in_the_same_state_alone() {
        let list = kept(7);
        assert_eq!(visited(&list, header(7)), Some(vec![1, 2]));
        assert_eq!(visited(&list, header(7)), Some(vec![1, 2]));
        for other in [header(8), header(6), Header { cluster: 9, ..header(7) }, Header { term: 3, ..header(7) }] {
            let list = kept(7);
            assert_eq!(visited(&list, other), None, "{other:?}");
            assert_eq!(visited(&list, header(7)), None, "{other:?} dropped them");
        }
    }

    #[test]
    fn own_writes_move_it_on_and_writes_of_others_end_it() {
        let list = kept(7);
        list.wrote(record("b", 3), header(8));
        list.wrote(record("aa", 9), header(9));
        assert_eq!(visited(&list, header(9)), Some(vec![1, 9, 3]), "in the order of keys");
        list.wrote(record("aa", 9), header(11));
        assert_eq!(visited(&list, header(11)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_is_used_for_a_minute_and_one_without_header_never() {
        let list = kept(7);
        tokio::time::advance(LIFETIME).await;
        assert!(visited(&list, header(7)).is_some());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(visited(&list, header(7)), None);
        list.keep(Listing { header: header(7), records: Vec::new() });
        tokio::time::advance(2 * LIFETIME).await;
        assert!(list.end().is_none());
        let list = SharedList::default();
        list.keep(Listing { header: Header::default(), records: Vec::new() });
        assert_eq!(visited(&list, Header::default()), None);
    }

    #[test]
    fn nothing_is_kept_once_a_watch_begins() {
        let list = kept(7);
        assert_eq!(list.end().map(|listing| listing.records.len()), Some(2));
        assert!(!list.is_wanted());
        list.keep(Listing { header: header(8), records: Vec::new() });
        assert!(list.end().is_none());
        assert_eq!(visited(&list, header(8)), None);
    }
}
