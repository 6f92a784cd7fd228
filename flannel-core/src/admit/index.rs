//! An ordered set of numbers whose order is defined by the caller.
//!
//! A `BTreeMap` would store each key a second time; with ten thousand records, the keys dominate the memory use. This
//! index uses about six bytes per record, and an insertion moves at most [`CHUNK`] of them.

/// The maximum number of entries in one chunk.
const CHUNK: usize = 256;

/// Numbers in an order that the caller passes to each call. All calls on one index must use the same total order.
#[derive(Default)]
pub(super) struct Index {
    chunks: Vec<Vec<u32>>,
}

impl Index {
    /// Inserts `id` after all entries that are `before` it.
    pub(super) fn insert(&mut self, id: u32, before: impl Fn(u32) -> bool) {
        let (chunk, place) = self.position(before);
        let Some(ids) = self.chunks.get_mut(chunk) else {
            let mut ids = Vec::with_capacity(CHUNK);
            ids.push(id);
            self.chunks.push(ids);
            return;
        };
        ids.insert(place, id);
        if ids.len() == CHUNK {
            // Ascending insertion is usual at start: in that case leave the first part nearly full.
            let keep = if place + 1 == CHUNK { CHUNK - CHUNK / 8 } else { CHUNK / 2 };
            let mut tail = Vec::with_capacity(CHUNK);
            tail.extend(ids.drain(keep..));
            self.chunks.insert(chunk + 1, tail);
        }
    }

    /// Removes `id`, which comes after all entries that are `before` it.
    pub(super) fn remove(&mut self, id: u32, before: impl Fn(u32) -> bool) {
        let (chunk, place) = self.position(before);
        let Some(ids) = self.chunks.get_mut(chunk) else { return };
        if ids.get(place) != Some(&id) {
            return;
        }
        ids.remove(place);
        if ids.is_empty() {
            self.chunks.remove(chunk);
        }
    }

    /// Returns the first entry that is not `before`, and all after it.
    pub(super) fn from(&self, before: impl Fn(u32) -> bool) -> impl Iterator<Item = u32> + '_ {
        let (chunk, place) = self.position(before);
        let rest = self.chunks.get(chunk).and_then(|ids| ids.get(place..)).unwrap_or_default();
        let later = self.chunks.get(chunk + 1..).unwrap_or_default();
        rest.iter().chain(later.iter().flatten()).copied()
    }

    /// Returns the last entry that is `before`.
    pub(super) fn last_of(&self, before: impl Fn(u32) -> bool) -> Option<u32> {
        let (chunk, place) = self.position(before);
        match place.checked_sub(1) {
            Some(place) => self.chunks.get(chunk)?.get(place).copied(),
            None => self.chunks.get(chunk.checked_sub(1)?)?.last().copied(),
        }
    }

    /// Returns the last entry.
    pub(super) fn last(&self) -> Option<u32> {
        self.chunks.last()?.last().copied()
    }

    /// Returns all entries in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.chunks.iter().flatten().copied()
    }

    /// Returns chunk and place of the first entry that is not `before`. Only in the last chunk can the place be the
    /// chunk's end; otherwise it is the start of the next chunk.
    fn position(&self, before: impl Fn(u32) -> bool) -> (usize, usize) {
        // A fast path for ascending insertion, as at start.
        if let Some(chunk) = self.chunks.last().filter(|ids| ids.last().is_some_and(|last| before(*last))) {
            return (self.chunks.len() - 1, chunk.len());
        }
        let chunk = self.chunks.partition_point(|ids| ids.last().is_some_and(|last| before(*last)));
        match self.chunks.get(chunk) {
            Some(ids) => (chunk, ids.partition_point(|id| before(*id))),
            None => (0, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_an_ordered_set(ops in proptest::collection::vec((any::<bool>(), 0u32..2000), 0..3000), from in 0u32..2000) {
            let mut index = Index::default();
            let mut model = std::collections::BTreeSet::new();
            for (remove, id) in ops {
                // Descending, so that the order differs from that of the numbers.
                let before = |other: u32| other > id;
                if remove {
                    index.remove(id, before);
                    model.remove(&id);
                } else if model.insert(id) {
                    index.insert(id, before);
                }
            }
            prop_assert!(index.iter().eq(model.iter().rev().copied()));
            prop_assert!(index.from(|other| other > from).eq(model.range(..=from).rev().copied()));
            prop_assert_eq!(index.last_of(|other| other > from), model.range(from + 1..).next().copied());
            prop_assert_eq!(index.last(), model.first().copied());
        }
    }
}
