//! HTTP: health for the supervisor, metrics and status for operators.

use std::fmt::{self, Write as _};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use flannel_core::clock::{Clock, SystemClock};
use flannel_core::overlay::Handle;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::firewall::Rulebook;
use crate::log::Log;
use crate::metrics::{Metrics, Outside};
use crate::status::{Document, Surroundings, is_ready};
use crate::{connections, peers};

/// The largest answer in bytes; what is longer ends with a line that says so.
const MOST_ANSWER: usize = 1 << 20;

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listening on {addr}: another program has it, or it is not this host's; set {flags}")]
pub(crate) struct ListenError {
    addr: SocketAddr,
    flags: &'static str,
    #[source]
    source: io::Error,
}

/// What the pages show.
pub(crate) struct Shown {
    pub(crate) handle: Handle,
    pub(crate) rules: watch::Receiver<Rulebook>,
    pub(crate) around: Surroundings,
    pub(crate) metrics: Metrics,
    pub(crate) log: Log,
}

impl Shown {
    fn document(&self) -> Document {
        let now = SystemClock::default().now();
        Document::new(&self.handle.status(), &self.rules.borrow(), &self.around, now, self.log.dropped())
    }
}

/// Takes an address, before privileges are dropped and before anything is touched.
pub(crate) fn listen(addr: SocketAddr, flags: &'static str) -> Result<TcpListener, ListenError> {
    let failed = |source| ListenError { addr, flags, source };
    let listener = TcpListener::bind(addr).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// `/healthz` and `/readyz`, with flannel's words (docs/compatibility.md, "Health server").
pub(crate) fn health(shown: Arc<Shown>) -> Router {
    Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(shown)
}

/// `/metrics` and `/status`, questions to the agent, and health once more.
pub(crate) fn operator(shown: Arc<Shown>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/peers", get(peers))
        .route("/plan", get(plan))
        .route("/explain", get(explain))
        .with_state(Arc::clone(&shown))
        .merge(health(shown))
}

/// Serves until cancelled, then finishes the answers under way.
pub(crate) async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    connections::serve(listener, router, cancel).await;
    Ok(())
}

async fn healthz() -> &'static str {
    "flanneld is running"
}

async fn readyz(State(shown): State<Arc<Shown>>) -> (StatusCode, &'static str) {
    if is_ready(&shown.handle.status(), &shown.rules.borrow()) {
        (StatusCode::OK, "flanneld is ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet")
    }
}

async fn metrics(State(shown): State<Arc<Shown>>) -> Response {
    let now = SystemClock::default().now();
    let outside = Outside { stale: shown.around.is_stale(), log_lines_dropped: shown.log.dropped() };
    let text = shown.metrics.encode(&shown.handle.status(), &shown.rules.borrow(), now, outside);
    match text {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => trouble(&error),
    }
}

async fn status(State(shown): State<Arc<Shown>>) -> Response {
    axum::Json(shown.document()).into_response()
}

async fn plan(State(shown): State<Arc<Shown>>) -> Response {
    match shown.handle.plan().await {
        Ok(preview) => Page::of(&preview).into_response(),
        Err(error) => trouble(&error),
    }
}

async fn peers(State(shown): State<Arc<Shown>>) -> Response {
    match shown.handle.peers().await {
        Ok(peers) => {
            ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(peers::array(peers))).into_response()
        }
        Err(error) => trouble(&error),
    }
}

#[derive(Deserialize)]
struct Peer {
    peer: String,
}

async fn explain(State(shown): State<Arc<Shown>>, Query(Peer { peer }): Query<Peer>) -> Response {
    match shown.handle.explain(&peer).await {
        Ok(Some(explanation)) => Page::of(&explanation).into_response(),
        Ok(None) => {
            let text =
                format!("no record is meant by {peer:?}: give a key, an address in a subnet, or a public address\n");
            (StatusCode::NOT_FOUND, text).into_response()
        }
        Err(error) => trouble(&error),
    }
}

fn trouble(error: &dyn std::error::Error) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", crate::chain(error))).into_response()
}

/// Text of a bounded size.
struct Page(String);

impl Page {
    fn of(shown: &impl fmt::Display) -> String {
        let mut page = Self(String::new());
        if write!(page, "{shown}").is_err() {
            page.0.push_str("\n(cut here: there is more)\n");
        }
        page.0
    }
}

impl fmt::Write for Page {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > MOST_ANSWER {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Endless;

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                writeln!(f, "route add 10.5.1.0/24")?;
            }
        }
    }

    #[test]
    fn an_answer_has_a_bound_and_says_that_it_was_cut() {
        let page = Page::of(&Endless);
        assert!(page.len() < MOST_ANSWER + 100);
        assert!(page.ends_with("there is more)\n"));
        assert_eq!(Page::of(&"short"), "short");
    }
}
