//! A blocking request loop on a plain netlink socket: answers counted, an end demanded of every dump, a deadline on
//! everything.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, ParseableParametrized,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::{Context, Error};

/// More messages than this in one send may overflow the receive buffer with their answers.
const BATCH: usize = 128;
/// Longer than any answer takes, RTNL congestion included.
const PATIENCE: Duration = Duration::from_secs(20);

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;

/// One object of a dump, as the kernel sent it.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    /// `nlmsg_type`.
    kind: u16,
    /// What follows the netlink header: the family's own header and its attributes.
    pub(crate) body: Vec<u8>,
}

impl Raw {
    /// The message as `netlink-packet-route` has it.
    pub(crate) fn decode(&self) -> Result<RouteNetlinkMessage, Error> {
        RouteNetlinkMessage::parse_with_param(&self.body, self.kind)
            .map_err(|error| Error::new(format!("netlink message of type {}: {error}", self.kind)))
    }
}

/// A request and the flags it needs beside `REQUEST` and `ACK`.
pub(crate) type Request = (RouteNetlinkMessage, u16);

/// A socket. It stays in the network namespace it was opened in, whoever uses it.
pub(crate) struct Channel {
    socket: Socket,
    sequence: u32,
}

impl Channel {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> Result<Self, Error> {
        let opened = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            socket.set_netlink_get_strict_chk(true)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64))?;
            Ok(socket)
        };
        Ok(Self { socket: opened().context(|| "opening a netlink socket".to_owned())?, sequence: 0 })
    }

    /// One request, and the kernel's answer.
    pub(crate) fn request(&mut self, request: Request, what: &str) -> Result<(), Error> {
        match self.batch(vec![request])?.pop() {
            Some(refused) => Err(refused.1.in_context(what)),
            None => Ok(()),
        }
    }

    /// Many requests; the index and error of each that was refused. A refusal stops none of the others.
    pub(crate) fn batch(&mut self, requests: Vec<Request>) -> Result<Vec<(usize, Refusal)>, Error> {
        let mut refused = Vec::new();
        let mut done = 0;
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            let mut waiting = 0;
            for (message, flags) in requests.by_ref().take(BATCH) {
                self.encode(message, flags | NLM_F_ACK, &mut bytes);
                waiting += 1;
            }
            self.send(&bytes)?;
            let count = waiting;
            while waiting > 0 {
                for answer in self.receive()? {
                    let nth = answer.sequence.wrapping_sub(first) as usize;
                    if answer.kind != NLMSG_ERROR || nth >= count {
                        continue;
                    }
                    waiting -= 1;
                    refused.extend(Refusal::of(&answer)?.map(|refusal| (done + nth, refusal)));
                }
            }
            done += count;
        }
        Ok(refused)
    }

    /// All objects that the kernel lists in answer to `message`.
    pub(crate) fn dump(&mut self, message: RouteNetlinkMessage, what: &str) -> Result<Vec<Raw>, Error> {
        let mut bytes = Vec::new();
        let sequence = self.encode(message, NLM_F_DUMP, &mut bytes);
        self.send(&bytes)?;
        let mut all = Vec::new();
        loop {
            for answer in self.receive()? {
                match answer.kind {
                    _ if answer.sequence != sequence => {}
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match Refusal::of(&answer)? {
                            Some(refusal) => Err(refusal.in_context(what)),
                            None => Ok(all),
                        };
                    }
                    kind => all.push(Raw { kind, body: answer.body }),
                }
            }
        }
    }

    fn encode(&mut self, message: RouteNetlinkMessage, flags: u16, bytes: &mut Vec<u8>) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::new(Default::default(), NetlinkPayload::from(message));
        message.header.flags = flags | NLM_F_REQUEST;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..start + message.buffer_len()]);
        self.sequence
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0);
        sent.map(drop).context(|| format!("sending {} bytes of netlink requests", bytes.len()))
    }

    fn receive(&self) -> Result<Vec<Answer>, Error> {
        let bytes = loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => break bytes,
                // A signal interrupts a wait with a time-out (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::new(format!("the kernel did not answer within {PATIENCE:?}")));
                }
                Err(error) => return Err(Error::io("receiving a netlink answer", error)),
            }
        };
        let mut answers = Vec::new();
        let mut rest = &bytes[..];
        while rest.len() >= HEADER {
            let len = (u32_at(rest, 0)? as usize).clamp(HEADER, rest.len());
            answers.push(Answer {
                kind: u16_at(rest, 4)?,
                flags: u16_at(rest, 6)?,
                sequence: u32_at(rest, 8)?,
                body: rest[HEADER..len].to_vec(),
            });
            rest = &rest[len.next_multiple_of(4).min(rest.len())..];
        }
        Ok(answers)
    }
}

struct Answer {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: Vec<u8>,
}

/// The kernel said no.
pub(crate) struct Refusal {
    errno: Errno,
    text: Option<String>,
}

impl Refusal {
    fn of(answer: &Answer) -> Result<Option<Self>, Error> {
        const ACK_TLVS: u16 = 0x200;
        let code = u32_at(&answer.body, 0)? as i32;
        if code >= 0 {
            return Ok(None);
        }
        // A capped error holds the request's header, a DONE nothing; the attributes follow.
        let attributes = if answer.kind == NLMSG_ERROR { 4 + HEADER } else { 4 };
        let has_text = answer.flags & ACK_TLVS != 0;
        let text = answer.body.get(attributes..).filter(|_| has_text).and_then(|bytes| {
            const NLMSGERR_ATTR_MSG: u16 = 1;
            let (_, value) = Attributes(bytes).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)?;
            Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned())
        });
        Ok(Some(Self { errno: Errno::from_raw(-code), text }))
    }

    /// As an error that says what was being done.
    pub(crate) fn in_context(self, what: &str) -> Error {
        match self.text {
            Some(text) => Error::io(format!("{what} ({text})"), self.errno),
            None => Error::io(what, self.errno),
        }
    }
}

/// The attributes in some bytes: kind and value of each.
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const KIND: u16 = 0x3fff;
        let len = usize::from(u16_at(self.0, 0).ok()?);
        let kind = u16_at(self.0, 2).ok()? & KIND;
        let value = self.0.get(4..len)?;
        self.0 = &self.0[len.next_multiple_of(4).min(self.0.len())..];
        Some((kind, value))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Error> {
    let word = bytes.get(at..at + 2).and_then(|word| word.try_into().ok());
    word.map(u16::from_ne_bytes).ok_or_else(|| Error::new("a netlink answer is cut short"))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Error> {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map(u32::from_ne_bytes).ok_or_else(|| Error::new("a netlink answer is cut short"))
}
