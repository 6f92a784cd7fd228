//! The request loop: one socket, and every message is accounted for.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, NetlinkAddr, recvmsg, setsockopt, sockopt};

use super::codec::{Batch, Message, Unreadable, Verdict, done_verdict, error_verdict, messages};
use crate::kernel::KernelError;

/// How long the kernel may take to answer. Waiting for RTNL, which others may hold for seconds, counts only between
/// answers: a send that waits for it inside the kernel cannot be interrupted.
const DEADLINE: Duration = Duration::from_secs(5);

/// The requested receive buffer, in bytes. Without privilege over the host, the kernel's limit applies; therefore a
/// send has at most [`Batch::MAX`] messages.
pub(crate) const RECEIVE_BUFFER: usize = 8 << 20;

/// How often a dump is read again if it changed while it was read.
const DUMP_TRIES: u32 = 5;

/// The kernel never puts more into one datagram of a dump (`NLMSG_GOODSIZE`, `max_recvmsg_len`).
const DATAGRAM: usize = 64 << 10;

/// A function that reads the next datagram.
pub(crate) type Receive = fn(&Socket, &mut [u8]) -> Result<Option<usize>, Errno>;

/// A request socket and its sequence numbers. After a fault it is reopened before the next request, so that a late
/// answer is not mistaken for the answer to a later request.
#[derive(Debug)]
pub(crate) struct Wire {
    open: Option<Open>,
    seq: u32,
    buffer: Vec<u8>,
    deadline: Duration,
    receive_buffer: usize,
    receive: Receive,
}

#[derive(Debug)]
struct Open {
    socket: Socket,
    port: u32,
}

/// Why an exchange failed.
#[derive(Debug)]
enum Fault {
    Timeout,
    Lost(String),
}

impl From<Unreadable> for Fault {
    fn from(unreadable: Unreadable) -> Self {
        Self::Lost(unreadable.to_string())
    }
}

/// What ends an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The acknowledgement of the last message.
    Acknowledgement,
    /// `NLMSG_DONE`: a dump without it is not complete.
    Done,
}

impl Wire {
    /// Creates a wire in the calling thread's network namespace.
    pub(crate) fn new() -> Self {
        Self::with_limits(DEADLINE, RECEIVE_BUFFER)
    }

    fn with_limits(deadline: Duration, receive_buffer: usize) -> Self {
        Self { open: None, seq: 0, buffer: vec![0; DATAGRAM], deadline, receive_buffer, receive }
    }

    /// Returns the port in notifications caused by requests of this socket; 0 before the first request.
    pub(crate) fn port(&self) -> u32 {
        self.open.as_ref().map_or(0, |open| open.port)
    }

    /// Sends the messages, empties the batch, and returns the refused messages by their place, in order.
    pub(crate) fn write(&mut self, batch: &mut Batch, doing: &str) -> Result<Vec<(usize, Verdict)>, KernelError> {
        batch.ask_acknowledgement();
        let (refused, _) = self.exchange(batch, doing, End::Acknowledgement, &mut |_| Ok(()))?;
        Ok(refused)
    }

    /// Sends one request that is answered by at most one message.
    pub(crate) fn fetch<T>(
        &mut self,
        batch: &mut Batch,
        doing: &str,
        mut read: impl FnMut(&Message<'_>) -> Result<Option<T>, Unreadable>,
    ) -> Result<Result<Option<T>, Verdict>, KernelError> {
        batch.ask_acknowledgement();
        let mut found = None;
        let (refused, _) = self.exchange(batch, doing, End::Acknowledgement, &mut |message| {
            found = read(message)?.or(found.take());
            Ok(())
        })?;
        Ok(match refused.into_iter().next() {
            Some((_, verdict)) => Err(verdict),
            None => Ok(found),
        })
    }

    /// Sends the one request in the batch and returns everything that `read` extracts from the answers: complete, or an
    /// error.
    pub(crate) fn dump<T>(
        &mut self,
        batch: &mut Batch,
        doing: &str,
        mut read: impl FnMut(&Message<'_>) -> Result<Option<T>, Unreadable>,
    ) -> Result<Vec<T>, KernelError> {
        let take = |items: &mut Vec<T>, message: &Message<'_>| {
            items.extend(read(message)?);
            Ok(())
        };
        self.fold(batch, doing, Vec::new, take)
    }

    /// Sends the one request in the batch and folds the answers with `take`: complete, or an error. If the dump is read
    /// again, it starts with a new `start()`.
    pub(crate) fn fold<T>(
        &mut self,
        batch: &mut Batch,
        doing: &str,
        start: impl Fn() -> T,
        take: impl FnMut(&mut T, &Message<'_>) -> Result<(), Unreadable>,
    ) -> Result<T, KernelError> {
        let kept = self.fold_tries(batch, doing, start, take);
        batch.clear();
        kept
    }

    fn fold_tries<T>(
        &mut self,
        request: &mut Batch,
        doing: &str,
        start: impl Fn() -> T,
        mut take: impl FnMut(&mut T, &Message<'_>) -> Result<(), Unreadable>,
    ) -> Result<T, KernelError> {
        for _ in 0..DUMP_TRIES {
            let mut kept = start();
            let (refused, torn) =
                self.exchange_kept(request, doing, End::Done, &mut |message| take(&mut kept, message))?;
            match refused.into_iter().next() {
                // The table does not exist, so it is empty.
                Some((_, verdict)) if verdict.errno == Errno::ENOENT as i32 => return Ok(start()),
                Some((_, verdict)) => return Err(refusal(doing.to_owned(), verdict)),
                None if !torn => return Ok(kept),
                None => {}
            }
        }
        let reason = format!("it changed {DUMP_TRIES} times while it was read");
        Err(KernelError::Lost { doing: doing.to_owned(), reason })
    }

    fn exchange(
        &mut self,
        batch: &mut Batch,
        doing: &str,
        end: End,
        visit: &mut dyn FnMut(&Message<'_>) -> Result<(), Unreadable>,
    ) -> Result<(Vec<(usize, Verdict)>, bool), KernelError> {
        let result = self.exchange_kept(batch, doing, end, visit);
        batch.clear();
        result
    }

    /// Sends one batch and reads all answers. Returns the refused messages, and whether the dump was interrupted.
    fn exchange_kept(
        &mut self,
        batch: &mut Batch,
        doing: &str,
        end: End,
        visit: &mut dyn FnMut(&Message<'_>) -> Result<(), Unreadable>,
    ) -> Result<(Vec<(usize, Verdict)>, bool), KernelError> {
        if batch.is_empty() {
            return Ok((Vec::new(), false));
        }
        let fault = match self.try_exchange(batch, end, visit) {
            Ok(answer) => return Ok(answer),
            Err(fault) => fault,
        };
        self.open = None;
        let doing = doing.to_owned();
        Err(match fault {
            Fault::Timeout => KernelError::Timeout { doing, within: self.deadline },
            Fault::Lost(reason) => KernelError::Lost { doing, reason },
        })
    }

    fn try_exchange(
        &mut self,
        batch: &mut Batch,
        end: End,
        visit: &mut dyn FnMut(&Message<'_>) -> Result<(), Unreadable>,
    ) -> Result<(Vec<(usize, Verdict)>, bool), Fault> {
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                Open::new(self.receive_buffer).map_err(|error| Fault::Lost(format!("no netlink socket: {error}")))?
            }
        };
        let open = self.open.insert(open);
        // A number is used only once in the life of a socket. 0 is not used, because notifications have it.
        if self.seq > u32::MAX - 2 * Batch::MAX as u32 {
            self.seq = 0;
        }
        let first = self.seq + 1;
        let count = batch.len();
        self.seq += count as u32;
        batch.number(first);
        let sent = open.socket.send(batch.bytes(), 0).map_err(|error| Fault::Lost(format!("send: {error}")))?;
        if sent != batch.bytes().len() {
            return Err(Fault::Lost(format!("{sent} of {} bytes sent", batch.bytes().len())));
        }
        let deadline = Instant::now() + self.deadline;
        let mut refused = Vec::new();
        let mut torn = false;
        loop {
            let received = open.wait(self.receive, &mut self.buffer, deadline)?;
            for message in messages(&self.buffer[..received]) {
                let message = message?;
                let place = message.seq.wrapping_sub(first) as usize;
                if place >= count || message.port != open.port {
                    continue;
                }
                torn |= message.flags & NLM_F_DUMP_INTR != 0;
                let verdict = match message.kind {
                    NLMSG_ERROR => error_verdict(&message)?,
                    NLMSG_DONE => done_verdict(&message)?,
                    NLMSG_OVERRUN => return Err(Fault::Lost("the kernel reports an overrun".to_owned())),
                    NLMSG_NOOP => continue,
                    _ => {
                        visit(&message)?;
                        continue;
                    }
                };
                let over = match end {
                    End::Acknowledgement => place + 1 == count,
                    End::Done => message.kind == NLMSG_DONE || verdict.errno != 0,
                };
                if verdict.errno != 0 {
                    refused.push((place, verdict));
                }
                if over {
                    return Ok((refused, torn));
                }
            }
        }
    }
}

impl Open {
    fn new(receive_buffer: usize) -> io::Result<Self> {
        let mut socket = open_socket(receive_buffer)?;
        // With strict checking the kernel filters dumps (docs/kernel-facts.md, "Filtered dumps"); the two ACK options
        // return the reason for a refusal without the request's payload. Linux has all three since 4.20.
        socket.set_netlink_get_strict_chk(true)?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, port })
    }

    fn wait(&self, receive: Receive, buffer: &mut [u8], deadline: Instant) -> Result<usize, Fault> {
        loop {
            match receive(&self.socket, buffer) {
                Ok(Some(len)) => return Ok(len),
                Ok(None) => {}
                Err(Errno::ENOBUFS) => return Err(Fault::Lost("the receive buffer overran".to_owned())),
                Err(errno) => return Err(Fault::Lost(format!("receive: {errno}"))),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Fault::Timeout);
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Fault::Lost(format!("poll: {errno}"))),
            }
        }
    }
}

/// Opens a socket with the largest receive buffer available.
pub(crate) fn open_socket(receive_buffer: usize) -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    let forced = setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &receive_buffer);
    if forced.is_err() {
        setsockopt(&socket.as_fd(), sockopt::RcvBuf, &receive_buffer)?;
    }
    Ok(socket)
}

/// Returns the next datagram from the kernel, if there is one. Any process may send to a netlink socket; datagrams that
/// are not from the kernel (port 0) are dropped.
pub(crate) fn receive(socket: &Socket, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
    loop {
        let mut parts = [IoSliceMut::new(buffer)];
        let received = recvmsg::<NetlinkAddr>(socket.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT);
        match received {
            Ok(datagram) if datagram.flags.contains(MsgFlags::MSG_TRUNC) => return Err(Errno::EMSGSIZE),
            Ok(datagram) if datagram.address.is_some_and(|from| from.pid() != 0) => {}
            Ok(datagram) => return Ok(Some(datagram.bytes)),
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Converts the refusal of one request to an error.
pub(crate) fn refusal(doing: String, verdict: Verdict) -> KernelError {
    match Errno::from_raw(verdict.errno) {
        // Not EACCES: that is caused by a host setting, such as IPv6 disabled on a device, which the text names.
        Errno::EPERM => KernelError::Denied {
            doing,
            hint: "CAP_NET_ADMIN is needed in the user namespace that owns the network namespace".to_owned(),
        },
        _ => KernelError::Refused { doing, errno: verdict.errno, message: verdict.text },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{LinkId, LinkName, Route};
    use crate::net::{Family, Prefix};
    use crate::netlink::codec::{link, route};
    use crate::netlink::test_namespace::in_new_namespace;

    fn refusable(batch: &mut Batch, count: u32) {
        for n in 0..count {
            let prefix = Prefix::new(std::net::Ipv4Addr::from(0x0a00_0000 + (n << 8)).into(), 24).unwrap();
            let route = Route::overlay(prefix, prefix.addr(), LinkId::Own(0));
            let spread = route::Spread::Protocols;
            route::create(batch, &route::NewRoute { prefix, route: &route, index: Some(4242), spread });
        }
    }

    #[test]
    fn a_setting_of_the_host_is_no_lack_of_privilege() {
        let text = "ipv6: IPv6 is disabled on this device".to_owned();
        let verdict = |errno: Errno| Verdict { errno: errno as i32, text: text.clone() };
        let KernelError::Refused { message, .. } = refusal("address add".to_owned(), verdict(Errno::EACCES)) else {
            panic!("it may be mended without another privilege");
        };
        assert_eq!(message, text);
        assert!(matches!(refusal(String::new(), verdict(Errno::EPERM)), KernelError::Denied { .. }));
    }

    #[test]
    fn a_full_batch_of_refusals_loses_none_with_the_default_buffer() {
        in_new_namespace(|| {
            // As in an unprivileged user namespace, where the host's limit applies.
            let mut wire = Wire::with_limits(DEADLINE, 212_992 / 2);
            let mut batch = Batch::default();
            refusable(&mut batch, Batch::MAX as u32);
            let refused = wire.write(&mut batch, "creating routes").unwrap();
            assert_eq!(
                refused.iter().map(|(place, _)| *place).collect::<Vec<_>>(),
                (0..Batch::MAX).collect::<Vec<_>>()
            );
            assert!(refused.iter().all(|(_, verdict)| verdict.errno == Errno::ENODEV as i32));
        });
    }

    #[test]
    fn answers_that_do_not_fit_are_an_error_and_the_next_request_works() {
        in_new_namespace(|| {
            let mut wire = Wire::with_limits(DEADLINE, 1);
            let mut batch = Batch::default();
            refusable(&mut batch, Batch::MAX as u32);
            let error = wire.write(&mut batch, "creating routes").unwrap_err();
            assert!(matches!(error, KernelError::Lost { .. }), "{error}");
            refusable(&mut batch, 1);
            assert_eq!(wire.write(&mut batch, "creating routes").unwrap().len(), 1);
        });
    }

    #[test]
    fn a_request_without_answer_ends_at_its_deadline_and_the_next_works() {
        in_new_namespace(|| {
            let mut wire = Wire::with_limits(Duration::from_millis(20), RECEIVE_BUFFER);
            let mut batch = Batch::default();
            refusable(&mut batch, 1);
            batch.spoil();
            let error = wire.write(&mut batch, "creating routes").unwrap_err();
            assert!(matches!(error, KernelError::Timeout { .. }), "{error}");
            let lo = LinkName::new("lo").unwrap();
            link::get_by_name(&mut batch, &lo);
            let found = wire.fetch(&mut batch, "reading lo", |message| link::decode(message.payload)).unwrap();
            assert_eq!(found.unwrap().unwrap().link.name, lo);
        });
    }

    #[test]
    fn a_dump_that_cannot_be_read_is_an_error_and_the_next_works() {
        in_new_namespace(|| {
            let mut wire = Wire::new();
            let mut batch = Batch::default();
            link::dump(&mut batch);
            let error = wire
                .dump::<()>(&mut batch, "reading links", |_| Err(Unreadable::new("anything")))
                .expect_err("unreadable");
            assert!(error.to_string().contains("unreadable anything"), "{error}");
            link::dump(&mut batch);
            let links = wire.dump(&mut batch, "reading links", |message| link::decode(message.payload)).unwrap();
            assert!(links.iter().any(|seen| seen.link.name.as_str() == "lo"));
        });
    }

    thread_local! {
        /// How many of the next dumps are torn.
        static TORN: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
    }

    /// Calls `visit` with each message, header included.
    fn each_message(mut bytes: &mut [u8], mut visit: impl FnMut(&mut [u8])) {
        while let Some(len) = bytes.get(..4).map(|len| u32::from_ne_bytes(len.try_into().unwrap()) as usize) {
            let (message, rest) = bytes.split_at_mut(len.next_multiple_of(4).min(bytes.len()));
            visit(message);
            bytes = rest;
        }
    }

    fn kind_of(message: &[u8]) -> u16 {
        u16::from_ne_bytes([message[4], message[5]])
    }

    /// Marks a dump as the kernel does when the table changes while it is read.
    fn receive_torn(socket: &Socket, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        let Some(len) = receive(socket, buffer)? else { return Ok(None) };
        each_message(&mut buffer[..len], |message| {
            if TORN.get() > 0 {
                let flags = u16::from_ne_bytes([message[6], message[7]]) | NLM_F_DUMP_INTR;
                message[6..8].copy_from_slice(&flags.to_ne_bytes());
            }
            if kind_of(message) == NLMSG_DONE {
                TORN.set(TORN.get().saturating_sub(1));
            }
        });
        Ok(Some(len))
    }

    /// Drops the datagram that ends a dump.
    fn receive_without_end(socket: &Socket, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        let Some(len) = receive(socket, buffer)? else { return Ok(None) };
        let mut over = false;
        each_message(&mut buffer[..len], |message| over |= kind_of(message) == NLMSG_DONE);
        Ok((!over).then_some(len))
    }

    #[test]
    fn a_dump_that_is_torn_is_read_anew_from_the_start_and_not_for_ever() {
        in_new_namespace(|| {
            let (mut wire, mut batch) = (Wire { receive: receive_torn, ..Wire::new() }, Batch::default());
            let mut read = |torn| {
                TORN.set(torn);
                link::dump(&mut batch);
                wire.dump(&mut batch, "reading links", |message| link::decode(message.payload))
            };
            let links = read(0).unwrap();
            for torn in 1..DUMP_TRIES {
                assert_eq!(read(torn).unwrap(), links, "nothing of a torn one is kept");
            }
            let error = read(DUMP_TRIES).unwrap_err();
            assert!(matches!(&error, KernelError::Lost { reason, .. } if reason.contains("changed")), "{error}");
            assert_eq!(read(0).unwrap(), links);
        });
    }

    #[test]
    fn a_dump_whose_end_is_lost_is_no_short_one() {
        in_new_namespace(|| {
            let mut wire = Wire::with_limits(Duration::from_millis(20), RECEIVE_BUFFER);
            wire.receive = receive_without_end;
            let mut batch = Batch::default();
            link::dump(&mut batch);
            let error = wire.dump(&mut batch, "reading links", |message| link::decode(message.payload)).unwrap_err();
            assert!(matches!(error, KernelError::Timeout { .. }), "{error}");
        });
    }

    #[test]
    fn routes_of_an_empty_namespace_are_none() {
        in_new_namespace(|| {
            let mut wire = Wire::new();
            for family in Family::BOTH {
                let mut batch = Batch::default();
                route::dump(&mut batch, family, crate::kernel::RouteSlot::MAIN.table);
                let routes = wire.dump(&mut batch, "reading routes", |message| route::decode(message.payload)).unwrap();
                assert_eq!(routes, []);
            }
        });
    }
}
