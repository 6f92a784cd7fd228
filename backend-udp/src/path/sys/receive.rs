//! recvmmsg(2).

use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;

use super::address::Address;

/// How many messages are received at once, at most.
const MESSAGES: usize = 8;
/// Room for a message, in bytes: the largest that the kernel merges datagrams to, and the largest datagram.
const ROOM: usize = 1 << 16;

/// Room for the control messages of one message: the size of merged datagrams takes 20 bytes and padding.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 64]);

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    /// Where it is in the arena.
    pub(crate) place: Range<usize>,
    pub(crate) sender: SocketAddr,
    /// How long each of the datagrams in it is but for the last, in bytes.
    pub(crate) segment: usize,
    /// Whether a part of it is missing.
    pub(crate) is_truncated: bool,
}

/// Buffers for messages.
pub(crate) struct Receiver {
    arena: Box<[u8]>,
    names: [Address; MESSAGES],
    controls: [Control; MESSAGES],
    /// What the kernel said of each message of the last call: bytes, flags, bytes of control messages.
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

    /// How many messages one call takes at most.
    pub(crate) const AT_ONCE: usize = MESSAGES;

    /// The buffer that all places are in.
    pub(crate) fn arena(&mut self) -> &mut [u8] {
        &mut self.arena
    }

    /// Takes what is there, without waiting, and says how many messages that were. What was received before is gone.
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

    /// The nth message of the last call. None if its sender has no address.
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
    /// The size of the datagrams that the kernel has merged (`UDP_GRO`), of which it says so in an int. `len`: how many
    /// bytes of control messages there are.
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
