//! The connections that pages are asked for on: bounded in number, in time and in what a request may hold.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Connections of one address at a time. One more ends the oldest: however many connect and say nothing, whoever asks
/// is answered.
const MOST_CONNECTIONS: usize = 16;
/// How long a connection lasts, from its begin to the last byte of the answer. It serves one request.
const LIFETIME: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes. The server takes no smaller limit.
const MOST_HEAD: usize = 8192;
/// The pause after a connection could not be taken, most likely for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves for ever. Dropped, it ends all connections.
pub(crate) async fn serve(listener: TcpListener, router: Router) {
    let mut open = Open::default();
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                failing = false;
                open.make_room().await;
                open.connections.push_back(tokio::spawn(answer(stream, router.clone())));
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "health and status cannot be asked for: raise the limit of open files");
                }
                sleep(PAUSE).await;
            }
        }
    }
}

/// The connections, the oldest first.
#[derive(Default)]
struct Open {
    connections: VecDeque<JoinHandle<()>>,
}

impl Open {
    async fn make_room(&mut self) {
        self.connections.retain(|connection| !connection.is_finished());
        while self.connections.len() >= MOST_CONNECTIONS
            && let Some(oldest) = self.connections.pop_front()
        {
            oldest.abort();
            // Its descriptor is free only when it has ended.
            let _ = oldest.await;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connections.iter().for_each(JoinHandle::abort);
    }
}

async fn answer(stream: TcpStream, router: Router) {
    let mut server = http1::Builder::new();
    server.keep_alive(false).max_buf_size(MOST_HEAD);
    let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    match timeout(LIFETIME, connection).await {
        Ok(Ok(())) => {}
        // The client's affair in each case.
        Ok(Err(error)) => tracing::trace!(%error, "a page was not delivered"),
        Err(_) => tracing::trace!("a page was not delivered in time"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What comes back for these bytes, up to the end of the connection.
    async fn told(addr: SocketAddr, request: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // An end by reset is an end.
        let _ = stream.read_to_end(&mut answer).await;
        answer
    }

    /// Whether a connection says nothing more, and has not ended either.
    async fn is_open(stream: &mut TcpStream) -> bool {
        let mut buffer = [0; 65536];
        loop {
            match timeout(Duration::from_millis(100), stream.read(&mut buffer)).await {
                Ok(Ok(0) | Err(_)) => return false,
                Ok(Ok(_)) => {}
                Err(_) => return true,
            }
        }
    }

    async fn server() -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let large = || async { "x".repeat(8 << 20) };
        let router = Router::new().route("/healthz", get(|| async { "fine" })).route("/large", get(large));
        (addr, tokio::spawn(serve(listener, router)))
    }

    const ASK: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";

    #[tokio::test]
    async fn however_many_connect_and_say_nothing_whoever_asks_is_answered() {
        let (addr, server) = server().await;
        let mut idle = Vec::new();
        for nth in 0..400 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            // Silent ones, ones that stop in the middle, and ones that do not read what they asked for.
            let said: &[u8] = [b"".as_slice(), b"GET /heal", b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"][nth % 3];
            let _ = stream.write_all(said).await;
            idle.push(stream);
        }
        assert!(told(addr, ASK).await.ends_with(b"fine"));
        let mut open = 0;
        for stream in &mut idle {
            open += usize::from(is_open(stream).await);
        }
        assert!(open < MOST_CONNECTIONS, "{open} of {} are open", idle.len());
        server.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_has_ten_seconds_and_one_request() {
        let (addr, _server) = server().await;
        let start = tokio::time::Instant::now();
        assert_eq!(told(addr, b"GET /healthz HTTP/1.1\r\nHost:").await, b"");
        assert!(start.elapsed() >= LIFETIME && start.elapsed() < LIFETIME * 2, "{:?}", start.elapsed());
        let twice = told(addr, &[ASK, ASK].concat()).await;
        assert_eq!(String::from_utf8(twice).unwrap().matches("fine").count(), 1);
    }

    #[tokio::test]
    async fn a_head_without_end_is_refused() {
        let (addr, _server) = server().await;
        let head = [b"GET /healthz HTTP/1.1\r\nx: ".as_slice(), &vec![b'x'; 1 << 20]].concat();
        let answer = String::from_utf8(told(addr, &head).await).unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
}
