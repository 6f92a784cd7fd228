//! Watches the network's configuration. Its errors are not reported: the watch of the leases meets the same ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{EventType, KeyValue, WatchOptions, WatchStream};
use flannel_core::backoff::{Backoff, Jitter};
use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::SubnetError;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::connect::{Connection, Header};
use crate::error::Fault;
use crate::store::Store;

/// The longest wait before the watch is opened again.
const LONGEST: Duration = Duration::from_secs(60);

/// Returns an event each time the configuration differs from the one that [`Store::network_config`] last returned.
pub(crate) fn watch(store: Arc<Store>) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    let watch = ConfigWatch { store, source: None, backoff: Backoff::up_to(LONGEST, Jitter::random()) };
    let (sender, mut changes) = mpsc::channel(1);
    let mut run = Some(watch.run(sender));
    // A task, which ends with the stream: a stream that is not polled for a while must not hold up other users of the
    // connection.
    let mut task = JoinSet::new();
    stream::poll_fn(move |context| {
        // Not earlier: a watch may be created outside of a runtime.
        if let Some(run) = run.take() {
            task.spawn(run);
        }
        changes.poll_recv(context).map(|change| change.map(|()| Ok(LeaseEvent::ConfigChanged)))
    })
    .boxed()
}

struct ConfigWatch {
    store: Arc<Store>,
    source: Option<(Connection, WatchStream)>,
    backoff: Backoff,
}

impl ConfigWatch {
    async fn run(mut self, changes: mpsc::Sender<()>) {
        loop {
            self.next().await;
            if changes.send(()).await.is_err() {
                return;
            }
        }
    }

    async fn next(&mut self) {
        loop {
            match self.step().await {
                Ok(Some(revision)) if self.store.config_seen.differs(revision) => return,
                Ok(_) => {}
                Err(fault) => {
                    self.source = None;
                    tracing::debug!(error = %fault.error, "the network configuration is not watched; it is tried again");
                    tokio::time::sleep(self.backoff.wait()).await;
                }
            }
        }
    }

    /// Returns the revision of the configuration, 0 if there is none, or `None` if it did not change.
    async fn step(&mut self) -> Result<Option<i64>, Fault> {
        let Some((connection, stream)) = &mut self.source else {
            return self.open().await.map(Some);
        };
        let message = stream.message().await.map_err(|error| Fault::of(&connection.endpoint, &error))?;
        let message = message.ok_or_else(|| Fault::cut(&connection.endpoint, "the member ended the watch"))?;
        if message.canceled() {
            return Err(Fault::cut(&connection.endpoint, message.cancel_reason()));
        }
        self.backoff.reset();
        Ok(message.events().last().map(|event| match event.event_type() {
            EventType::Put => event.kv().map_or(0, KeyValue::mod_revision),
            EventType::Delete => 0,
        }))
    }

    /// Opens the watch. Returns the revision of the configuration, from which it goes on.
    async fn open(&mut self) -> Result<i64, Fault> {
        let (connector, key) = (&self.store.connector, &*self.store.config_key);
        let read = connector.read(|mut client| async move { client.get(key, None).await }).await?;
        let revision = read.kvs().first().map_or(0, KeyValue::mod_revision);
        let options = WatchOptions::new().with_start_revision(Header::of(read.header()).revision + 1);
        let connection = connector.current().await?;
        let mut client = connection.client.clone();
        let stream = client.watch(key, Some(options));
        let stream = connector.attempt(&connection, connector.request_limit(), stream).await?;
        self.source = Some((connection, stream));
        Ok(revision)
    }
}

/// The revision of the configuration that was last returned.
#[derive(Debug, Default)]
pub(crate) struct ConfigSeen(AtomicI64);

impl ConfigSeen {
    /// The value before the configuration was returned for the first time.
    const NEVER: i64 = 0;

    pub(crate) fn note(&self, revision: i64) {
        self.0.store(revision, Ordering::Relaxed);
    }

    /// Whether another revision was returned than this one.
    fn differs(&self, revision: i64) -> bool {
        ![Self::NEVER, revision].contains(&self.0.load(Ordering::Relaxed))
    }
}
