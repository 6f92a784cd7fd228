//! Checks whether the configuration in the store is still the one in force.

use std::sync::Arc;
use std::time::Duration;

use crate::agent::status::{Contact, Event};
use crate::agent::{ConfigPolicy, Machine};
use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::subnet::SubnetError;
use crate::text::chain;

/// The shortest time between two requests that succeed.
const SPACING: Duration = Duration::from_secs(1);

/// When to ask the store for its configuration: each time contact is restored, until the store has answered.
#[derive(Debug)]
pub(crate) struct Reconfiguration {
    /// When the next request is due.
    due: Option<BootTime>,
    under_way: bool,
    /// Whether contact was lost during the request: the answer may come from a state file.
    void: bool,
    /// Whether the store has confirmed the configuration that the agent started with.
    confirmed: bool,
    /// The earliest time of the next request.
    not_before: BootTime,
    backoff: Backoff,
}

impl Reconfiguration {
    pub(crate) fn new(jitter: Jitter) -> Self {
        Self {
            due: None,
            under_way: false,
            void: false,
            confirmed: false,
            not_before: BootTime::default(),
            backoff: Backoff::new(jitter),
        }
    }

    /// Schedules a request: contact was restored, the store has reported a change, or it has refused a lease of the
    /// configuration in force.
    pub(crate) fn ask(&mut self) {
        self.due = Some(self.not_before);
    }

    /// Postpones the request until contact with the store is restored.
    pub(crate) fn wait(&mut self) {
        (self.due, self.void) = (None, self.under_way);
    }

    pub(crate) fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    pub(crate) fn deadline(&self) -> Option<BootTime> {
        self.due.filter(|_| !self.under_way)
    }

    /// Whether to ask now.
    pub(crate) fn call(&mut self, now: BootTime) -> bool {
        let begins = !self.under_way && self.due.take_if(|due| *due <= now).is_some();
        self.under_way |= begins;
        begins
    }

    /// Whether an answer that has arrived is the store's own.
    pub(crate) fn takes_answer(&mut self) -> bool {
        self.under_way = false;
        !std::mem::take(&mut self.void)
    }

    /// Notes the store's answer.
    pub(crate) fn answered(&mut self, is_same: bool, now: BootTime) {
        self.confirmed |= is_same;
        self.not_before = now.after(SPACING);
        self.backoff.reset();
    }

    /// Notes that there was no answer. The request is repeated if contact with the store is otherwise live (`speaks`).
    pub(crate) fn unanswered(&mut self, now: BootTime, speaks: bool) {
        if speaks {
            self.due.get_or_insert_with(|| now.after(self.backoff.wait()));
        }
    }
}

impl Machine {
    /// Whether to ask the store for its configuration now.
    pub(crate) fn config_call(&mut self, now: BootTime) -> bool {
        self.reconfiguration.call(now)
    }

    /// Whether the store has another configuration and the policy is to end then.
    pub(crate) fn is_outdated(&self) -> bool {
        let ends = match self.settings.on_reconfiguration {
            ConfigPolicy::Keep => false,
            ConfigPolicy::KeepOnceConfirmed => !self.reconfiguration.is_confirmed(),
            ConfigPolicy::Stop => true,
        };
        ends && self.status.reconfigured.is_some()
    }

    pub(super) fn config_answer(&mut self, now: BootTime, answer: Result<NetworkConfig, SubnetError>) {
        let own_word = self.reconfiguration.takes_answer();
        let config = match answer {
            Ok(config) if own_word => config,
            answer => {
                if let Err(error @ (SubnetError::Invalid { .. } | SubnetError::Unconfigured { .. })) = answer
                    && own_word
                {
                    self.reject_config(chain(&error));
                }
                return self.reconfiguration.unanswered(now, self.status.store == Contact::Live);
            }
        };
        let in_force = &self.local.context.config;
        let is_same = in_force.is_same_overlay(&config) && in_force.enable_nftables == config.enable_nftables;
        self.reconfiguration.answered(is_same, now);
        let reconfigured = (!is_same).then(|| Arc::new(config));
        if self.status.reconfigured != reconfigured || self.status.config_rejected.is_some() {
            self.events.extend(reconfigured.clone().map(Event::ConfigChanged));
            self.show(|status| (status.reconfigured, status.config_rejected) = (reconfigured, None));
        }
    }

    fn reject_config(&mut self, reason: String) {
        if self.status.config_rejected.as_ref() != Some(&reason) {
            self.events.push(Event::ConfigRejected(reason.clone()));
            self.show(|status| (status.reconfigured, status.config_rejected) = (None, Some(reason)));
        }
    }
}
