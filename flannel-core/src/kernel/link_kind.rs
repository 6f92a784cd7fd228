//! Kinds of devices: which two are the same device, which can be changed into another, and which exclude each other.

use std::net::IpAddr;

use super::data_plane::Tunnel;
use super::objects::LinkId;
use crate::net::{Family, Vni};

/// The kind of a device, with the attributes that are set when it is created.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkKind {
    /// A VXLAN tunnel end point (`drivers/net/vxlan`).
    Vxlan(Vxlan),
    /// A TUN device (`drivers/net/tun.c`), whose packets a [`DataPlane`] carries.
    ///
    /// [`DataPlane`]: crate::kernel::DataPlane
    Tun(Tun),
    /// A device that another program creates and configures, such as the data plane of an embedder, by the kernel's
    /// name of its kind (`tun`, `wireguard`). Used only in wanted state: a seen device is [`Other`](Self::Other) or
    /// [`Tun`](Self::Tun). Not for `vxlan` devices, which this library creates.
    ///
    /// The device is recognised by the overlay's mark ([`OverlayName::mark`]) and this kind, never by its name. It is
    /// not created, changed or deleted through [`Kernel`](crate::kernel::Kernel). Wanted objects on it are written
    /// while it exists, and deleted with the overlay. Addresses and neighbours outside the overlay's networks belong to
    /// the other program and stay; FDB entries on it all belong to the overlay.
    ///
    /// [`OverlayName::mark`]: crate::kernel::OverlayName::mark
    External(Box<str>),
    /// Any other seen device, by the kernel's name of the kind; empty for a physical one.
    Other(Box<str>),
}

impl LinkKind {
    /// Whether two devices are the same one under different names.
    pub(crate) fn is_same_device(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vxlan(a), Self::Vxlan(b)) => a.vni == b.vni && a.family() == b.family(),
            (Self::External(a), Self::Other(b)) | (Self::Other(a), Self::External(b)) => a == b,
            // An overlay has at most one, so no further attribute is compared.
            (Self::Tun(_), Self::Tun(_)) => true,
            (Self::External(kind), Self::Tun(_)) | (Self::Tun(_), Self::External(kind)) => &**kind == Tun::KIND,
            (a, b) => a == b,
        }
    }

    /// Whether one device prevents the kernel from creating the other, whatever their names are (docs/kernel-facts.md,
    /// "Identity of a VXLAN device").
    pub(crate) fn excludes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vxlan(a), Self::Vxlan(b)) => a.excludes(b),
            _ => false,
        }
    }

    /// Whether a device of the kind `have` can be changed into this one without being created again. An attribute that
    /// one side leaves open matches (docs/compatibility.md, "Device").
    pub(crate) fn is_compatible(&self, have: &Self) -> bool {
        fn open<T: PartialEq>(want: Option<T>, have: Option<T>) -> bool {
            want.is_none() || have.is_none() || want == have
        }
        match (self, have) {
            (Self::Vxlan(want), Self::Vxlan(have)) => {
                want.vni == have.vni
                    && open(want.port, have.port)
                    && open(want.local, have.local)
                    && open(want.lower, have.lower)
                    && want.gbp == have.gbp
                    && want.misses == have.misses
            }
            (Self::Tun(want), Self::Tun(have)) => want.multi_queue == have.multi_queue,
            (want, have) => want == have,
        }
    }

    /// The kind of a compatible device after an update: attributes that cannot be changed stay.
    pub(crate) fn updated(&self, have: &Self) -> Self {
        match (self, have) {
            (Self::Vxlan(want), Self::Vxlan(have)) => {
                Self::Vxlan(Vxlan { learning: want.learning, remote: want.remote, ..have.clone() })
            }
            (Self::Tun(want), Self::Tun(_)) => Self::Tun(want.clone()),
            (_, have) => have.clone(),
        }
    }

    /// Whether devices of this kind are created and deleted through the kernel interface.
    pub(crate) fn is_made_here(&self) -> bool {
        match self {
            Self::Vxlan(_) | Self::Tun(_) => true,
            Self::External(_) | Self::Other(_) => false,
        }
    }

    /// Whether it names `vxlan` as an external kind, which is not supported.
    pub(crate) fn is_external_vxlan(&self) -> bool {
        matches!(self, Self::External(kind) if &**kind == "vxlan")
    }

    /// Returns whether it is a veth device, one end of a pair, as pods have.
    pub fn is_veth(&self) -> bool {
        matches!(self, Self::Other(kind) if &**kind == "veth")
    }
}

/// A TUN device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tun {
    /// Whether it has several queues (`IFF_MULTI_QUEUE`). That cannot be changed.
    pub multi_queue: bool,
    /// How its packets are carried; `None` for a seen device that no data plane of this process carries.
    pub tunnel: Option<Tunnel>,
}

impl Tun {
    /// The kernel's name of the kind.
    pub const KIND: &'static str = "tun";

    /// Creates a device whose packets are not carried, or without saying how: enough to recognise it.
    pub fn new(multi_queue: bool) -> Self {
        Self { multi_queue, tunnel: None }
    }

    /// Creates a device whose packets are carried like this.
    pub fn carried(tunnel: Tunnel) -> Self {
        Self { multi_queue: tunnel.is_multi_queue(), tunnel: Some(tunnel) }
    }
}

/// A VXLAN device's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Vxlan {
    /// The network identifier.
    pub vni: Vni,
    /// The UDP destination port. In wanted state, `None` leaves it to the kernel (8472) and matches any port.
    pub port: Option<u16>,
    /// The outer source address. A seen device may have none.
    pub local: Option<IpAddr>,
    /// The lower device.
    pub lower: Option<LinkId>,
    /// Whether the device learns peers from received packets.
    pub learning: bool,
    /// Whether it carries group policies (`VXLAN-GBP`).
    pub gbp: bool,
    /// The destination of frames without an FDB entry (`remote`).
    pub remote: Option<IpAddr>,
    /// Whether it reports unknown destinations (`l2miss` or `l3miss`). That cannot be changed.
    pub misses: bool,
}

impl Vxlan {
    /// Creates a device of this identifier, with everything else off or left to the kernel.
    pub fn new(vni: Vni) -> Self {
        Self { vni, port: None, local: None, lower: None, learning: false, gbp: false, remote: None, misses: false }
    }

    /// Returns the address family of the underlay.
    pub fn family(&self) -> Option<Family> {
        self.local.map(Family::of)
    }

    /// Returns whether the kernel allows only one of the two to exist: same identifier, port and underlay family, which
    /// is IPv4 if there is no local address (docs/kernel-facts.md, "Identity of a VXLAN device").
    pub fn excludes(&self, other: &Self) -> bool {
        let place =
            |vxlan: &Self| (vxlan.vni, vxlan.port.unwrap_or(Self::DEFAULT_PORT), vxlan.family().unwrap_or(Family::V4));
        place(self) == place(other)
    }

    /// The port that Linux uses if none is given.
    pub const DEFAULT_PORT: u16 = 8472;
}
