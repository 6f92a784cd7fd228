//! Encodes and decodes netlink messages. Pure: no I/O.
//!
//! Messages are encoded with the types of `netlink-packet-route`. Messages from the kernel are decoded attribute by
//! attribute into small values: the typed messages take twice the time (docs/kernel-facts.md, "Cost of dumps and
//! memory"), and one attribute unknown to them would make a whole message unreadable.

pub(crate) mod address;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod check;
pub(crate) mod link;
pub(crate) mod neighbour;
pub(crate) mod route;

use std::net::IpAddr;

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_REQUEST, NetlinkBuffer, NlasIterator,
};

use crate::net::Prefix;

/// Bytes from the kernel that do not decode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unreadable {what}")]
pub(crate) struct Unreadable {
    /// The message or attribute.
    pub(crate) what: &'static str,
}

impl Unreadable {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what }
    }
}

/// Length of `struct nlmsghdr`.
const HEADER_LEN: usize = 16;

/// Messages to send in one system call.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Batch {
    /// The most messages in one send: if all were refused, the answers to more would not fit into a default receive
    /// buffer (docs/kernel-facts.md, "Batches").
    pub(crate) const MAX: usize = 128;

    /// Appends a message.
    pub(crate) fn push(&mut self, kind: u16, flags: u16, body: &impl Emitable) {
        let start = self.bytes.len();
        let len = HEADER_LEN + body.buffer_len();
        self.bytes.resize(start + len, 0);
        self.starts.push(start);
        let message = &mut self.bytes[start..];
        message[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        body.emit(&mut message[HEADER_LEN..]);
    }

    /// Returns the number of messages.
    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Removes all messages and keeps the allocation.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.starts.clear();
    }

    /// Numbers the messages, starting with `first`.
    pub(crate) fn number(&mut self, first: u32) {
        for (start, seq) in self.starts.iter().zip(first..) {
            self.bytes[start + 8..start + 12].copy_from_slice(&seq.to_ne_bytes());
        }
    }

    /// Requests an acknowledgement of the last message. The others are answered only if refused (docs/kernel-facts.md,
    /// "Batches"), and all these answers are queued before the acknowledgement.
    pub(crate) fn ask_acknowledgement(&mut self) {
        let Some(start) = self.starts.last() else { return };
        let field = &mut self.bytes[start + 6..start + 8];
        let flags = u16::from_ne_bytes([field[0], field[1]]) | NLM_F_ACK;
        field.copy_from_slice(&flags.to_ne_bytes());
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Corrupts the last message so that the kernel drops it silently.
    #[cfg(test)]
    pub(crate) fn spoil(&mut self) {
        let start = *self.starts.last().unwrap();
        self.bytes[start..start + 4].copy_from_slice(&4u32.to_ne_bytes());
    }
}

/// A message from the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    /// `nlmsg_type`.
    pub(crate) kind: u16,
    /// `nlmsg_flags`.
    pub(crate) flags: u16,
    /// `nlmsg_seq`.
    pub(crate) seq: u32,
    /// `nlmsg_pid`: the port of the request that caused it; 0 for the kernel itself.
    pub(crate) port: u32,
    /// The bytes after the header.
    pub(crate) payload: &'a [u8],
}

/// Returns the messages of a datagram.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Unreadable>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let Ok(buffer) = NetlinkBuffer::new_checked(bytes) else {
            bytes = &[];
            return Some(Err(Unreadable::new("netlink header")));
        };
        let message = Message {
            kind: buffer.message_type(),
            flags: buffer.flags(),
            seq: buffer.sequence_number(),
            port: buffer.port_number(),
            payload: buffer.payload(),
        };
        let len = (buffer.length() as usize).next_multiple_of(4);
        bytes = bytes.get(len..).unwrap_or(&[]);
        Some(Ok(message))
    })
}

/// The content of `NLMSG_ERROR` or `NLMSG_DONE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Positive; 0 for an acknowledgement.
    pub(crate) errno: i32,
    /// The kernel's message (extended ACK), possibly empty.
    pub(crate) text: String,
}

/// `NLMSGERR_ATTR_MSG` of `enum nlmsgerr_attrs`.
const ERROR_TEXT: u16 = 1;

/// Decodes `NLMSG_ERROR`: the code, the request's header (with its payload unless capped), then attributes.
pub(crate) fn error_verdict(message: &Message<'_>) -> Result<Verdict, Unreadable> {
    let code = errno(message.payload)?;
    let request = message.payload.get(4..).ok_or(Unreadable::new("error answer"))?;
    let skip = match request.get(..4) {
        Some(len) if message.flags & NLM_F_CAPPED == 0 => (u32_of(len)? as usize).next_multiple_of(4),
        _ => HEADER_LEN,
    };
    Ok(Verdict { errno: code, text: error_text(message, request.get(skip..).unwrap_or(&[])) })
}

/// Decodes `NLMSG_DONE`: the code, then attributes.
pub(crate) fn done_verdict(message: &Message<'_>) -> Result<Verdict, Unreadable> {
    Ok(Verdict { errno: errno(message.payload)?, text: error_text(message, message.payload.get(4..).unwrap_or(&[])) })
}

fn errno(payload: &[u8]) -> Result<i32, Unreadable> {
    let code = payload.get(..4).ok_or(Unreadable::new("error code"))?;
    Ok((u32_of(code)? as i32).saturating_neg())
}

/// Returns the error text. The text is optional: unreadable parts are left out.
fn error_text(message: &Message<'_>, attributes: &[u8]) -> String {
    if message.flags & NLM_F_ACK_TLVS == 0 {
        return String::new();
    }
    let mut text = String::new();
    let _ = each_attribute(attributes, "extended ACK", |kind, value| {
        if kind == ERROR_TEXT {
            text = text_of(value).into_owned();
        }
        Ok(())
    });
    text
}

/// Calls `visit` with type and value of each attribute.
pub(crate) fn each_attribute(
    bytes: &[u8],
    what: &'static str,
    mut visit: impl FnMut(u16, &[u8]) -> Result<(), Unreadable>,
) -> Result<(), Unreadable> {
    for attribute in NlasIterator::new(bytes) {
        let attribute = attribute.map_err(|_| Unreadable::new(what))?;
        visit(attribute.kind(), attribute.value())?;
    }
    Ok(())
}

pub(crate) fn u32_of(value: &[u8]) -> Result<u32, Unreadable> {
    value.try_into().map(u32::from_ne_bytes).map_err(|_| Unreadable::new("32-bit attribute"))
}

/// Decodes an address by its length.
pub(crate) fn addr_of(value: &[u8]) -> Result<IpAddr, Unreadable> {
    if let Ok(v4) = <[u8; 4]>::try_from(value) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(value).map(IpAddr::from).map_err(|_| Unreadable::new("address attribute"))
}

pub(crate) fn prefix_of(addr: IpAddr, len: u8) -> Result<Prefix, Unreadable> {
    Prefix::masked(addr, len).map_err(|_| Unreadable::new("prefix length"))
}

/// Returns the text up to its NUL. Names may contain any byte; bytes that are not UTF-8 become the replacement
/// character.
pub(crate) fn text_of(value: &[u8]) -> std::borrow::Cow<'_, str> {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_LEN + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([7, 0, 0, 0, 9, 0, 0, 0]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn the_text_of_a_refusal_is_read_capped_or_not() {
        let text = [9u16.to_ne_bytes().as_slice(), &1u16.to_ne_bytes(), b"why?\0\0\0\0"].concat();
        let mut capped = (-17i32).to_ne_bytes().to_vec();
        capped.extend([20, 0, 0, 0].iter().chain(&[0; 12]));
        let mut whole = capped.clone();
        capped.extend(&text);
        whole.extend([1, 2, 3, 4]);
        whole.extend(&text);
        for (flags, payload) in [(NLM_F_ACK_TLVS | NLM_F_CAPPED, capped), (NLM_F_ACK_TLVS, whole)] {
            let bytes = message(2, flags, &payload);
            let read = messages(&bytes).next().unwrap().unwrap();
            assert_eq!((read.seq, read.port), (7, 9));
            assert_eq!(error_verdict(&read).unwrap(), Verdict { errno: 17, text: "why?".into() });
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            check::check_datagram(&bytes);
            let whole = Message { kind: 0, flags: 0xffff, seq: 0, port: 0, payload: &bytes };
            let _ = (error_verdict(&whole), done_verdict(&whole));
            let _ = link::decode(&bytes);
            let _ = address::decode(&bytes);
            let _ = neighbour::decode(&bytes);
            let _ = route::decode(&bytes);
        }
    }
}
