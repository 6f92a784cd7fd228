//! A TCP server that tells clients the address from which they reached it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::{Context, Error, Namespace};

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running server. Ends when dropped.
#[derive(Debug)]
pub struct Mirror {
    addr: SocketAddr,
    ends: Arc<AtomicBool>,
    ns: Namespace,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Mirror {
    /// Starts a server at an address of the namespace.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn start(ns: &Namespace, addr: SocketAddr) -> Result<Self, Error> {
        let listener = ns.run(|| TcpListener::bind(addr))?.context(|| format!("{}: TCP on {addr}", ns.name()))?;
        let addr = listener.local_addr().context(|| "own address".to_owned())?;
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let thread = ns.spawn(move || {
            while let Ok((mut client, from)) = listener.accept() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                // A client that has gone needs no answer.
                let _ = client.write_all(from.ip().to_canonical().to_string().as_bytes());
            }
        })?;
        Ok(Self { addr, ends, ns: ns.clone(), thread: Some(thread) })
    }

    /// Returns the server's address and port.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        // Wakes it.
        let _ = self.ns.run(|| TcpStream::connect_timeout(&self.addr, PATIENCE));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects to a [`Mirror`], perhaps through a translation, and returns the client's address as the server sees it.
///
/// # Errors
/// If the server cannot be reached. It may be tried again.
pub fn seen_at(from: &Namespace, target: SocketAddr) -> Result<IpAddr, Error> {
    let doing = || format!("{}: TCP to {target}", from.name());
    let stream = from.run(|| TcpStream::connect_timeout(&target, PATIENCE))?;
    let mut stream = stream.context(doing)?;
    let mut text = String::new();
    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.read_to_string(&mut text)).context(doing)?;
    text.parse().map_err(|_| Error::new(format!("{}: answered {text:?}", doing())))
}
