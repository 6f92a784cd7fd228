//! recvmmsg(2).

use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;

use super::address::Address;

/// The most messages received in one call.
const MESSAGES: usize = 8;
/// Room for a message, in bytes: the largest message of merged datagrams, and the largest datagram.
const ROOM: usize = 1 << 16;

/// Room for the control messages of one message: the one with the segment size takes 20 bytes and padding.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 64]);

/// A received message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    /// Its place in the arena.
    pub(crate) place: Range<usize>,
    pub(crate) sender: SocketAddr,
    /// The length of each datagram in it except the last, in bytes.
    pub(crate) segment: usize,
    /// Whether it was truncated.
    pub(crate) is_truncated: bool,
}

/// Buffers for messages.
pub(crate) struct Receiver {
    arena: Box<[u8]>,
    names: [Address; MESSAGES],
    controls: [Control; MESSAGES],
    /// For each message of the last call: its bytes, flags, and bytes of control messages.
    outcomes: [(usize, i32, usize); MESSAGES],
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            arena: vec![0; MESSAGES * ROOM].into_boxed_slice(),
            names: [Address::none(); MESSAGES],
            controls: [Control([0; 64]); MESSAGES],
            outcomes: [(0, 0, 0); MESSAGES],
        }
    }

    /// The most messages that one call receives.
    pub(crate) const AT_ONCE: usize = MESSAGES;

    /// The buffer that all places refer to.
    pub(crate) fn arena(&mut self) -> &mut [u8] {
        &mut self.arena
    }

    /// Receives what is available without waiting, and returns the number of messages. Overwrites the previous
    /// messages.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        // SAFETY: these are numbers and pointers, which may be zero.
        let mut parts: [libc::iovec; MESSAGES] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut heads: [libc::mmsghdr; MESSAGES] = unsafe { std::mem::zeroed() };
        let rooms = self.arena.chunks_exact_mut(ROOM);
        let controls = self.controls.iter_mut().zip(&mut self.names);
        for (((part, head), room), (control, name)) in parts.iter_mut().zip(&mut heads).zip(rooms).zip(controls) {
            part.iov_base = room.as_mut_ptr().cast();
            part.iov_len = room.len();
            head.msg_hdr.msg_name = ptr::from_mut(name).cast();
            head.msg_hdr.msg_namelen = Address::ROOM;
            head.msg_hdr.msg_iov = part;
            head.msg_hdr.msg_iovlen = 1;
            head.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            head.msg_hdr.msg_controllen = control.0.len() as _;
        }
        // SAFETY: there are as many heads as said. Each points to a name, a part and room for control messages of the
        // lengths said, all of which live until the call has ended, are not used by anything else, and may hold any bytes.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                heads.as_mut_ptr(),
                MESSAGES as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        let count = Errno::result(count)? as usize;
        #[cfg_attr(target_env = "gnu", expect(clippy::unnecessary_cast, reason = "other C libraries have other types"))]
        for (outcome, head) in self.outcomes.iter_mut().zip(&heads).take(count) {
            *outcome = (head.msg_len as usize, head.msg_hdr.msg_flags, head.msg_hdr.msg_controllen as usize);
        }
        Ok(count)
    }

    /// Returns the nth message of the last call, or `None` if its sender has no address.
    pub(crate) fn received(&self, nth: usize) -> Option<Received> {
        let (len, flags, control) = *self.outcomes.get(nth)?;
        let len = len.min(ROOM);
        Some(Received {
            place: nth * ROOM..nth * ROOM + len,
            sender: self.names.get(nth)?.read()?,
            segment: self.controls.get(nth)?.segment(control).filter(|size| *size > 0).unwrap_or(len),
            is_truncated: flags & libc::MSG_TRUNC != 0,
        })
    }
}

impl Control {
    /// Returns the size of merged datagrams, which the kernel reports as an int (`UDP_GRO`). `len` is the number of
    /// bytes of control messages.
    fn segment(&self, len: usize) -> Option<usize> {
        // SAFETY: these are numbers and pointers, which may be zero.
        let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
        head.msg_control = self.0.as_ptr().cast_mut().cast();
        head.msg_controllen = len.min(self.0.len()) as _;
        // SAFETY: the head says where control messages are and how long they are together, which is inside of `self`.
        // The macros stay inside of that: the first is there whole or null, and so is each that follows.
        let mut at = unsafe { libc::CMSG_FIRSTHDR(&raw const head) };
        while !at.is_null() {
            // SAFETY: it is not null, so it points to a whole header, aligned as the buffer is.
            let message = unsafe { ptr::read(at) };
            let is_size = message.cmsg_level == libc::SOL_UDP && message.cmsg_type == libc::UDP_GRO;
            // SAFETY: CMSG_LEN computes with numbers.
            if is_size && message.cmsg_len as usize >= unsafe { libc::CMSG_LEN(4) } as usize {
                // SAFETY: the kernel wrote at least four bytes after the header, which lie inside of the buffer; they
                // need not be aligned.
                let size = unsafe { ptr::read_unaligned(libc::CMSG_DATA(at).cast::<libc::c_int>()) };
                return usize::try_from(size).ok();
            }
            // SAFETY: as for the first.
            at = unsafe { libc::CMSG_NXTHDR(&raw const head, at) };
        }
        None
    }
}
