//! HTTP: health for the supervisor, metrics and status for operators.

use std::fmt::{self, Write as _};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use flannel_core::backoff::Backoff;
use flannel_core::clock::{Clock, SystemClock};
use flannel_core::overlay::{Explanation, Handle};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn6, bind, setsockopt, socket, sockopt,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::client::{self, JSON};
use crate::connections;
use crate::log::Log;
use crate::metrics::{Clocks, Format, Metrics, Observed};
use crate::peers::{self, Columns};
use crate::status::{Document, ProgramInfo, is_ready, reasons};
use flannel_core::firewall_keeper::RulesState;

/// The largest text page, in bytes. A longer one is cut, with a line that says so.
const MOST_ANSWER: usize = 1 << 20;

/// The first port that needs no privilege (ip(7), `net.ipv4.ip_unprivileged_port_start`).
const UNPRIVILEGED: u16 = 1024;

/// The agent cannot listen on an address.
#[derive(Debug, thiserror::Error)]
#[error("listening on {addr}: set {flags}")]
pub(crate) struct ListenError {
    addr: SocketAddr,
    flags: &'static str,
    #[source]
    source: io::Error,
}

/// An address to serve pages at.
#[derive(Debug)]
pub(crate) struct ServeAddress {
    addr: SocketAddr,
    flags: &'static str,
    /// `None` while another program has the address.
    listener: Option<TcpListener>,
}

impl ServeAddress {
    /// Listens on an address, before privileges are dropped and before anything is changed. An address that another
    /// program uses is not an error: any user of the host may take a port from [`UNPRIVILEGED`], and must not prevent the
    /// agent from starting.
    pub(crate) fn take(addr: SocketAddr, flags: &'static str) -> Result<Self, ListenError> {
        let listener = match listen(addr) {
            Ok(listener) => Some(listener),
            // A smaller port cannot be taken later: the privilege for it is dropped.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && addr.port() >= UNPRIVILEGED => None,
            Err(source) => return Err(ListenError { addr, flags, source }),
        };
        Ok(Self { addr, flags, listener })
    }

    /// Returns an error if the two addresses exclude each other.
    pub(crate) fn check_beside(&self, other: &Self) -> Result<(), ListenError> {
        let (ours, theirs) = (self.addr.ip(), other.addr.ip());
        let meet = ours == theirs || ours.is_unspecified() || theirs.is_unspecified();
        if !meet || self.addr.port() != other.addr.port() {
            return Ok(());
        }
        let text = format!("it is the address of {} as well", other.flags);
        let source = io::Error::new(io::ErrorKind::AddrInUse, text);
        Err(ListenError { addr: self.addr, flags: self.flags, source })
    }

    /// Waits until the address is free. Logs this once, and again when the agent listens.
    async fn listener(self) -> TcpListener {
        if let Some(listener) = self.listener {
            return listener;
        }
        let Self { addr, flags, .. } = self;
        tracing::warn!(
            target: "flannel::agent",
            "cannot serve HTTP at {addr}: another program uses the address; stop it, or set {flags}"
        );
        let mut backoff = Backoff::default();
        loop {
            sleep(backoff.wait()).await;
            if let Ok(listener) = listen(addr) {
                tracing::info!(target: "flannel::agent", "serving HTTP at {addr}");
                return listener;
            }
        }
    }
}

/// Listens on an address. The unspecified IPv4 address means all addresses of both families, as in Go: the
/// kubelet of a node without IPv4 probes by IPv6.
fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let both = (addr.ip() == Ipv4Addr::UNSPECIFIED).then(|| listen_on_both(addr.port()));
    let listener = match both {
        Some(Ok(listener)) => listener,
        Some(Err(error)) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
        // Without IPv6.
        Some(Err(_)) | None => TcpListener::bind(addr)?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn listen_on_both(port: u16) -> io::Result<TcpListener> {
    let socket = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0)))?;
    nix::sys::socket::listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// The sources of the pages.
pub(crate) struct Shown {
    pub(crate) handle: Handle,
    pub(crate) rules: watch::Receiver<RulesState>,
    pub(crate) info: ProgramInfo,
    pub(crate) metrics: Metrics,
    pub(crate) log: Log,
}

impl Shown {
    /// Calls `answer` with the current status.
    fn status<T>(&self, answer: impl FnOnce(&Document<'_>) -> T) -> T {
        let (status, rules) = (self.handle.status(), self.rules.borrow().clone());
        answer(&Document::new(&status, &rules, &self.info, SystemClock::default().now(), self.log.dropped()))
    }
}

/// `/healthz` and `/readyz`, with flannel's answers (docs/compatibility.md, "Health server").
pub(crate) fn health(shown: Arc<Shown>) -> Router {
    Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(shown)
}

/// `/metrics` and `/status`, queries to the agent, and the health pages.
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

/// Serves until cancelled, then finishes pending answers.
pub(crate) async fn serve(address: ServeAddress, router: Router, cancel: CancellationToken) -> io::Result<()> {
    let listener = tokio::select! {
        listener = address.listener() => tokio::net::TcpListener::from_std(listener)?,
        () = cancel.cancelled() => return Ok(()),
    };
    connections::serve(listener, router, cancel).await;
    Ok(())
}

async fn healthz() -> &'static str {
    "flanneld is running"
}

async fn readyz(State(shown): State<Arc<Shown>>) -> (StatusCode, String) {
    let (status, rules) = (shown.handle.status(), shown.rules.borrow().clone());
    if is_ready(&status, &rules) {
        return (StatusCode::OK, "flanneld is ready".to_owned());
    }
    let reasons = format!("flanneld is not ready yet\n{}", reasons(&status, &rules).join("\n"));
    (StatusCode::SERVICE_UNAVAILABLE, Page::of(&reasons))
}

async fn metrics(State(shown): State<Arc<Shown>>, headers: HeaderMap) -> Response {
    let format = Format::accepted_by(&headers);
    let (status, rules) = (shown.handle.status(), shown.rules.borrow().clone());
    let observed = Observed {
        overlay: &shown.info.overlay,
        status: &status,
        rules: &rules,
        clocks: Clocks::now(),
        stale: shown.info.is_stale(),
        log_lines_dropped: shown.log.dropped(),
        carried: shown.info.carried.devices(),
    };
    match shown.metrics.encode(&observed, format) {
        Ok(page) => ([(header::CONTENT_TYPE, format.content_type())], page).into_response(),
        Err(error) => trouble(&error),
    }
}

async fn status(State(shown): State<Arc<Shown>>, headers: HeaderMap) -> Response {
    if wants_text(&headers) {
        return shown.status(|document| Page::of(document)).into_response();
    }
    shown.status(|document| json(document))
}

async fn plan(State(shown): State<Arc<Shown>>) -> Response {
    match shown.handle.plan().await {
        Ok(preview) => Page::of(&preview).into_response(),
        Err(error) => trouble(&error),
    }
}

async fn peers(State(shown): State<Arc<Shown>>, headers: HeaderMap) -> Response {
    match shown.handle.records().await {
        Ok(peers) if wants_text(&headers) => {
            Body::from_stream(peers::table(peers, columns(&headers)).await).into_response()
        }
        Ok(peers) => ([(header::CONTENT_TYPE, JSON)], Body::from_stream(peers::array(peers))).into_response(),
        Err(error) => trouble(&error),
    }
}

#[derive(Deserialize)]
struct Peer {
    peer: Option<String>,
}

async fn explain(State(shown): State<Arc<Shown>>, Query(Peer { peer }): Query<Peer>, headers: HeaderMap) -> Response {
    let Some(peer) = peer else {
        return (StatusCode::BAD_REQUEST, "missing parameter: peer\n").into_response();
    };
    match shown.handle.explain(&peer).await {
        Ok(found) if found.is_empty() => {
            let hint = "give a key, a subnet, an address in a subnet, or the address of a node";
            (StatusCode::NOT_FOUND, format!("no peer matches {peer:?}: {hint}\n")).into_response()
        }
        Ok(found) if wants_json(&headers) => json(&found),
        Ok(found) => Page::of(&Joined(&found)).into_response(),
        Err(error) => trouble(&error),
    }
}

fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string_pretty(value) {
        Ok(json) => ([(header::CONTENT_TYPE, JSON)], json + "\n").into_response(),
        Err(error) => trouble(&error),
    }
}

/// Whether the client requests plain text, of pages that are otherwise JSON.
fn wants_text(headers: &HeaderMap) -> bool {
    accepts(headers, client::TEXT)
}

/// Whether the client requests JSON, of pages that are otherwise text.
fn wants_json(headers: &HeaderMap) -> bool {
    accepts(headers, JSON)
}

fn columns(headers: &HeaderMap) -> Columns {
    if accepts(headers, client::WIDE) { Columns::All { now: SystemClock::default().now() } } else { Columns::Few }
}

fn accepts(headers: &HeaderMap, kind: &str) -> bool {
    headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(kind.as_bytes()))
}

fn trouble(error: &dyn std::error::Error) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", crate::chain(error))).into_response()
}

/// Explanations one after the other.
struct Joined<'a>(&'a [Explanation]);

impl fmt::Display for Joined<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|explanation| explanation.fmt(f))
    }
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
    fn the_unspecified_address_is_that_of_both_families() {
        let both = testkit::Namespace::new("both").unwrap();
        both.run(|| {
            let listener = listen(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            for addr in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
                std::net::TcpStream::connect(addr).unwrap_or_else(|error| panic!("{addr}: {error}"));
            }
        })
        .unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_is_taken_is_waited_for_and_one_that_cannot_be_had_is_an_error() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = other.local_addr().unwrap();
        let address = ServeAddress::take(addr, "-flag").unwrap();
        let mut waiting = std::pin::pin!(address.listener());
        let ten_minutes = std::time::Duration::from_secs(600);
        assert!(tokio::time::timeout(ten_minutes, &mut waiting).await.is_err());
        drop(other);
        assert_eq!(waiting.await.local_addr().unwrap(), addr);
        // An address for documentation, which no host has.
        let error = ServeAddress::take("192.0.2.77:1".parse().unwrap(), "-flag").unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AddrNotAvailable);
        let privileged = TcpListener::bind("127.0.0.77:1023").unwrap();
        let error = ServeAddress::take(privileged.local_addr().unwrap(), "-flag").unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn one_address_for_both_pages_is_an_error() {
        let at = |addr: &str| ServeAddress { addr: addr.parse().unwrap(), flags: "-flag", listener: None };
        let meet = |one: &str, other: &str| at(one).check_beside(&at(other)).is_err();
        assert!(meet("127.0.0.1:1", "127.0.0.1:1") && meet("0.0.0.0:1", "127.0.0.1:1") && meet("[::1]:1", "[::]:1"));
        assert!(!meet("127.0.0.1:1", "127.0.0.1:2") && !meet("127.0.0.1:1", "127.0.0.2:1"));
    }

    #[test]
    fn an_answer_has_a_bound_and_says_that_it_was_cut() {
        let page = Page::of(&Endless);
        assert!(page.len() < MOST_ANSWER + 100);
        assert!(page.ends_with("there is more)\n"));
        assert_eq!(Page::of(&"short"), "short");
    }
}
