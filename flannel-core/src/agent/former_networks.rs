//! Networks of former runs: the overlay's objects there are deleted after the first audit, once the store itself
//! answers.
//!
//! The overlay's devices have its mark, so an audit finds those of another backend or VNI by itself. A route belongs to
//! the overlay only inside one of its networks. So a former network is part of the scope until an audit finds no route
//! of the overlay there.

use std::sync::Arc;

use crate::agent::status::Contact;
use crate::clock::BootTime;
use crate::kernel::Op;
use crate::net::Prefix;
use crate::plan::Plan;

use super::{Machine, SPACING};

/// The maximum number of former networks in the scope at once: each route of a dump is compared with all of them.
const MOST_AT_ONCE: usize = 16;

impl Machine {
    /// Schedules the removal of the overlay's routes from these networks too. Networks inside the current one, or
    /// inside another of these, are skipped.
    pub(crate) fn look_after(&mut self, mut former: Vec<Prefix>) {
        former.retain(|network| !self.scope.is_in_network(network));
        // In the order of address, then length, a network follows those that cover it.
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

    /// Whether a former network may still have routes of the overlay.
    pub(crate) fn has_former(&self) -> bool {
        !(self.former.is_empty() && self.scope.former.is_empty())
    }

    /// Whether former networks wait and may be cleared: only after the first audit has put the present network in
    /// place, and while the store itself answers, because an old state file may name the present network as a former
    /// one.
    pub(super) fn may_clear_former_networks(&self) -> bool {
        let is_room = self.scope.former.len() < MOST_AT_ONCE && !self.former.is_empty();
        is_room && self.audit.done_once && self.health.watch() == Contact::Live
    }

    /// Makes as many former networks part of the scope as there is room for. Must not be called while an audit reads
    /// the kernel: its result is for the scope at its beginning.
    pub(super) fn include_former_networks(&mut self) {
        let room = MOST_AT_ONCE.saturating_sub(self.scope.former.len()).min(self.former.len());
        self.scope.former.extend(self.former.drain(..room));
    }

    /// Makes all former networks part of the scope, for a removal.
    pub(crate) fn include_all_former_networks(&mut self) {
        self.scope.former.append(&mut self.former);
    }

    /// Removes from the scope the networks in which the plan of an audit deletes nothing.
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
