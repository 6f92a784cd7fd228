//! Which of the schemes a member serves, after a connection with the endpoint's scheme has failed: neither side's error
//! says that the other one is needed.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A TLS handshake record with an empty HelloRequest, which only servers send: a TLS server answers with an alert.
const OUT_OF_ORDER: &[u8] = &[22, 3, 1, 0, 4, 0, 0, 0, 0];
/// The types of TLS records that a server may answer with: alert and handshake (RFC 8446, section 5.1).
const TLS_TYPES: [u8; 2] = [21, 22];

/// HTTP/2's connection preface with an empty SETTINGS frame (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The type of a SETTINGS frame, which is a server's first frame.
const SETTINGS: u8 = 4;

/// Returns the remedy if the member at this endpoint serves the other scheme.
pub(crate) async fn remedy(endpoint: &str) -> Option<&'static str> {
    match endpoint.split_once("://")? {
        ("http", authority) if serves_tls(authority).await? => {
            Some("this member serves TLS: write https:// for http://")
        }
        ("https", authority) if serves_clear_text(authority).await? => {
            Some("this member serves no TLS: write http:// for https://")
        }
        _ => None,
    }
}

async fn serves_tls(authority: &str) -> Option<bool> {
    let mut answer = [0; 1];
    ask(&with_port(authority, 80), OUT_OF_ORDER, &mut answer).await?;
    Some(TLS_TYPES.contains(&answer[0]))
}

async fn serves_clear_text(authority: &str) -> Option<bool> {
    // The length of a frame in three bytes, and its type.
    let mut answer = [0; 4];
    ask(&with_port(authority, 443), PREFACE, &mut answer).await?;
    Some(answer[3] == SETTINGS)
}

async fn ask(address: &str, question: &[u8], answer: &mut [u8]) -> Option<()> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream.write_all(question).await.ok()?;
    stream.read_exact(answer).await.ok().map(drop)
}

/// Adds the scheme's port if there is none.
fn with_port(authority: &str, port: u16) -> String {
    let after_address = authority.rsplit(']').next().unwrap_or(authority);
    if after_address.contains(':') { authority.to_owned() } else { format!("{authority}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_without_a_port_has_that_of_its_scheme() {
        for (authority, wanted) in [
            ("10.0.0.1:2379", "10.0.0.1:2379"),
            ("etcd.example", "etcd.example:80"),
            ("[fd00::1]", "[fd00::1]:80"),
            ("[fd00::1]:2379", "[fd00::1]:2379"),
        ] {
            assert_eq!(with_port(authority, 80), wanted);
        }
    }
}
