//! A proxy before an API server that does what a server cannot be made to do.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
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

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// This is answered instead, and the server does not see the request.
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
    /// The connection ends after so many bytes of the answer's body.
    CutAfter(usize),
    /// Nothing comes after so many bytes of the answer's body, and the connection stays open.
    FreezeAfter(usize),
    /// The server carries the request out, and the answer is lost.
    Lose,
}

impl Fault {
    /// A refusal as Kubernetes words it.
    pub fn status(code: u16, message: &str) -> Self {
        let body = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code,
        });
        Self::Answer { status: code, retry_after: None, content: "application/json", body: body.to_string().into() }
    }
}

/// A request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The method and the path with its query.
    pub line: String,
    /// The body.
    pub body: String,
}

/// A proxy in clear text on the loopback, whose requests the server takes for the administrator's. It ends with its handle.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// What is to happen to how many requests with this text in their first line.
    faults: Mutex<Vec<(String, Fault, usize)>>,
    seen: Mutex<Vec<Seen>>,
    /// How often all answers under way were cut.
    cuts: watch::Sender<u64>,
}

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

impl Proxy {
    /// Starts a proxy before `server`.
    ///
    /// # Errors
    /// What the system refused.
    pub async fn start(server: &ApiServer) -> Result<Self, Error> {
        let client = server.client().await?;
        let listener = TcpListener::bind("127.0.0.1:0").await.context(|| "no port for a proxy".to_owned())?;
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

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Lets `fault` happen to the next `times` requests with `part` in their first line. Those that were asked for first
    /// come first.
    pub fn expect(&self, part: &str, fault: Fault, times: usize) {
        locked(&self.shared.faults).push((part.to_owned(), fault, times));
    }

    /// Lets nothing happen any more.
    pub fn mend(&self) {
        locked(&self.shared.faults).clear();
    }

    /// Ends all answers that are under way.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// The requests with `part` in their first line that came so far.
    pub fn seen(&self, part: &str) -> Vec<Seen> {
        locked(&self.shared.seen).iter().filter(|seen| seen.line.contains(part)).cloned().collect()
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
    // However it ends: the client sees it.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

async fn answer(request: Request<Incoming>, client: kube::Client, shared: Arc<Shared>) -> io::Result<Answer> {
    let (mut parts, body) = request.into_parts();
    let line = format!("{} {}", parts.method, parts.uri);
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    locked(&shared.seen).push(Seen { line: line.clone(), body: String::from_utf8_lossy(&body).into_owned() });
    let fault = shared.fault(&line);
    if let Some(Fault::Answer { status, retry_after, content, body }) = fault {
        let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
        let mut answer = Response::builder().status(status).header(CONTENT_TYPE, content);
        if let Some(seconds) = retry_after {
            answer = answer.header(RETRY_AFTER, seconds);
        }
        let body = Full::from(body).map_err(|never| match never {}).boxed_unsync();
        return answer.body(body).map_err(io::Error::other);
    }
    // The client has a host, credentials and a way to compress of its own.
    let headers = std::mem::take(&mut parts.headers);
    parts.headers.extend(headers.into_iter().filter(|(name, _)| matches!(name, Some(ACCEPT | CONTENT_TYPE))));
    let cuts = shared.cuts.subscribe();
    let forwarded = Request::from_parts(parts, Body::from(body.to_vec()));
    let (parts, body) = client.send(forwarded).await.map_err(io::Error::other)?.into_parts();
    let end = match fault {
        Some(Fault::Lose) => return Err(io::ErrorKind::ConnectionReset.into()),
        Some(Fault::CutAfter(left)) => End::Cut(left),
        Some(Fault::FreezeAfter(left)) => End::Freeze(left),
        Some(Fault::Answer { .. }) | None => End::Own,
    };
    let status = parts.status;
    let mut answer = Response::builder().status(status);
    for (name, value) in parts.headers.iter().filter(|(name, _)| *name != http::header::TRANSFER_ENCODING) {
        // A body that is cut has another length.
        if *name != http::header::CONTENT_LENGTH {
            answer = answer.header(name, value);
        }
    }
    answer.body(StreamBody::new(Box::pin(passed(body, end, cuts))).boxed_unsync()).map_err(io::Error::other)
}

/// How an answer ends, after so many bytes.
enum End {
    Own,
    Cut(usize),
    Freeze(usize),
}

fn passed(body: Body, end: End, cuts: watch::Receiver<u64>) -> impl Stream<Item = io::Result<Frame<Bytes>>> {
    stream::unfold((body, end, cuts), |(mut body, mut end, mut cuts)| async move {
        let cut = || Err(io::ErrorKind::ConnectionReset.into());
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
            End::Cut(0) => return Some((cut(), (body, end, cuts))),
            End::Freeze(0) => {
                let _ = cuts.changed().await;
                return Some((cut(), (body, end, cuts)));
            }
            End::Cut(left) | End::Freeze(left) => {
                bytes.truncate(*left);
                *left -= bytes.len();
            }
        }
        Some((Ok(Frame::data(bytes)), (body, end, cuts)))
    })
}

impl Shared {
    /// What is to happen to a request.
    fn fault(&self, line: &str) -> Option<Fault> {
        let mut faults = locked(&self.faults);
        let (_, fault, times) =
            faults.iter_mut().find(|(part, _, times)| line.contains(part.as_str()) && *times > 0)?;
        *times -= 1;
        Some(fault.clone())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
