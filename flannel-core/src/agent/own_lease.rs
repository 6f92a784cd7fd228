//! This node's lease: the store's answers about it, and the effects of its renewal, replacement or loss.

use std::sync::Arc;

use crate::agent::LossPolicy;
use crate::agent::renewal::Outcome;
use crate::agent::status::{Event, LossReason, Phase};
use crate::agent::store_health::Source;
use crate::backend::LocalNode;
use crate::clock::BootTime;
use crate::lease::Lease;
use crate::subnet::SubnetError;
use crate::text::chain;

use super::{Cause, Machine, prefixes_of};

impl Machine {
    pub(super) fn lease_answer(&mut self, now: BootTime, answer: Result<Lease, SubnetError>) {
        let (outcome, error) = self.renewal.answered(answer, now);
        match error {
            Some(error) if !error.is_answer() => self.store_trouble(Source::Calls, now, chain(&error)),
            error => {
                self.store_well(Source::Calls);
                self.show_refused_lease(error.as_ref().map(|error| chain(error)));
                if matches!(error, Some(SubnetError::Reconfigured)) {
                    self.reconfiguration.ask();
                }
            }
        }
        self.renewal_outcome(now, outcome);
    }

    pub(super) fn expire_lease(&mut self, now: BootTime) {
        let outcome = self.renewal.expire(now);
        self.renewal_outcome(now, outcome);
    }

    pub(super) fn renewal_outcome(&mut self, now: BootTime, outcome: Outcome) {
        match outcome {
            Outcome::Same => {}
            Outcome::Lost(reason) => self.lease_lost(now, reason),
            Outcome::Renewed => {
                let lease = Arc::clone(self.renewal.lease());
                self.events.push(Event::LeaseRenewed(Arc::clone(&lease)));
                self.hold(now, lease);
            }
            Outcome::Replaced => {
                let lease = Arc::clone(self.renewal.lease());
                self.events.push(Event::LeaseAcquired(Arc::clone(&lease)));
                self.hold(now, lease);
            }
        }
    }

    pub(super) fn lease_lost(&mut self, now: BootTime, reason: LossReason) {
        self.events.push(Event::LeaseLost(reason));
        if self.settings.node.is_none() {
            // The host may have been suspended and may have another address: it is read before a lease is acquired.
            self.audit.facts = true;
            self.audit_at(now, Cause::Hint);
        }
        if self.settings.on_loss != LossPolicy::Reacquire {
            // No call follows, so the last error of a call would stay for ever.
            self.store_well(Source::Calls);
            self.show_refused_lease(None);
        }
        self.show(|status| (status.lease, status.phase) = (None, Phase::Starting));
    }

    /// Notes that the agent ends and has released its lease.
    pub(crate) fn lease_given_back(&mut self) {
        self.show(|status| (status.lease, status.phase) = (None, Phase::Starting));
    }

    /// Notes that this node holds another lease, or the same one with other contents.
    pub(super) fn hold(&mut self, now: BootTime, lease: Arc<Lease>) {
        self.show_refused_lease(None);
        let old = &self.local.lease;
        let regained = self.status.lease.is_none();
        let matters = regained || old.subnets != lease.subnets || old.attrs != lease.attrs || old.key != lease.key;
        self.show(|status| {
            status.lease = Some(Arc::clone(&lease));
            if regained {
                // The next audit finds the actual phase.
                status.phase = Phase::LeaseHeld;
            }
        });
        self.set_local(now, LocalNode { lease, context: self.local.context.clone() });
        if matters {
            for prefix in prefixes_of(Some(&Arc::clone(&self.local.lease))) {
                self.prefix_in_use(now, &prefix);
            }
            self.audit_at(now, Cause::Expected);
        }
    }
}
