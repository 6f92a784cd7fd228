//! Which objects in a kernel belong to an overlay (docs/design.md, "Ownership").

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::link_kind::{LinkKind, Vxlan};
use super::objects::{AddressKey, Link, LinkId, NeighbourKey, Route, RouteKind, RouteSlot};
use super::scope::Scope;
use crate::net::{Family, Prefix, is_link_local};

/// The name of an overlay. It is never derived from the configuration, so that objects of a former network are found
/// again after a change.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OverlayName(String);

/// The text is not a valid overlay name. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("overlay name {0:?} must be 1 to 32 characters out of a-z, 0-9 and '-', starting with a letter")]
pub struct OverlayNameError(String);

impl OverlayName {
    /// Validates `text` as a name.
    ///
    /// # Errors
    /// [`OverlayNameError`]. Final for this input.
    pub fn new(text: &str) -> Result<Self, OverlayNameError> {
        let ok = text.len() <= 32
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if ok { Ok(Self(text.to_owned())) } else { Err(OverlayNameError(text.chars().take(64).collect())) }
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the link group that marks a device as this overlay's: `0x666b0000 | hash16(name)` (docs/design.md,
    /// "Ownership"). It is set in the message that creates the device, so the device is never unmarked
    /// (docs/kernel-facts.md, "Group and alias of a new link"). A TUN device cannot be created that way: it is marked
    /// before it is made persistent.
    pub fn mark(&self) -> u32 {
        // FNV-1a, folded to 16 bits. It must be stable across versions, because the kernel keeps the group number.
        let hash =
            self.0.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        MARK | ((hash >> 16) ^ (hash & 0xffff))
    }

    /// Returns the alias of the overlay's devices, which names the overlay in readable form and for
    /// [`owns`](Self::owns).
    pub fn alias(&self) -> String {
        format!("{ALIAS_PREFIX}{}", self.0)
    }

    /// Returns whether a device with this group and alias belongs to this overlay. An alias that names an overlay takes
    /// precedence: two names may have the same hash, and another program may change the group. Without such an alias
    /// the group decides.
    pub fn owns(&self, group: u32, alias: Option<&str>) -> bool {
        match alias.and_then(|alias| alias.strip_prefix(ALIAS_PREFIX)) {
            Some(name) => name == self.0,
            None => group == self.mark(),
        }
    }
}

/// Whether a device has the mark of an overlay of another name.
pub(super) fn is_of_another(overlay: &OverlayName, link: &Link) -> bool {
    let (group, alias) = (link.group, link.alias.as_deref());
    let is_marked = group & MARK_MASK == MARK || alias.is_some_and(|alias| alias.starts_with(ALIAS_PREFIX));
    is_marked && !overlay.owns(group, alias)
}

/// The part of a mark that is the same for all overlays.
const MARK: u32 = 0x666b_0000;
const MARK_MASK: u32 = 0xffff_0000;

const ALIAS_PREFIX: &str = "flannelkit:";

impl Default for OverlayName {
    /// `flannel`.
    fn default() -> Self {
        Self("flannel".to_owned())
    }
}

impl FromStr for OverlayName {
    type Err = OverlayNameError;

    fn from_str(text: &str) -> Result<Self, OverlayNameError> {
        Self::new(text)
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

/// Whether the overlay creates devices of this kind, and does not want this one as [external](LinkKind::External).
pub(crate) fn is_made_here(kind: &LinkKind, scope: &Scope) -> bool {
    let is_external = |wanted: &LinkKind| matches!(wanted, LinkKind::External(_)) && wanted.is_same_device(kind);
    kind.is_made_here() && !scope.devices.iter().any(|device| is_external(&device.kind))
}

/// Whether a device is the overlay's: it has the overlay's mark, and its kind is created by the overlay or wanted as
/// [external](LinkKind::External).
pub(crate) fn owns_link(link: &Link, scope: &Scope) -> bool {
    let is_external = || scope.devices.iter().any(|device| device.kind.is_same_device(&link.kind));
    scope.overlay.owns(link.group, link.alias.as_deref()) && (link.kind.is_made_here() || is_external())
}

/// Whether the overlay may delete a seen address. Link-local addresses belong to the kernel.
pub(crate) fn owns_address(key: &AddressKey, scope: &Scope) -> bool {
    !is_link_local(key.addr) && owns_child(key.link, key.addr, scope)
}

/// Whether the overlay may delete a seen neighbour.
pub(crate) fn owns_neighbour(key: &NeighbourKey, scope: &Scope) -> bool {
    owns_child(key.link, key.addr, scope)
}

/// Whether an object for `addr` on a link is the overlay's. On a device that another program creates, objects outside
/// the overlay's networks are that program's.
fn owns_child(link: LinkId, addr: IpAddr, scope: &Scope) -> bool {
    let LinkId::Own(slot) = link else { return false };
    let is_inside = || scope.networks.get(Family::of(addr)).is_some_and(|network| network.contains(addr));
    scope.devices.get(usize::from(slot)).is_none_or(|device| device.kind.is_made_here()) || is_inside()
}

/// Returns the public address of the accepted peer that holds exactly this subnet. A `boot` route to the subnet with
/// this gateway, through a device that is not the overlay's, was left by Go flannel (docs/design.md, "Ownership").
pub type Claims<'a> = dyn Fn(&Prefix) -> Option<IpAddr> + 'a;

/// Returns whether the overlay may change or delete a seen route. `links` are the seen links.
pub fn owns_route(
    prefix: &Prefix,
    route: &Route,
    scope: &Scope,
    links: &BTreeMap<LinkId, Link>,
    claims: &Claims<'_>,
) -> bool {
    if !scope.covers(prefix) {
        return false;
    }
    // Another overlay may have this network now, and be stopped: nothing else shows then that the route is its own.
    let link = || route.link.and_then(|link| links.get(&link));
    if !scope.is_in_network(prefix) && link().is_some_and(|link| is_of_another(&scope.overlay, link)) {
        return false;
    }
    match route.kind {
        RouteKind::Foreign => return false,
        RouteKind::Blackhole => return route.has_own_protocol(),
        RouteKind::Unicast => {}
    }
    if route.has_own_protocol() {
        return true;
    }
    let is_plain = route.slot() == RouteSlot::MAIN && route.source().is_none();
    if route.protocol != Route::BOOT || !is_plain {
        return false;
    }
    // Routes that Go flannel leaves.
    match (route.link, route.gateway) {
        (Some(LinkId::Own(_)), Some(gateway)) => route.onlink && gateway == prefix.addr(),
        (_, Some(gateway)) => claims(prefix) == Some(gateway),
        (_, None) => false,
    }
}

/// Whether an unmarked device has the wanted name and this process carries its packets.
pub(crate) fn is_carried_here(want: &Link, have: &Link) -> bool {
    let carried = matches!(&have.kind, LinkKind::Tun(tun) if tun.tunnel.is_some());
    carried && is_unmarked(have) && have.name == want.name && want.kind.is_same_device(&have.kind)
}

fn is_unmarked(link: &Link) -> bool {
    link.group == 0 && link.alias.is_none()
}

/// Whether an unmarked device has the wanted name and was created by Go flannel: it is then adopted. A TUN device of Go
/// flannel does not outlive its process, so any other unmarked device is foreign.
pub(crate) fn is_go_flannels(want: &Link, have: &Link) -> bool {
    let vxlan = matches!(have.kind, LinkKind::Vxlan(Vxlan { remote: None, .. }));
    is_unmarked(have) && vxlan && have.name == want.name && want.kind.is_compatible(&have.kind)
}
