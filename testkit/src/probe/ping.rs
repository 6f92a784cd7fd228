//! ICMP echo: the kernel at the other end answers, so no program is needed there.

use std::io;
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::{Context, Error, Namespace};

/// The interval of requests while waiting for a path to heal: the resolution of the measured time.
const STEP: Duration = Duration::from_millis(2);

/// Sends one echo request from inside `from`. Returns the time until the reply.
///
/// # Errors
/// If there is no route, or no reply within `timeout`. It may be tried again.
pub fn ping(from: &Namespace, to: IpAddr, timeout: Duration) -> Result<Duration, Error> {
    let echo = Echo::open(from, to)?;
    let start = Instant::now();
    echo.send(1).context(|| format!("{}: echo request to {to}", from.name()))?;
    match echo.reply(start + timeout)? {
        Some(1) => Ok(start.elapsed()),
        _ => Err(Error::new(format!("{}: no echo reply from {to} within {timeout:?}", from.name()))),
    }
}

/// Sends an echo request every 2 ms, even without a route. Returns the time until the first reply.
///
/// # Errors
/// If no reply arrives within `patience`.
pub fn until_reply(from: &Namespace, to: IpAddr, patience: Duration) -> Result<Duration, Error> {
    let echo = Echo::open(from, to)?;
    let start = Instant::now();
    let mut last = None;
    for sequence in 1_u16.. {
        last = echo.send(sequence).err().or(last);
        if echo.reply(Instant::now() + STEP)?.is_some() {
            return Ok(start.elapsed());
        }
        if start.elapsed() > patience {
            break;
        }
    }
    let text = format!("{}: no echo reply from {to} within {patience:?}", from.name());
    Err(last.map_or_else(|| Error::new(text.clone()), |error| Error::io(text.clone(), error)))
}

/// Sends echo requests for `duration` at the interval `every`. Returns the round trip times, without requests that had
/// no reply within a second.
///
/// # Errors
/// If there is no route, or a socket cannot be opened.
pub fn pings(from: &Namespace, to: IpAddr, every: Duration, duration: Duration) -> Result<Vec<Duration>, Error> {
    let echo = Echo::open(from, to)?;
    let start = Instant::now();
    let mut took = Vec::new();
    for sequence in 1_u16..=u16::MAX {
        let sent = Instant::now();
        if sent - start >= duration {
            break;
        }
        echo.send(sequence).context(|| format!("{}: echo request to {to}", from.name()))?;
        let until = sent + Duration::from_secs(1);
        while let Some(answered) = echo.reply(until)? {
            if answered == sequence {
                took.push(sent.elapsed());
                break;
            }
        }
        std::thread::sleep(every.saturating_sub(sent.elapsed()));
    }
    Ok(took)
}

/// Counts the probes of this process.
static PROBES: AtomicU16 = AtomicU16::new(0);

struct Echo {
    socket: OwnedFd,
    to: IpAddr,
    id: u16,
}

impl Echo {
    fn open(from: &Namespace, to: IpAddr) -> Result<Self, Error> {
        let v6 = to.is_ipv6();
        let opened = from.run(|| -> nix::Result<OwnedFd> {
            let (family, protocol) = if v6 {
                (AddressFamily::Inet6, SockProtocol::IcmpV6)
            } else {
                (AddressFamily::Inet, SockProtocol::Icmp)
            };
            socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
        })?;
        let socket = opened.context(|| format!("{}: a raw socket needs CAP_NET_RAW", from.name()))?;
        // Not the number of the socket: the next socket has it again, and would take late replies to this probe.
        let id = (std::process::id() as u16).rotate_left(8) ^ PROBES.fetch_add(1, Ordering::Relaxed);
        Ok(Self { socket, to, id })
    }

    fn send(&self, sequence: u16) -> io::Result<()> {
        let [id, sequence] = [self.id.to_be_bytes(), sequence.to_be_bytes()];
        let kind = if self.to.is_ipv6() { 128 } else { 8 };
        let mut packet = [kind, 0, 0, 0, id[0], id[1], sequence[0], sequence[1]];
        if !self.to.is_ipv6() {
            // The kernel fills in the checksum of ICMPv6 only.
            [packet[2], packet[3]] = checksum(&packet).to_be_bytes();
        }
        let (socket, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        match self.to {
            IpAddr::V4(to) => sendto(socket, &packet, &SockaddrIn::from(SocketAddrV4::new(to, 0)), flags)?,
            IpAddr::V6(to) => sendto(socket, &packet, &SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, 0)), flags)?,
        };
        Ok(())
    }

    /// Returns the sequence number of the next reply to this socket, or `None` if none arrives in time.
    fn reply(&self, until: Instant) -> Result<Option<u16>, Error> {
        let mut buffer = [0; 1500];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // Zero would mean no timeout.
            let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
            let timeout = TimeVal::new(micros / 1_000_000, micros % 1_000_000);
            setsockopt(&self.socket, sockopt::ReceiveTimeout, &timeout).context(|| "timing an echo".to_owned())?;
            let received = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(len) => &buffer[..len],
                Err(Errno::EAGAIN) => return Ok(None),
                // Errors from routers and neighbours about earlier requests.
                Err(_) => continue,
            };
            if let Some(sequence) = self.sequence(received) {
                return Ok(Some(sequence));
            }
        }
    }

    fn sequence(&self, packet: &[u8]) -> Option<u16> {
        // A raw IPv4 socket also returns the IP header.
        let header = if self.to.is_ipv6() { 0 } else { usize::from(packet.first()? & 0xf) * 4 };
        let kind = if self.to.is_ipv6() { 129 } else { 0 };
        let echo = packet.get(header..header + 8)?;
        let ours = echo[0] == kind && echo[4..6] == self.id.to_be_bytes();
        ours.then(|| u16::from_be_bytes([echo[6], echo[7]]))
    }
}

fn checksum(packet: &[u8; 8]) -> u16 {
    let sum: u32 = packet.chunks_exact(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_probe_takes_no_late_reply_to_an_earlier_one() {
        let namespace = Namespace::new("ping").unwrap();
        let id = || Echo::open(&namespace, Ipv4Addr::LOCALHOST.into()).unwrap().id;
        assert_ne!(id(), id());
    }
}
