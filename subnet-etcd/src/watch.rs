//! The watch: carries out the steps of `list_watch`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::SubnetError;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::time::Instant;

use crate::connect::{Connection, Header};
use crate::error::{Fault, Kind};
use crate::list::{Listing, after_prefix, list};
use crate::list_watch::{ListWatch, Message, Step};
use crate::store::Store;
use crate::wire;

/// Returns all records, then the changes.
pub(crate) fn watch(store: Arc<Store>) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    let watch = Watch { store, list_watch: ListWatch::new(), source: None, pause: None, ready: VecDeque::new() };
    stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed()
}

struct Watch {
    store: Arc<Store>,
    list_watch: ListWatch,
    source: Option<Source>,
    /// The wait before the next step, if the last one failed.
    pause: Option<Duration>,
    /// Events that are still to be returned.
    ready: VecDeque<LeaseEvent>,
}

/// An open watch.
struct Source {
    connection: Connection,
    stream: WatchStream,
    since: Instant,
}

impl Watch {
    async fn next(&mut self) -> Result<LeaseEvent, SubnetError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            if let Some(pause) = self.pause {
                tokio::time::sleep(pause).await;
                self.pause = None;
            }
            if let Err(fault) = self.step().await {
                if fault.kind == Kind::TooLarge {
                    self.list_watch.unreadable();
                }
                // A failed stream does not recover, and its connection may be bad.
                let source = self.source.take();
                if let Some(source) = &source {
                    self.store.connector.forget(&source.connection).await;
                }
                self.pause = Some(self.list_watch.failed(source.map(|source| source.since.elapsed())));
                return Err(fault.into_subnet_error("watching the leases"));
            }
        }
    }

    async fn step(&mut self) -> Result<(), Fault> {
        let connector = Arc::clone(&self.store.connector);
        match self.list_watch.step() {
            Step::List => {
                self.source = None;
                let listing = self.all_records().await?;
                self.list_watch.listed(listing.header);
                self.ready.push_back(LeaseEvent::Reset(listing.records));
            }
            Step::Probe => self.list_watch.probed(connector.header().await?),
            Step::Open(from) => {
                self.source = Some(self.open(from).await?);
                self.list_watch.opened();
            }
            Step::Read => {
                let message = self.read().await?;
                let events = self.list_watch.message(message);
                self.ready.extend(events.map_err(|cancelled| Fault::cancelled(&self.endpoint(), cancelled.0))?);
            }
        }
        Ok(())
    }

    /// Returns the list of an earlier step of this start, if nobody has written since, or else a new one.
    async fn all_records(&self) -> Result<Listing, Fault> {
        let Store { connector, base, shared_list, .. } = &*self.store;
        if let Some(kept) = shared_list.end()
            && kept.header == connector.header().await?
        {
            return Ok(kept);
        }
        list(connector, base).await
    }

    async fn open(&self, from: i64) -> Result<Source, Fault> {
        let connector = &self.store.connector;
        let connection = connector.current().await?;
        let options = WatchOptions::new()
            .with_range(after_prefix(&self.store.base))
            .with_start_revision(from)
            .with_progress_notify()
            .with_fragment();
        let mut client = connection.client.clone();
        let stream = client.watch(&*self.store.base, Some(options));
        let stream = connector.attempt(&connection, connector.request_limit(), stream).await?;
        Ok(Source { connection, stream, since: Instant::now() })
    }

    async fn read(&mut self) -> Result<Message, Fault> {
        let Some(Source { connection, stream, .. }) = &mut self.source else {
            return Err(Fault::cut("etcd", "no watch is open"));
        };
        match stream.message().await {
            Ok(Some(response)) => Ok(message(&self.store.base, &response)),
            Ok(None) => Err(Fault::cut(&connection.endpoint, "the member ended the watch")),
            Err(error) => Err(Fault::of(&connection.endpoint, &error)),
        }
    }

    fn endpoint(&self) -> String {
        self.source.as_ref().map_or_else(|| "etcd".to_owned(), |source| source.connection.endpoint.to_string())
    }
}

fn message(base: &str, response: &WatchResponse) -> Message {
    let mut changes = Vec::with_capacity(response.events().len());
    for event in response.events() {
        let Some(kv) = event.kv() else { continue };
        let change = match event.event_type() {
            EventType::Put => LeaseEvent::Upsert(wire::record(base, kv)),
            EventType::Delete => LeaseEvent::Remove(wire::lease_key(base, kv.key())),
        };
        changes.push((kv.mod_revision(), change));
    }
    Message {
        header: Header::of(response.header()),
        is_created: response.created() && !response.canceled(),
        is_compacted: response.compact_revision() != 0,
        cancelled: response.canceled().then(|| response.cancel_reason().to_owned()),
        changes,
    }
}
