//! The host as it changes: which uplink is in use, and what this node publishes.

use std::sync::Arc;

use crate::backend::{Local, Situation};
use crate::clock::BootTime;
use crate::kernel::{HostFacts, KernelError};
use crate::overlay::status::Event;
use crate::overlay::{chain, view};

use super::{Cause, Machine, Round};

impl Machine {
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
        let old = &local.situation;
        let found = view::situation(&self.settings, old, Arc::clone(&facts));
        let uplink = found.as_ref().ok().map(|situation| situation.uplink.clone());
        let mut situation = match found {
            Ok(situation) => situation,
            Err(error) => {
                if self.status.borrow().uplink.is_some() {
                    self.events.push(Event::UplinkLost(chain(&error)));
                }
                Situation { host: facts, ..old.clone() }
            }
        };
        if let Some(uplink) = uplink.as_ref().filter(|_| self.status.borrow().uplink.is_none()) {
            self.events.push(Event::UplinkBack(uplink.clone()));
        }
        // What is published now wins over what a device happens to have.
        situation.previous = Some(Arc::clone(&local.lease));
        if situation.uplink != old.uplink || situation.public != old.public {
            self.events.push(Event::UplinkChanged(situation.uplink.clone()));
            match self.backend.advertise(&situation) {
                Ok(attrs) => self.tenure.publish(attrs, now),
                Err(error) => self.events.push(Event::AdvertiseFailed(chain(&error))),
            }
        }
        if situation != *old {
            self.audit.expected |= situation.uplink != old.uplink;
            let mtu = view::pod_mtu(&*self.backend, &situation);
            self.status.send_modify(|status| (status.uplink, status.mtu) = (uplink, Some(mtu)));
            self.set_local(now, Local { situation, lease: Arc::clone(&self.local.lease) });
        }
        self.audit_at(now, Cause::Hint);
    }
}
