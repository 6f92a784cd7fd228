//! Requests to the running agent, at its HTTP address.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::output::Format;

/// Longer than the agent needs for any answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than the size of any answer of an agent, in bytes.
const MOST: u64 = 64 << 20;

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
    #[error("{0}")]
    Refused(String),
}

/// Returns whether the agent is ready.
pub(crate) fn is_ready(addr: SocketAddr) -> Result<bool, ClientError> {
    match ask(addr, "/readyz", TEXT) {
        Ok(_) => Ok(true),
        Err(ClientError::Refused(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Requests `path` and returns its body, in the format `accept` ([`TEXT`], [`WIDE`], [`JSON`]) if the page has several.
pub(crate) fn ask(addr: SocketAddr, path: &str, accept: &str) -> Result<String, ClientError> {
    let addr = reachable(addr);
    let answer = exchange(addr, path, accept).map_err(|source| ClientError::Unreachable { addr, source })?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(ClientError::NotOurs(addr))?;
    let code = head.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).ok_or(ClientError::NotOurs(addr))?;
    match code {
        "200" => Ok(body.to_owned()),
        "400" | "404" | "503" if !body.is_empty() => Err(ClientError::Refused(body.trim_end().to_owned())),
        _ => Err(ClientError::NotOurs(addr)),
    }
}

/// Escapes text for use in a query.
pub(crate) fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// HTTP/1.0: the end of the connection is the end of the body.
fn exchange(addr: SocketAddr, path: &str, accept: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {addr}\r\nAccept: {accept}\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MOST).read_to_string(&mut answer)?;
    if answer.len() as u64 == MOST {
        return Err(io::Error::other("its answer is longer than any of an agent"));
    }
    Ok(answer)
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
    use super::*;

    #[test]
    fn queries_are_escaped_and_wildcards_become_the_loopback() {
        assert_eq!(escape("/a b/10.5.1.0-24&x"), "%2Fa%20b%2F10.5.1.0-24%26x");
        assert_eq!(reachable("0.0.0.0:80".parse().unwrap()), "127.0.0.1:80".parse().unwrap());
        assert_eq!(reachable("[::]:80".parse().unwrap()), "[::1]:80".parse().unwrap());
    }
}
