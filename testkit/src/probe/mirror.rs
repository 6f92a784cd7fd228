//! A TCP server that answers with the client's address.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use crate::{Context, Error, Namespace};

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running server. Ends when dropped.
#[derive(Debug)]
pub struct Mirror {
    addr: SocketAddr,
    listener: TcpListener,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Mirror {
    /// Starts a server at an address of the namespace.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn start(ns: &Namespace, addr: SocketAddr) -> Result<Self, Error> {
        let bound = ns.run(|| TcpListener::bind(addr))?.and_then(|listener| Ok((listener.try_clone()?, listener)));
        let (listener, accepting) = bound.context(|| format!("{}: TCP on {addr}", ns.name()))?;
        let addr = listener.local_addr().context(|| "own address".to_owned())?;
        // Until it is shut down.
        let thread = ns.spawn(move || {
            while let Ok((mut client, from)) = accepting.accept() {
                // A client that has gone needs no answer.
                let _ = client.write_all(from.ip().to_canonical().to_string().as_bytes());
            }
        })?;
        Ok(Self { addr, listener, thread: Some(thread) })
    }

    /// Returns the server's address and port.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // Ends `accept`.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
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
