//! The thread that receives from peers and writes to the TUN. It also binds the sockets, because it runs in the network
//! namespace that they have to be in.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Commands, SyncSender};
use std::time::Duration;

use flannel_core::net::{Dual, Family};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::eventfd::EventFd;

use super::admit::admit;
use super::coalesce::{Coalescer, Merging, Sink, Taken};
use super::counters::{Cells, Reason};
use super::header::{Fragment, Ip, Vnet, long};
use super::offload::Offload;
use super::shared::{Ready, Shared, wait};
use super::socket::{Buffers, Socket, SocketError, Sockets};
use super::sys::{Received, Receiver};
use super::table::Lookup;

/// How often one socket is read before the other socket, the commands and the stop flag are checked.
const READS: usize = 32;
/// The pause after a socket error.
const PAUSE: Duration = Duration::from_millis(50);

/// A command to the thread.
pub(crate) enum Command {
    /// Use exactly these sockets.
    Sockets { wanted: Dual<SocketAddr>, buffers: Buffers, reply: SyncSender<Result<(), SocketError>> },
}

pub(crate) struct Rx {
    pub(crate) shared: Arc<Shared>,
    pub(crate) cells: Arc<Cells>,
    pub(crate) queues: Vec<Arc<File>>,
    /// The length of the header before each packet, in bytes.
    pub(crate) header: usize,
    pub(crate) merging: Merging,
    pub(crate) commands: Commands<Command>,
}

impl Rx {
    pub(crate) fn run(self) {
        let Self { shared, cells, queues, header, merging, commands } = self;
        let mut sockets = Sockets::default();
        let mut receiver = Receiver::new();
        let mut delivery = Delivery {
            lookup: Lookup::new(Arc::clone(&shared.table)),
            coalescer: Coalescer::new(merging),
            writer: Writer { shared: &shared, cells: &cells, queues, header, refusals: 0 },
        };
        while !shared.is_stopping() {
            let held = |socket: Option<&Arc<Socket>>| socket.filter(|_| shared.has_tun()).cloned();
            let (v4, v6) = (held(sockets.v4.as_ref()), held(sockets.v6.as_ref()));
            let (is_woken, ready) = wait_for(v4.as_deref(), v6.as_deref(), &shared.wake);
            for (socket, _) in [v4.as_ref(), v6.as_ref()].into_iter().zip(ready).filter(|(_, ready)| *ready) {
                let Some(socket) = socket else { continue };
                match delivery.drain(socket, &mut receiver) {
                    Ok(()) => {}
                    Err(Errno::ECONNABORTED) => socket.set_lost(),
                    Err(_) => {
                        wait([], &shared.wake, Some(PAUSE));
                    }
                }
            }
            drop((v4, v6));
            if is_woken {
                // The event is reset before sockets and commands are looked at: the next wait sees any later wake-up.
                let _ = shared.wake.read();
            }
            // Kernels differ in whether a destroyed socket stays bound, so a new one is bound.
            if sockets.iter().any(|(_, socket)| socket.is_lost()) {
                for family in Family::BOTH {
                    sockets.slot(family).take_if(|socket| socket.is_lost());
                }
                shared.drop_lost(&sockets);
            }
            if !is_woken {
                continue;
            }
            while let Ok(Command::Sockets { wanted, buffers, reply }) = commands.try_recv() {
                let former = sockets.clone();
                let changed = change(&shared, &mut sockets, wanted, buffers);
                let is_held = |family, socket| sockets.get(family).is_some_and(|held| Arc::ptr_eq(held, socket));
                for (_, old) in former.iter().filter(|(family, old)| !is_held(*family, old)) {
                    // Delivers what was received while the new sockets were bound. A socket error means that there is
                    // nothing to read.
                    let _ = delivery.drain(old, &mut receiver);
                }
                // The addresses are free before the reply is sent.
                drop(former);
                // The caller may have gone.
                let _ = reply.send(changed);
            }
        }
    }
}

/// Waits until a socket is readable or the thread is woken. Returns whether it was woken, and which sockets are
/// readable.
fn wait_for(v4: Option<&Socket>, v6: Option<&Socket>, wake: &EventFd) -> (bool, [bool; 2]) {
    fn readable(socket: &Socket) -> (BorrowedFd<'_>, PollFlags) {
        (socket.as_fd(), PollFlags::POLLIN)
    }
    match (v4, v6) {
        (Some(v4), Some(v6)) => {
            let Ready { event, fds } = wait([readable(v4), readable(v6)], wake, None);
            (event, fds)
        }
        (Some(v4), None) => {
            let Ready { event, fds: [v4] } = wait([readable(v4)], wake, None);
            (event, [v4, false])
        }
        (None, Some(v6)) => {
            let Ready { event, fds: [v6] } = wait([readable(v6)], wake, None);
            (event, [false, v6])
        }
        (None, None) => (wait([], wake, None).event, [false; 2]),
    }
}

/// Binds missing sockets, then closes unwanted ones. If a socket cannot be bound, nothing is changed.
fn change(
    shared: &Shared,
    sockets: &mut Sockets,
    wanted: Dual<SocketAddr>,
    buffers: Buffers,
) -> Result<(), SocketError> {
    let mut new = Sockets::default();
    for (family, local) in wanted.iter() {
        let old = sockets.get(family).filter(|socket| socket.local() == *local);
        if Family::of(local.ip()) != family {
            return Err(SocketError::Family { local: *local });
        }
        let socket = match old {
            Some(old) => Arc::clone(old),
            None => Arc::new(Socket::bind(*local, buffers, &shared.offloads)?),
        };
        *new.slot(family) = Some(socket);
    }
    shared.set_sockets(new.clone());
    *sockets = new;
    Ok(())
}

/// Delivers packets from a socket to the TUN.
struct Delivery<'a> {
    lookup: Lookup,
    coalescer: Coalescer,
    writer: Writer<'a>,
}

impl Delivery<'_> {
    /// Delivers the received datagrams, with a limited number of reads.
    fn drain(&mut self, socket: &Socket, receiver: &mut Receiver) -> Result<(), Errno> {
        for _ in 0..READS {
            self.writer.cells.calls.add(1);
            let count = match receiver.receive(socket.as_fd()) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            };
            self.lookup.refresh();
            for nth in 0..count {
                if let Some(received) = receiver.received(nth) {
                    self.deliver(receiver.arena(), received);
                }
            }
            self.coalescer.flush(receiver.arena(), &mut self.writer);
            if self.writer.gives_up_merging() {
                self.coalescer.set_merging(Merging::Nothing);
            }
            if count < Receiver::AT_ONCE {
                return Ok(());
            }
        }
        Ok(())
    }

    fn deliver(&mut self, arena: &mut [u8], received: Received) {
        let Received { place, sender, segment, is_truncated } = received;
        let cells = self.writer.cells;
        cells.udp.add(1);
        let reason = match self.lookup.knows(sender) {
            _ if is_truncated => Some(Reason::Truncated),
            true => None,
            false => Some(Reason::UnknownSender),
        };
        if let Some(reason) = reason {
            return cells.dropped_many(reason, place.len().div_ceil(segment.max(1)).max(1) as u64);
        }
        let mut start = place.start;
        loop {
            let end = place.end.min(start + segment.max(1));
            self.packet(arena, start..end, sender);
            start = end;
            if start >= place.end {
                return;
            }
        }
    }

    fn packet(&mut self, arena: &mut [u8], place: Range<usize>, sender: SocketAddr) {
        let packet = arena.get_mut(place.clone()).unwrap_or_default();
        match admit(packet, sender, &mut self.lookup) {
            Ok(ip) => self.coalescer.push(arena, place.start..place.start + ip.len, &ip, &mut self.writer),
            Err(reason) => self.writer.cells.dropped(reason),
        }
    }
}

/// Writes packets to the TUN.
struct Writer<'a> {
    shared: &'a Shared,
    cells: &'a Cells,
    queues: Vec<Arc<File>>,
    header: usize,
    /// The number of consecutive refused super-packets.
    refusals: usize,
}

impl Writer<'_> {
    /// After this many consecutive refusals, no more super-packets are written: some kernels refuse all of them.
    const REFUSALS: usize = 16;

    fn gives_up_merging(&self) -> bool {
        self.refusals >= Self::REFUSALS
    }

    fn write(&self, packet: &[u8], parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let queue = match self.queues.len() {
            0 | 1 => self.queues.first(),
            several => self.queues.get(spread(packet) % several),
        };
        let Some(queue) = queue.filter(|_| self.shared.has_tun()) else { return Err(Errno::EBADFD.into()) };
        self.cells.calls.add(1);
        loop {
            match (&**queue).write_vectored(parts) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => return written,
            }
        }
    }

    fn written(&self, packets: usize, bytes: usize) {
        self.cells.tun.add(1);
        self.cells.packets.add(packets as u64);
        self.cells.bytes.add(bytes as u64);
    }

    fn refused(&self, packets: usize, error: &io::Error) {
        // If the device is gone, the sending threads end. This one reads no more sockets, and waits for commands.
        self.shared.is_tun_gone(error);
        self.cells.dropped_many(Reason::TunRefused, packets as u64);
    }
}

impl Sink for Writer<'_> {
    fn single(&mut self, packet: &[u8]) {
        let vnet = [0; Vnet::LEN];
        let parts = [IoSlice::new(vnet.get(..self.header).unwrap_or_default()), IoSlice::new(packet)];
        match self.write(packet, &parts) {
            Ok(_) => self.written(1, packet.len()),
            Err(error) => self.refused(1, &error),
        }
    }

    fn merged(&mut self, parts: &[IoSlice<'_>], count: usize, bytes: usize) -> Taken {
        let [_, first, ..] = parts else { return Taken::No };
        match self.write(first, parts) {
            Ok(_) => {
                self.refusals = 0;
                self.written(count, bytes);
                Taken::Yes
            }
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                self.refusals += 1;
                if self.refusals == Self::REFUSALS {
                    self.shared.degrade(Offload::TunSuperPackets, error);
                }
                Taken::No
            }
            Err(error) => {
                self.refused(count, &error);
                Taken::Yes
            }
        }
    }
}

/// Returns a number that is the same for all packets of a flow: the kernel passes a flow to the queue to which its
/// other direction was last written.
fn spread(packet: &[u8]) -> usize {
    let Ok(ip) = Ip::parse(packet) else { return 0 };
    let addresses = if ip.is_v4() { 12..20 } else { 8..40 };
    let words = packet.get(addresses).unwrap_or_default().as_chunks::<4>().0;
    let ports = long(packet, ip.header).filter(|_| ip.fragment == Fragment::Whole).unwrap_or(0);
    let sum = words.iter().fold(ports, |sum, word| sum.rotate_left(5) ^ u32::from_be_bytes(*word));
    // The upper bits of the product depend on all bits of the sum.
    (u64::from(sum).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{TryRecvError, sync_channel};

    use nix::sys::epoll::{Epoll, EpollCreateFlags};

    use super::*;
    use crate::path::offload::Offloads;
    use crate::path::packets::Spec;
    use crate::path::shared::Notify;
    use crate::path::table::Table;

    #[test]
    fn a_device_that_refuses_super_packets_gets_none_after_a_while_and_it_is_told_once() {
        // An epoll descriptor fails with EINVAL, as such a device does.
        let refusing = File::from(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap().0);
        let shared = Shared::new(Table::new(Dual::default()), Offloads::default(), Notify::default()).unwrap();
        let cells = Cells::default();
        let queues = vec![Arc::new(refusing)];
        let mut writer = Writer { shared: &shared, cells: &cells, queues, header: Vnet::LEN, refusals: 0 };
        let packet = Spec::tcp(100).packet();
        let parts = [IoSlice::new(&[0; Vnet::LEN]), IoSlice::new(&packet)];
        for _ in 0..Writer::REFUSALS {
            assert!(!writer.gives_up_merging());
            assert_eq!(writer.merged(&parts, 1, packet.len()), Taken::No);
        }
        assert!(writer.gives_up_merging());
        assert_eq!(writer.merged(&parts, 1, packet.len()), Taken::No);
        assert_eq!(shared.offloads.list().len(), 1);
        writer.single(&packet);
        let mut counters = crate::path::Counters::default();
        cells.add_to(&mut counters, |counters| &mut counters.received);
        assert_eq!((counters.dropped(Reason::TunRefused), counters.received.packets), (1, 0));
    }

    #[test]
    fn datagrams_that_sockets_dropped_are_counted_once_while_sockets_are_replaced() {
        let ns = testkit::Namespace::new("overflow").unwrap();
        ns.set_up("lo").unwrap();
        let shared = Shared::new(Table::new(Dual::default()), Offloads::default(), Notify::default()).unwrap();
        let replace = |_is_over: SyncSender<()>| {
            let (mut sockets, mut counted) = (Sockets::default(), 0);
            let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            for port in 1..=1000 {
                let local = SocketAddr::from(([127, 0, 0, 1], port));
                change(&shared, &mut sockets, Dual { v4: Some(local), v6: None }, Buffers::new(1, 1)).unwrap();
                let socket = sockets.v4.clone().unwrap();
                let inbox = std::net::UdpSocket::from(socket.as_fd().try_clone_to_owned().unwrap());
                let (mut sent, mut received) = (0, 0);
                while socket.overflowed() == 0 {
                    sender.send_to(&[0; 1000], local).unwrap();
                    sent += 1;
                }
                while received + socket.overflowed() < sent {
                    received += u64::from(inbox.recv(&mut [0; 1000]).is_ok());
                }
                counted += socket.overflowed();
            }
            change(&shared, &mut sockets, Dual::default(), Buffers::default()).unwrap();
            counted
        };
        let (is_over, replacing) = sync_channel(0);
        let counted = std::thread::scope(|scope| {
            let replaced = scope.spawn(|| ns.run(|| replace(is_over)).unwrap());
            let mut last = 0;
            while replacing.try_recv() == Err(TryRecvError::Empty) {
                let now = shared.overflowed();
                assert!(now >= last, "{now} after {last}");
                last = now;
            }
            replaced.join().unwrap()
        });
        assert_eq!(shared.overflowed(), counted);
    }

    #[test]
    fn both_directions_of_a_flow_need_not_have_the_same_queue_but_each_has_one() {
        let packets = |flow| (1..50).map(move |len| Spec { flow, ..Spec::tcp(len) }.packet());
        for flow in 0..20 {
            let mut queues: Vec<_> = packets(flow).map(|packet| spread(&packet)).collect();
            queues.dedup();
            assert_eq!(queues.len(), 1);
        }
        let mut queues: Vec<_> = (0..100).map(|flow| spread(&Spec { flow, ..Spec::tcp(1) }.packet()) % 4).collect();
        queues.sort_unstable();
        queues.dedup();
        assert_eq!(queues, [0, 1, 2, 3]);
    }
}
