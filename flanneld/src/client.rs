//! Requests to the running agent, at its HTTP address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use crate::output::Format;

/// How long a request may take, up to the last byte of the answer: an agent serves a connection no longer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// More than the size of any answer of an agent, in bytes.
const MOST: usize = 64 << 20;

/// Text for people, as a value of the `Accept` header.
pub(crate) const TEXT: &str = "text/plain";
/// The same with all columns.
pub(crate) const WIDE: &str = "text/plain; columns=all";
/// JSON for programs.
pub(crate) const JSON: &str = "application/json";

/// Returns the value of the `Accept` header for a format.
pub(crate) fn accepting(format: Format) -> &'static str {
    match format {
        Format::Table => TEXT,
        Format::Wide => WIDE,
        Format::Json => JSON,
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("the agent was not reached at {addr}: check that it runs with the same -metrics-ip and -metrics-port")]
    Unreachable {
        addr: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("another program than flanneld answers at {0}: check -metrics-ip and -metrics-port")]
    NotOurs(SocketAddr),
    #[error("no complete answer from {addr}: try again; if that does not help, check which program listens there")]
    Incomplete {
        addr: SocketAddr,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{0}")]
    Refused(String),
}

/// Returns whether the agent is ready.
pub(crate) async fn is_ready(addr: SocketAddr) -> Result<bool, ClientError> {
    match ask(addr, "/readyz", TEXT).await {
        Ok(_) => Ok(true),
        Err(ClientError::Refused(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Requests `path` and returns its body, in the format `accept` ([`TEXT`], [`WIDE`], [`JSON`]) if the page has several.
pub(crate) async fn ask(addr: SocketAddr, path: &str, accept: &str) -> Result<String, ClientError> {
    let addr = reachable(addr);
    let late = |late: Elapsed| ClientError::Incomplete { addr, source: late.into() };
    let (code, body) = timeout(TIMEOUT, exchange(addr, path, accept)).await.map_err(late)??;
    match code {
        StatusCode::OK => Ok(body),
        StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND | StatusCode::SERVICE_UNAVAILABLE if !body.is_empty() => {
            Err(ClientError::Refused(body.trim_end().to_owned()))
        }
        _ => Err(ClientError::NotOurs(addr)),
    }
}

/// Escapes text for use in a query.
pub(crate) fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

async fn exchange(addr: SocketAddr, path: &str, accept: &str) -> Result<(StatusCode, String), ClientError> {
    let unreachable = |source| ClientError::Unreachable { addr, source };
    let stream = TcpStream::connect(addr).await.map_err(unreachable)?;
    let failed = |error: hyper::Error| match error.is_parse() {
        true => ClientError::NotOurs(addr),
        false => ClientError::Incomplete { addr, source: error.into() },
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Ends with the connection, or with the runtime of this command. Its error is that of the answer.
    tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, addr.to_string()).header(header::ACCEPT, accept);
    let request = request.body(Body::empty()).map_err(|error| unreachable(io::Error::other(error)))?;
    let (head, body) = sender.send_request(request).await.map_err(failed)?.into_parts();
    let incomplete = |source| ClientError::Incomplete { addr, source };
    let body = to_bytes(Body::new(body), MOST).await.map_err(|error| incomplete(error.into()))?;
    let text = String::from_utf8(body.into()).map_err(|_| ClientError::NotOurs(addr))?;
    Ok((head.status, text))
}

/// Replaces an unspecified address by the loopback address, at which such an agent can be reached.
fn reachable(addr: SocketAddr) -> SocketAddr {
    let ip = match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, addr.port())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn queries_are_escaped_and_wildcards_become_the_loopback() {
        assert_eq!(escape("/a b/10.5.1.0-24&x"), "%2Fa%20b%2F10.5.1.0-24%26x");
        assert_eq!(reachable("0.0.0.0:80".parse().unwrap()), "127.0.0.1:80".parse().unwrap());
        assert_eq!(reachable("[::]:80".parse().unwrap()), "[::1]:80".parse().unwrap());
    }

    /// Asks a program that sends `answer` and closes the connection.
    async fn answered(answer: &'static [u8]) -> Result<String, ClientError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let program = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let request = stream.read(&mut [0; 1024]).await.unwrap();
            assert!(request > 0);
            stream.write_all(answer).await.unwrap();
        };
        tokio::join!(ask(addr, "/status", JSON), program).0
    }

    #[tokio::test]
    async fn only_a_whole_answer_of_an_agent_is_one() {
        let whole = answered(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}\n").await;
        assert_eq!(whole.unwrap(), "{}\n");
        let refused = answered(b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnone").await;
        assert!(matches!(refused, Err(ClientError::Refused(text)) if text == "none"));
        for cut in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\ncontent-le",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n{}\n\r\n",
        ] {
            let answer = answered(cut).await;
            assert!(matches!(answer, Err(ClientError::Incomplete { .. })), "{cut:?}: {answer:?}");
        }
        for other in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n"] {
            let answer = answered(other).await;
            assert!(matches!(answer, Err(ClientError::NotOurs(_))), "{other:?}: {answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_ten_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let answer = ask(addr, "/status", JSON).await;
        assert!(matches!(answer, Err(ClientError::Incomplete { .. })), "{answer:?}");
    }
}
