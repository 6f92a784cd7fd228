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
/// How long to wait for a full socket. What cannot be sent by then is dropped, as by a network card.
const FULL_SOCKET_WAIT: Duration = Duration::from_millis(50);
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
        let mut run = self.refused_runs.run(to, datagram.len());
        if run == Run::One {
            self.cells.unbatched.add(1);
        }
        if !self.shared.offloads.has_udp_segment() {
            run = Run::One;
        }
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
                    self.send_on(bound.sockets.get(family).map(|socket| &**socket), family);
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
        let outgoing = Outgoing { shared: &self.shared, cells: &self.cells, socket };
        let mut nth = 0;
        while nth < batch.len() {
            let (taken, refused) = outgoing.send(&mut batch, nth);
            for message in messages().skip(nth).take(taken) {
                outgoing.sent(message.count, message.bytes);
            }
            nth += taken;
            let Some(errno) = refused else { continue };
            let Some(message) = messages().nth(nth) else { return };
            nth += 1;
            if !outgoing.goes_singly(message, errno) {
                self.cells.dropped_many(outgoing.reason(errno), message.count as u64);
                continue;
            }
            if errno != Errno::EIO {
                let now = Instant::now();
                self.refused_runs.refuse(message.to, message.segment, now);
                self.shared.refuse_run(message.to, message.segment, now);
            }
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
                }
                self.cells.unbatched.add(taken as u64);
                done += taken;
                if let Some(errno) = refused {
                    self.cells.dropped(outgoing.reason(errno));
                    done += 1;
                }
            }
        }
    }
}

/// The socket that a batch is sent on.
struct Outgoing<'a> {
    shared: &'a Shared,
    cells: &'a Cells,
    socket: &'a Socket,
}

impl Outgoing<'_> {
    /// Sends from the nth message on. Returns how many were accepted, and the error of the message after them.
    fn send(&self, batch: &mut super::sys::Batch<'_>, nth: usize) -> (usize, Option<Errno>) {
        let mut until = None;
        loop {
            self.cells.calls.add(1);
            match batch.send(self.socket.as_fd(), nth) {
                Ok(taken) => return (taken.max(1), None),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let now = Instant::now();
                    let left = until.get_or_insert(now + FULL_SOCKET_WAIT).saturating_duration_since(now);
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
            // Kernels return one or the other if the datagrams are larger than the path carries.
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
    use crate::path::offload::Offloads;
    use crate::path::shared::Notify;
    use crate::path::socket::Buffers;
    use crate::path::table::Table;

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
            Outgoing { shared: &shared, cells: &cells, socket: &socket }.send(&mut batch, 0)
        };
        assert_eq!((send(), socket.is_lost()), ((1, None), false));
        ns.destroy_udp_sockets(local.port()).unwrap();
        assert_eq!((send(), socket.is_lost()), ((0, Some(Errno::ECONNABORTED)), true));
        assert_eq!(shared.wake.read(), Ok(1));
    }
}
