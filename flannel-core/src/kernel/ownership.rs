//! Which objects in a kernel belong to an overlay (docs/design.md, "Ownership").

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::link_kind::{LinkKind, Vxlan};
use super::objects::{AddressKey, Link, LinkId, NeighbourKey, Route, RouteKind, RouteSlot};
use super::scope::Scope;
use crate::net::{Family, Prefix, is_link_local};

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
    /// (docs/kernel-facts.md, "Group and alias of a new link"). A TUN device cannot be made like that: it is marked before it
    /// is let outlive its process.
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

/// Whether a device of this kind is one that the overlay makes, and not one that is wanted as
/// [external](LinkKind::External).
pub(crate) fn is_made_here(kind: &LinkKind, scope: &Scope) -> bool {
    let is_external = |wanted: &LinkKind| matches!(wanted, LinkKind::External(_)) && wanted.is_same_device(kind);
    kind.is_made_here() && !scope.devices.iter().any(|device| is_external(&device.kind))
}

/// Whether a device is the overlay's: it bears its mark, and is of a kind that is made here or wanted as
/// [external](LinkKind::External).
pub(crate) fn owns_link(link: &Link, scope: &Scope) -> bool {
    let is_external = || scope.devices.iter().any(|device| device.kind.is_same_device(&link.kind));
    scope.overlay.owns(link.group, link.alias.as_deref()) && (link.kind.is_made_here() || is_external())
}

/// Whether a seen address is ours to delete. Link-local ones are the kernel's.
pub(crate) fn owns_address(key: &AddressKey, scope: &Scope) -> bool {
    !is_link_local(key.addr) && owns_child(key.link, key.addr, scope)
}

/// Whether a seen neighbour is ours to delete.
pub(crate) fn owns_neighbour(key: &NeighbourKey, scope: &Scope) -> bool {
    owns_child(key.link, key.addr, scope)
}

/// Whether what a link has for `addr` is ours. On a device that another program makes it is that program's where it lies
/// outside our networks.
fn owns_child(link: LinkId, addr: IpAddr, scope: &Scope) -> bool {
    let LinkId::Own(slot) = link else { return false };
    let is_inside = || scope.networks.get(Family::of(addr)).is_some_and(|network| network.contains(addr));
    scope.devices.get(usize::from(slot)).is_none_or(|device| device.kind.is_made_here()) || is_inside()
}

/// Who may have left a `boot` route through a device that is not ours: the public address of the accepted peer that
/// holds exactly this subnet (docs/design.md, "Ownership").
pub type Claims<'a> = dyn Fn(&Prefix) -> Option<IpAddr> + 'a;

/// Whether a seen route is ours to change or delete.
pub fn owns_route(prefix: &Prefix, route: &Route, scope: &Scope, claims: &Claims<'_>) -> bool {
    if !scope.covers(prefix) {
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
    // What Go flannel leaves.
    match (route.link, route.gateway) {
        (Some(LinkId::Own(_)), Some(gateway)) => route.onlink && gateway == prefix.addr(),
        (_, Some(gateway)) => claims(prefix) == Some(gateway),
        (_, None) => false,
    }
}

/// Whether an unmarked device is one whose packets this process carries, under our name.
pub(crate) fn is_carried_here(want: &Link, have: &Link) -> bool {
    let carried = matches!(&have.kind, LinkKind::Tun(tun) if tun.tunnel.is_some());
    carried && is_unmarked(have) && have.name == want.name && want.kind.is_same_device(&have.kind)
}

fn is_unmarked(link: &Link) -> bool {
    link.group == 0 && link.alias.is_none()
}

/// Whether an unmarked device is what Go flannel makes under our name, and is therefore adopted. Go makes no TUN that
/// outlives it, so any other unmarked device is foreign.
pub(crate) fn is_go_flannels(want: &Link, have: &Link) -> bool {
    let vxlan = matches!(have.kind, LinkKind::Vxlan(Vxlan { remote: None, .. }));
    is_unmarked(have) && vxlan && have.name == want.name && want.kind.is_compatible(&have.kind)
}
