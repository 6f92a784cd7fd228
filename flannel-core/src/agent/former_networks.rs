//! The networks this node had before: what is left there of ours goes once all is well in the present one.
//!
//! Devices of ours bear their mark wherever they are, so audits find those of another backend or VNI by themselves. A
//! route is ours only inside a network of ours, so one that has moved needs its former network looked at too.

use std::sync::Arc;

use crate::agent::status::Contact;
use crate::clock::BootTime;
use crate::kernel::{ApplyReport, KernelError, Op, Scope, State};
use crate::net::{Dual, Prefix};
use crate::plan::Plan;
use crate::text::chain;

use super::rounds::first_error;
use super::{KernelCall, Machine, Round, SPACING};

/// Former networks, until a look at each shows nothing of ours there.
#[derive(Debug)]
pub(super) struct Former {
    /// The one looked at first, then the others.
    networks: Vec<Dual<Prefix>>,
    /// When to look next.
    due: BootTime,
}

impl Machine {
    /// Looks after what is left in these networks too. One that lies within the present network is no other.
    pub(crate) fn look_after(&mut self, former: Vec<Dual<Prefix>>, now: BootTime) {
        let is_other = |prefix: &Prefix| !self.scope.covers(prefix);
        let others = former.into_iter().map(|it| Dual { v4: it.v4.filter(is_other), v6: it.v6.filter(is_other) });
        let networks: Vec<_> = others.filter(|it| it.families().next().is_some()).collect();
        self.former = (!networks.is_empty()).then_some(Former { networks, due: now });
        self.show_former();
    }

    /// Whether a former network may still hold something of ours.
    pub(crate) fn has_former(&self) -> bool {
        self.former.is_some()
    }

    /// Where to look for what former networks still hold.
    pub(crate) fn former_scopes(&self) -> Vec<Scope> {
        let networks = self.former.iter().flat_map(|former| &former.networks);
        networks.map(|networks| self.elsewhere(*networks)).collect()
    }

    /// What removes everything of ours that was seen in a former network. Routes alone: devices of ours are the present
    /// network's, or gone with the first audit.
    pub(crate) fn clearing(&self, scope: &Scope, seen: &State) -> Plan {
        let mut plan = crate::plan::plan(&State::default(), seen, scope, &|_| None);
        plan.conflicts.clear();
        plan.ops.retain(|op| matches!(op, Op::DeleteRoute { prefix, .. } if !self.scope.covers(prefix)));
        plan
    }

    /// When a former network is to be looked at: not before the first audit has put the present one in place, and only
    /// while the store itself speaks, since an old state file may take the present network for a former one.
    pub(super) fn former_due(&self) -> Option<BootTime> {
        self.former
            .as_ref()
            .filter(|_| self.audit.done_once && self.health.watch() == Contact::Live)
            .map(|former| former.due)
    }

    pub(super) fn look_at_former(&mut self, now: BootTime) -> Option<KernelCall> {
        self.former_due().filter(|due| *due <= now)?;
        self.round = Round::LookingBack;
        Some(KernelCall::Observe(self.former_scope()))
    }

    pub(super) fn seen_back(&mut self, now: BootTime, seen: Result<State, KernelError>) {
        let seen = match seen {
            Ok(seen) => seen,
            Err(error) => return self.former_trouble(now, Some(chain(&error))),
        };
        let plan = self.clearing(&self.former_scope(), &seen);
        if plan.is_empty() {
            self.former = self.former.take().and_then(|Former { mut networks, .. }| {
                networks.remove(0);
                (!networks.is_empty()).then_some(Former { networks, due: now })
            });
            self.show_former();
        } else {
            self.round = Round::Clearing { ops: Arc::new(plan.ops) };
        }
    }

    pub(super) fn cleared(&mut self, now: BootTime, ops: &[Op], report: &ApplyReport) {
        if !report.is_complete() {
            return self.former_trouble(now, first_error(report));
        }
        tracing::info!(routes = ops.len(), "what was left in the former network is removed");
        // A look has to show that nothing is left; somebody who writes it again sets no pace.
        if let Some(former) = &mut self.former {
            former.due = now.after(SPACING);
        }
    }

    pub(super) fn former_scope(&self) -> Scope {
        let networks = self.former.as_ref().and_then(|former| former.networks.first().copied()).unwrap_or_default();
        self.elsewhere(networks)
    }

    fn elsewhere(&self, networks: Dual<Prefix>) -> Scope {
        Scope { networks, ..self.scope.clone() }
    }

    fn show_former(&mut self) {
        let networks = self.former.iter().flat_map(|former| &former.networks);
        let former = networks.flat_map(|it| it.iter().map(|(_, prefix)| *prefix).collect::<Vec<_>>()).collect();
        self.show(|status| status.former = Arc::new(former));
    }

    fn former_trouble(&mut self, now: BootTime, error: Option<String>) {
        let again = now.after(self.backoff.wait());
        if let Some(former) = &mut self.former {
            former.due = again;
        }
        if let Some(error) = error {
            self.show_error(error);
        }
    }
}
