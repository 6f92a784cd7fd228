//! A proxy before an API server that injects faults which a real server cannot be made to have.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::client::Body;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::ApiServer;
use crate::{Context, Error};

/// The fault of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The proxy answers, and the server does not see the request.
    Answer {
        /// The status code.
        status: u16,
        /// How many seconds the client is asked to wait.
        retry_after: Option<u32>,
        /// The type of the body.
        content: &'static str,
        /// The body.
        body: Vec<u8>,
    },
    /// The connection ends after this many bytes of the answer's body.
    CutAfter(usize),
    /// Nothing follows after this many bytes of the answer's body, and the connection stays open.
    FreezeAfter(usize),
    /// The server carries out the request, and the answer is lost.
    Lose,
    /// The answer is delayed by this time.
    Delay(Duration),
    /// In a watch in protobuf, the events of the Node with this name do not arrive.
    Drop(String),
}

/// The media type of a watch in protobuf.
const WATCH: &str = "application/vnd.kubernetes.protobuf;stream=watch";

/// An event `ERROR` whose object is a `Status` with code 410.
const GONE: &[u8] = b"\0\0\0\x39\x0a\x05ERROR\x12\x30\x0a\x2ek8s\0\
    \x0a\x0c\x0a\x02v1\x12\x06Status\
    \x12\x16\x12\x07Failure\x1a\x08too old!\x30\x9a\x03\
    \x1a\0\x22\0";

impl Fault {
    /// Creates a refusal in Kubernetes' format.
    pub fn status(code: u16, message: &str) -> Self {
        let body = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code,
        });
        Self::Answer { status: code, retry_after: None, content: "application/json", body: body.to_string().into() }
    }

    /// Creates a refusal that asks the client to wait this many seconds.
    pub fn busy(status: u16, seconds: u32) -> Self {
        let body = b"Too many requests".to_vec();
        Self::Answer { status, retry_after: Some(seconds), content: "text/plain", body }
    }

    /// Creates a successful answer.
    pub fn sent(content: &'static str, body: &[u8]) -> Self {
        Self::Answer { status: 200, retry_after: None, content, body: body.to_vec() }
    }

    /// Creates a watch with one event, which reports that the requested version is gone.
    pub fn gone() -> Self {
        Self::sent(WATCH, GONE)
    }

    /// Creates the same watch, ended in the middle of the event.
    pub fn half_an_event() -> Self {
        Self::sent(WATCH, &GONE[..40])
    }
}

/// A received request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The method and the path with its query.
    pub line: String,
    /// The body.
    pub body: String,
    /// The request's token.
    pub token: Option<String>,
}

impl Seen {
    fn has(&self, part: &str) -> bool {
        self.line.contains(part) || self.body.contains(part)
    }
}

/// A proxy without TLS. It ends when its handle is dropped.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// The faults for requests with this text, each with its remaining count.
    faults: Mutex<Vec<(String, Fault, usize)>>,
    seen: Mutex<Vec<Seen>>,
    /// How often all answers in progress were cut.
    cuts: watch::Sender<u64>,
}

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

impl Proxy {
    /// Starts a proxy before `server`, on the loopback. The server sees all requests as the administrator's.
    ///
    /// # Errors
    /// The system's error.
    pub async fn start(server: &ApiServer) -> Result<Self, Error> {
        Self::before(server.client().await?, Ipv4Addr::LOCALHOST.into()).await
    }

    /// Starts a proxy at another address of this network namespace. The server sees the clients' own tokens.
    ///
    /// # Errors
    /// The system's error.
    pub async fn start_at(server: &ApiServer, address: IpAddr) -> Result<Self, Error> {
        Self::before(server.client_of(None)?, address).await
    }

    async fn before(client: kube::Client, address: IpAddr) -> Result<Self, Error> {
        let listener = TcpListener::bind((address, 0)).await.context(|| "no port for a proxy".to_owned())?;
        let addr = listener.local_addr().context(|| "no port for a proxy".to_owned())?;
        let shared = Arc::new(Shared { faults: Mutex::default(), seen: Mutex::default(), cuts: watch::Sender::new(0) });
        let serving = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, client.clone(), Arc::clone(&serving)));
            }
        });
        Ok(Self { addr, shared, task })
    }

    /// Returns the proxy's URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Applies `fault` to the next `times` requests with `part` in their first line or body. Faults requested earlier
    /// are applied first.
    pub fn expect(&self, part: &str, fault: Fault, times: usize) {
        locked(&self.shared.faults).push((part.to_owned(), fault, times));
    }

    /// Removes all faults.
    pub fn mend(&self) {
        locked(&self.shared.faults).clear();
    }

    /// Ends all answers in progress.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Returns the requests so far with `part` in their first line or body.
    pub fn seen(&self, part: &str) -> Vec<Seen> {
        locked(&self.shared.seen).iter().filter(|seen| seen.has(part)).cloned().collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn serve(stream: TcpStream, client: kube::Client, shared: Arc<Shared>) {
    let answer = |request| answer(request, client.clone(), Arc::clone(&shared));
    // The client sees any error.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

async fn answer(request: Request<Incoming>, client: kube::Client, shared: Arc<Shared>) -> io::Result<Answer> {
    let (mut parts, body) = request.into_parts();
    let line = format!("{} {}", parts.method, parts.uri);
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let token = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let seen = Seen { line, body: String::from_utf8_lossy(&body).into_owned(), token: token.map(str::to_owned) };
    let fault = shared.fault(&seen);
    locked(&shared.seen).push(seen);
    if let Some(Fault::Answer { status, retry_after, content, body }) = fault {
        let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
        let mut answer = Response::builder().status(status).header(CONTENT_TYPE, content);
        if let Some(seconds) = retry_after {
            answer = answer.header(RETRY_AFTER, seconds);
        }
        let body = Full::from(body).map_err(|never| match never {}).boxed_unsync();
        return answer.body(body).map_err(io::Error::other);
    }
    // The client sets its own host, compression and credentials of the administrator.
    let headers = std::mem::take(&mut parts.headers);
    let kept = |name: &Option<_>| matches!(name, Some(ACCEPT | AUTHORIZATION | CONTENT_TYPE));
    parts.headers.extend(headers.into_iter().filter(|(name, _)| kept(name)));
    let cuts = shared.cuts.subscribe();
    let forwarded = Request::from_parts(parts, Body::from(body.to_vec()));
    let (parts, body) = client.send(forwarded).await.map_err(io::Error::other)?.into_parts();
    let end = match fault {
        Some(Fault::Lose) => return Err(io::ErrorKind::ConnectionReset.into()),
        Some(Fault::CutAfter(left)) => End::Cut(left),
        Some(Fault::FreezeAfter(left)) => End::Freeze(left),
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            End::Own
        }
        Some(Fault::Drop(node)) => End::Without(Without::node(&node)),
        Some(Fault::Answer { .. }) | None => End::Own,
    };
    let status = parts.status;
    let mut answer = Response::builder().status(status);
    for (name, value) in parts.headers.iter().filter(|(name, _)| *name != http::header::TRANSFER_ENCODING) {
        // A cut body has another length.
        if *name != http::header::CONTENT_LENGTH {
            answer = answer.header(name, value);
        }
    }
    answer.body(StreamBody::new(Box::pin(passed(body, end, cuts))).boxed_unsync()).map_err(io::Error::other)
}

/// How an answer's body is passed on.
enum End {
    Own,
    /// It ends after this many bytes.
    Cut(usize),
    Freeze(usize),
    Without(Without),
}

/// A watch without the events of a Node.
struct Without {
    /// The encoding of its name in an event.
    mark: Vec<u8>,
    /// The beginning of an incomplete event.
    rest: Vec<u8>,
}

impl Without {
    fn node(name: &str) -> Self {
        // `ObjectMeta { name = 1 }`, with its length: no other name contains it.
        let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
        Self { mark: [&[0x0a, length], name.as_bytes()].concat(), rest: Vec::new() }
    }

    /// Returns the received bytes that are passed on. Each event is preceded by its length.
    fn pass(&mut self, bytes: &[u8]) -> Bytes {
        self.rest.extend_from_slice(bytes);
        let mut passed = Vec::new();
        while let Some(length) = self.rest.first_chunk().map(|length| u32::from_be_bytes(*length) as usize + 4) {
            if self.rest.len() < length {
                break;
            }
            let event: Vec<_> = self.rest.drain(..length).collect();
            if !event.windows(self.mark.len()).any(|part| part == self.mark) {
                passed.extend(event);
            }
        }
        passed.into()
    }
}

fn passed(body: Body, end: End, cuts: watch::Receiver<u64>) -> impl Stream<Item = io::Result<Frame<Bytes>>> {
    stream::unfold((body, end, cuts), |(mut body, mut end, mut cuts)| async move {
        let cut = || Err(io::ErrorKind::ConnectionReset.into());
        match end {
            End::Cut(0) => return Some((cut(), (body, end, cuts))),
            End::Freeze(0) => {
                let _ = cuts.changed().await;
                return Some((cut(), (body, end, cuts)));
            }
            End::Own | End::Cut(_) | End::Freeze(_) | End::Without(_) => {}
        }
        let frame = tokio::select! {
            _ = cuts.changed() => return Some((cut(), (body, end, cuts))),
            frame = body.frame() => frame?,
        };
        let mut bytes = match frame.map_err(io::Error::other).map(Frame::into_data) {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(_)) => Bytes::new(),
            Err(error) => return Some((Err(error), (body, end, cuts))),
        };
        match &mut end {
            End::Own => {}
            End::Cut(left) | End::Freeze(left) => {
                bytes.truncate(*left);
                *left -= bytes.len();
            }
            End::Without(without) => bytes = without.pass(&bytes),
        }
        Some((Ok(Frame::data(bytes)), (body, end, cuts)))
    })
}

impl Shared {
    /// Returns the fault of a request.
    fn fault(&self, seen: &Seen) -> Option<Fault> {
        let mut faults = locked(&self.faults);
        let (_, fault, times) = faults.iter_mut().find(|(part, _, times)| seen.has(part) && *times > 0)?;
        *times -= 1;
        Some(fault.clone())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
