//! The seam to a data plane in user space: code that reads and writes the packets of a TUN device itself.
//!
//! The kernel's own interfaces neither make such a device nor show where its packets go. So a data plane is attached to
//! the kernel ([`NetlinkKernel::with_data_plane`]), which makes it part of the same two verbs: what it holds is observed
//! and written with everything else.
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

/// How a data plane carries a TUN device's packets. All of it changes in place, but for a change between one and several
/// queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tunnel {
    /// The UDP port, of this node and of its peers.
    pub port: u16,
    /// The own addresses that packets are sent from and received at, one of each family of the underlay.
    pub local: Dual<IpAddr>,
    /// The own subnets: a received packet to any other destination is dropped.
    pub subnets: Dual<Prefix>,
    /// How many packets may be sent at the same time: each queue has a thread of its own. Default: 1.
    pub queues: NonZeroU8,
    /// The size of each socket's buffers, in bytes. `None`, the default: what the data plane takes.
    pub socket_buffer: Option<u32>,
}

impl Tunnel {
    /// One queue, and buffers as the data plane takes them.
    pub fn new(port: u16, local: Dual<IpAddr>, subnets: Dual<Prefix>) -> Self {
        Self { port, local, subnets, queues: NonZeroU8::MIN, socket_buffer: None }
    }

    /// Whether the device is made for several queues (`IFF_MULTI_QUEUE`).
    pub fn is_multi_queue(&self) -> bool {
        self.queues > NonZeroU8::MIN
    }
}

/// Which packets of a device a data plane forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardKey {
    /// The device.
    pub link: LinkId,
    /// Their destinations; the longest prefix decides.
    pub prefix: Prefix,
}

/// Where a data plane sends packets, and from where it takes packets of these sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Forward {
    /// The peer's outer address and port.
    pub endpoint: SocketAddr,
    /// The peer's public key, where the data plane encrypts.
    pub key: Option<PublicKey>,
}

impl Forward {
    /// Unencrypted packets to this address and port.
    pub fn to(endpoint: SocketAddr) -> Self {
        // Neither a scope nor a flow label tells peers apart.
        Self { endpoint: SocketAddr::new(endpoint.ip(), endpoint.port()), key: None }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint.fmt(f)
    }
}

/// A public key of Curve25519 (RFC 7748), as cryptokey routing names a peer by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// Something that makes a data plane slower than it could be. Packets are carried all the same.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limitation {
    /// What is limited: an offload that is not available, or the path to a peer. Names the limitation on its device.
    pub what: String,
    /// Why, with the remedy where there is one.
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

/// Makes the agent look at the kernel again, after what a data plane holds has changed by itself. A call does not block.
pub type OnChange = Arc<dyn Fn() + Send + Sync>;

/// A data plane in user space. It is called by one thread, in the network namespace of the kernel it is attached to, and
/// starts its own threads from there. Dropping it ends them; devices that were [kept](Self::keep) stay, with their routes,
/// and drop packets until they are opened again.
pub trait DataPlane: Send + 'static {
    /// Sets what to call when a device is lost or its packets are no longer carried, so that the agent repairs it at once,
    /// and when a [limitation](Self::limitations) is found.
    fn on_change(&mut self, changed: OnChange);

    /// Whether devices can be made here. Leaves nothing behind.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] where the kernel has no such devices, [`KernelError::Denied`] without the privilege:
    /// both final.
    fn probe(&mut self) -> Result<(), KernelError>;

    /// Carries the packets of the device `name`, and returns its interface index. `index` names a device that is there
    /// already, whose packets are then carried as `tunnel` says: forwards stay. Without one a new device is made, which
    /// goes with the data plane until it is [kept](Self::keep). The index may be that of a device that another process
    /// kept, and the device may be called otherwise for now.
    ///
    /// # Errors
    /// [`KernelError::Refused`] where the kernel takes no such device or socket; packets go on as before where another socket
    /// was asked for. Whether a retry helps depends on `errno`. [`KernelError::Unsupported`] and [`KernelError::Denied`] as
    /// for [`probe`](Self::probe).
    fn open(&mut self, name: &LinkName, index: Option<u32>, tunnel: &Tunnel) -> Result<u32, KernelError>;

    /// Lets a device outlive the data plane, so that its routes do.
    ///
    /// # Errors
    /// [`KernelError::Refused`], also for a device that is not open.
    fn keep(&mut self, index: u32) -> Result<(), KernelError>;

    /// How the packets of a device are carried: `None` where they are not.
    fn held(&self, index: u32) -> Option<Tunnel>;

    /// Writes forwards of a device, and removes those that are `None`. Packets meet all of the changes or none.
    ///
    /// # Errors
    /// [`KernelError::Refused`], also for a device that is not open; none of the changes was made.
    fn write(&mut self, index: u32, changes: &[(Prefix, Option<Forward>)]) -> Result<(), KernelError>;

    /// The forwards of a device, in any order.
    fn forwards(&self, index: u32) -> Vec<(Prefix, Forward)>;

    /// What makes a device slower than it could be, in any order: at most 128 of them. Each lasts for as long as it is
    /// returned.
    fn limitations(&self, index: u32) -> Vec<Limitation>;

    /// Stops carrying the packets of a device. A device that was not kept is gone afterwards.
    fn close(&mut self, index: u32);
}
