//! The hub's connections: bounded in number, in time, and in what the head of a request may hold.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The most connections at a time. Others wait until one ends.
pub(crate) const MAX_CONNECTIONS: usize = 900;
/// How long a connection lasts, whoever does not read or write on it.
pub(crate) const LIFETIME: Duration = Duration::from_secs(660);
/// How long the head of a request may take.
const HEAD: Duration = Duration::from_secs(5);
/// The largest head of a request, in bytes. The server takes no smaller limit.
const MAX_HEAD: usize = 8192;
/// The pause after a connection could not be taken, most likely for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves one request a connection. Dropped, it ends all of them.
pub(crate) async fn serve(listener: TcpListener, router: Router) -> Infallible {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut open = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { continue };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                open.spawn(async move {
                    let _place = place;
                    // A client that goes amid a request is no trouble of the hub's.
                    let _ = timeout(LIFETIME, answer(stream, router)).await;
                });
            }
            Err(_) => sleep(PAUSE).await,
        }
        while open.try_join_next().is_some() {}
    }
}

async fn answer(stream: TcpStream, router: Router) -> hyper::Result<()> {
    let mut server = http1::Builder::new();
    server.keep_alive(false).max_buf_size(MAX_HEAD).timer(TokioTimer::new()).header_read_timeout(HEAD);
    server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await
}
