//! Changes of the host: which uplink is in use, and what this node publishes.
//!
//! Other nodes send to a node's addresses, and in etcd they are its identity. So interface and addresses stay the same
//! for as long as they can be used. Others replace them only after the host has offered them for [`SETTLE`], and never
//! an address that another node publishes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::agent::inputs::{self, SETTLE, Settling};
use crate::agent::readiness::UplinkState;
use crate::agent::renewal::Address;
use crate::agent::status::Event;
use crate::backend::{LocalNode, NodeContext};
use crate::clock::BootTime;
use crate::kernel::{HostFacts, KernelError};
use crate::net::{Dual, Family};
use crate::text::chain;
use crate::uplink::{Select, UplinkError};

use super::{Cause, Machine, Round, prefixes_of};

/// The shortest time between two changes of the MAC address, which limits the rate even if another node copies each new
/// one.
const MAC_PAUSE: Duration = Duration::from_secs(10);
/// The maximum number of MAC addresses that are remembered as taken.
const MOST_TAKEN: usize = 64;

/// Whether the host was read for the current uplink selection.
#[derive(Debug)]
pub(super) enum Selection {
    InUse,
    /// The next read of the host uses this selection.
    Chosen(Select),
    /// The read under way uses a new selection.
    Sought,
}

impl Machine {
    /// Handles another uplink selection: the host is read again for it.
    pub(super) fn select_uplink(&mut self, now: BootTime, select: Select) {
        self.selection = Selection::Chosen(select);
        self.audit.facts = true;
        self.audit_at(now, Cause::Hint);
    }

    /// A read of the host begins: a new selection is used from now on.
    pub(super) fn take_selection(&mut self) {
        self.selection = match std::mem::replace(&mut self.selection, Selection::InUse) {
            Selection::Chosen(select) => {
                Arc::make_mut(&mut self.settings).uplink = select;
                Selection::Sought
            }
            other => other,
        };
    }

    pub(super) fn facts(&mut self, now: BootTime, facts: Result<HostFacts, KernelError>) {
        self.round = Round::Idle;
        let facts = match facts {
            Ok(facts) => Arc::new(facts),
            Err(error) => {
                self.audit.facts = true;
                return self.kernel_trouble(now, error);
            }
        };
        let local = Arc::clone(&self.local);
        let old = &local.context;
        let found = self.find_uplink(old, &facts);
        let lost = match &found {
            Ok(found) if self.has_settled(now, old, found) => inputs::uplink_trouble(found),
            Ok(found) => Some(format!(
                "{} cannot be used with {} any more; {} with {} is used after {SETTLE:?} unless that changes",
                old.uplink.name,
                addresses(&old.uplink.addrs),
                found.uplink.name,
                addresses(&found.uplink.addrs)
            )),
            Err(error) => {
                self.settling = None;
                Some(chain(error))
            }
        };
        if matches!(self.selection, Selection::Sought) {
            self.selection = Selection::InUse;
        }
        let was_up = self.status.uplink.up().is_some();
        let mut context = match found {
            Ok(context) if self.settling.is_none() => context,
            _ => NodeContext { host: facts, ..old.clone() },
        };
        let uplink = match lost {
            None => UplinkState::Up(context.uplink.clone()),
            Some(error) => self.status.uplink.lost(Some(context.uplink.clone()), now, error),
        };
        match &uplink {
            UplinkState::Lost { error, .. } if was_up => self.events.push(Event::UplinkLost(error.clone())),
            UplinkState::Up(uplink) if !was_up => self.events.push(Event::UplinkBack(uplink.clone())),
            UplinkState::Lost { .. } | UplinkState::Up(_) | UplinkState::Unknown => {}
        }
        // The published attributes take precedence over those of a device.
        context.previous = Some(Arc::clone(&local.lease));
        let moved = context.uplink != old.uplink || context.public != old.public;
        if moved {
            self.events.push(Event::UplinkChanged { before: old.uplink.clone(), uplink: context.uplink.clone() });
        }
        if moved || context.host != old.host {
            // Only the host differs from what is published now.
            let before = NodeContext { host: Arc::clone(&old.host), ..context.clone() };
            match self.backend.advertise(&context) {
                // A record that stays the same is not written again.
                Ok(attrs) if moved || self.backend.advertise(&before).ok().as_ref() != Some(&attrs) => {
                    self.renewal.publish(attrs, now);
                }
                Ok(_) => {}
                Err(error) if moved => self.events.push(Event::AdvertiseFailed(chain(&error))),
                // The record stays as it is. The backend skips what it can no longer use.
                Err(_) => {}
            }
        }
        let mtu = inputs::pod_mtu(&*self.backend, &context);
        let unknown = context.host.left_out;
        let status = &self.status;
        if (&status.uplink, status.mtu, status.unknown_host_objects) != (&uplink, Some(mtu), unknown) {
            self.show(|status| {
                (status.uplink, status.mtu, status.unknown_host_objects) = (uplink, Some(mtu), unknown);
            });
        }
        if context != *old {
            self.audit.expected |= context.uplink != old.uplink;
            self.set_local(now, LocalNode { context, lease: Arc::clone(&self.local.lease) });
        }
        self.audit_at(now, Cause::Hint);
    }

    /// Handles news of the store for this node: addresses to publish, or something that a lease waits for.
    pub(super) fn this_node(&mut self, now: BootTime, public: Dual<IpAddr>) {
        self.renewal.store_changed(now);
        if self.settings.store_public != public {
            Arc::make_mut(&mut self.settings).store_public = public;
            self.audit.facts = true;
            self.audit_at(now, Cause::Hint);
        }
    }

    /// Publishes another MAC address if an older record has the same one, by chance or on purpose: other nodes accept
    /// the older record and refuse this node's.
    pub(super) fn change_shared_mac(&mut self, now: BootTime) {
        if self.mac_changed.is_some_and(|changed| now < changed.after(MAC_PAUSE)) || !self.renewal.is_held() {
            return;
        }
        let Some(mac) = self.admission.mac_shared_with_older() else { return };
        self.mac_changed = Some(now);
        let mut context = self.local.context.clone();
        if context.taken.len() >= MOST_TAKEN {
            context.taken.clear();
        }
        context.taken.insert(mac);
        match self.backend.advertise(&context) {
            Ok(attrs) => self.renewal.publish(attrs, now),
            Err(error) => self.events.push(Event::AdvertiseFailed(chain(&error))),
        }
        self.set_local(now, LocalNode { context, lease: Arc::clone(&self.local.lease) });
    }

    /// When the MAC address may be changed again, if it has to be.
    pub(super) fn mac_change_due(&self) -> Option<BootTime> {
        let due = self.mac_changed.map(|changed| changed.after(MAC_PAUSE))?;
        (self.renewal.is_held() && self.admission.mac_shared_with_older().is_some()).then_some(due)
    }

    /// Whether the host has the address that identifies this node. Another node may have it once the host has lost it,
    /// and a store that identifies nodes by address would then give this node the other node's lease.
    pub(super) fn address(&self) -> Address {
        let is_read = !self.audit.facts && !matches!(self.round, Round::Facts);
        if self.settings.node.is_some() {
            // The node is identified by name: the lease is this node's whichever host has the address.
            Address::Held
        } else if lacks_identity(&self.local.context) {
            Address::Lost
        } else if is_read || !self.synced {
            // The host is not read again before the records are listed.
            Address::Held
        } else {
            Address::Unknown
        }
    }

    pub(super) fn set_local(&mut self, now: BootTime, local: LocalNode) {
        self.local = Arc::new(local);
        let mut scope = inputs::scope(&self.settings, &*self.backend, &self.local);
        scope.former.clone_from(&self.scope.former);
        if scope != self.scope {
            self.scope = scope;
            self.scope_changed(now);
        }
        self.judge_host(now);
    }

    /// The hints of the former scope end here: the host and the kernel are read at `due` instead.
    pub(super) fn scope_changed(&mut self, due: BootTime) {
        self.audit.facts = true;
        self.audit_at(due, Cause::Expected);
    }

    /// Judges all records again by this node's current state.
    pub(super) fn judge_host(&mut self, now: BootTime) {
        let host = inputs::host(&self.settings, &self.local, self.admission.rules());
        let changes = self.admission.set_host(host);
        self.stale.peers = true;
        self.protect_named();
        for change in changes {
            self.count(&change);
            for prefix in prefixes_of(change.new.as_deref()) {
                self.prefix_in_use(now, &prefix);
            }
            self.show_peer(&change);
            self.note(change);
        }
    }

    /// When the host has to be read again for a change that waits to be stable.
    pub(super) fn settles(&self) -> Option<BootTime> {
        let until = self.settling.as_ref().map(|settling| settling.until)?;
        // After a failed read the back-off applies here too.
        Some(self.audit.not_before.map_or(until, |not_before| not_before.max(until)))
    }

    /// The uplink that the host offers. Records are searched only if it differs from the one in use.
    fn find_uplink(&self, old: &NodeContext, facts: &Arc<HostFacts>) -> Result<NodeContext, UplinkError> {
        let find = |others| inputs::context(&self.settings, old, Arc::clone(facts), others);
        let nobody = BTreeSet::new();
        let found = find(&nobody);
        if found.as_ref().is_ok_and(|found| found.public == old.public) {
            return found;
        }
        let own = self.local.lease.key.clone();
        let others = self.admission.claims().filter(|claim| *claim.key != own);
        let published: BTreeSet<IpAddr> =
            others.flat_map(|claim| [claim.public.v4, claim.public.v6]).flatten().collect();
        find(&published)
    }

    /// Whether the found uplink may be used now: at once after a new selection, or if its addresses are the same; else
    /// once it has been stable.
    fn has_settled(&mut self, now: BootTime, old: &NodeContext, found: &NodeContext) -> bool {
        if matches!(self.selection, Selection::Sought) {
            // An embedder selected it: no wait for stability is needed.
            self.settling = None;
            return true;
        }
        self.settling = Settling::of(self.settling, &old.uplink.addrs, &found.uplink.addrs, now);
        self.settling.is_none()
    }
}

/// Whether the address that identifies this node was the host's own and is so no longer.
fn lacks_identity(NodeContext { uplink, public, host, .. }: &NodeContext) -> bool {
    let is_there = |addr: &IpAddr| host.addresses.iter().any(|found| found.addr == *addr);
    // As for the identity itself: IPv4 if there is one.
    let family = if public.v4.is_some() { Family::V4 } else { Family::V6 };
    let is_own = public.get(family) == uplink.addrs.get(family);
    // If addresses were left out of the facts, it may be one of those.
    let of_uplink = host.addresses.iter().filter(|found| found.link == uplink.index).count();
    let is_complete = of_uplink < HostFacts::MOST_OF_A_LINK && host.addresses.len() < HostFacts::MOST_BESIDE_LINK_LOCAL;
    is_own && is_complete && !public.get(family).is_some_and(is_there)
}

fn addresses(addrs: &Dual<IpAddr>) -> String {
    let texts: Vec<_> = addrs.iter().map(|(_, addr)| addr.to_string()).collect();
    texts.join(" and ")
}
