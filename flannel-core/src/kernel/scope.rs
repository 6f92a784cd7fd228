//! The part of the kernel an overlay may look at and write.

use std::collections::BTreeMap;

use super::link_kind::LinkKind;
use super::objects::{Link, LinkId, LinkName, RouteSlot, State};
use super::ownership::OverlayName;
use crate::net::{Dual, Family, Prefix};

/// The part of the kernel an overlay may look at and write.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Scope {
    /// Whose devices.
    pub overlay: OverlayName,
    /// The network. Routes that are wanted lie inside it.
    pub networks: Dual<Prefix>,
    /// Networks of former runs, where routes of the overlay may be left. Nothing is wanted there.
    pub former: Vec<Prefix>,
    /// The devices wanted, in the order of [`LinkId::Own`].
    pub devices: Vec<Device>,
    /// Tables and metrics of the overlay's routes, beside [`RouteSlot::MAIN`]. Routes in others are not looked at.
    pub slots: Vec<RouteSlot>,
    /// Interface index of the uplink, if there is one now.
    pub uplink: Option<u32>,
}

/// A device wanted: how to recognise it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Device {
    /// Its name.
    pub name: LinkName,
    /// Its kind: what counts for recognising a renamed one.
    pub kind: LinkKind,
}

impl Device {
    /// A device of this name and kind.
    pub fn new(name: LinkName, kind: LinkKind) -> Self {
        Self { name, kind }
    }

    /// What `link` is recognised by.
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
    /// Everything else. A [`LinkKind::Vxlan`]'s `lower` is [`LinkId::Other`] here.
    pub link: Link,
    /// Whether it is up and has a carrier.
    pub carrier: bool,
}

impl Scope {
    /// The network alone: no devices are wanted, no other table or former network is looked at, and there is no uplink.
    pub fn new(overlay: OverlayName, networks: Dual<Prefix>) -> Self {
        Self { overlay, networks, former: Vec::new(), devices: Vec::new(), slots: Vec::new(), uplink: None }
    }

    /// Gives ids to the links of a dump: our devices (by mark, whatever their name; else by name, but for external ones), the
    /// uplink, and foreign or former devices that are in the way. Links that do not concern the overlay get none.
    ///
    /// Both the real and the fake kernel use this, so that they agree.
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
        // A name is a weaker sign than the mark: it never takes a device from another slot.
        for (slot, device) in missing {
            // Whoever makes an external device marks it.
            let is_it = |seen: &&SeenLink| seen.link.name == device.name && device.kind.is_made_here();
            if let Some(seen) = links.iter().find(is_it) {
                ids.entry(seen.index).or_insert(LinkId::Own(slot));
            }
        }
        // A foreign device in our place is still reported, as itself: the plan then knows why it cannot create or rename.
        for device in &self.devices {
            let in_place = |seen: &&SeenLink| seen.link.name == device.name || seen.link.kind.excludes(&device.kind);
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

    /// Puts the overlay's mark on the devices of a wanted state, as an agent does.
    pub fn mark(&self, wanted: &mut State) {
        for (id, link) in &mut wanted.links {
            if matches!(id, LinkId::Own(_)) {
                (link.group, link.alias) = (self.overlay.mark(), Some(self.overlay.alias().into()));
            }
        }
    }

    /// Whether routes to `prefix` may be wanted.
    pub fn is_in_network(&self, prefix: &Prefix) -> bool {
        self.networks.get(prefix.family()).is_some_and(|network| network.covers(prefix))
    }

    /// Whether the overlay may look at and delete routes to `prefix`: in its network, or in a former one.
    pub fn covers(&self, prefix: &Prefix) -> bool {
        self.is_in_network(prefix) || self.former.iter().any(|former| former.covers(prefix))
    }

    /// Whether routes of this family with this table and metric are looked at.
    pub fn has_slot(&self, slot: RouteSlot, family: Family) -> bool {
        let slot = slot.normalized(family);
        slot == RouteSlot::MAIN || (slot.table != 0 && self.slots.iter().any(|named| named.normalized(family) == slot))
    }

    /// The families of which routes are looked at.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        let is_former = |family| self.former.iter().any(|former| former.family() == family);
        Family::BOTH.into_iter().filter(move |family| self.networks.get(*family).is_some() || is_former(*family))
    }
}
