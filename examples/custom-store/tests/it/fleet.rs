//! A hub on loopback, and an HTTP client for operators' requests.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use custom_store::Server;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The time limit for a response.
const PATIENCE: Duration = Duration::from_secs(10);

/// A hub, and its server task while it runs.
pub(crate) struct Fleet {
    pub(crate) server: Server,
    pub(crate) addr: SocketAddr,
    serving: Option<JoinHandle<()>>,
}

impl Fleet {
    pub(crate) async fn new() -> Self {
        let mut fleet =
            Self { server: Server::default(), addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), serving: None };
        fleet.start().await;
        fleet
    }

    pub(crate) async fn start(&mut self) {
        let listener = TcpListener::bind(self.addr).await.unwrap();
        self.addr = listener.local_addr().unwrap();
        let server = self.server.clone();
        self.serving = Some(tokio::spawn(async move { match server.serve(listener).await {} }));
    }

    pub(crate) async fn stop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            assert!(serving.await.unwrap_err().is_cancelled());
        }
    }

    /// Sends a request to the hub.
    pub(crate) async fn curl(&self, method: &str, path: &str, body: String) -> Result<String, String> {
        let (addr, method, path) = (self.addr, method.to_owned(), path.to_owned());
        tokio::task::spawn_blocking(move || curl(addr, &method, &path, &body)).await.unwrap()
    }
}

/// Sends a request as curl does. The error is the whole response.
pub(crate) fn curl(addr: SocketAddr, method: &str, path: &str, body: &str) -> Result<String, String> {
    let (start, mut stream) = (Instant::now(), TcpStream::connect(addr).unwrap());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: hub\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    // The hub may refuse the request before it has read all of it.
    let _ = stream.write_all(request.as_bytes());
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(read) if start.elapsed() < PATIENCE => answer.extend_from_slice(&part[..read]),
            other => panic!("{method} {path}: incomplete response: {other:?}, after {} bytes", answer.len()),
        }
    }
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    if head.starts_with("HTTP/1.1 200 ") { Ok(body.to_owned()) } else { Err(answer) }
}
