//! HTTP connections, bounded in number, in time and in the size of a request.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use futures_util::poll;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Connections of one address at a time. A further one ends the oldest that has not sent a whole request, or else the
/// oldest.
const MOST_CONNECTIONS: usize = 16;
/// How long a new connection may take to send data before it may be ended in favour of another one. A client that sends
/// its request at once is therefore answered, however many others connect.
const FIRST_READ_TIMEOUT: Duration = Duration::from_millis(2);
/// How long a connection may last, up to the last byte of the answer. It serves one request.
const LIFETIME: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes. The HTTP library accepts no smaller limit.
const MOST_HEAD: usize = 8192;
/// The pause after a connection could not be accepted, most likely for lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves until cancelled, then finishes pending answers. Dropping the future ends all connections.
pub(crate) async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) {
    let mut open = Open::default();
    tokio::select! {
        () = accept(&listener, &router, &mut open) => {}
        () = cancel.cancelled() => {}
    }
    drop(listener);
    open.finish().await;
}

async fn accept(listener: &TcpListener, router: &Router, open: &mut Open) {
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                failing = false;
                open.make_room().await;
                open.connections.push(Connection::start(stream, router.clone()));
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(
                        target: "flannel::agent",
                        %error,
                        "cannot accept HTTP requests: raise the limit of open files"
                    );
                }
                sleep(PAUSE).await;
            }
        }
    }
}

/// The open connections, the oldest first.
#[derive(Default)]
struct Open {
    connections: Vec<Connection>,
}

impl Open {
    async fn make_room(&mut self) {
        loop {
            self.connections.retain(|connection| !connection.task.is_finished());
            if self.connections.len() < MOST_CONNECTIONS {
                return;
            }
            let nth = self.connections.iter().position(|connection| !connection.has_request()).unwrap_or(0);
            let Some(connection) = self.connections.get(nth) else { return };
            if !connection.progress.was_read.load(Ordering::Relaxed) {
                // Meanwhile its request may be read, or other connections may end.
                let _ = timeout(FIRST_READ_TIMEOUT, connection.progress.changed.notified()).await;
                continue;
            }
            let mut connection = self.connections.remove(nth);
            connection.task.abort();
            // Its file descriptor is free only after the task has ended.
            let _ = (&mut connection.task).await;
        }
    }

    /// Waits for pending answers.
    async fn finish(&mut self) {
        for connection in self.connections.iter_mut().filter(|connection| connection.has_request()) {
            let _ = (&mut connection.task).await;
        }
    }
}

/// One connection, which ends when this is dropped.
struct Connection {
    task: JoinHandle<()>,
    progress: Arc<Progress>,
}

/// The progress of a connection.
#[derive(Default)]
struct Progress {
    /// Whether the data that was sent at once, if any, has been read.
    was_read: AtomicBool,
    has_request: AtomicBool,
    /// Notified when `was_read` is set.
    changed: Notify,
}

impl Connection {
    fn start(stream: TcpStream, router: Router) -> Self {
        let progress = Arc::<Progress>::default();
        let task = tokio::spawn(answer(stream, router, Arc::clone(&progress)));
        Self { task, progress }
    }

    /// Whether the whole head of a request was received.
    fn has_request(&self) -> bool {
        self.progress.has_request.load(Ordering::Relaxed)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(stream: TcpStream, router: Router, progress: Arc<Progress>) {
    let mut server = http1::Builder::new();
    server.keep_alive(false).max_buf_size(MOST_HEAD);
    let pages = TowerToHyperService::new(router);
    let service = service_fn(|request| {
        progress.has_request.store(true, Ordering::Relaxed);
        pages.call(request)
    });
    let serve = async {
        let _ = timeout(FIRST_READ_TIMEOUT, stream.readable()).await;
        let mut serving = pin!(server.serve_connection(TokioIo::new(stream), service));
        let first = poll!(serving.as_mut());
        progress.was_read.store(true, Ordering::Relaxed);
        progress.changed.notify_one();
        match first {
            Poll::Ready(served) => served,
            Poll::Pending => serving.await,
        }
    };
    // A page that is not delivered concerns only its client.
    match timeout(LIFETIME, serve).await {
        Ok(Ok(())) => {}
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

    /// Sends these bytes and returns the answer, up to the end of the connection.
    async fn told(addr: SocketAddr, request: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        // The server may refuse a request before all of it is sent.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        // A reset ends the connection as well.
        let _ = stream.read_to_end(&mut answer).await;
        answer
    }

    /// Whether a connection is open and sends nothing more.
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
        (addr, serve_on(listener, &Arc::default(), CancellationToken::new()))
    }

    /// A page that waits after it was requested.
    #[derive(Default)]
    struct Slow {
        asked: Notify,
        go: Notify,
    }

    fn serve_on(listener: TcpListener, slow: &Arc<Slow>, cancel: CancellationToken) -> JoinHandle<()> {
        let slow = Arc::clone(slow);
        let large = || async { "x".repeat(8 << 20) };
        let slow = || async move {
            slow.asked.notify_one();
            slow.go.notified().await;
            "late"
        };
        let router = Router::new().route("/healthz", get(|| async { "fine" })).route("/large", get(large));
        tokio::spawn(serve(listener, router.route("/slow", get(slow)), cancel))
    }

    const ASK_SLOW: &[u8] = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n";
    const ASK: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";

    #[tokio::test]
    async fn however_many_connect_and_say_nothing_whoever_asks_is_answered() {
        let (addr, server) = server().await;
        let mut idle = Vec::new();
        for nth in 0..400 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            // Silent connections, connections with half a request, and connections that do not read the answer.
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

    #[tokio::test]
    async fn whoever_has_asked_is_answered_however_many_connect_before_the_server_comes_to_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut asking = TcpStream::connect(addr).await.unwrap();
        asking.write_all(ASK).await.unwrap();
        let mut idle = Vec::new();
        for _ in 0..MOST_CONNECTIONS * 4 {
            idle.push(TcpStream::connect(addr).await.unwrap());
        }
        let _server = serve_on(listener, &Arc::default(), CancellationToken::new());
        let mut answer = Vec::new();
        let _ = asking.read_to_end(&mut answer).await;
        assert!(answer.ends_with(b"fine"), "{answer:?}");
    }

    #[tokio::test]
    async fn an_answer_under_way_is_not_ended_for_idle_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, slow) = (listener.local_addr().unwrap(), Arc::<Slow>::default());
        let _server = serve_on(listener, &slow, CancellationToken::new());
        let mut asking = TcpStream::connect(addr).await.unwrap();
        asking.write_all(ASK_SLOW).await.unwrap();
        slow.asked.notified().await;
        let mut idle = Vec::new();
        for _ in 0..MOST_CONNECTIONS * 4 {
            idle.push(TcpStream::connect(addr).await.unwrap());
        }
        // After this the server has accepted all of them.
        assert!(told(addr, ASK).await.ends_with(b"fine"));
        slow.go.notify_one();
        let mut answer = Vec::new();
        let _ = asking.read_to_end(&mut answer).await;
        assert!(answer.ends_with(b"late"), "{answer:?}");
    }

    #[tokio::test]
    async fn a_flood_of_connections_does_not_starve_a_probe() {
        let (addr, _server) = server().await;
        let stop = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&stop);
        let flood = std::thread::spawn(move || {
            let mut held = std::collections::VecDeque::new();
            let mut made = 0;
            while !ends.load(Ordering::Relaxed) {
                // A connection that is refused because the queue is full is tried again.
                held.extend(std::net::TcpStream::connect_timeout(&addr, Duration::from_secs(1)));
                made += 1;
                if held.len() > 100 {
                    held.pop_front();
                }
            }
            made
        });
        let mut answered = 0;
        for _ in 0..PROBES {
            answered += usize::from(told(addr, ASK).await.ends_with(b"fine"));
        }
        stop.store(true, Ordering::Relaxed);
        let made = tokio::task::spawn_blocking(|| flood.join().unwrap()).await.unwrap();
        assert!(made > MOST_CONNECTIONS, "{made} connections are no flood");
        // A client that is not scheduled in time may send too late.
        assert!(answered * 4 >= PROBES * 3, "{answered} of {PROBES} probes were answered among {made} others");
    }

    const PROBES: usize = 100;

    #[tokio::test]
    async fn an_answer_under_way_is_finished_after_a_cancel_and_nothing_else_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, slow, cancel) = (listener.local_addr().unwrap(), Arc::<Slow>::default(), CancellationToken::new());
        let server = serve_on(listener, &slow, cancel.clone());
        let _idle = TcpStream::connect(addr).await.unwrap();
        let mut asking = TcpStream::connect(addr).await.unwrap();
        asking.write_all(ASK_SLOW).await.unwrap();
        slow.asked.notified().await;
        cancel.cancel();
        slow.go.notify_one();
        timeout(LIFETIME / 2, server).await.unwrap().unwrap();
        let mut answer = Vec::new();
        let _ = asking.read_to_end(&mut answer).await;
        assert!(answer.ends_with(b"late"), "{answer:?}");
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

    #[tokio::test]
    async fn a_head_of_up_to_eight_kilobytes_is_answered_and_a_larger_one_is_not() {
        let (addr, _server) = server().await;
        let head = |size: usize| {
            let (begin, end) = (b"GET /healthz HTTP/1.1\r\nHost: x\r\nx: ".as_slice(), b"\r\n\r\n".as_slice());
            [begin, &vec![b'x'; size - begin.len() - end.len()], end].concat()
        };
        assert!(told(addr, &head(MOST_HEAD - 1)).await.ends_with(b"fine"));
        let answer = String::from_utf8(told(addr, &head(MOST_HEAD + 1024)).await).unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
}
