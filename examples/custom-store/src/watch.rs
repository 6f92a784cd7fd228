//! A watch of the hub that reconnects: a list of all leases, then the changes, and a new list after each error.

use std::time::Duration;

use flannelkit::lease::{LeaseEvent, LeaseKey, Record};
use flannelkit::spi::backoff::Backoff;
use flannelkit::spi::subnet::SubnetError;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::time::{Instant, timeout_at};

use crate::client::Hub;
use crate::http::{Fault, Watching};
use crate::wire::Line;

const DOING: &str = "watching the leases";

/// The maximum number of leases in a list: many times the hub's own limit.
pub(crate) const MAX_LISTED: usize = 10_000;
/// The time limit for the list of all leases.
pub(crate) const LIST: Duration = Duration::from_secs(10);

/// Returns all leases, then the changes.
pub(crate) fn watch(hub: Hub) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    let watch = Watch {
        hub,
        source: None,
        listed: Some(Vec::new()),
        list_by: Instant::now(),
        pause: Duration::ZERO,
        backoff: Backoff::default(),
    };
    stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed()
}

struct Watch {
    hub: Hub,
    source: Option<Watching>,
    /// The leases of a list that is incomplete; `None` once it is complete.
    listed: Option<Vec<Record>>,
    /// The deadline of the list.
    list_by: Instant,
    /// The pause before the next connection.
    pause: Duration,
    backoff: Backoff,
}

impl Watch {
    async fn next(&mut self) -> Result<LeaseEvent, SubnetError> {
        loop {
            match self.step().await {
                Ok(None) => {}
                Ok(Some(event)) => return Ok(event),
                Err(error) => {
                    self.restart();
                    return Err(error);
                }
            }
        }
    }

    /// Reads a line, connecting first if necessary.
    async fn step(&mut self) -> Result<Option<LeaseEvent>, SubnetError> {
        let source = match &mut self.source {
            Some(source) => source,
            None => {
                tokio::time::sleep(self.pause).await;
                let source = self.hub.open(DOING).await?;
                self.list_by = Instant::now() + LIST;
                self.source.insert(source)
            }
        };
        let line = match self.listed {
            Some(_) => timeout_at(self.list_by, source.lines.next()).await.unwrap_or(Err(Fault::Late(LIST))),
            None => source.lines.next().await,
        };
        let line = line.map_err(|fault| self.hub.error(DOING, fault))?;
        let now = self.hub.clock.now();
        Ok(match (line, &mut self.listed) {
            (Some(Line::Beat), _) => None,
            (Some(Line::Put(entry)), None) => Some(LeaseEvent::Upsert(entry.record(now))),
            (Some(Line::Put(entry)), Some(listed)) if listed.len() < MAX_LISTED => {
                listed.push(entry.record(now));
                None
            }
            (Some(Line::Gone(node)), None) => Some(LeaseEvent::Remove(LeaseKey::of_bytes(node.as_bytes()))),
            (Some(Line::Listed), listed) => {
                self.backoff.reset();
                listed.take().map(LeaseEvent::Reset)
            }
            // The hub ends watches after a time, and those of slow clients.
            (None, None) => {
                self.restart();
                None
            }
            (None | Some(Line::Put(_) | Line::Gone(_)), Some(_)) => return Err(self.hub.error(DOING, Fault::Unlisted)),
        })
    }

    fn restart(&mut self) {
        self.source = None;
        self.listed = Some(Vec::new());
        self.pause = self.backoff.wait();
    }
}
