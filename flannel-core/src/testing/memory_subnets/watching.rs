//! The events of each watcher.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::stream::{BoxStream, StreamExt, unfold};
use tokio::sync::Notify;

use super::{Shared, unavailable};
use crate::lease::LeaseEvent;
use crate::subnet::{SubnetError, ThisNode};

/// The number of events kept for a slow watcher; beyond that it gets a `Reset` instead.
const BACKLOG: usize = 16_384;

pub(super) struct Watcher {
    /// The node that watches.
    pub(super) node: ThisNode,
    pending: Mutex<Pending>,
    pub(super) changed: Notify,
}

/// Events that a watcher has not received yet.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) reset: bool,
    /// Whether the node's addresses are sent next.
    pub(super) this_node: bool,
    /// Whether a change of the configuration is reported next.
    pub(super) config: bool,
    pub(super) trouble: Option<SubnetError>,
    pub(super) events: VecDeque<LeaseEvent>,
}

impl Watcher {
    pub(super) fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: &LeaseEvent) {
        let mut pending = self.lock();
        if pending.reset {
            // The snapshot is taken when it is read, so it will include this event.
            return;
        }
        if pending.events.len() >= BACKLOG {
            pending.events.clear();
            pending.reset = true;
        } else {
            pending.events.push_back(event.clone());
        }
        self.changed.notify_one();
    }
}

/// Opens a watch of a store, which may already be unavailable.
pub(super) fn watch(shared: &Arc<Shared>, node: ThisNode) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    let mut inner = shared.lock();
    let trouble = inner.away.then(|| unavailable("watching"));
    let pending = Pending { reset: true, trouble, ..Pending::default() };
    let watcher = Arc::new(Watcher { node, pending: Mutex::new(pending), changed: Notify::new() });
    inner.watch(&watcher);
    drop(inner);
    let state = (Arc::clone(shared), watcher);
    unfold(state, |(shared, watcher)| async move {
        let event = next_event(&shared, &watcher).await;
        Some((event, (shared, watcher)))
    })
    .boxed()
}

async fn next_event(shared: &Shared, watcher: &Watcher) -> Result<LeaseEvent, SubnetError> {
    loop {
        let next_expiry = {
            // The store's lock before the watcher's, as everywhere.
            let mut inner = shared.lock();
            inner.sweep(shared.clock.now());
            let mut pending = watcher.lock();
            if let Some(trouble) = pending.trouble.take() {
                return Err(trouble);
            }
            if !inner.away && std::mem::take(&mut pending.reset) {
                pending.this_node |= inner.public_of(&watcher.node).is_some();
                return Ok(LeaseEvent::Reset(inner.records.values().cloned().collect()));
            }
            if !inner.away && std::mem::take(&mut pending.this_node) {
                return Ok(LeaseEvent::ThisNode(inner.public_of(&watcher.node).unwrap_or(watcher.node.public)));
            }
            if !inner.away && std::mem::take(&mut pending.config) {
                return Ok(LeaseEvent::ConfigChanged);
            }
            if let Some(event) = pending.events.pop_front() {
                return Ok(event);
            }
            inner.next_expiry()
        };
        let expired = match next_expiry {
            Some(deadline) => shared.clock.sleep_until(deadline).boxed(),
            None => futures_util::future::pending().boxed(),
        };
        tokio::select! {
            () = watcher.changed.notified() => {}
            () = expired => {}
        }
    }
}
