//! System calls without a safe wrapper: requests to a TUN, and many datagrams in one call.
#![expect(
    unsafe_code,
    reason = "ioctl(2) of a TUN, if_indextoname(3), recvmmsg(2) and sendmmsg(2) with a control message for each datagram"
)]

mod address;
mod receive;
mod send;

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

pub(crate) use receive::{Received, Receiver};
pub(crate) use send::{Batch, Sender};

/// Constants of `linux/if_tun.h` that libc lacks.
pub(crate) mod flags {
    use std::ffi::c_uint;

    /// The device must not exist.
    pub(crate) const IFF_TUN_EXCL: c_uint = 0x8000;
    pub(crate) const TUN_F_CSUM: c_uint = 0x01;
    pub(crate) const TUN_F_TSO4: c_uint = 0x02;
    pub(crate) const TUN_F_TSO6: c_uint = 0x04;
    pub(crate) const TUN_F_USO4: c_uint = 0x20;
    pub(crate) const TUN_F_USO6: c_uint = 0x40;
}

mod request {
    use std::ffi::{c_int, c_uint};

    use nix::{ioctl_read_bad, ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_read, request_code_write};

    const KIND: u8 = b'T';
    const SIZE: usize = size_of::<c_int>();

    nix::ioctl_readwrite_bad!(set_iff, request_code_write!(KIND, 202, SIZE), libc::ifreq);
    ioctl_write_int_bad!(set_persist, request_code_write!(KIND, 203, SIZE));
    ioctl_read_bad!(get_features, request_code_read!(KIND, 207, SIZE), c_uint);
    ioctl_write_int_bad!(set_offload, request_code_write!(KIND, 208, SIZE));
    ioctl_write_ptr_bad!(set_vnet_header_size, request_code_write!(KIND, 216, SIZE), c_int);
}

/// Returns the flags that the kernel's TUN driver supports (`TUNGETFEATURES`).
pub(crate) fn features(tun: BorrowedFd<'_>) -> Result<c_uint, Errno> {
    let mut features = 0;
    // SAFETY: the request writes one unsigned int where the pointer says, and it points to one.
    unsafe { request::get_features(tun.as_raw_fd(), &raw mut features) }?;
    Ok(features)
}

/// Attaches an open `/dev/net/tun` to a device (`TUNSETIFF`), and creates the device if it does not exist. Returns the
/// device's name, which the kernel chooses if `name` contains `%d`.
pub(crate) fn attach(tun: BorrowedFd<'_>, name: &CStr, flags: c_uint) -> Result<CString, Errno> {
    // SAFETY: ifreq consists of numbers and of pointers that are not followed; all of them may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let (last, places) = request.ifr_name.split_last_mut().ok_or(Errno::EINVAL)?;
    let name = name.to_bytes();
    if name.len() > places.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    *last = 0;
    places.iter_mut().zip(name).for_each(|(place, byte)| *place = *byte as c_char);
    // The field has 16 bits, as have the flags.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes one ifreq where the pointer says, and it points to one.
    unsafe { request::set_iff(tun.as_raw_fd(), &raw mut request) }?;
    let name: Vec<u8> = request.ifr_name.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0).collect();
    CString::new(name).map_err(|_| Errno::EINVAL)
}

/// Sets whether the device stays after its last descriptor is closed (`TUNSETPERSIST`).
pub(crate) fn set_persistent(tun: BorrowedFd<'_>, persistent: c_int) -> Result<(), Errno> {
    // SAFETY: the request takes a number.
    unsafe { request::set_persist(tun.as_raw_fd(), persistent) }.map(drop)
}

/// Sets the offloads that the reader of the device supports (`TUNSETOFFLOAD`).
pub(crate) fn set_offload(tun: BorrowedFd<'_>, offload: c_uint) -> Result<(), Errno> {
    // SAFETY: the request takes a number.
    unsafe { request::set_offload(tun.as_raw_fd(), offload as c_int) }.map(drop)
}

/// Sets the length of the header before each packet, in bytes (`TUNSETVNETHDRSZ`).
pub(crate) fn set_vnet_header_size(tun: BorrowedFd<'_>, size: c_int) -> Result<(), Errno> {
    // SAFETY: the request reads one int where the pointer says, and it points to one.
    unsafe { request::set_vnet_header_size(tun.as_raw_fd(), &raw const size) }.map(drop)
}

/// Returns the name of a device (if_indextoname(3)). The wrapper of nix 0.31 returns an empty name instead of an error.
pub(crate) fn device_name(index: c_uint) -> Result<CString, Errno> {
    let mut name = [0 as c_char; libc::IF_NAMESIZE];
    // SAFETY: the function writes at most IF_NAMESIZE bytes at the pointer, which points to that many.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if found.is_null() {
        return Err(Errno::last());
    }
    // SAFETY: it points to `name`, in which the function has written a string with its end.
    Ok(unsafe { CStr::from_ptr(found) }.to_owned())
}

/// Sets a socket option that is an int (setsockopt(2)).
pub(crate) fn set_option(socket: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> Result<(), Errno> {
    let size = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes where the pointer says, and it points to an int.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    Errno::result(done).map(drop)
}

/// Returns the number of messages that the kernel dropped instead of adding them to a socket's buffer (`SO_MEMINFO`):
/// the buffer was full, the checksum was wrong, or a filter refused them. With `UDP_GRO` a message may be a run of up to
/// 64 datagrams.
pub(crate) fn overflowed(socket: BorrowedFd<'_>) -> Result<u32, Errno> {
    // It is the last of the numbers.
    let mut numbers = [0_u32; libc::SK_MEMINFO_DROPS as usize + 1];
    let mut size = size_of_val(&numbers) as libc::socklen_t;
    let place = numbers.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `size` bytes at the pointer, which points to that many.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, place, &raw mut size) };
    Errno::result(done)?;
    numbers.last().copied().ok_or(Errno::EINVAL)
}
