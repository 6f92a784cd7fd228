//! sendmmsg(2).

use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;

use super::address::Address;

/// Room for one control message: the one with the segment size takes 18 bytes and padding.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 32]);

/// A message: its destination and its parts.
struct Message {
    name: Address,
    name_len: libc::socklen_t,
    control: Control,
    /// Zero if there is no control message.
    control_len: usize,
    first: usize,
    parts: usize,
}

/// Buffers for messages, reused for each batch.
pub(crate) struct Sender {
    messages: Vec<Message>,
    parts: Vec<libc::iovec>,
    heads: Vec<libc::mmsghdr>,
}

/// Messages that are being assembled.
pub(crate) struct Batch<'a> {
    sender: &'a mut Sender,
    data: PhantomData<&'a [u8]>,
}

impl Sender {
    /// Creates buffers for this many messages with this many parts in total, without reallocation.
    pub(crate) fn new(messages: usize, parts: usize) -> Self {
        Self {
            messages: Vec::with_capacity(messages),
            parts: Vec::with_capacity(parts),
            heads: Vec::with_capacity(messages),
        }
    }

    /// Starts an empty batch.
    pub(crate) fn batch(&mut self) -> Batch<'_> {
        self.messages.clear();
        self.parts.clear();
        Batch { sender: self, data: PhantomData }
    }
}

impl<'a> Batch<'a> {
    /// Starts a message to `to`. If `segment` is given, the kernel cuts it into datagrams of that many bytes.
    pub(crate) fn message(&mut self, to: SocketAddr, segment: Option<u16>) {
        let (name, name_len) = Address::new(to);
        let (control, control_len) = segment.map_or((Control([0; 32]), 0), Control::segment);
        let first = self.sender.parts.len();
        self.sender.messages.push(Message { name, name_len, control, control_len, first, parts: 0 });
    }

    /// Adds a part to the last message.
    pub(crate) fn part(&mut self, bytes: &'a [u8]) {
        if let Some(message) = self.sender.messages.last_mut() {
            message.parts += 1;
            let base = bytes.as_ptr().cast_mut().cast();
            self.sender.parts.push(libc::iovec { iov_base: base, iov_len: bytes.len() });
        }
    }

    /// Returns the number of messages.
    pub(crate) fn len(&self) -> usize {
        self.sender.messages.len()
    }

    /// Sends the messages from the nth on without waiting, and returns how many were accepted. An error is that of the
    /// nth.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, nth: usize) -> Result<usize, Errno> {
        let Sender { messages, parts, heads } = &mut *self.sender;
        heads.clear();
        let base = parts.as_mut_ptr();
        for message in messages.iter_mut().skip(nth) {
            // SAFETY: these are numbers and pointers, which may be zero.
            let mut head: libc::mmsghdr = unsafe { std::mem::zeroed() };
            head.msg_hdr.msg_name = ptr::from_mut(&mut message.name).cast();
            head.msg_hdr.msg_namelen = message.name_len;
            // Parts are never removed, so this is inside of the buffer or directly behind it.
            head.msg_hdr.msg_iov = base.wrapping_add(message.first);
            head.msg_hdr.msg_iovlen = message.parts as _;
            if message.control_len > 0 {
                head.msg_hdr.msg_control = message.control.0.as_mut_ptr().cast();
                head.msg_hdr.msg_controllen = message.control_len as _;
            }
            heads.push(head);
        }
        if heads.is_empty() {
            return Ok(0);
        }
        // SAFETY: there are as many heads as said. Each points to a name, to parts and to a control message of the lengths
        // said, which live until the call has ended. The parts point to bytes that are borrowed for as long as this batch
        // is. The kernel writes to the heads only, and to nothing that they point to.
        let sent = unsafe {
            let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _;
            libc::sendmmsg(socket.as_raw_fd(), heads.as_mut_ptr(), heads.len() as libc::c_uint, flags)
        };
        Errno::result(sent).map(|sent| sent as usize)
    }
}

impl Control {
    /// Makes the kernel cut a message into datagrams of this size (`UDP_SEGMENT`). Also returns the length of the
    /// control message, in bytes.
    fn segment(size: u16) -> (Self, usize) {
        let mut control = Self([0; 32]);
        // SAFETY: CMSG_SPACE and CMSG_LEN compute with numbers.
        let (space, len) = unsafe { (libc::CMSG_SPACE(2) as usize, libc::CMSG_LEN(2)) };
        // SAFETY: these are numbers and pointers, which may be zero.
        let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
        head.msg_control = control.0.as_mut_ptr().cast();
        head.msg_controllen = space.min(control.0.len()) as _;
        // SAFETY: the head says where there is room for control messages, and how much.
        let message = unsafe { libc::CMSG_FIRSTHDR(&raw const head) };
        if message.is_null() {
            return (control, 0);
        }
        // SAFETY: it is not null, so there is room for a header, aligned as the buffer is, and after it for the two bytes
        // that CMSG_SPACE counted, which need not be aligned.
        unsafe {
            (*message).cmsg_level = libc::SOL_UDP;
            (*message).cmsg_type = libc::UDP_SEGMENT;
            (*message).cmsg_len = len as _;
            ptr::write_unaligned(libc::CMSG_DATA(message).cast::<u16>(), size);
        }
        (control, space)
    }
}
