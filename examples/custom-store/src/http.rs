//! Requests to the hub: one per connection, bounded in time and size.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::lines::Lines;
use crate::wire::MAX_BODY;

/// The time limit for a request and its response.
const DEADLINE: Duration = Duration::from_secs(5);
/// The maximum size of a response's head, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("cannot connect to the hub at {0}")]
    Connect(SocketAddr, #[source] io::Error),
    #[error("the hub did not answer within {0:?}")]
    Late(Duration),
    #[error("the connection to the hub failed")]
    Http(#[from] hyper::Error),
    #[error("cannot build the request to the hub")]
    Request(#[from] hyper::http::Error),
    #[error("the hub's answer exceeds {MAX_BODY} bytes")]
    TooLong,
    #[error("cannot parse the hub's answer")]
    Malformed(#[from] serde_json::Error),
    #[error("the hub answered {0}: {1}")]
    Refused(StatusCode, String),
    #[error("the hub's list of leases is incomplete or too long")]
    Unlisted,
}

/// A response and its connection, which closes on drop.
struct Answer {
    response: Response<Incoming>,
    connection: JoinSet<()>,
}

async fn send(hub: SocketAddr, method: Method, path: &str, body: String) -> Result<Answer, Fault> {
    let stream = TcpStream::connect(hub).await.map_err(|error| Fault::Connect(hub, error))?;
    let mut client = http1::Builder::new();
    let (mut sender, driver) = client.max_buf_size(MAX_HEAD).handshake(TokioIo::new(stream)).await?;
    let mut connection = JoinSet::new();
    connection.spawn(async move {
        // `send_request` and the body return the error.
        let _ = driver.await;
    });
    let request = Request::builder().method(method).uri(path).header(header::HOST, hub.to_string());
    let response = sender.send_request(request.body(Full::new(Bytes::from(body)))?).await?;
    Ok(Answer { response, connection })
}

/// Sends a request and returns the response's body.
pub(crate) async fn call(hub: SocketAddr, method: Method, path: &str, body: String) -> Result<Bytes, Fault> {
    let whole = async {
        let Answer { response, connection: _open } = send(hub, method, path, body).await?;
        let status = response.status();
        let said = read(&mut response.into_body()).await?;
        refused(status, &said)?;
        Ok(said)
    };
    timeout(DEADLINE, whole).await.unwrap_or(Err(Fault::Late(DEADLINE)))
}

/// Opens a stream of lines.
pub(crate) async fn lines(hub: SocketAddr, path: &str) -> Result<Watching, Fault> {
    let open = async {
        let Answer { response, connection } = send(hub, Method::GET, path, String::new()).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let said = read(&mut body).await?;
            refused(status, &said)?;
        }
        Ok(Watching { lines: Lines::new(body), _connection: connection })
    };
    timeout(DEADLINE, open).await.unwrap_or(Err(Fault::Late(DEADLINE)))
}

/// A stream of lines and its connection.
pub(crate) struct Watching {
    pub(crate) lines: Lines<Incoming>,
    _connection: JoinSet<()>,
}

async fn read(body: &mut Incoming) -> Result<Bytes, Fault> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if all.len() + data.len() > MAX_BODY {
            return Err(Fault::TooLong);
        }
        all.extend_from_slice(&data);
    }
    Ok(all.into())
}

fn refused(status: StatusCode, body: &[u8]) -> Result<(), Fault> {
    /// The maximum length of a reason, in bytes.
    const REASON: usize = 512;
    if status.is_success() {
        return Ok(());
    }
    let said = body.get(..REASON).unwrap_or(body);
    Err(Fault::Refused(status, String::from_utf8_lossy(said).into_owned()))
}
