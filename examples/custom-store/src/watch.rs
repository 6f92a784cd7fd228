//! A watch of the hub that goes on by itself: a list of all leases, then what changes, and again from the start after any
//! trouble.

use std::time::Duration;

use flannelkit::lease::{LeaseEvent, LeaseKey, Record};
use flannelkit::spi::backoff::Backoff;
use flannelkit::spi::subnet::SubnetError;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use crate::client::Hub;
use crate::http::{Fault, Watching};
use crate::wire::Line;

const DOING: &str = "watching the leases";

/// The most leases of a list that are believed: many times what a hub has room for.
pub(crate) const MAX_LISTED: usize = 10_000;

/// Returns all leases, then what changes.
pub(crate) fn watch(hub: Hub) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    let watch =
        Watch { hub, source: None, listed: Some(Vec::new()), pause: Duration::ZERO, backoff: Backoff::default() };
    stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed()
}

struct Watch {
    hub: Hub,
    source: Option<Watching>,
    /// The leases of a list that is not whole yet.
    listed: Option<Vec<Record>>,
    /// How long to wait before the next connection.
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
                    self.begin_anew();
                    return Err(error);
                }
            }
        }
    }

    /// Reads one line.
    async fn step(&mut self) -> Result<Option<LeaseEvent>, SubnetError> {
        let source = match &mut self.source {
            Some(source) => source,
            None => {
                tokio::time::sleep(self.pause).await;
                self.source.insert(self.hub.open(DOING).await?)
            }
        };
        let line = source.lines.next().await.map_err(|fault| self.hub.error(DOING, fault))?;
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
            // The hub ends a watch from time to time, and one whose reader is slow.
            (None, None) => {
                self.begin_anew();
                None
            }
            (None | Some(Line::Put(_) | Line::Gone(_)), Some(_)) => return Err(self.hub.error(DOING, Fault::Unlisted)),
        })
    }

    fn begin_anew(&mut self) {
        self.source = None;
        self.listed = Some(Vec::new());
        self.pause = self.backoff.wait();
    }
}
