//! The interface to the kernel: a few broad operations over plain values.

mod data_plane;
mod host;
mod link_kind;
mod objects;
mod op;
mod ownership;
mod refusals;
mod routes;
mod scope;
mod text;

use std::any::Any;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::net::{Dual, Prefix, is_automatic};
use crate::text::Plain;

pub use data_plane::{DataPlane, Forward, ForwardKey, Limitation, OnChange, PublicKey, Tunnel};
pub use host::{HostAddress, HostFacts, HostLink, HostRoute, NextHop};
pub use link_kind::{LinkKind, Tun, Vxlan};
pub use objects::{
    AddressKey, FdbKey, Link, LinkId, LinkName, LinkNameError, NeighbourKey, PeerState, Route, RouteKey, RouteKind,
    RouteSlot, State,
};
pub use op::{LinkPart, Object, Op};
pub use ownership::{Claims, OverlayName, OverlayNameError, owns_route};
pub use refusals::Refusals;
pub use routes::Routes;
pub use scope::{Device, LinkNames, Scope, SeenLink};
pub use text::OpText;

pub(crate) use ownership::{is_carried_here, is_go_flannels, is_made_here, owns_address, owns_link, owns_neighbour};
pub(crate) use text::{RouteText, describe_link};

/// A reason to observe the kernel again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hint {
    /// An object in the scope changed, other than by a write for this overlay.
    Changed,
    /// What [`host_facts`](Kernel::host_facts) returns changed, other than by a write for this overlay: a link was
    /// added, removed or changed (name, kind, MAC address, MTU, state, group, alias), or an address, or a route of the
    /// main table that is a default route, has no gateway, or has one and lies inside the prefix of an address.
    ///
    /// Not raised for changes that are frequent on a busy host: veth devices without an address (the devices of pods),
    /// IPv6 link-local addresses, other routes through a gateway, and routes of this library's overlays or through
    /// devices of the scope. A later read shows those too.
    FactsChanged,
    /// Notifications were lost: any object may have changed.
    Lost,
    /// The subscription failed. No notifications arrive until the next hint, which is [`Lost`](Self::Lost); changes go
    /// unnoticed until then.
    SubscriptionBroken,
}

impl Hint {
    /// Returns whether a change of a link of this kind, with these addresses, is [`FactsChanged`](Self::FactsChanged).
    /// Shared by the real and the fake kernel, so that both behave alike.
    pub fn tells_of(kind: &LinkKind, mut addresses: impl Iterator<Item = IpAddr>) -> bool {
        !kind.is_veth() || addresses.any(|addr| !is_automatic(addr))
    }

    /// Returns the hints for an address that was added or changed (`is_there`) or deleted. `is_own` says whether it is
    /// on a device of the scope. Shared by the real and the fake kernel, so that both behave alike.
    pub fn of_address(addr: IpAddr, is_there: bool, is_own: bool) -> impl Iterator<Item = Self> {
        // The kernel deletes routes through a deleted address without notifications for them (docs/kernel-facts.md,
        // "Loss of an address").
        let changed = (!is_there || is_own).then_some(Self::Changed);
        let hints = [Some(Self::FactsChanged), changed].into_iter().flatten();
        hints.filter(move |_| !is_automatic(addr))
    }
}

/// An error of a kernel operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The kernel refused one request. Whether a retry helps depends on `errno`; the next audit decides.
    #[error("kernel refused {}: {}{}", Plain(doing), errno_text(*errno), Plain(detail(message)))]
    Refused {
        /// The operation, with its object.
        doing: String,
        /// `errno`, positive.
        errno: i32,
        /// The kernel's message (extended ACK), possibly empty.
        message: String,
    },
    /// The kernel did not answer in time. The outcome is unknown: observe before writing again.
    #[error("kernel did not answer within {within:?} while {}", Plain(doing))]
    Timeout {
        /// The operation.
        doing: String,
        /// The deadline.
        within: std::time::Duration,
    },
    /// Answers were lost, the socket failed (a new one is opened), or the kernel's thread could not be started. The
    /// outcome is unknown: observe before writing again.
    #[error("lost contact with the kernel while {}: {}", Plain(doing), Plain(reason))]
    Lost {
        /// The operation.
        doing: String,
        /// Why.
        reason: String,
    },
    /// The kernel does not support the operation. Final; `hint` says what to install or choose.
    #[error("{} is not supported by this kernel: {}", Plain(what), Plain(hint))]
    Unsupported {
        /// The unsupported feature.
        what: String,
        /// The remedy.
        hint: String,
    },
    /// The process lacks a privilege. Final; `hint` says which.
    #[error("no permission for {}: {}", Plain(doing), Plain(hint))]
    Denied {
        /// The operation.
        doing: String,
        /// The remedy.
        hint: String,
    },
    /// Another overlay in this network namespace has the same name or an overlapping network.
    #[error("overlay {} is already running in this network namespace: {}", Plain(other), Plain(hint))]
    Conflict {
        /// The claim of the other overlay.
        other: String,
        /// The remedy.
        hint: String,
    },
    /// The netlink thread has ended. Final.
    #[error("the netlink thread has stopped")]
    Stopped,
}

impl KernelError {
    /// Returns whether the kernel rejected the written value, as opposed to lacking memory or permission. Other values
    /// may be accepted.
    pub fn rejects_value(&self) -> bool {
        use std::io::ErrorKind::{AddrNotAvailable, HostUnreachable, InvalidInput, NetworkUnreachable};
        let Self::Refused { errno, .. } = self else { return false };
        let kind = std::io::Error::from_raw_os_error(*errno).kind();
        matches!(kind, AddrNotAvailable | HostUnreachable | InvalidInput | NetworkUnreachable)
    }
}

fn errno_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

fn detail(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// `EEXIST` on every Linux architecture.
pub const EEXIST: i32 = 17;

/// `EINVAL` on every Linux architecture.
pub const EINVAL: i32 = 22;

/// The result of [`Kernel::apply`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ApplyReport {
    /// The number of operations that the kernel acknowledged.
    pub applied: usize,
    /// Operations that the kernel refused, by index, in ascending order.
    pub refused: Vec<(usize, KernelError)>,
    /// Operations that were not tried because they depend on a refused one, by index, in ascending order.
    pub skipped: Vec<usize>,
    /// Contact with the kernel was lost before all answers arrived: the outcome of the remaining operations is unknown.
    pub lost: Option<KernelError>,
}

impl ApplyReport {
    /// Returns whether every operation was applied.
    pub fn is_complete(&self) -> bool {
        self.refused.is_empty() && self.skipped.is_empty() && self.lost.is_none()
    }
}

/// How an overlay uses the networks that it claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Residence {
    /// The overlay runs in them. At most one such claim per name.
    Present,
    /// The overlay ran in them before, and its objects there are still to be deleted. Until then no other overlay may
    /// claim them. Held in addition to the present claim of the same name.
    Former,
}

/// A claim on a name and networks, held until it is dropped.
pub struct Claim(#[expect(dead_code, reason = "held for its drop")] Box<dyn Any + Send + Sync>);

impl Claim {
    /// Wraps a guard that releases the claim when it is dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Box::new(guard))
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claim")
    }
}

/// The kernel, or an implementation that behaves like it.
///
/// # Cancel safety
/// Any call may be dropped at any await. Its effect is then unknown: the caller has to [`observe`](Kernel::observe)
/// before it relies on remembered state.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait Kernel: Send + Sync + 'static {
    /// Claims a name and networks in this network namespace, until the claim is dropped or the process ends.
    ///
    /// # Errors
    /// [`KernelError::Conflict`] when an overlay of another name in this namespace claims an overlapping network, or
    /// when this name already claims networks as [`Residence::Present`]. Former networks may be claimed any number of
    /// times by one name.
    async fn claim(
        &self,
        overlay: &OverlayName,
        networks: &Dual<Prefix>,
        residence: Residence,
    ) -> Result<Claim, KernelError>;

    /// Checks whether devices of these kinds can be created here, so that a missing driver or privilege is found before
    /// a lease is taken or anything is written. Leaves nothing behind, except a driver that the kernel loads by itself.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] or [`KernelError::Denied`], both final; the others as for
    /// [`host_facts`](Kernel::host_facts).
    async fn probe(&self, devices: &[Device]) -> Result<(), KernelError>;

    /// Reads the links, addresses and routes of the host. `reach` are the addresses whose route matters
    /// ([`Select::reaches`](crate::uplink::Select::reaches)).
    ///
    /// # Errors
    /// [`KernelError`] when the read is not complete; a partial result is never returned. Retry with back-off, except
    /// after [`KernelError::Denied`] or [`KernelError::Stopped`].
    async fn host_facts(&self, reach: &[IpAddr]) -> Result<HostFacts, KernelError>;

    /// Reads the state in `scope`: the overlay's devices, the objects on them, and every route in its networks. The
    /// result is complete, or an error.
    ///
    /// # Errors
    /// As [`host_facts`](Kernel::host_facts).
    async fn observe(&self, scope: &Scope) -> Result<State, KernelError>;

    /// Writes `ops` in order, in batches of any size. After a refusal, only operations that depend on the refused
    /// object are skipped.
    async fn apply(&self, scope: &Scope, ops: Arc<Vec<Op>>) -> ApplyReport;

    /// Returns a stream of reasons to observe again, except writes for this overlay; writes for another overlay through
    /// the same kernel are included. Hints that are not polled are merged. The stream ends only when the kernel's
    /// thread ends. The scope of a later call replaces that of an earlier one.
    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint>;
}
