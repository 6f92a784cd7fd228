//! Reads all records in pages of one revision.

use etcd_client::{GetOptions, KeyValue};
use flannel_core::lease::{OldestRecords, Record};
use futures_util::future::join;

use crate::connect::{Connector, Header};
use crate::error::{Fault, Kind};
use crate::wire;

/// All records as of one revision.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) header: Header,
    pub(crate) records: Vec<Record>,
}

/// Records per request: some 200 KB.
const PAGE: i64 = 1000;

/// How often a listing starts over after its revision was compacted.
const TRIES: u32 = 3;

/// Returns all records under `base`, or the oldest if there are too many.
pub(crate) async fn list(connector: &Connector, base: &str) -> Result<Listing, Fault> {
    let (header, oldest) = gather(connector, base, OldestRecords::default, OldestRecords::push).await?;
    Ok(Listing { header, records: oldest.finish() })
}

/// Folds all records under `base`, however many there are.
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
    let page = |from: &[u8], options: GetOptions| {
        let (from, options) = (from.to_vec(), options.with_range(end.clone()));
        connector.read(move |mut client| {
            let (from, options) = (from.clone(), options.clone());
            async move { client.get(from, Some(options)).await }
        })
    };
    let mut limit = PAGE;
    let mut from = base.as_bytes().to_vec();
    let mut options = GetOptions::new();
    let mut answer = page(&from, options.clone().with_limit(limit)).await;
    let mut header = Header::default();
    loop {
        let (response, is_cut) = match answer {
            Err(fault) if fault.kind == Kind::TooLarge && limit > 1 => {
                // Another client wrote large values: these records are bad, but the others are not.
                limit = (limit / 8).max(1);
                answer = page(&from, options.clone().with_limit(limit)).await;
                continue;
            }
            Err(fault) if fault.kind == Kind::TooLarge => {
                (page(&from, options.clone().with_limit(1).with_keys_only()).await?, true)
            }
            result => (result?, false),
        };
        if header.revision == 0 {
            header = Header::of(response.header());
            options = options.with_revision(header.revision);
        }
        let read = if is_cut { wire::record_too_large } else { wire::record };
        let mut add_all = || response.kvs().iter().for_each(|kv| add(read(base, kv)));
        match response.kvs().last() {
            Some(last) if response.more() => from = after(last),
            _ => {
                add_all();
                return Ok(header);
            }
        }
        limit = (limit * 2).min(PAGE);
        // The server prepares the next page while this one is parsed.
        let parsed = async {
            // Lets the connection send the request.
            tokio::task::yield_now().await;
            add_all();
        };
        (answer, ()) = join(page(&from, options.clone().with_limit(limit)), parsed).await;
    }
}

/// Returns the first key after all keys with `prefix`. The prefix ends in a slash, whose byte can be incremented.
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
