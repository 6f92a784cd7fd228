//! The interface to a data plane in user space: code that reads and writes the packets of a TUN device itself.
//!
//! Netlink can neither create such a device nor show where its packets go. So a data plane is
//! attached to the kernel ([`NetlinkKernel::with_data_plane`]), and its state is observed and written together with the
//! kernel's.
//!
//! [`NetlinkKernel::with_data_plane`]: crate::netlink::NetlinkKernel::with_data_plane

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::sync::Arc;

use super::KernelError;
use super::objects::{LinkId, LinkName};
use crate::net::{Dual, Prefix};
use crate::text::Plain;

/// How a data plane carries the packets of a TUN device. Everything can be changed in place, except from one queue to
/// several or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tunnel {
    /// The UDP port of this node and of its peers.
    pub port: u16,
    /// This node's addresses that packets are sent from and received at, one for each family of the underlay.
    pub local: Dual<IpAddr>,
    /// This node's subnets. Received packets to other destinations are dropped.
    pub subnets: Dual<Prefix>,
    /// The number of queues, each with its own thread: this many packets can be sent at the same time. Default: 1.
    pub queues: NonZeroU8,
    /// The size of each socket's buffers, in bytes. `None`, the default: the data plane chooses.
    pub socket_buffer: Option<u32>,
}

impl Tunnel {
    /// Creates a tunnel with one queue and the data plane's buffer size.
    pub fn new(port: u16, local: Dual<IpAddr>, subnets: Dual<Prefix>) -> Self {
        Self { port, local, subnets, queues: NonZeroU8::MIN, socket_buffer: None }
    }

    /// Returns whether the device has several queues (`IFF_MULTI_QUEUE`).
    pub fn is_multi_queue(&self) -> bool {
        self.queues > NonZeroU8::MIN
    }
}

/// Selects packets of a device that a data plane forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardKey {
    /// The device.
    pub link: LinkId,
    /// The destination prefix; the longest match decides.
    pub prefix: Prefix,
}

/// The peer that a data plane sends packets to, and accepts packets of these sources from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Forward {
    /// The peer's outer address and port.
    pub endpoint: SocketAddr,
    /// The peer's public key, if the data plane encrypts.
    pub key: Option<PublicKey>,
}

impl Forward {
    /// Creates a forward of unencrypted packets to this address and port.
    pub fn to(endpoint: SocketAddr) -> Self {
        // Peers do not differ in scope or flow label.
        Self { endpoint: SocketAddr::new(endpoint.ip(), endpoint.port()), key: None }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint.fmt(f)
    }
}

/// A Curve25519 public key (RFC 7748), which identifies a peer in cryptokey routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// A condition that makes a data plane slower than it could be. Packets are still carried.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limitation {
    /// What is limited: an offload that is not available, or the path to a peer. Unique per device.
    pub what: String,
    /// The cause, with the remedy if there is one.
    pub cause: String,
}

impl Limitation {
    /// Returns a limitation of `what`, because of `cause`.
    pub fn new(what: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { what: what.into(), cause: cause.into() }
    }
}

impl fmt::Display for Limitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Plain(&self.what), Plain(&self.cause))
    }
}

/// Makes the agent observe the kernel again after a data plane's state has changed by itself. A call does not block.
pub type OnChange = Arc<dyn Fn() + Send + Sync>;

/// A data plane in user space. It is called from one thread, in the network namespace of the kernel that it is attached
/// to, and starts its own threads from there. Dropping it ends those threads; devices that were [kept](Self::keep)
/// stay, with their routes, and drop packets until they are opened again.
pub trait DataPlane: Send + 'static {
    /// Sets the function to call when a device is lost or its packets are no longer carried, so that the agent repairs
    /// it at once, and when a [limitation](Self::limitations) is found.
    fn on_change(&mut self, changed: OnChange);

    /// Checks whether devices can be created here. Leaves nothing behind.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if the kernel has no such devices, [`KernelError::Denied`] without the privilege.
    /// Both are final.
    fn probe(&mut self) -> Result<(), KernelError>;

    /// Carries the packets of the device `name`, and returns its interface index. `index` names an existing device,
    /// whose packets are carried as `tunnel` says from then on; its forwards stay. It may be a device that another
    /// process kept, and may have another name for now. Without an index a new device is created, which is removed with
    /// the data plane unless it is [kept](Self::keep).
    ///
    /// # Errors
    /// [`KernelError::Refused`] if the kernel refuses the device or socket; if another socket was requested, packets
    /// are carried as before. Whether a retry helps depends on `errno`. [`KernelError::Unsupported`] and
    /// [`KernelError::Denied`] as for [`probe`](Self::probe).
    fn open(&mut self, name: &LinkName, index: Option<u32>, tunnel: &Tunnel) -> Result<u32, KernelError>;

    /// Makes a device outlive the data plane, so that its routes stay.
    ///
    /// # Errors
    /// [`KernelError::Refused`], also for a device that is not open.
    fn keep(&mut self, index: u32) -> Result<(), KernelError>;

    /// Returns how the packets of a device are carried; `None` if they are not.
    fn held(&self, index: u32) -> Option<Tunnel>;

    /// Writes forwards of a device, and removes those that are `None`. A packet sees all of the changes or none.
    ///
    /// # Errors
    /// [`KernelError::Refused`], also for a device that is not open. No change is made then.
    fn write(&mut self, index: u32, changes: &[(Prefix, Option<Forward>)]) -> Result<(), KernelError>;

    /// Returns the forwards of a device, in any order.
    fn forwards(&self, index: u32) -> Vec<(Prefix, Forward)>;

    /// Returns what makes a device slower than it could be, in any order, at most 128 entries. A limitation has ended
    /// once it is no longer returned.
    fn limitations(&self, index: u32) -> Vec<Limitation>;

    /// Stops carrying the packets of a device. A device that was not kept is removed.
    fn close(&mut self, index: u32);
}
