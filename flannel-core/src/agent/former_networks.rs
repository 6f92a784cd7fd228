//! Networks of former runs: what is left there of ours goes once all is well in the present one.
//!
//! Devices of ours bear their mark wherever they are, so an audit finds those of another backend or VNI by itself. A route
//! is ours only inside a network of ours. So a former network is part of the scope until an audit has shown nothing of
//! ours there.

use std::sync::Arc;

use crate::agent::status::Contact;
use crate::clock::BootTime;
use crate::kernel::State;
use crate::net::Prefix;

use super::{Machine, SPACING};

impl Machine {
    /// Has routes of ours removed from these networks too. Networks inside the current one are skipped.
    pub(crate) fn look_after(&mut self, mut former: Vec<Prefix>) {
        former.retain(|network| !self.scope.is_in_network(network));
        self.former = former;
        self.show_former();
    }

    /// Whether a former network may still hold something of ours.
    pub(crate) fn has_former(&self) -> bool {
        !(self.former.is_empty() && self.scope.former.is_empty())
    }

    /// Whether former networks wait and may be cleared: not before the first audit has put the present one in place, and
    /// only while the store itself speaks, since an old state file may take the present network for a former one.
    pub(super) fn may_clear_former_networks(&self) -> bool {
        !self.former.is_empty() && self.audit.done_once && self.health.watch() == Contact::Live
    }

    /// Makes former networks part of the scope. Not while the kernel is looked at: what is seen is of the scope asked for.
    pub(crate) fn include_former_networks(&mut self) {
        self.scope.former.append(&mut self.former);
    }

    /// Takes networks in which an audit has seen nothing of ours out of the scope.
    pub(super) fn leave_cleared_networks(&mut self, now: BootTime, seen: &State) {
        let before = self.scope.former.len();
        if before == 0 {
            return;
        }
        let left: Vec<Prefix> = self.owned_prefixes(seen).filter(|prefix| !self.scope.is_in_network(prefix)).collect();
        self.scope.former.retain(|network| left.iter().any(|prefix| network.covers(prefix)));
        if self.scope.former.len() < before {
            self.scope_changed(now.after(SPACING));
            self.show_former();
        }
    }

    fn show_former(&mut self) {
        let former = [&self.scope.former[..], &self.former].concat();
        self.show(|status| status.former = Arc::new(former));
    }
}
