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

/// All records under `base`.
pub(crate) async fn list(connector: &Connector, base: &str) -> Result<Listing, Fault> {
    let mut tries = 1;
    loop {
        match pages(connector, base).await {
            Err(fault) if fault.kind == Kind::Compacted && tries < TRIES => tries += 1,
            result => return result,
        }
    }
}

async fn pages(connector: &Connector, base: &str) -> Result<Listing, Fault> {
    let end = after_prefix(base);
    let mut listing = Listing { header: Header::default(), records: Vec::new() };
    let mut from = base.as_bytes().to_vec();
    let mut limit = PAGE;
    loop {
        let options = || GetOptions::new().with_range(end.clone()).with_revision(listing.header.revision);
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
        if listing.header.revision == 0 {
            listing.header = Header::of(response.header());
            listing.records.reserve(usize::try_from(response.count()).unwrap_or_default().min(100_000));
        }
        let read = if is_cut { wire::record_too_large } else { wire::record };
        listing.records.extend(response.kvs().iter().map(|kv| read(base, kv)));
        // Sorting each time would cost a listing of millions its time.
        if listing.records.len() > 2 * MOST {
            keep_oldest(&mut listing.records, MOST);
        }
        match response.kvs().last() {
            Some(last) if response.more() => from = after(last),
            _ => break,
        }
        limit = (limit * 2).min(PAGE);
    }
    keep_oldest(&mut listing.records, MOST);
    Ok(listing)
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
