//! The part of the kernel state that an overlay may read and write.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::host::HostFacts;
use super::link_kind::LinkKind;
use super::objects::{Link, LinkId, LinkName, RouteSlot, State};
use super::ownership::{OverlayName, is_of_another};
use crate::net::{Dual, Family, Prefix};

/// The part of the kernel state that an overlay may read and write.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Scope {
    /// The overlay that owns the devices.
    pub overlay: OverlayName,
    /// The network. Wanted routes lie inside it.
    pub networks: Dual<Prefix>,
    /// Networks of former runs, where routes of the overlay may be left. No routes are wanted there.
    pub former: Vec<Prefix>,
    /// The wanted devices, in the order of [`LinkId::Own`].
    pub devices: Vec<Device>,
    /// Tables and metrics of the overlay's routes, in addition to [`RouteSlot::MAIN`]. Routes in other slots are not
    /// read.
    pub slots: Vec<RouteSlot>,
    /// The interface index of the uplink, if there is one.
    pub uplink: Option<u32>,
    /// The names of the host's links, for texts.
    pub names: LinkNames,
}

/// The names of the host's links, for texts. They are no part of what a [`Scope`] describes: all values are equal.
#[derive(Clone, Default)]
pub struct LinkNames(Arc<HostFacts>);

impl LinkNames {
    /// Returns the names in `host`.
    pub fn of(host: Arc<HostFacts>) -> Self {
        Self(host)
    }

    /// Returns the name of the link with this interface index.
    pub fn get(&self, index: u32) -> Option<&LinkName> {
        self.0.links.get(&index).map(|link| &link.name)
    }
}

impl PartialEq for LinkNames {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for LinkNames {}

impl fmt::Debug for LinkNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LinkNames").field(&self.0.links.len()).finish()
    }
}

/// How a wanted device is recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Device {
    /// Its name.
    pub name: LinkName,
    /// Its kind, by which a renamed device is recognised.
    pub kind: LinkKind,
}

impl Device {
    /// Creates the description of a device with this name and kind.
    pub fn new(name: LinkName, kind: LinkKind) -> Self {
        Self { name, kind }
    }

    /// Returns the description of `link`.
    pub fn of(link: &Link) -> Self {
        Self::new(link.name.clone(), link.kind.clone())
    }
}

/// A link seen in a dump, before it has a [`LinkId`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SeenLink {
    /// Interface index.
    pub index: u32,
    /// The link itself. In a [`LinkKind::Vxlan`], `lower` is [`LinkId::Other`] here.
    pub link: Link,
    /// Whether it is up and has a carrier.
    pub carrier: bool,
}

impl Scope {
    /// Creates a scope of the networks alone: without wanted devices, further tables, former networks or an uplink.
    pub fn new(overlay: OverlayName, networks: Dual<Prefix>) -> Self {
        Self {
            overlay,
            networks,
            former: Vec::new(),
            devices: Vec::new(),
            slots: Vec::new(),
            uplink: None,
            names: LinkNames::default(),
        }
    }

    /// Assigns ids to the links of a dump: the overlay's devices (by mark, under any name; else by name, except
    /// external ones), the uplink, foreign or former devices that are in the way, and, if there are former networks,
    /// devices of other overlays. Links that do not concern the overlay get no id.
    ///
    /// Shared by the real and the fake kernel, so that both behave alike.
    pub fn identify(&self, links: &[SeenLink]) -> BTreeMap<u32, LinkId> {
        let ours = |link: &Link| self.overlay.owns(link.group, link.alias.as_deref());
        let mut ids = BTreeMap::new();
        let mut missing = Vec::new();
        for (slot, device) in (0u8..).zip(&self.devices) {
            let marked = links
                .iter()
                .filter(|seen| ours(&seen.link) && seen.link.kind.is_same_device(&device.kind))
                .filter(|seen| !ids.contains_key(&seen.index))
                .min_by_key(|seen| (seen.link.name != device.name, seen.index));
            match marked {
                Some(seen) => {
                    ids.insert(seen.index, LinkId::Own(slot));
                }
                None => missing.push((slot, device)),
            }
        }
        // A name is weaker evidence than the mark: it never takes a device from another slot.
        for (slot, device) in missing {
            // An external device is recognised by its mark only.
            let is_it = |seen: &&SeenLink| seen.link.name == device.name && device.kind.is_made_here();
            if let Some(seen) = links.iter().find(is_it) {
                ids.entry(seen.index).or_insert(LinkId::Own(slot));
            }
        }
        // A foreign device under a wanted name is reported with its own id, so that the plan can say why it cannot
        // create or rename.
        for device in &self.devices {
            let in_place = |seen: &&SeenLink| seen.link.name == device.name || seen.link.kind.excludes(&device.kind);
            for seen in links.iter().filter(in_place) {
                ids.entry(seen.index).or_insert(LinkId::Other(seen.index));
            }
        }
        for seen in links {
            if Some(seen.index) == self.uplink {
                ids.insert(seen.index, LinkId::Uplink);
            } else if ours(&seen.link) || (!self.former.is_empty() && is_of_another(&self.overlay, &seen.link)) {
                ids.entry(seen.index).or_insert(LinkId::Other(seen.index));
            }
        }
        ids
    }

    /// Returns whether this link affects the ids that [`identify`](Self::identify) assigns. A link that gets no id by
    /// itself does not affect the ids of others.
    pub fn concerns(&self, link: &SeenLink) -> bool {
        !self.identify(std::slice::from_ref(link)).is_empty()
    }

    /// Sets the overlay's mark on the devices of a wanted state, as an agent does.
    pub fn mark(&self, wanted: &mut State) {
        for (id, link) in &mut wanted.links {
            if matches!(id, LinkId::Own(_)) {
                (link.group, link.alias) = (self.overlay.mark(), Some(self.overlay.alias().into()));
            }
        }
    }

    /// Returns whether routes to `prefix` may be wanted.
    pub fn is_in_network(&self, prefix: &Prefix) -> bool {
        self.networks.get(prefix.family()).is_some_and(|network| network.covers(prefix))
    }

    /// Returns whether the overlay may read and delete routes to `prefix`, which lies in its network or in a former
    /// one.
    pub fn covers(&self, prefix: &Prefix) -> bool {
        self.is_in_network(prefix) || self.former.iter().any(|former| former.covers(prefix))
    }

    /// Returns whether routes of this family with this table and metric are read.
    pub fn has_slot(&self, slot: RouteSlot, family: Family) -> bool {
        let slot = slot.normalized(family);
        slot == RouteSlot::MAIN || (slot.table != 0 && self.slots.iter().any(|named| named.normalized(family) == slot))
    }

    /// Returns the families whose routes are read.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        let is_former = |family| self.former.iter().any(|former| former.family() == family);
        Family::BOTH.into_iter().filter(move |family| self.networks.get(*family).is_some() || is_former(*family))
    }
}
