//! The thread that reads the TUN and sends to peers.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use nix::errno::Errno;
use nix::poll::PollFlags;

use super::counters::{Cells, Reason};
use super::header::{self, Ip, Vnet};
use super::icmp;
use super::offload::Offload;
use super::outbox::{Datagram, MAX_DATAGRAMS, MAX_MESSAGES, MAX_RUN, Message, Outbox, RefusedRuns, Run};
use super::shared::{Shared, wait};
use super::socket::Socket;
use super::split::{self, Split};
use super::sys::Sender;
use super::table::Lookup;

/// The room for one read, in bytes: a header and the largest packet. With less, packets would be truncated silently.
const ROOM: usize = Vnet::LEN + (1 << 16);
/// How many bytes are read before they are sent.
const BATCH: usize = 128 << 10;
/// The room for the segment headers of a batch, in bytes.
const HEADERS: usize = MAX_DATAGRAMS * 128 + split::MAX_HEADERS;
/// The alignment of each packet in the arena, in bytes.
const ALIGNMENT: usize = 64;
/// How long a batch waits for a full socket that accepts nothing. After that, each of its messages is tried once, and if
/// the socket is still full, dropped as by a network card: hosts that do not answer must not delay the others.
const FULL_SOCKET_WAIT: Duration = Duration::from_millis(50);
/// How long a batch waits for a full socket that accepts a message from time to time: a slow link.
const SLOW_SOCKET_WAIT: Duration = Duration::from_millis(200);
/// The pause after a read error, or after repeated spurious wake-ups.
const PAUSE: Duration = Duration::from_millis(50);
/// How many spurious wake-ups are tolerated in a row.
const MAX_SPURIOUS_WAKEUPS: u32 = 4;

pub(crate) struct Tx {
    shared: Arc<Shared>,
    cells: Arc<Cells>,
    tun: Arc<File>,
    /// The length of the header before each packet, in bytes.
    header: usize,
    lookup: Lookup,
    refused_runs: RefusedRuns,
    arena: Vec<u8>,
    /// How many bytes of the arena are used.
    filled: usize,
    headers: Vec<u8>,
    outbox: Outbox,
    sender: Sender,
    singles: Sender,
    limit: icmp::Limit,
}

impl Tx {
    pub(crate) fn new(shared: Arc<Shared>, cells: Arc<Cells>, tun: Arc<File>, header: usize) -> Self {
        Self {
            lookup: Lookup::new(Arc::clone(&shared.table)),
            shared,
            cells,
            tun,
            header,
            refused_runs: RefusedRuns::new(),
            arena: vec![0; BATCH + ROOM],
            filled: 0,
            headers: Vec::with_capacity(HEADERS),
            outbox: Outbox::new(),
            sender: Sender::new(MAX_MESSAGES, 2 * MAX_DATAGRAMS),
            singles: Sender::new(MAX_RUN, 2 * MAX_RUN),
            limit: icmp::Limit::new(Instant::now()),
        }
    }

    pub(crate) fn run(mut self) {
        // The number of consecutive wake-ups with nothing to read.
        let mut spurious = 0;
        while !self.shared.is_stopping() {
            let room = self.arena.get_mut(self.filled..).unwrap_or_default();
            self.cells.calls.add(1);
            match (&*self.tun).read(room) {
                Ok(len) => {
                    spurious = 0;
                    self.take(len);
                    if self.filled >= BATCH || !self.outbox.has_room() {
                        self.flush();
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.flush();
                    if spurious >= MAX_SPURIOUS_WAKEUPS {
                        self.shared.pause(PAUSE);
                    }
                    let tun = (self.tun.as_fd(), PollFlags::POLLIN);
                    let [is_ready] = wait([tun], &self.shared.stopped, None).fds;
                    spurious = if is_ready { spurious + 1 } else { 0 };
                }
                Err(error) => {
                    self.flush();
                    if self.shared.is_tun_gone(&error) {
                        return;
                    }
                    self.shared.pause(PAUSE);
                }
            }
        }
    }

    /// Handles the packet that was read to the end of the arena.
    fn take(&mut self, len: usize) {
        let start = self.filled;
        if start == 0 {
            self.lookup.refresh();
            self.refused_runs.refresh();
        }
        let place = start + self.header..start + len;
        self.filled = (start + len).next_multiple_of(ALIGNMENT);
        let vnet = match self.header {
            0 => Vnet::default(),
            _ => self
                .arena
                .get(start..)
                .and_then(|read| read.first_chunk().copied())
                .map(Vnet::parse)
                .unwrap_or_default(),
        };
        self.cells.tun.add(1);
        if let Err(reason) = self.packet(&vnet, place) {
            self.cells.dropped(reason);
        }
    }

    fn packet(&mut self, vnet: &Vnet, place: Range<usize>) -> Result<(), Reason> {
        let packet = self.arena.get_mut(place.clone()).ok_or(Reason::SentMalformed)?;
        let ip = Ip::parse(packet).map_err(|_| Reason::SentMalformed)?;
        if ip.destination.is_multicast() {
            return Err(Reason::SentToGroup);
        }
        let Some(peer) = self.lookup.peer(ip.destination) else {
            self.answer(&ip, place);
            return Err(Reason::NoPeer);
        };
        header::decrement_ttl(packet, &ip).ok_or(Reason::SentExpired)?;
        match split::split(vnet, &ip, packet).map_err(|split::Refused| Reason::NotSplit)? {
            Split::Whole => self.put(peer, Datagram { headers: 0..0, payload: place.start..place.start + ip.len }),
            Split::Segments(mut segments) => loop {
                if self.headers.capacity() - self.headers.len() < split::MAX_HEADERS {
                    self.send();
                }
                let packet = self.arena.get(place.clone()).unwrap_or_default();
                let Some(segment) = segments.next(packet, &mut self.headers) else { break };
                let payload = place.start + segment.payload.start..place.start + segment.payload.end;
                self.put(peer, Datagram { headers: segment.headers, payload });
            },
        }
        Ok(())
    }

    /// Adds a datagram to the batch.
    fn put(&mut self, to: SocketAddr, datagram: Datagram) {
        if !self.outbox.has_room() {
            // The headers of this datagram have to be kept.
            let headers = self.headers.get(datagram.headers.clone()).unwrap_or_default();
            let mut kept = [0_u8; split::MAX_HEADERS];
            let len = headers.len();
            kept.iter_mut().zip(headers).for_each(|(to, from)| *to = *from);
            self.send();
            self.headers.extend_from_slice(kept.get(..len).unwrap_or_default());
            return self.put_there(to, Datagram { headers: 0..len, ..datagram });
        }
        self.put_there(to, datagram);
    }

    fn put_there(&mut self, to: SocketAddr, datagram: Datagram) {
        let run = match self.shared.offloads.has_udp_segment() {
            true => self.refused_runs.run(to, datagram.len()),
            false => Run::Off,
        };
        self.outbox.push(to, datagram, run);
    }

    /// Answers the sender of a packet that there is no peer for it.
    fn answer(&mut self, ip: &Ip, place: Range<usize>) {
        let Some(packet) = self.arena.get(place) else { return };
        let mut answer = [0; icmp::MAX_LEN];
        let Some(len) = icmp::unreachable(packet, ip, &mut answer).filter(|_| self.limit.allows(Instant::now())) else {
            return;
        };
        let vnet = Vnet::default().bytes();
        let parts = [vnet.get(..self.header), answer.get(..len)].map(|part| IoSlice::new(part.unwrap_or_default()));
        self.cells.calls.add(1);
        // If the device refuses this, it loses more than answers, and those losses are counted.
        if (&*self.tun).write_vectored(&parts).is_ok() {
            self.cells.answered.add(1);
        }
    }

    /// Sends the batch, and starts another at the beginning of the arena.
    fn flush(&mut self) {
        self.send();
        self.filled = 0;
    }

    /// Sends the batch. The packets stay in the arena.
    fn send(&mut self) {
        if !self.outbox.messages().is_empty() {
            let bound = self.shared.bound();
            for family in Family::BOTH {
                let is_of = |message: &&Message| Family::of(message.to.ip()) == family;
                if self.outbox.messages().iter().any(|message| is_of(&message)) {
                    let socket = bound.sockets.get(family).map(|socket| &**socket);
                    self.send_on(socket, family);
                }
            }
        }
        self.outbox.clear();
        self.headers.clear();
    }

    fn send_on(&mut self, socket: Option<&Socket>, family: Family) {
        let messages = || self.outbox.messages().iter().filter(|message| Family::of(message.to.ip()) == family);
        let Some(socket) = socket else {
            let lost = messages().map(|message| message.count as u64).sum();
            return self.cells.dropped_many(Reason::NoSocket, lost);
        };
        let mut batch = self.sender.batch();
        for message in messages() {
            batch.message(message.to, (message.count > 1).then_some(message.segment as u16));
            for datagram in self.outbox.datagrams(message) {
                batch.part(self.headers.get(datagram.headers.clone()).unwrap_or_default());
                batch.part(self.arena.get(datagram.payload.clone()).unwrap_or_default());
            }
        }
        let mut outgoing = Outgoing { shared: &self.shared, cells: &self.cells, socket, full: None };
        let mut nth = 0;
        while nth < batch.len() {
            let (taken, refused) = outgoing.send(&mut batch, nth);
            for message in messages().skip(nth).take(taken) {
                outgoing.sent(message.count, message.bytes);
                if message.run == Run::Narrow {
                    self.cells.unbatched.add(1);
                }
            }
            nth += taken;
            let Some(errno) = refused else { continue };
            let Some(message) = messages().nth(nth) else { return };
            nth += 1;
            if !outgoing.goes_singly(message, errno) {
                self.cells.dropped_many(outgoing.reason(errno), message.count as u64);
                continue;
            }
            let mut is_narrow = errno == Errno::EMSGSIZE;
            let mut singles = self.singles.batch();
            for datagram in self.outbox.datagrams(message) {
                singles.message(message.to, None);
                singles.part(self.headers.get(datagram.headers.clone()).unwrap_or_default());
                singles.part(self.arena.get(datagram.payload.clone()).unwrap_or_default());
            }
            let mut done = 0;
            while done < singles.len() {
                let (taken, refused) = outgoing.send(&mut singles, done);
                for datagram in self.outbox.datagrams(message).skip(done).take(taken) {
                    outgoing.sent(1, datagram.len());
                    // Until then the peer may be unreachable: a route is a cause of EINVAL as well.
                    is_narrow |= errno == Errno::EINVAL && datagram.len() == message.segment;
                }
                self.cells.unbatched.add(taken as u64);
                done += taken;
                if let Some(errno) = refused {
                    self.cells.dropped(outgoing.reason(errno));
                    done += 1;
                }
            }
            if is_narrow {
                let now = Instant::now();
                self.refused_runs.refuse(message.to, message.segment, now);
                self.shared.refuse_run(message.to, message.segment, now);
            }
        }
    }
}

/// The socket that a batch is sent on.
struct Outgoing<'a> {
    shared: &'a Shared,
    cells: &'a Cells,
    socket: &'a Socket,
    full: Option<Full>,
}

/// The wait of a batch for a full socket, once it has begun.
struct Full {
    until: Instant,
    /// The latest end.
    most: Instant,
}

impl Outgoing<'_> {
    /// Sends from the nth message on. Returns how many were accepted, and the error of the message after them.
    fn send(&mut self, batch: &mut super::sys::Batch<'_>, nth: usize) -> (usize, Option<Errno>) {
        loop {
            self.cells.calls.add(1);
            match batch.send(self.socket.as_fd(), nth) {
                Ok(taken) => {
                    if let Some(full) = &mut self.full {
                        full.until = full.most.min(Instant::now() + FULL_SOCKET_WAIT);
                    }
                    return (taken.max(1), None);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let now = Instant::now();
                    let begin = || Full { until: now + FULL_SOCKET_WAIT, most: now + SLOW_SOCKET_WAIT };
                    let left = self.full.get_or_insert_with(begin).until.saturating_duration_since(now);
                    if left.is_zero() || self.shared.is_stopping() {
                        return (0, Some(Errno::EAGAIN));
                    }
                    wait([(self.socket.as_fd(), PollFlags::POLLOUT)], &self.shared.stopped, Some(left));
                }
                Err(errno) => {
                    if errno == Errno::ECONNABORTED {
                        self.shared.lose(self.socket);
                    }
                    return (0, Some(errno));
                }
            }
        }
    }

    fn sent(&self, packets: usize, bytes: usize) {
        self.cells.udp.add(1);
        self.cells.packets.add(packets as u64);
        self.cells.bytes.add(bytes as u64);
    }

    /// Whether a refused run is sent as single datagrams, which are fragmented if the path requires it.
    fn goes_singly(&self, message: &Message, errno: Errno) -> bool {
        if message.count == 1 {
            return false;
        }
        match errno {
            // Kernels return one or the other if the datagrams are larger than the path carries. EINVAL has more causes.
            Errno::EMSGSIZE | Errno::EINVAL => true,
            // The device cannot finish checksums, or there is a transformation such as IPsec.
            Errno::EIO | Errno::EOPNOTSUPP => {
                self.shared.degrade(Offload::UdpSegment, errno);
                true
            }
            _ => false,
        }
    }

    fn reason(&self, errno: Errno) -> Reason {
        if errno == Errno::EAGAIN { Reason::SocketFull } else { Reason::SendRefused }
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::net::Dual;
    use testkit::Namespace;

    use super::*;
    use crate::path::Counters;
    use crate::path::offload::Offloads;
    use crate::path::shared::Notify;
    use crate::path::socket::Buffers;
    use crate::path::sys::set_option;
    use crate::path::table::Table;

    /// The option of a socket that sends no checksums (`asm-generic/socket.h`), which libc lacks. Runs need checksums.
    const SO_NO_CHECK: i32 = 11;
    const LOCALHOST: [u8; 4] = [127, 0, 0, 1];
    const UPLINK: [u8; 4] = [192, 0, 2, 1];

    fn endpoint(address: [u8; 4]) -> SocketAddr {
        SocketAddr::from((address, 8285))
    }

    /// Returns the state of a sending thread with a socket in this namespace.
    fn tx(ns: &Namespace, local: [u8; 4], buffers: Buffers) -> Tx {
        let shared = Shared::new(Table::new(Dual::default()), Offloads::default(), Notify::default()).unwrap();
        let socket = ns.run(|| Socket::bind(endpoint(local), buffers, &shared.offloads).unwrap()).unwrap();
        shared.set_sockets(Dual { v4: Some(Arc::new(socket)), v6: None });
        let tun = Arc::new(File::open("/dev/null").unwrap());
        Tx::new(Arc::new(shared), Arc::default(), tun, 0)
    }

    /// Returns the same with the smallest buffer, on a link where no host answers: the kernel keeps what is sent.
    fn tx_to_nowhere(ns: &Namespace) -> Tx {
        ns.set_sysctl("net/ipv4/neigh/eth0/mcast_solicit", "1000").unwrap();
        tx(ns, UPLINK, Buffers::new(1, 1))
    }

    /// Makes the kernel refuse all runs with EINVAL and none of their datagrams.
    fn refuse_runs(tx: &Tx) {
        let bound = tx.shared.bound();
        set_option(bound.sockets.v4.as_ref().unwrap().as_fd(), libc::SOL_SOCKET, SO_NO_CHECK, 1).unwrap();
    }

    /// Sends datagrams of these sizes to each of these peers in one batch.
    fn send(tx: &mut Tx, peers: &[SocketAddr], sizes: &[usize]) {
        for (to, size) in peers.iter().flat_map(|to| sizes.iter().map(move |size| (*to, *size))) {
            tx.put(to, Datagram { headers: 0..0, payload: 0..size });
        }
        tx.send();
    }

    fn counters(tx: &Tx) -> Counters {
        let mut counters = Counters::default();
        tx.cells.add_to(&mut counters, |counters| &mut counters.sent);
        counters
    }

    #[test]
    fn a_batch_waits_once_for_a_full_socket_however_many_peers_do_not_answer() {
        let ns = Namespace::with_uplink("full", "eth0", &["192.0.2.1/24"]).unwrap();
        let mut tx = tx_to_nowhere(&ns);
        let peers: Vec<_> = (100..200).map(|host| endpoint([192, 0, 2, host])).collect();
        send(&mut tx, &peers, &[1000]);
        let counters = counters(&tx);
        let (sent, lost) = (counters.sent.packets, counters.dropped(Reason::SocketFull));
        assert!(sent > 0 && lost > 0 && sent + lost == 100, "{counters:?}");
        // One call for all that were sent, one for each lost one, and one after the wait.
        assert_eq!(counters.sent.calls, 1 + lost + 1);
    }

    #[test]
    fn the_datagrams_of_a_refused_run_wait_no_longer_than_their_batch() {
        let ns = Namespace::with_uplink("full", "eth0", &["192.0.2.1/24"]).unwrap();
        let mut tx = tx_to_nowhere(&ns);
        refuse_runs(&tx);
        let peers: Vec<_> = (100..120).map(|host| endpoint([192, 0, 2, host])).collect();
        send(&mut tx, &peers, &[1000; 4]);
        let counters = counters(&tx);
        let (sent, lost) = (counters.sent.packets, counters.dropped(Reason::SocketFull));
        assert!((1..4).contains(&sent) && sent + lost == 80, "{counters:?}");
        // Of the first run: one call for the run, one for what was sent of it, one for each lost datagram, and one after
        // the wait. One call for each further run.
        assert_eq!(counters.sent.calls, 1 + 1 + (4 - sent) + 1 + 19);
    }

    #[test]
    fn a_path_is_narrow_once_a_datagram_of_a_refused_run_is_accepted() {
        let ns = Namespace::new("narrow").unwrap();
        let (mut tx, peer) = (tx(&ns, LOCALHOST, Buffers::default()), endpoint(LOCALHOST));
        refuse_runs(&tx);
        send(&mut tx, &[peer], &[1000, 1000, 500]);
        assert_eq!(tx.shared.narrow_paths.list(Instant::now()), [(peer, 1000)]);
        let unbatched = |tx: &Tx| (counters(tx).unbatched, counters(tx).sent.udp, counters(tx).sent.packets);
        assert_eq!(unbatched(&tx), (3, 3, 3));
        send(&mut tx, &[peer], &[1000, 1000]);
        assert_eq!(unbatched(&tx), (5, 5, 5));
        assert_eq!(counters(&tx).all_dropped(), 0);
    }

    #[test]
    fn a_peer_that_no_datagram_can_be_sent_to_has_no_narrow_path() {
        let ns = Namespace::new("blackhole").unwrap();
        ns.ip("route add blackhole 198.51.100.0/24").unwrap();
        let (mut tx, peer) = (tx(&ns, LOCALHOST, Buffers::default()), endpoint([198, 51, 100, 2]));
        send(&mut tx, &[peer], &[1000, 1000]);
        assert_eq!(tx.shared.narrow_paths.list(Instant::now()), []);
        assert_eq!(tx.refused_runs.run(peer, 1000), Run::Long);
        // What is not accepted does not count as sent one by one either.
        tx.refused_runs.refuse(peer, 1000, Instant::now());
        send(&mut tx, &[peer], &[1000, 1000]);
        let counters = counters(&tx);
        assert_eq!((counters.dropped(Reason::SendRefused), counters.unbatched, counters.sent.packets), (4, 0, 0));
    }

    #[test]
    fn the_receiver_learns_of_a_destroyed_socket_whose_error_a_send_consumed() {
        let ns = Namespace::new("destroyed").unwrap();
        ns.set_up("lo").unwrap();
        let local = SocketAddr::from(([127, 0, 0, 1], 8285));
        let shared = Shared::new(Table::new(Dual::default()), Offloads::default(), Notify::default()).unwrap();
        let socket = ns.run(|| Socket::bind(local, Buffers::default(), &shared.offloads).unwrap()).unwrap();
        let (cells, mut sender) = (Cells::default(), Sender::new(1, 1));
        let mut send = || {
            let mut batch = sender.batch();
            batch.message(local, None);
            batch.part(b"packet");
            Outgoing { shared: &shared, cells: &cells, socket: &socket, full: None }.send(&mut batch, 0)
        };
        assert_eq!((send(), socket.is_lost()), ((1, None), false));
        ns.destroy_udp_sockets(local.port()).unwrap();
        assert_eq!((send(), socket.is_lost()), ((0, Some(Errno::ECONNABORTED)), true));
        assert_eq!(shared.wake.read(), Ok(1));
    }
}
