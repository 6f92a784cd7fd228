//! The seam to the kernel: four wide verbs over values.

mod routes;

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::net::{Dual, Family, MacAddr, Prefix, is_automatic};
use crate::plan::Plan;
use crate::state::{Link, LinkId, LinkKind, LinkName, State};

pub use routes::Routes;

/// The name of an overlay: never derived from the configuration, so that a new network finds the old one's objects.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OverlayName(String);

/// Text cannot name an overlay. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("overlay name {0:?} must be 1 to 32 characters out of a-z, 0-9 and '-', starting with a letter")]
pub struct OverlayNameError(String);

impl OverlayName {
    /// Checks and keeps `text`.
    ///
    /// # Errors
    /// [`OverlayNameError`]. Final for this input.
    pub fn new(text: &str) -> Result<Self, OverlayNameError> {
        let ok = text.len() <= 32
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if ok { Ok(Self(text.to_owned())) } else { Err(OverlayNameError(text.chars().take(64).collect())) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The link group that marks a device as this overlay's: `0x666b0000 | hash16(name)` (docs/design.md, "Ownership").
    /// It is set in the creating message, so there is no moment at which a device of ours is unmarked
    /// (docs/kernel-facts.md, "Group and alias of a new link").
    pub fn mark(&self) -> u32 {
        // FNV-1a, folded to 16 bits: stable across versions, which a group number in a kernel has to be.
        let hash =
            self.0.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        0x666b_0000 | ((hash >> 16) ^ (hash & 0xffff))
    }

    /// The alias that says the same to people, and to [`owns`](Self::owns).
    pub fn alias(&self) -> String {
        format!("{ALIAS_PREFIX}{}", self.0)
    }

    /// Whether a device with this group and alias belongs to this overlay. An alias that names an overlay decides: two
    /// names may share a hash, and a group that somebody changed does not make the device his. Without one the group
    /// does.
    pub fn owns(&self, group: u32, alias: Option<&str>) -> bool {
        match alias.and_then(|alias| alias.strip_prefix(ALIAS_PREFIX)) {
            Some(name) => name == self.0,
            None => group == self.mark(),
        }
    }
}

const ALIAS_PREFIX: &str = "flannelkit:";

impl Default for OverlayName {
    /// `flannel`.
    fn default() -> Self {
        Self("flannel".to_owned())
    }
}

impl fmt::Display for OverlayName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for OverlayName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The part of the kernel an overlay may look at and write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// Whose devices.
    pub overlay: OverlayName,
    /// Routes inside these are the overlay's territory.
    pub networks: Dual<Prefix>,
    /// The devices wanted, in the order of [`LinkId::Own`].
    pub devices: Vec<Device>,
    /// Interface index of the uplink, if there is one now.
    pub uplink: Option<u32>,
}

/// A device wanted: how to recognise it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: LinkName,
    /// Its kind: what counts for recognising a renamed one.
    pub kind: LinkKind,
}

/// A link seen in a dump, before it has a [`LinkId`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenLink {
    /// Interface index.
    pub index: u32,
    /// Everything else. A [`LinkKind::Vxlan`]'s `lower` is [`LinkId::Other`] here.
    pub link: Link,
}

impl Scope {
    /// Gives ids to the links of a dump: our devices (by mark, whatever their name; else by name), the uplink, and
    /// strangers' or former devices that are in the way. Links that do not concern the overlay get none.
    ///
    /// Both the real and the fake kernel use this, so that they agree.
    pub fn identify(&self, links: &[SeenLink]) -> BTreeMap<u32, LinkId> {
        let ours = |link: &Link| self.overlay.owns(link.group, link.alias.as_deref());
        let mut ids = BTreeMap::new();
        let mut missing = Vec::new();
        for (slot, device) in (0u8..).zip(&self.devices) {
            let marked = links
                .iter()
                .filter(|seen| ours(&seen.link) && same_identity(&seen.link.kind, &device.kind))
                .min_by_key(|seen| (seen.link.name != device.name, seen.index));
            match marked {
                Some(seen) => {
                    ids.insert(seen.index, LinkId::Own(slot));
                }
                None => missing.push((slot, device)),
            }
        }
        // A name is a weaker sign than the mark: it never takes a device from another slot.
        for (slot, device) in missing {
            if let Some(seen) = links.iter().find(|seen| seen.link.name == device.name) {
                ids.entry(seen.index).or_insert(LinkId::Own(slot));
            }
        }
        // A stranger in our place is still reported, as itself: the plan then knows why it cannot create or rename.
        for device in &self.devices {
            let in_place =
                |seen: &&SeenLink| seen.link.name == device.name || takes_place(&seen.link.kind, &device.kind);
            for seen in links.iter().filter(in_place) {
                ids.entry(seen.index).or_insert(LinkId::Other(seen.index));
            }
        }
        for seen in links {
            if Some(seen.index) == self.uplink {
                ids.insert(seen.index, LinkId::Uplink);
            } else if ours(&seen.link) {
                ids.entry(seen.index).or_insert(LinkId::Other(seen.index));
            }
        }
        ids
    }

    /// Whether the ids of links depend on this one: one that gets none while it is alone changes nothing for the others.
    pub fn concerns(&self, link: &SeenLink) -> bool {
        !self.identify(std::slice::from_ref(link)).is_empty()
    }

    /// Whether routes to `prefix` are the overlay's territory.
    pub fn covers(&self, prefix: &Prefix) -> bool {
        self.networks.get(prefix.family()).is_some_and(|network| network.covers(prefix))
    }
}

/// Whether two devices are the same one under different names.
fn same_identity(a: &LinkKind, b: &LinkKind) -> bool {
    match (a, b) {
        (LinkKind::Vxlan(a), LinkKind::Vxlan(b)) => a.vni == b.vni && a.family() == b.family(),
        (a, b) => a == b,
    }
}

/// Whether one device keeps the kernel from creating the other.
fn takes_place(a: &LinkKind, b: &LinkKind) -> bool {
    match (a, b) {
        (LinkKind::Vxlan(a), LinkKind::Vxlan(b)) => a.excludes(b),
        _ => false,
    }
}

/// What an overlay needs to know of the host it runs on. Of links and addresses no more than
/// [`HostFacts::MOST_LINKS`] and [`HostFacts::MOST_ADDRESSES`] are kept, of the addresses of a link no more than
/// [`HostFacts::MOST_OF_A_LINK`], of routes and next hops no more than [`HostFacts::MOST`] of each kind: the first of the
/// dump.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// The links, by interface index.
    pub links: BTreeMap<u32, HostLink>,
    /// The addresses, in the kernel's order within a link.
    pub addresses: Vec<HostAddress>,
    /// How many links, addresses and routes are not kept because there are too many, but for those that
    /// [`MOST_OF_PODS`](Self::MOST_OF_PODS) and [`MOST_BESIDE_LINK_LOCAL`](Self::MOST_BESIDE_LINK_LOCAL) are about.
    /// A route counts too where not all of its next hops are kept.
    pub left_out: usize,
    /// Default routes of the main table, in the order of the dump.
    pub defaults: Vec<HostRoute>,
    /// Routes of the main table without a gateway, and those with one that lie inside such a route. Ours are left
    /// out.
    pub on_link: Routes,
    /// The main table's other routes with a gateway, as far as they lead to an address that was asked for: a router's
    /// table would not fit. Ours and other overlays' are left out.
    pub far: Routes,
    /// Next hops in use by routes that are not ours.
    pub next_hops: BTreeSet<NextHop>,
}

/// A gateway in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NextHop {
    /// Its address.
    pub addr: IpAddr,
    /// Through which interface, where the route says.
    pub link: Option<u32>,
}

/// A link of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLink {
    /// Its name.
    pub name: LinkName,
    /// What it is.
    pub kind: LinkKind,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its link group.
    pub group: u32,
    /// Its alias.
    pub alias: Option<Box<str>>,
}

/// An address of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAddress {
    /// Interface index.
    pub link: u32,
    /// The address.
    pub addr: IpAddr,
    /// Length of its prefix, in bits.
    pub len: u8,
    /// Set by an administrator rather than learnt with a lifetime (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// A privacy address (`IFA_F_TEMPORARY`).
    pub temporary: bool,
    /// Not to be used for new connections (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
}

/// A route of the host, not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostRoute {
    /// Destination.
    pub prefix: Prefix,
    /// Output interface; `None` when the route has several next hops.
    pub link: Option<u32>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Metric.
    pub metric: u32,
}

impl HostFacts {
    /// Most default routes, routes without a gateway, routes inside those, and next hops.
    pub const MOST: usize = 65_536;
    /// Most links.
    pub const MOST_LINKS: usize = 8_192;
    /// Most addresses: one of each family for each link.
    pub const MOST_ADDRESSES: usize = 2 * Self::MOST_LINKS;
    /// Most addresses of one family on one link: a service proxy may hold each service's address on one device.
    pub const MOST_OF_A_LINK: usize = 4_096;
    /// Once there are so many addresses, IPv6 link-local ones are not kept: each pod has one. An uplink that has no other
    /// is then not found.
    pub const MOST_BESIDE_LINK_LOCAL: usize = Self::MOST_ADDRESSES - Self::MOST_OF_A_LINK;
    /// Once there are so many links, veth devices without an address of their own, which pods have, are not kept. An uplink
    /// that is such a device is then not found.
    pub const MOST_OF_PODS: usize = 1_024;

    /// Takes in an address, if there is room. Those of a link and family are given one after the other, as a kernel lists
    /// them. All that read a kernel use this, so that they agree.
    pub fn keep_address(&mut self, address: HostAddress) {
        let is_pods = is_automatic(address.addr);
        let is_beside =
            |other: &HostAddress| other.link == address.link && other.addr.is_ipv4() == address.addr.is_ipv4();
        let first = self.addresses.len().checked_sub(Self::MOST_OF_A_LINK);
        let is_full = first.and_then(|first| self.addresses.get(first)).is_some_and(is_beside);
        let most = if is_pods { Self::MOST_BESIDE_LINK_LOCAL } else { Self::MOST_ADDRESSES };
        if self.addresses.len() < most && !is_full {
            self.addresses.push(address);
        } else {
            self.left_out += usize::from(!is_pods);
        }
    }

    /// The links that have an address of their own, for [`keep_link`](Self::keep_link).
    pub fn addressed(&self) -> BTreeSet<u32> {
        self.addresses.iter().filter(|address| !is_automatic(address.addr)).map(|address| address.link).collect()
    }

    /// Takes in a link, if there is room. `addressed` are those that have an address. All that read a kernel use this, so
    /// that they agree.
    pub fn keep_link(&mut self, index: u32, link: HostLink, addressed: &BTreeSet<u32>) {
        let is_pods = link.kind.is_veth() && !addressed.contains(&index);
        if self.links.len() < if is_pods { Self::MOST_OF_PODS } else { Self::MOST_LINKS } {
            self.links.insert(index, link);
        } else {
            self.left_out += usize::from(!is_pods);
        }
    }

    /// The interface through which `addr` is reached without a gateway, if it is (docs/compatibility.md, "Direct
    /// routing").
    pub fn on_link(&self, addr: IpAddr) -> Option<u32> {
        let best = self.on_link.to(addr)?;
        match best.gateway {
            None => best.link,
            Some(_) => None,
        }
    }

    /// The route of the main table that packets to `addr` take, as far as prefixes and metrics tell. `addr` has to be
    /// one that [`Kernel::host_facts`] was asked for.
    pub fn route_to(&self, addr: IpAddr) -> Option<&HostRoute> {
        let defaults = self.defaults.iter().filter(|route| route.prefix.contains(addr));
        let fits = self.on_link.to(addr).into_iter().chain(self.far.to(addr)).chain(defaults);
        fits.min_by_key(|route| (std::cmp::Reverse(route.prefix.len()), route.metric))
    }

    /// Whether `addr` is in the prefix of an address of the host, whatever routes there are.
    pub fn is_connected(&self, addr: IpAddr) -> bool {
        self.connected(Family::of(addr)).any(|prefix| prefix.contains(addr))
    }

    /// The prefixes the host is connected to: those of its addresses. A route without a gateway alone connects nobody;
    /// anybody may have written it.
    pub fn connected(&self, family: Family) -> impl Iterator<Item = Prefix> + '_ {
        let prefixes = self.addresses.iter().filter_map(|address| Prefix::masked(address.addr, address.len).ok());
        prefixes.filter(move |prefix| prefix.family() == family)
    }
}

/// A reason to look at the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// Something in the scope changed, and it was not us.
    Changed,
    /// What [`host_facts`](Kernel::host_facts) shows of the host changed, and it was not us: a link came, went or changed
    /// (name, kind, Ethernet address, MTU, state, group, alias), or an address, or a route of the main table that is a
    /// default route, has no gateway, or has one and lies inside the prefix of an address.
    ///
    /// Not raised for what goes on all the time on a busy host: veth devices without an address, which pods have,
    /// IPv6 link-local addresses, other routes through a gateway, and routes of this library's overlays or through
    /// devices of the scope. A later read shows those too.
    FactsChanged,
    /// Notifications were lost: anything may have changed.
    Lost,
    /// Notifications cannot be heard until the next hint, which is [`Lost`](Self::Lost): anything may change unseen.
    Unheard,
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
    #[error("kernel refused {doing}: {}{}", errno_text(*errno), detail(message))]
    Refused {
        /// What was being done, with the object.
        doing: String,
        /// `errno`, positive.
        errno: i32,
        /// The kernel's own words (extended ACK), possibly empty.
        message: String,
    },
    /// No answer in time. What happened is unknown: look before writing.
    #[error("kernel did not answer within {within:?} while {doing}")]
    Timeout {
        /// What was being done.
        doing: String,
        /// The deadline.
        within: std::time::Duration,
    },
    /// Answers were lost or the socket failed; it has been opened anew. What happened is unknown: look before
    /// writing.
    #[error("lost contact with the kernel while {doing}: {reason}")]
    Lost {
        /// What was being done.
        doing: String,
        /// Why.
        reason: String,
    },
    /// The kernel cannot do it at all. Final; `hint` says what to install or choose.
    #[error("{what} is not supported by this kernel: {hint}")]
    Unsupported {
        /// What.
        what: String,
        /// The remedy.
        hint: String,
    },
    /// No privilege. Final; `hint` says which.
    #[error("no permission for {doing}: {hint}")]
    Denied {
        /// What was being done.
        doing: String,
        /// The remedy.
        hint: String,
    },
    /// Another overlay in this network namespace has the same name or an overlapping network.
    #[error("overlay {other} is already running in this network namespace: {hint}")]
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

/// What came of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ApplyReport {
    /// Operations the kernel acknowledged.
    pub applied: usize,
    /// Operations it refused, by their place in [`Plan::ops`], in ascending order.
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
#[cfg_attr(feature = "testing", mockall::automock)]
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

    /// Writes `plan`, in batches as it likes but in order of [`Plan::ops`]. A refusal stops nothing but what stands
    /// on the refused object.
    async fn apply(&self, scope: &Scope, plan: Arc<Plan>) -> ApplyReport;

    /// Reasons to look again, other than what was written for this overlay; what is written for another one through the
    /// same kernel is a reason. Hints are merged when nobody polls; the stream ends only when
    /// the kernel's thread does. A later call's scope replaces the earlier one's.
    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint>;
}
