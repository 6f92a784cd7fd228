//! A watch and the records that result from its events.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::time::Instant;

use crate::lease::{Lease, LeaseEvent, LeaseKey, Record};
use crate::net::Dual;
use crate::subnet::{SubnetError, SubnetManager};
use crate::text::chain;

/// A watch, and the state its events have built. Waiting panics if the watch ends or violates the contract.
pub struct Watcher {
    stream: BoxStream<'static, Result<LeaseEvent, SubnetError>>,
    /// The records after the last event.
    pub seen: BTreeMap<LeaseKey, Record>,
    /// How many [`LeaseEvent::Reset`]s arrived.
    pub resets: usize,
    /// The last addresses to publish.
    pub public: Option<Dual<IpAddr>>,
    /// The errors, with their causes.
    pub errors: Vec<String>,
}

impl Watcher {
    /// Opens a watch and waits up to `seconds` for its first `Reset`.
    pub async fn open(store: &dyn SubnetManager, seconds: u64) -> Self {
        let mut watcher =
            Self { stream: store.watch(), seen: BTreeMap::new(), resets: 0, public: None, errors: Vec::new() };
        watcher.until(seconds, "a first event", |watcher| watcher.resets > 0).await;
        watcher
    }

    /// Waits up to `seconds` until `done` returns true. Returns how long that took.
    pub async fn until(&mut self, seconds: u64, what: &str, done: impl Fn(&Self) -> bool) -> Duration {
        let (start, limit) = (Instant::now(), Duration::from_secs(seconds));
        while !done(self) {
            match tokio::time::timeout_at(start + limit, self.stream.next()).await {
                Ok(Some(Ok(event))) => self.fold(event),
                Ok(Some(Err(error))) => self.errors.push(chain(&error)),
                Ok(None) => panic!("watch: the stream must never end, but did, while waiting for: {what}"),
                Err(_) => {
                    panic!("watch: not within {limit:?}: {what}; errors: {:?}; seen: {:?}", self.errors, self.seen)
                }
            }
        }
        start.elapsed()
    }

    /// Returns the lease of a record that exists and is valid.
    pub fn good(&self, key: &LeaseKey) -> Option<&Lease> {
        self.seen.get(key)?.lease.as_deref().ok()
    }

    /// Returns whether a record has the subnets and attributes of this lease.
    pub fn holds(&self, lease: &Lease) -> bool {
        self.good(&lease.key).is_some_and(|found| found.subnets == lease.subnets && found.attrs == lease.attrs)
    }

    fn fold(&mut self, event: LeaseEvent) {
        let is_first = self.resets == 0;
        match event {
            LeaseEvent::Reset(records) => {
                let count = records.len();
                self.resets += 1;
                self.seen = records.into_iter().map(|record| (record.key.clone(), record)).collect();
                assert_eq!(self.seen.len(), count, "watch: a Reset must hold each key once");
            }
            LeaseEvent::ConfigChanged => {}
            event if is_first => panic!("watch: the first event must be a Reset, not {event:?}"),
            LeaseEvent::Upsert(record) => drop(self.seen.insert(record.key.clone(), record)),
            LeaseEvent::Remove(key) => drop(self.seen.remove(&key)),
            LeaseEvent::Resumed => {}
            LeaseEvent::ThisNode(public) => self.public = Some(public),
        }
    }
}
