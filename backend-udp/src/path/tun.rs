//! The TUN device, which passes the overlay's packets from and to the kernel.

use std::ffi::{CString, c_uint};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::header::Vnet;
use super::offload::{Degraded, Offload};
use super::sys::{self, flags};

const DRIVER: &str = "/dev/net/tun";
/// The most queues of a device.
pub(crate) const MAX_QUEUES: usize = 16;
/// The longest name of a device, in bytes (`IFNAMSIZ` with the zero at its end).
const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;

/// Whether the device may already exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// The device must not exist.
    Create,
    /// The device has to exist and be persistent. A device created for one queue must not be open elsewhere; a device
    /// created for several queues can be shared by several processes.
    Attach,
}

/// An open TUN device. Dropping this value deletes the device, unless it is persistent.
#[derive(Debug)]
pub struct Tun {
    queues: Vec<File>,
    name: String,
    index: u32,
    degraded: Vec<Degraded>,
}

/// An error from opening or changing a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TunError {
    /// The name is empty, too long, or has invalid characters.
    #[error("{0:?} is no name for a device")]
    Name(String),
    /// The number of queues is out of range.
    #[error("{0} queues: a device has from 1 to {MAX_QUEUES}")]
    Queues(usize),
    /// The driver cannot be opened: it is missing, access is denied, or the system is out of descriptors.
    #[error("cannot open {DRIVER}: {}", driver_remedy(.0))]
    Driver(#[source] io::Error),
    /// The process may not create network devices.
    #[error("the kernel does not let this process have {name}: CAP_NET_ADMIN is needed")]
    Denied {
        /// The device.
        name: String,
    },
    /// The device must not exist, but does.
    #[error("there is a device {name} already")]
    Exists {
        /// The device.
        name: String,
    },
    /// The device has to exist, but does not.
    #[error("there is no device {name}")]
    Missing {
        /// The device.
        name: String,
    },
    /// Another program, or another path of this program, has the device open.
    #[error("the device {name} is in use by another program")]
    Busy {
        /// The device.
        name: String,
    },
    /// The existing device is of another kind. Delete it or use another name.
    #[error("the device {name} is no TUN device that was made for {}", if *queues == 1 { "one queue" } else { "several queues" })]
    Mismatch {
        /// The device.
        name: String,
        /// The requested number of queues: a device is created for one queue, or for several.
        queues: usize,
    },
    /// Another error from the kernel.
    #[error("{doing} failed for the device {name}")]
    Refused {
        /// The action that failed.
        doing: &'static str,
        /// The device.
        name: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

impl Tun {
    /// Opens a device in the network namespace of the calling thread, with all offloads that the kernel supports. If
    /// the name contains `%d`, the kernel chooses a number.
    ///
    /// # Errors
    /// [`TunError`]. A device that was created before the error is deleted.
    pub fn open(name: &str, mode: OpenMode, queues: usize) -> Result<Self, TunError> {
        Self::open_without(name, mode, queues, &[])
    }

    /// Opens a device as on a kernel that lacks these offloads.
    pub(crate) fn open_without(
        name: &str,
        mode: OpenMode,
        queues: usize,
        without: &[Offload],
    ) -> Result<Self, TunError> {
        let bad = || TunError::Name(name.chars().take(2 * LONGEST_NAME).collect());
        let is_name = (1..=LONGEST_NAME).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
            && ![".", ".."].contains(&name);
        let wanted = CString::new(name).ok().filter(|_| is_name).ok_or_else(bad)?;
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(TunError::Queues(queues));
        }
        let exists = if_nametoindex(name).is_ok();
        match mode {
            OpenMode::Create if exists => return Err(TunError::Exists { name: name.to_owned() }),
            OpenMode::Attach if !exists => return Err(TunError::Missing { name: name.to_owned() }),
            _ => {}
        }
        let mut opening = Opening { name: wanted, mode, queues, exists, vnet: 0, degraded: Vec::new() };
        let first = opening.first(without)?;
        let files = (1..queues).map(|_| opening.attach(opening.flags()));
        let files = std::iter::once(Ok(first)).chain(files).collect::<Result<Vec<_>, _>>()?;
        let name = opening.name.to_string_lossy().into_owned();
        let index =
            if_nametoindex(name.as_str()).map_err(|errno| opening.refused("reading its interface index", errno))?;
        Ok(Self { queues: files, name, index, degraded: opening.degraded })
    }

    /// Checks whether the driver is available. Creates nothing.
    ///
    /// # Errors
    /// [`TunError::Driver`].
    pub fn probe() -> Result<(), TunError> {
        let file = open()?;
        sys::features(file.as_fd()).map(drop).map_err(|errno| TunError::Driver(errno.into()))
    }

    /// Returns the device's name when it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the interface index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Makes the device persistent: it stays with its addresses and routes when this value is dropped. Until it is
    /// opened again, packets to it are dropped.
    ///
    /// # Errors
    /// [`TunError::Refused`].
    pub fn keep(&self) -> Result<(), TunError> {
        let refused = |errno: Errno| TunError::Refused {
            doing: "changing whether the device persists (TUNSETPERSIST)",
            name: self.name.clone(),
            source: errno.into(),
        };
        self.queues.first().map_or(Ok(()), |queue| sys::set_persistent(queue.as_fd(), 1).map_err(refused))
    }

    pub(crate) fn queues(&self) -> &[File] {
        &self.queues
    }

    /// Returns the offloads that are missing.
    pub(crate) fn degraded(&self) -> &[Degraded] {
        &self.degraded
    }

    /// Returns the length of the header before each packet, in bytes.
    pub(crate) fn header(&self) -> usize {
        if self.has(Offload::VnetHeader) { Vnet::LEN } else { 0 }
    }

    pub(crate) fn has(&self, what: Offload) -> bool {
        self.degraded.iter().all(|degraded| degraded.what != what)
    }
}

/// A device that is being opened.
struct Opening {
    /// After the first queue, the name that the kernel chose.
    name: CString,
    mode: OpenMode,
    queues: usize,
    exists: bool,
    /// `IFF_VNET_HDR`, if the kernel supports it.
    vnet: c_uint,
    degraded: Vec<Degraded>,
}

impl Opening {
    fn first(&mut self, without: &[Offload]) -> Result<File, TunError> {
        let file = open()?;
        let features =
            sys::features(file.as_fd()).map_err(|errno| self.refused("reading the driver's features", errno))?;
        if !without.contains(&Offload::VnetHeader) {
            self.vnet = features & libc::IFF_VNET_HDR as c_uint;
        }
        let exclusive = if self.mode == OpenMode::Create { flags::IFF_TUN_EXCL } else { 0 };
        self.name = sys::attach(file.as_fd(), &self.name, self.flags() | exclusive)
            .map_err(|errno| self.not_attached(errno))?;
        let offload = |wanted| sys::set_offload(file.as_fd(), wanted);
        if self.vnet == 0 {
            self.degrade(Offload::VnetHeader, "the driver does not know IFF_VNET_HDR");
            offload(0).map_err(|errno| self.refused("turning offloads off", errno))?;
            return Ok(file);
        }
        // An existing device keeps the header size that a former user set.
        sys::set_vnet_header_size(file.as_fd(), Vnet::LEN as i32)
            .map_err(|errno| self.refused("setting the size of packet headers", errno))?;
        // Without TUN_F_TSO_ECN, the kernel itself splits packets with CWR, whose meaning AccECN changes.
        let tcp = flags::TUN_F_CSUM | flags::TUN_F_TSO4 | flags::TUN_F_TSO6;
        let try_offload = |what, wanted| if without.contains(&what) { Err(Errno::EINVAL) } else { offload(wanted) };
        if let Err(errno) = try_offload(Offload::TunUdp, tcp | flags::TUN_F_USO4 | flags::TUN_F_USO6) {
            self.degrade(Offload::TunUdp, errno);
            if let Err(errno) = try_offload(Offload::TunTcp, tcp) {
                self.degrade(Offload::TunTcp, errno);
                offload(0).map_err(|errno| self.refused("turning offloads off", errno))?;
            }
        }
        Ok(file)
    }

    /// Opens one more queue.
    fn attach(&self, flags: c_uint) -> Result<File, TunError> {
        let file = open()?;
        sys::attach(file.as_fd(), &self.name, flags).map_err(|errno| self.not_attached(errno))?;
        Ok(file)
    }

    fn flags(&self) -> c_uint {
        let queues = if self.queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        (libc::IFF_TUN | libc::IFF_NO_PI | queues) as c_uint | self.vnet
    }

    fn degrade(&mut self, what: Offload, because: impl ToString) {
        self.degraded.push(Degraded { what, because: because.to_string() });
    }

    fn not_attached(&self, errno: Errno) -> TunError {
        let name = self.name.to_string_lossy().into_owned();
        match errno {
            Errno::EPERM | Errno::EACCES => TunError::Denied { name },
            Errno::EBUSY if self.mode == OpenMode::Create => TunError::Exists { name },
            Errno::EBUSY => TunError::Busy { name },
            Errno::EINVAL if self.exists => TunError::Mismatch { name, queues: self.queues },
            errno => self.refused("attaching to the device (TUNSETIFF)", errno),
        }
    }

    fn refused(&self, doing: &'static str, errno: Errno) -> TunError {
        TunError::Refused { doing, name: self.name.to_string_lossy().into_owned(), source: errno.into() }
    }
}

/// Returns what to do if the driver cannot be opened.
fn driver_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => "load the module tun, or give the container this device",
        Some(Errno::EACCES | Errno::EPERM) => "let this program read and write it",
        Some(Errno::EMFILE | Errno::ENFILE) => "raise the limit of open files, or close some",
        _ => "see the cause",
    }
}

fn open() -> Result<File, TunError> {
    let mut options = OpenOptions::new();
    // std sets O_CLOEXEC.
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    options.open(DRIVER).map_err(TunError::Driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_depends_on_why_the_driver_cannot_be_opened() {
        let text = |errno: Errno| TunError::Driver(errno.into()).to_string();
        assert!(text(Errno::ENOENT).contains("load the module tun"));
        assert!(text(Errno::EMFILE).contains("limit of open files"));
        assert!(text(Errno::EACCES).contains("read and write"));
    }
}
