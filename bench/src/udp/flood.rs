//! What is left for peers while somebody who is none floods a node: datagrams to its port, as many as one thread can send.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use bench::Error;
use bench::agent::{Program, Programs};
use bench::peers::Backend;

use crate::udp::contenders::Flanneld;
use crate::udp::library::Library;
use crate::udp::pair::{Link, Pair, Way};
use crate::udp::rows::{Limit, Row};
use crate::udp::session::Session;
use crate::udp::small::{SIZE, Stream, highest_rate};

/// The least rate of a flood, of the highest rate that the overlay carries.
const TIMES: f64 = 2.0;
/// What peers send meanwhile, of the same.
const SHARE: f64 = 0.1;
/// Datagrams that the flood sends in one call.
const RUN: usize = 64;
/// The share of peers' packets that has to arrive.
const GOODPUT: f64 = 0.8;
/// How long a changed peer may take, in milliseconds.
const CHANGE: f64 = 100.0;
/// How long a flood goes on before anything is measured.
const BUILD_UP: Duration = Duration::from_millis(200);
/// The port of the backend.
const PORT: u16 = 8285;

pub(crate) fn compare(session: &Session, programs: &Programs) -> Result<(), Error> {
    let go = Pair::new()?;
    let _go = Flanneld::start(&go, programs, Program::Go, 1)?;
    go.overlay().until_open()?;
    let pair = Pair::new()?;
    let library = Library::start(&pair, Backend::Udp, 1)?;
    pair.overlay().until_open()?;
    for link in Link::ALL {
        let (mut ours, mut theirs, mut rates, mut changes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        go.set_link(link)?;
        pair.set_link(link)?;
        for _ in 0..session.rounds {
            session.go_on()?;
            theirs.push(flooded(&go, session.time, || Ok(()))?.share);
            let flooded = flooded(&pair, session.time, || {
                changes.push(library.change()?.as_secs_f64() * 1e3);
                Ok(())
            })?;
            ours.push(flooded.share);
            rates.push(flooded.times);
        }
        let row = |name, unit| Row { name, link: Some(link.name()), n: 1, unit };
        row("udp_flood_rate", "times").least(&rates, TIMES);
        row("udp_flood_goodput", "share").least(&ours, GOODPUT);
        row("udp_flood_goodput", "share").beside(&ours, "go_udp", &theirs, Some(Limit::Least(1.0)));
        row("udp_flood_change", "ms").print(&changes, Some(CHANGE));
    }
    Ok(())
}

/// What a flood did.
struct Flooded {
    /// Its rate, of the highest rate that the overlay carries.
    times: f64,
    /// The share of the peers' packets that arrived.
    share: f64,
}

/// Floods the second host, with peers' packets and `meanwhile` under way.
fn flooded(pair: &Pair, time: Duration, meanwhile: impl FnOnce() -> Result<(), Error>) -> Result<Flooded, Error> {
    let way = pair.overlay();
    let most = highest_rate(way, time / 4)?;
    let stream = Stream::open(way)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let flood = scope.spawn(|| flood(pair.underlay(), &stop));
        thread::sleep(BUILD_UP);
        let trial = stream.trial(most * SHARE, time);
        let done = meanwhile();
        stop.store(true, Ordering::Relaxed);
        let rate = flood.join().map_err(|_| "the flood died")??;
        done?;
        Ok(Flooded { times: rate / most, share: 1.0 - trial?.loss })
    })
}

/// Sends datagrams until it is stopped. Returns how many a second.
fn flood(way: Way<'_>, stop: &AtomicBool) -> Result<f64, Error> {
    let outbox = way.from.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    outbox.connect((way.addr, PORT))?;
    setsockopt(&outbox, sockopt::UdpGsoSegment, &(SIZE as i32))?;
    let run = [0; SIZE * RUN];
    let (start, mut sent) = (Instant::now(), 0_u64);
    while !stop.load(Ordering::Relaxed) {
        match send(outbox.as_raw_fd(), &run, MsgFlags::empty()) {
            Ok(_) => sent += RUN as u64,
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(sent as f64 / start.elapsed().as_secs_f64())
}
