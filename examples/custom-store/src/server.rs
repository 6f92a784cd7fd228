//! The hub: an HTTP server for leases.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use flannelkit::spi::clock::{BootTime, Clock, SystemClock};
use futures_util::{Stream, StreamExt, stream};
use tokio::net::TcpListener;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast};
use tokio::time::{Instant, timeout};

use crate::connections::{self, LIFETIME, MAX_CONNECTIONS};
use crate::leases::{Leases, Refusal};
use crate::wire::{Delete, Entry, Line, MAX_BODY, Write};

/// The interval between heartbeats of an idle watch.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(3);
/// The lifetime of a watch. Clients reconnect; watches of dead clients end.
const WATCH: Duration = Duration::from_secs(600);
/// The maximum number of watches. The remaining connections are for other requests.
const MAX_WATCHES: usize = MAX_CONNECTIONS * 9 / 10;
/// The maximum lag of a watch, in changes. Beyond it the watch ends, and its client lists all leases again.
const QUEUE: usize = 1024;
/// The time limit for reading a request's body and producing the response's head.
const DEADLINE: Duration = Duration::from_secs(10);

const _: () = assert!(WATCH.as_secs() + DEADLINE.as_secs() <= LIFETIME.as_secs());

/// The hub. Clones share its state.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    leases: Mutex<Leases>,
    clock: SystemClock,
    /// The changes, as lines for the watches.
    changes: broadcast::Sender<Bytes>,
    /// Notified when a lease was written: the next expiry may have changed.
    written: Notify,
    watches: Arc<Semaphore>,
}

impl Default for Server {
    /// Returns a hub without a configuration and without leases.
    fn default() -> Self {
        Self(Arc::new(Shared {
            leases: Mutex::default(),
            clock: SystemClock::default(),
            changes: broadcast::Sender::new(QUEUE),
            written: Notify::new(),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
        }))
    }
}

impl Server {
    /// Serves requests until the future is dropped, which closes all connections and keeps the hub's state.
    pub async fn serve(&self, listener: TcpListener) -> Infallible {
        let lease = get(read_lease).put(write_lease).delete(delete_lease);
        let router = Router::new()
            .route("/v1/config", get(read_config).put(write_config))
            .route("/v1/leases/{node}", lease)
            .route("/v1/watch", get(watch))
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .layer(middleware::from_fn(in_time))
            .with_state(Arc::clone(&self.0));
        tokio::select! {
            never = connections::serve(listener, router) => never,
            never = self.0.expire() => never,
        }
    }
}

impl Shared {
    /// Removes expired leases, and returns the others and the current time.
    fn leases(&self) -> (MutexGuard<'_, Leases>, BootTime) {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        for node in leases.expire(now) {
            self.send(&Line::Gone(node));
        }
        (leases, now)
    }

    /// Sends a line to all watches. The caller locks the leases, so that all watches have the same order.
    fn send(&self, line: &Line) {
        // Fails if there is no watch.
        let _ = self.changes.send(text(line));
    }

    /// Removes leases when they expire, also while there are no requests.
    async fn expire(&self) -> Infallible {
        loop {
            let end = self.leases().0.next_end();
            let time = async {
                match end {
                    Some(end) => self.clock.sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = time => {}
                () = self.written.notified() => {}
            }
        }
    }
}

type Hub = State<Arc<Shared>>;

async fn read_config(hub: Hub) -> Result<String, Refusal> {
    Ok(hub.leases().0.config()?.to_owned())
}

async fn write_config(hub: Hub, text: String) -> Result<(), Refusal> {
    hub.leases().0.put_config(text)
}

async fn read_lease(hub: Hub, Path(node): Path<String>) -> Result<axum::Json<Entry>, Refusal> {
    let (leases, now) = hub.leases();
    Ok(axum::Json(leases.entry(&node, now)?))
}

async fn write_lease(hub: Hub, Path(node): Path<String>, body: Bytes) -> Result<axum::Json<Entry>, Refusal> {
    let write: Write = serde_json::from_slice(&body).map_err(|error| Refusal::Bad(error.to_string()))?;
    let (mut leases, now) = hub.leases();
    let entry = leases.put(&node, write, now)?;
    hub.send(&Line::Put(entry.clone()));
    hub.written.notify_one();
    Ok(axum::Json(entry))
}

async fn delete_lease(hub: Hub, Path(node): Path<String>, Query(delete): Query<Delete>) -> Result<(), Refusal> {
    let (mut leases, _) = hub.leases();
    leases.delete(&node, delete.revision)?;
    hub.send(&Line::Gone(node));
    Ok(())
}

async fn watch(hub: Hub) -> Result<Response, Refusal> {
    let permit = Arc::clone(&hub.watches).try_acquire_owned().map_err(|_| Refusal::Full)?;
    let (leases, now) = hub.leases();
    // Without a configuration the hub has just started: an empty list would be wrong.
    leases.config()?;
    let (entries, changes) = (leases.entries(now), hub.changes.subscribe());
    drop(leases);
    let list = entries.into_iter().map(Line::Put).chain([Line::Listed]);
    let lines = stream::iter(list).map(|line| text(&line)).chain(follow(changes, permit));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines.map(Ok::<_, Infallible>)))
        .into_response())
}

/// Returns the changes from now on, with heartbeats in between.
fn follow(changes: broadcast::Receiver<Bytes>, permit: OwnedSemaphorePermit) -> impl Stream<Item = Bytes> {
    let end = Instant::now() + WATCH;
    stream::unfold((changes, permit), move |(mut changes, permit)| async move {
        if Instant::now() >= end {
            return None;
        }
        let line = match timeout(HEARTBEAT, changes.recv()).await {
            Ok(Ok(line)) => line,
            Ok(Err(RecvError::Lagged(_) | RecvError::Closed)) => return None,
            Err(_) => text(&Line::Beat),
        };
        Some((line, (changes, permit)))
    })
}

fn text(line: &Line) -> Bytes {
    // Text and numbers always serialize.
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

/// Answers 408 after [`DEADLINE`].
async fn in_time(request: Request, next: Next) -> Response {
    let late = || (StatusCode::REQUEST_TIMEOUT, format!("the request took longer than {DEADLINE:?}")).into_response();
    timeout(DEADLINE, next.run(request)).await.unwrap_or_else(|_| late())
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Bad(why) => (StatusCode::BAD_REQUEST, why).into_response(),
            Self::Missing(what) => (StatusCode::NOT_FOUND, what).into_response(),
            Self::Conflict(why) => (StatusCode::CONFLICT, why).into_response(),
            Self::Full => (StatusCode::SERVICE_UNAVAILABLE, "the hub has too many leases or watches").into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watching(shared: &Shared) -> impl Stream<Item = Bytes> + use<> {
        let permit = Arc::clone(&shared.watches).try_acquire_owned().unwrap();
        follow(shared.changes.subscribe(), permit)
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_watch_sends_heartbeats_and_ends_after_its_lifetime() {
        let hub = Server::default();
        let (quiet, start) = (Box::pin(watching(&hub.0)), Instant::now());
        let lines: Vec<_> = quiet.collect().await;
        assert!(lines.len() >= 100 && lines.iter().all(|line| line == "\"beat\"\n"));
        assert!((WATCH..WATCH + HEARTBEAT).contains(&start.elapsed()));
        assert_eq!(hub.0.watches.available_permits(), MAX_WATCHES);
    }

    #[tokio::test]
    async fn a_watch_that_lags_too_far_ends() {
        let hub = Server::default();
        let mut behind = Box::pin(watching(&hub.0));
        let mut up_to_date = Box::pin(watching(&hub.0));
        for n in 0..=QUEUE {
            hub.0.send(&Line::Gone(n.to_string()));
            assert!(up_to_date.next().await.is_some());
        }
        assert_eq!(behind.next().await, None);
    }
}
