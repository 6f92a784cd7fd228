//! Networks of former runs: what is left there of ours goes after the first audit, once the store has been heard.
//!
//! Devices of ours bear their mark wherever they are, so an audit finds those of another backend or VNI by itself. A route
//! is ours only inside a network of ours. So a former network is part of the scope until an audit has shown nothing of
//! ours there.

use std::sync::Arc;

use crate::agent::status::Contact;
use crate::clock::BootTime;
use crate::kernel::Op;
use crate::net::Prefix;
use crate::plan::Plan;

use super::{Machine, SPACING};

/// The most former networks in the scope at once: each route of a dump is compared with all of them.
const MOST_AT_ONCE: usize = 16;

impl Machine {
    /// Has routes of ours removed from these networks too. Networks inside the current one, or inside another of these, are
    /// skipped.
    pub(crate) fn look_after(&mut self, mut former: Vec<Prefix>) {
        former.retain(|network| !self.scope.is_in_network(network));
        // In the order of address, then length, what covers a network stands before it.
        former.sort_unstable();
        let mut last: Option<Prefix> = None;
        former.retain(|network| {
            let is_other = !last.is_some_and(|last| last.covers(network));
            last = last.filter(|_| !is_other).or(Some(*network));
            is_other
        });
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
        let is_room = self.scope.former.len() < MOST_AT_ONCE && !self.former.is_empty();
        is_room && self.audit.done_once && self.health.watch() == Contact::Live
    }

    /// Makes former networks part of the scope, as many as there is room for. Must not be called while an audit reads the
    /// kernel: its result is that of the scope it was asked for.
    pub(super) fn include_former_networks(&mut self) {
        let room = MOST_AT_ONCE.saturating_sub(self.scope.former.len()).min(self.former.len());
        self.scope.former.extend(self.former.drain(..room));
    }

    /// Makes all former networks part of the scope, for a removal.
    pub(crate) fn include_all_former_networks(&mut self) {
        self.scope.former.append(&mut self.former);
    }

    /// Removes networks from the scope in which the plan of an audit deletes nothing.
    pub(super) fn leave_cleared_networks(&mut self, now: BootTime, plan: &Plan) {
        let before = self.scope.former.len();
        if before == 0 {
            return;
        }
        let deleted = plan.ops.iter().filter_map(|op| match op {
            Op::DeleteRoute { prefix, .. } => Some(prefix),
            _ => None,
        });
        let left: Vec<_> = deleted.filter(|prefix| !self.scope.is_in_network(prefix)).collect();
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
