//! The hub's connections: bounded in number, lifetime and size of a request's head.

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

/// The maximum number of connections. Others wait until one ends.
pub(crate) const MAX_CONNECTIONS: usize = 900;
/// The maximum lifetime of a connection, including one whose client does not read or write.
pub(crate) const LIFETIME: Duration = Duration::from_secs(660);
/// The time limit for a request's head.
const HEAD: Duration = Duration::from_secs(5);
/// The maximum size of a request's head, in bytes. hyper accepts no smaller limit.
const MAX_HEAD: usize = 8192;
/// The pause after a failed accept, most likely for lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves one request per connection. Dropping the future closes all connections.
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
                    // Errors of one client do not affect the hub.
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
