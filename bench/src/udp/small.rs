//! How many small packets a second go through with less than one in a hundred lost.

use std::io::{IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt};

use bench::Error;

use crate::udp::pair::Way;

/// Bytes in each packet.
pub(crate) const SIZE: usize = 64;
/// Packets sent or received in one call.
const BATCH: usize = 64;
/// The share that may be lost.
const LOSS: f64 = 0.01;
/// Packets a second that the search begins with, and how it goes on until some are lost.
const FIRST: f64 = 50_000.0;
const STEP: f64 = 1.5;
/// How close it gets.
const CLOSE: f64 = 1.06;
/// The most rates that are tried.
const TRIALS: u32 = 16;
/// A sender that falls this far behind is what limits.
const BEHIND: f64 = 0.95;
/// How long the sender sleeps when nothing is due.
const TICK: Duration = Duration::from_micros(50);
/// How long packets may be under way.
const DRAIN: Duration = Duration::from_millis(50);
/// What the receiving socket holds, so that it is the way that loses.
const ROOM: usize = 8 << 20;

/// The highest rate in packets a second, each tried for `time`.
pub(crate) fn highest_rate(way: Way<'_>, time: Duration) -> Result<f64, Error> {
    let stream = Stream::open(way)?;
    let (mut rate, mut good, mut bad) = (FIRST, 0.0, f64::INFINITY);
    for _ in 0..TRIALS {
        let mut trial = stream.trial(rate, time)?;
        if trial.loss > LOSS {
            // Once more: what disturbs the machine for a moment is not the limit.
            trial = stream.trial(rate, time)?;
        }
        match trial.loss > LOSS {
            true => bad = rate,
            false => good = trial.received,
        }
        if trial.loss <= LOSS && trial.sent < rate * BEHIND || bad < good * CLOSE {
            break;
        }
        rate = match (good > 0.0, bad.is_finite()) {
            (_, false) => rate * STEP,
            (true, true) => (good * bad).sqrt(),
            (false, true) => rate / STEP,
        };
    }
    Ok(good)
}

/// What became of a rate.
pub(crate) struct Trial {
    /// Packets a second.
    sent: f64,
    received: f64,
    pub(crate) loss: f64,
}

/// A sender, and a receiver that counts until it is dropped.
pub(crate) struct Stream {
    outbox: UdpSocket,
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    receiver: Option<JoinHandle<Result<nix::Result<()>, testkit::Error>>>,
}

impl Stream {
    pub(crate) fn open(way: Way<'_>) -> Result<Self, Error> {
        let inbox = way.to.run(|| UdpSocket::bind((way.addr, 0)))??;
        setsockopt(&inbox, sockopt::RcvBufForce, &ROOM).or_else(|_| setsockopt(&inbox, sockopt::RcvBuf, &ROOM))?;
        inbox.set_read_timeout(Some(DRAIN / 2))?;
        let target = inbox.local_addr()?;
        let outbox = way.from.run(|| -> std::io::Result<UdpSocket> {
            let outbox = UdpSocket::bind("0.0.0.0:0")?;
            outbox.connect(target)?;
            Ok(outbox)
        })??;
        let (received, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end) = (Arc::clone(&received), Arc::clone(&stop));
        let receiver = Some(way.to.spawn(move || receive(&inbox, &count, &end))?);
        Ok(Self { outbox, received, stop, receiver })
    }

    pub(crate) fn trial(&self, rate: f64, time: Duration) -> Result<Trial, Error> {
        let before = self.received.load(Ordering::Relaxed);
        let (sent, took) = send(&self.outbox, rate, time)?;
        thread::sleep(DRAIN);
        let received = self.received.load(Ordering::Relaxed) - before;
        let seconds = took.as_secs_f64();
        Ok(Trial {
            sent: sent as f64 / seconds,
            received: received as f64 / seconds,
            loss: 1.0 - received as f64 / sent.max(1) as f64,
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(receiver) = self.receiver.take() {
            let _ = receiver.join();
        }
    }
}

/// Sends at a rate for some time; how many packets that were, and how long it took.
fn send(outbox: &UdpSocket, rate: f64, time: Duration) -> nix::Result<(u64, Duration)> {
    let packet = [0; SIZE];
    let messages = [[IoSlice::new(&packet)]; BATCH];
    let addresses = [None::<SockaddrIn>; BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let (start, mut sent) = (Instant::now(), 0);
    loop {
        let elapsed = start.elapsed();
        if elapsed >= time {
            return Ok((sent, elapsed));
        }
        let due = (elapsed.as_secs_f64() * rate) as u64;
        let count = usize::try_from(due.saturating_sub(sent)).unwrap_or(BATCH).min(BATCH);
        if count == 0 {
            thread::sleep(TICK);
            continue;
        }
        let batch = messages.iter().take(count);
        match sendmmsg(outbox.as_raw_fd(), &mut headers, batch, addresses, [], MsgFlags::empty()) {
            Ok(results) => sent += results.count() as u64,
            // What is refused here is not under way.
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn receive(inbox: &UdpSocket, received: &AtomicU64, stop: &AtomicBool) -> nix::Result<()> {
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    let mut buffers = [[0; SIZE]; BATCH];
    while !stop.load(Ordering::Relaxed) {
        let mut slices = buffers.each_mut().map(|buffer| [IoSliceMut::new(buffer)]);
        match recvmmsg(inbox.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_WAITFORONE, None) {
            Ok(results) => received.fetch_add(results.count() as u64, Ordering::Relaxed),
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(errno) => return Err(errno),
        };
    }
    Ok(())
}
