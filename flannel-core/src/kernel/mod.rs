//! The seam to the kernel: four wide verbs over values.

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
pub use scope::{Device, Scope, SeenLink};
pub use text::OpText;

pub(crate) use ownership::{is_carried_here, is_go_flannels, is_made_here, owns_address, owns_link, owns_neighbour};
pub(crate) use text::{RouteText, describe_link};

/// A reason to look at the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hint {
    /// Something in the scope changed, and it was not us.
    Changed,
    /// What [`host_facts`](Kernel::host_facts) shows of the host changed, and it was not us: a link came, went or changed
    /// (name, kind, MAC address, MTU, state, group, alias), or an address, or a route of the main table that is a
    /// default route, has no gateway, or has one and lies inside the prefix of an address.
    ///
    /// Not raised for what goes on all the time on a busy host: veth devices without an address, which pods have,
    /// IPv6 link-local addresses, other routes through a gateway, and routes of this library's overlays or through
    /// devices of the scope. A later read shows those too.
    FactsChanged,
    /// Notifications were lost: anything may have changed.
    Lost,
    /// No notifications arrive until the next hint, which is [`Lost`](Self::Lost): anything may change unseen.
    SubscriptionBroken,
}

impl Hint {
    /// Whether a change of a link of this kind, with these addresses, is [`FactsChanged`](Self::FactsChanged). Both the
    /// real and the fake kernel use this, so that they agree.
    pub fn tells_of(kind: &LinkKind, mut addresses: impl Iterator<Item = IpAddr>) -> bool {
        !kind.is_veth() || addresses.any(|addr| !is_automatic(addr))
    }

    /// The hints for an address that was added or changed (`is_there`), or deleted. `is_own` says whether it is on a
    /// device of the scope. Both the real and the fake kernel use this, so that they agree.
    pub fn of_address(addr: IpAddr, is_there: bool, is_own: bool) -> impl Iterator<Item = Self> {
        // Routes through a deleted address go without notifications of their own (docs/kernel-facts.md, "Loss of an
        // address").
        let changed = (!is_there || is_own).then_some(Self::Changed);
        let hints = [Some(Self::FactsChanged), changed].into_iter().flatten();
        hints.filter(move |_| !is_automatic(addr))
    }
}

/// Why the kernel did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The kernel refused one request. Whether a retry helps depends on `errno`: an audit decides.
    #[error("kernel refused {}: {}{}", Plain(doing), errno_text(*errno), Plain(detail(message)))]
    Refused {
        /// What was being done, with the object.
        doing: String,
        /// `errno`, positive.
        errno: i32,
        /// The kernel's own words (extended ACK), possibly empty.
        message: String,
    },
    /// No answer in time. What happened is unknown: look before writing.
    #[error("kernel did not answer within {within:?} while {}", Plain(doing))]
    Timeout {
        /// What was being done.
        doing: String,
        /// The deadline.
        within: std::time::Duration,
    },
    /// Answers were lost or the socket failed; it has been opened anew. What happened is unknown: look before
    /// writing.
    #[error("lost contact with the kernel while {}: {}", Plain(doing), Plain(reason))]
    Lost {
        /// What was being done.
        doing: String,
        /// Why.
        reason: String,
    },
    /// The kernel cannot do it at all. Final; `hint` says what to install or choose.
    #[error("{} is not supported by this kernel: {}", Plain(what), Plain(hint))]
    Unsupported {
        /// What.
        what: String,
        /// The remedy.
        hint: String,
    },
    /// No privilege. Final; `hint` says which.
    #[error("no permission for {}: {}", Plain(doing), Plain(hint))]
    Denied {
        /// What was being done.
        doing: String,
        /// The remedy.
        hint: String,
    },
    /// Another overlay in this network namespace has the same name or an overlapping network.
    #[error("overlay {} is already running in this network namespace: {}", Plain(other), Plain(hint))]
    Conflict {
        /// The other's claim.
        other: String,
        /// The remedy.
        hint: String,
    },
    /// The thread that speaks to the kernel is gone.
    #[error("the netlink thread has stopped")]
    Stopped,
}

impl KernelError {
    /// Whether the kernel rejects the value that was written, rather than lacking memory or permission. Other values may
    /// be accepted.
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

/// What came of the operations that a kernel was to write.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ApplyReport {
    /// Operations the kernel acknowledged.
    pub applied: usize,
    /// Operations it refused, by their place, in ascending order.
    pub refused: Vec<(usize, KernelError)>,
    /// Operations not tried because what they stand on was refused, by their place, in ascending order.
    pub skipped: Vec<usize>,
    /// Contact was lost midway: what came of the rest is unknown.
    pub lost: Option<KernelError>,
}

impl ApplyReport {
    /// Whether all of it was done.
    pub fn is_complete(&self) -> bool {
        self.refused.is_empty() && self.skipped.is_empty() && self.lost.is_none()
    }
}

/// What an overlay is to the networks it claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Residence {
    /// It runs in them: one claim a name.
    Present,
    /// It ran in them, and what it left there is still to go: nobody else may move in before that. Stands beside the
    /// present claim of the same name.
    Former,
}

/// A name held for as long as this value lives.
pub struct Claim(#[expect(dead_code, reason = "held for its drop")] Box<dyn Any + Send + Sync>);

impl Claim {
    /// Wraps whatever releases the claim when dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Box::new(guard))
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claim")
    }
}

/// The kernel, or something that behaves like it.
///
/// # Cancel safety
/// Any call may be dropped at any await: what it did is then unknown, so the caller has to
/// [`observe`](Kernel::observe) before it trusts its memory.
#[cfg_attr(feature = "mock", mockall::automock)]
#[async_trait]
pub trait Kernel: Send + Sync + 'static {
    /// Takes name and networks for this network namespace, until the claim is dropped or the process ends.
    ///
    /// # Errors
    /// [`KernelError::Conflict`] when an overlay of another name here has a network that overlaps, or one of this name
    /// has claimed the same: any present networks, or just these former ones.
    async fn claim(
        &self,
        overlay: &OverlayName,
        networks: &Dual<Prefix>,
        residence: Residence,
    ) -> Result<Claim, KernelError>;

    /// Whether devices of these kinds could be made here: a driver that is missing or a privilege that is, before
    /// anything is taken or written. Leaves nothing behind, but for a driver that the kernel loads by itself.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] or [`KernelError::Denied`], both final; the others as for
    /// [`host_facts`](Kernel::host_facts).
    async fn probe(&self, devices: &[Device]) -> Result<(), KernelError>;

    /// What the host looks like now. `reach` are the addresses whose route matters
    /// ([`Select::reaches`](crate::uplink::Select::reaches)).
    ///
    /// # Errors
    /// [`KernelError`] when the read is not complete; never a part of it. Retry with back-off unless
    /// [`KernelError::Denied`] or [`KernelError::Stopped`].
    async fn host_facts(&self, reach: &[IpAddr]) -> Result<HostFacts, KernelError>;

    /// What is there in `scope` now: our devices, what is on them, and every route in the networks' territory.
    /// Complete or an error; never invents.
    ///
    /// # Errors
    /// As [`host_facts`](Kernel::host_facts).
    async fn observe(&self, scope: &Scope) -> Result<State, KernelError>;

    /// Writes `ops`, in batches as it likes but in their order. A refusal stops nothing but what stands
    /// on the refused object.
    async fn apply(&self, scope: &Scope, ops: Arc<Vec<Op>>) -> ApplyReport;

    /// Reasons to look again, other than what was written for this overlay; what is written for another one through the
    /// same kernel is a reason. Hints are merged when nobody polls; the stream ends only when
    /// the kernel's thread does. A later call's scope replaces the earlier one's.
    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint>;
}
