//! A steady stream of numbered datagrams, to measure the loss from a change of the data plane.

use std::collections::BTreeSet;
use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};

use crate::{Context, Error, Namespace};

/// If nothing arrives for this time after the last datagram was sent, the rest is lost.
const SILENCE: Duration = Duration::from_millis(500);
/// The sender's interval; it then sends what is due.
const TICK: Duration = Duration::from_micros(500);

/// A running stream. If dropped, it ends without a report.
pub struct Flow {
    stop: Arc<AtomicBool>,
    all_sent: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64, Error>>,
    receiver: JoinHandle<Result<Result<FlowReport, Error>, Error>>,
}

/// The result of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FlowReport {
    /// Datagrams sent, including those that the sending kernel refused.
    pub sent: u64,
    /// Sent datagrams that the sending kernel refused, such as without a route.
    pub refused: u64,
    /// Distinct datagrams received.
    pub received: u64,
    /// Datagrams lost on the way: neither received, nor dropped by the receiving socket because its buffer was full.
    pub lost: u64,
    /// Datagrams dropped by the receiving socket: they arrived, but the receiver was too slow.
    pub overrun: u64,
    /// Datagrams received again.
    pub duplicated: u64,
    /// Datagrams received after a later one.
    pub reordered: u64,
    /// The longest time without a datagram.
    pub longest_gap: Duration,
}

impl Flow {
    /// Starts `rate` datagrams per second from `from` to `addr`, which is in `to`.
    ///
    /// # Errors
    /// If a socket cannot be opened or bound there.
    pub fn start(from: &Namespace, to: &Namespace, addr: IpAddr, rate: u32) -> Result<Self, Error> {
        let inbox = to.run(|| UdpSocket::bind((addr, 0)))?.context(|| format!("{}: UDP on {addr}", to.name()))?;
        let target = inbox.local_addr().context(|| format!("{}: own address", to.name()))?;
        let any: SocketAddr = match addr {
            IpAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
            IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let outbox = from.run(|| UdpSocket::bind(any))?.context(|| format!("{}: UDP", from.name()))?;
        roomy(&inbox)
            .and_then(|()| setsockopt(&inbox, sockopt::RxqOvfl, &1))
            .context(|| format!("{}: receive buffer", to.name()))?;
        let (stop, all_sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let sender = {
            let (stop, sent) = (stop.clone(), sent.clone());
            from.spawn(move || send(&outbox, target, rate, &stop, &sent))?
        };
        let receiver = {
            let (all_sent, sent, received) = (all_sent.clone(), sent.clone(), received.clone());
            to.spawn(move || receive(&inbox, &all_sent, &sent, &received))?
        };
        Ok(Self { stop, all_sent, sent, received, sender, receiver })
    }

    /// Returns the number of datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns the number of datagrams received so far, including duplicates.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Ends the stream, waits for datagrams in transit, and counts.
    ///
    /// # Errors
    /// If one of its threads failed.
    pub fn stop(self) -> Result<FlowReport, Error> {
        self.stop.store(true, Ordering::Relaxed);
        let died = |_| Error::new("a thread of the flow probe died");
        let refused = self.sender.join().map_err(died)??;
        // Not earlier: a receiver that stopped with the sender could miss the last datagrams.
        self.all_sent.store(true, Ordering::Release);
        let counted = self.receiver.join().map_err(died)???;
        let sent = self.sent.load(Ordering::Relaxed);
        let lost = sent.saturating_sub(counted.received + counted.overrun);
        Ok(FlowReport { sent, refused, lost, ..counted })
    }
}

/// Gives a socket enough buffer for the time that its reader is not scheduled.
pub(crate) fn roomy(inbox: &UdpSocket) -> nix::Result<()> {
    const ROOM: usize = 8 << 20;
    // Only root of the initial user namespace may exceed the limit.
    setsockopt(inbox, sockopt::RcvBufForce, &ROOM).or_else(|_| setsockopt(inbox, sockopt::RcvBuf, &ROOM))
}

fn send(outbox: &UdpSocket, target: SocketAddr, rate: u32, stop: &AtomicBool, sent: &AtomicU64) -> u64 {
    let start = Instant::now();
    let (mut sequence, mut refused) = (0_u64, 0);
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        while sequence < due {
            if outbox.send_to(&sequence.to_be_bytes(), target).is_err() {
                refused += 1;
            }
            sequence += 1;
            sent.store(sequence, Ordering::Relaxed);
        }
        thread::sleep(TICK);
    }
    refused
}

fn receive(
    inbox: &UdpSocket,
    all_sent: &AtomicBool,
    sent: &AtomicU64,
    received: &AtomicU64,
) -> Result<FlowReport, Error> {
    const POLL: Duration = Duration::from_millis(20);
    inbox.set_read_timeout(Some(POLL)).context(|| "timing a flow".to_owned())?;
    let mut report = FlowReport::default();
    let mut seen = Seen::default();
    let mut last = None;
    loop {
        if let Some((sequence, dropped)) = one(inbox)? {
            let now = Instant::now();
            if let Some(last) = last.replace(now) {
                report.longest_gap = report.longest_gap.max(now.duration_since(last));
            }
            received.fetch_add(1, Ordering::Relaxed);
            report.overrun = report.overrun.max(dropped);
            seen.count(sequence, &mut report);
            continue;
        }
        let ended = all_sent.load(Ordering::Acquire);
        let complete = report.received + report.overrun >= sent.load(Ordering::Relaxed);
        let silent = last.is_none_or(|last| last.elapsed() > SILENCE);
        if ended && (complete || silent) {
            return Ok(report);
        }
    }
}

/// Returns the next datagram's number, and how many this socket has dropped so far.
fn one(inbox: &UdpSocket) -> Result<Option<(u64, u64)>, Error> {
    let mut bytes = [0; 8];
    let mut space = nix::cmsg_space!(u32);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let dropped = match recvmsg::<()>(inbox.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()) {
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(None),
        Err(error) => return Err(Error::io("receiving a flow", error)),
        Ok(message) => {
            let notes = message.cmsgs().context(|| "receiving a flow".to_owned())?;
            notes
                .filter_map(|note| if let ControlMessageOwned::RxqOvfl(count) = note { Some(count) } else { None })
                .max()
        }
    };
    Ok(Some((u64::from_be_bytes(bytes), dropped.unwrap_or(0).into())))
}

/// The received numbers: those below `next` except `missing`.
#[derive(Default)]
struct Seen {
    next: u64,
    missing: BTreeSet<u64>,
}

impl Seen {
    fn count(&mut self, sequence: u64, report: &mut FlowReport) {
        if sequence >= self.next {
            self.missing.extend(self.next..sequence);
            self.next = sequence + 1;
        } else if self.missing.remove(&sequence) {
            report.reordered += 1;
        } else {
            report.duplicated += 1;
            return;
        }
        report.received += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_and_repeated_numbers_are_told_from_lost_ones() {
        let (mut seen, mut report) = (Seen::default(), FlowReport::default());
        for sequence in [0, 1, 3, 2, 2, 6] {
            seen.count(sequence, &mut report);
        }
        assert_eq!((report.received, report.reordered, report.duplicated), (5, 1, 1));
        assert_eq!(seen.missing.into_iter().collect::<Vec<_>>(), [4, 5]);
    }
}
