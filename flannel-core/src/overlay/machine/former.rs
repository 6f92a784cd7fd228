//! The networks this node had before: what is left there of ours goes once all is well in the present one.
//!
//! Devices of ours bear their mark wherever they are, so audits find those of another backend or VNI by themselves. A
//! route is ours only inside a network of ours, so one that has moved needs its former network looked at too.

use std::sync::Arc;

use crate::clock::BootTime;
use crate::kernel::{ApplyReport, KernelError, Scope};
use crate::net::{Dual, Prefix};
use crate::overlay::chain;
use crate::overlay::status::Contact;
use crate::plan::{Op, Plan};
use crate::state::State;

use super::rounds::first_error;
use super::{KernelCall, Machine, Round, SPACING};

/// A former network, until a look shows nothing of ours there.
#[derive(Debug)]
pub(super) struct Former {
    networks: Dual<Prefix>,
    /// When to look next.
    due: BootTime,
    /// Why something may still be there.
    trouble: Option<String>,
}

impl Machine {
    /// Looks after what is left in these networks too. One that lies within the present network is no other.
    pub(crate) fn look_after(&mut self, former: Dual<Prefix>, now: BootTime) {
        let is_other = |prefix: &Prefix| !self.scope.covers(prefix);
        let networks = Dual { v4: former.v4.filter(is_other), v6: former.v6.filter(is_other) };
        if networks.families().next().is_some() {
            self.former = Some(Former { networks, due: now, trouble: None });
        }
    }

    /// In words, which former network may still hold something of ours, and why.
    pub(crate) fn former_pending(&self) -> Option<String> {
        let Former { networks, trouble, .. } = self.former.as_ref()?;
        let names: Vec<_> = networks.iter().map(|(_, network)| network.to_string()).collect();
        let waits = match trouble {
            Some(trouble) => trouble.clone(),
            None => "the present network and the lease store come first".to_owned(),
        };
        Some(format!("routes of ours may be left in the former network {}: {waits}", names.join(" and ")))
    }

    /// What removes everything of ours that a former network still holds, and where to look for it.
    pub(crate) fn former_removal(&self) -> Option<(Scope, impl Fn(&State) -> Plan)> {
        self.former.as_ref()?;
        let scope = self.former_scope();
        let looked_at = scope.clone();
        Some((scope, move |seen: &State| self.clearing(&looked_at, seen)))
    }

    /// When a former network is to be looked at: not before the first audit has put the present one in place, and only
    /// while the store itself speaks, since an old state file may take the present network for a former one.
    pub(super) fn former_due(&self) -> Option<BootTime> {
        self.former
            .as_ref()
            .filter(|_| self.audit.done_once && self.words.watch() == Contact::Live)
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
            self.former = None;
        } else {
            self.round = Round::Clearing { plan: Arc::new(plan) };
        }
    }

    pub(super) fn cleared(&mut self, now: BootTime, plan: &Plan, report: &ApplyReport) {
        if !report.is_complete() {
            return self.former_trouble(now, first_error(report));
        }
        tracing::info!(routes = plan.ops.len(), "what was left in the former network is removed");
        // A look has to show that nothing is left; somebody who writes it again sets no pace.
        if let Some(former) = &mut self.former {
            (former.due, former.trouble) = (now.after(SPACING), None);
        }
    }

    /// Deletes routes alone: devices of ours are the present network's, or gone with the first audit.
    fn clearing(&self, scope: &Scope, seen: &State) -> Plan {
        let mut plan = crate::plan::plan(&State::default(), seen, scope, &|_| None);
        plan.conflicts.clear();
        plan.ops.retain(|op| matches!(op, Op::DeleteRoute { prefix, .. } if !self.scope.covers(prefix)));
        plan
    }

    pub(super) fn former_scope(&self) -> Scope {
        let networks = self.former.as_ref().map(|former| former.networks).unwrap_or_default();
        Scope { networks, ..self.scope.clone() }
    }

    fn former_trouble(&mut self, now: BootTime, error: Option<String>) {
        let again = now.after(self.backoff.next());
        if let Some(former) = &mut self.former {
            (former.due, former.trouble) = (again, error.clone());
        }
        if let Some(error) = error {
            self.show_error(error);
        }
    }
}
