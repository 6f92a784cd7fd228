//! Reading all records: pages of one revision.

use etcd_client::{GetOptions, KeyValue};
use flannel_core::lease::{MAX_RECORDS, Record, keep_oldest};

use crate::connect::{Connector, Header};
use crate::error::{Fault, Kind};
use crate::wire;

/// All records as they were at one revision.
pub(crate) struct Listing {
    pub(crate) header: Header,
    pub(crate) records: Vec<Record>,
}

/// Records a request: some 200 KB.
const PAGE: i64 = 1000;

/// The most records held of a listing: the oldest. More than the agent holds, so that it sees that there are too many.
const MOST: usize = MAX_RECORDS + MAX_RECORDS / 8;

/// How often a listing that was compacted away under our hands begins again.
const TRIES: u32 = 3;

/// All records under `base`, or the oldest of too many.
pub(crate) async fn list(connector: &Connector, base: &str) -> Result<Listing, Fault> {
    let (header, mut held) = gather(connector, base, Held::default, Held::add).await?;
    held.prune();
    Ok(Listing { header, records: held.records })
}

/// What is held of a listing while it is read: the oldest records, by [`Record::weight`] [`MOST`] at the end and never more
/// than twice as many.
#[derive(Default)]
struct Held {
    records: Vec<Record>,
    weight: usize,
}

impl Held {
    fn add(&mut self, record: Record) {
        self.weight += record.weight();
        self.records.push(record);
        // Sorting each time would cost a listing of millions its time.
        if self.weight > 2 * MOST {
            self.prune();
        }
    }

    fn prune(&mut self) {
        keep_oldest(&mut self.records, MOST);
        self.weight = self.records.iter().map(Record::weight).sum();
    }
}

/// Adds up all records under `base`, however many there are.
pub(crate) async fn gather<T>(
    connector: &Connector,
    base: &str,
    start: impl Fn() -> T,
    add: impl Fn(&mut T, Record),
) -> Result<(Header, T), Fault> {
    let mut tries = 1;
    loop {
        let mut sum = start();
        match pages(connector, base, |record| add(&mut sum, record)).await {
            Err(fault) if fault.kind == Kind::Compacted && tries < TRIES => tries += 1,
            result => return Ok((result?, sum)),
        }
    }
}

async fn pages(connector: &Connector, base: &str, mut add: impl FnMut(Record)) -> Result<Header, Fault> {
    let end = after_prefix(base);
    let mut header = Header::default();
    let mut from = base.as_bytes().to_vec();
    let mut limit = PAGE;
    loop {
        let options = || GetOptions::new().with_range(end.clone()).with_revision(header.revision);
        let page = |options: GetOptions| {
            let from = from.clone();
            connector.read(move |mut client| {
                let (from, options) = (from.clone(), options.clone());
                async move { client.get(from, Some(options)).await }
            })
        };
        let (response, is_cut) = match page(options().with_limit(limit)).await {
            Err(fault) if fault.kind == Kind::TooLarge && limit > 1 => {
                // Somebody put large values there: they are bad, but those beside them are not.
                limit = (limit / 8).max(1);
                continue;
            }
            Err(fault) if fault.kind == Kind::TooLarge => (page(options().with_limit(1).with_keys_only()).await?, true),
            result => (result?, false),
        };
        if header.revision == 0 {
            header = Header::of(response.header());
        }
        let read = if is_cut { wire::record_too_large } else { wire::record };
        response.kvs().iter().for_each(|kv| add(read(base, kv)));
        match response.kvs().last() {
            Some(last) if response.more() => from = after(last),
            _ => return Ok(header),
        }
        limit = (limit * 2).min(PAGE);
    }
}

/// The first key that `prefix` does not begin. It ends in a slash, which is not the last byte there is.
pub(crate) fn after_prefix(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn after(last: &KeyValue) -> Vec<u8> {
    let mut next = last.key().to_vec();
    next.push(0);
    next
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::lease::{BadRecord, LeaseKey};

    #[test]
    fn of_a_list_without_end_the_oldest_are_held_and_no_more_than_twice_as_many() {
        let record = |created: u64| Record {
            key: LeaseKey::new(&format!("{created}")),
            created,
            lease: Err(Box::new(BadRecord { reason: String::new(), subnets: Default::default() })),
        };
        let mut held = Held::default();
        let (most, all) = (MOST as u64, 3 * MOST as u64);
        // The order of keys says nothing of age: 7919 is prime to the number of records.
        for nth in 0..all {
            held.add(record(nth * 7919 % all));
            assert!(held.records.len() <= 2 * MOST);
        }
        held.prune();
        let mut ages: Vec<u64> = held.records.iter().map(|record| record.created).collect();
        ages.sort_unstable();
        assert!(ages.into_iter().eq(0..most));
        // A large record counts as several.
        let mut held = Held::default();
        let large = |created: u64| Record { key: LeaseKey::new(&format!("{created:0>250}")), ..record(created) };
        for created in 0..all {
            held.add(large(created));
            assert!(held.records.len() <= 2 * MOST / large(0).weight());
        }
    }
}
