//! The throughput of one TCP stream.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::{Context, Error, Namespace};

const CHUNK: usize = 256 << 10;
const CONNECT: Duration = Duration::from_secs(5);

/// The result of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throughput {
    /// Bytes that arrived.
    pub bytes: u64,
    /// The time from the first byte sent to the last byte received.
    pub elapsed: Duration,
}

impl Throughput {
    /// Returns the throughput in Gbit/s.
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.elapsed.as_secs_f64()
    }
}

/// Sends as much as possible for `duration` over one TCP stream from `from` to `addr`, which is in `to`.
///
/// # Errors
/// If there is no connection within some seconds, or it breaks. It may be tried again.
pub fn throughput(from: &Namespace, to: &Namespace, addr: IpAddr, duration: Duration) -> Result<Throughput, Error> {
    let refused = || format!("TCP from {} to {addr}", from.name());
    let listener = to.run(|| TcpListener::bind((addr, 0)))?.context(refused)?;
    let target = listener.local_addr().context(refused)?;
    let mut stream = from.run(|| TcpStream::connect_timeout(&target, CONNECT))?.context(refused)?;
    let (mut inbox, _) = listener.accept().context(refused)?;
    inbox.set_read_timeout(Some(duration + CONNECT)).context(refused)?;
    stream.set_write_timeout(Some(CONNECT)).context(refused)?;
    let reader = to.spawn(move || {
        let mut buffer = vec![0; CHUNK];
        let mut bytes = 0;
        loop {
            match inbox.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(count) => bytes += count as u64,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    })?;
    let start = Instant::now();
    let chunk = vec![0; CHUNK];
    while start.elapsed() < duration {
        stream.write_all(&chunk).context(refused)?;
    }
    drop(stream);
    let read = reader.join().map_err(|_| Error::new("the receiver of a throughput probe died"))??;
    Ok(Throughput { bytes: read.context(refused)?, elapsed: start.elapsed() })
}
