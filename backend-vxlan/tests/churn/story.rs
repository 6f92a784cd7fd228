//! The events of an agent, compared with its status.

use std::sync::Arc;

use flannel_core::clock::BootTime;
use flannel_core::lease::Lease;
use flannel_core::overlay::{Event, LossReason, Phase, Status};

/// What an agent's events have reported so far.
#[derive(Default)]
pub(crate) struct Story {
    lease: Option<Arc<Lease>>,
    listed: bool,
    store_lost: bool,
    uplink_lost: bool,
    deaf: bool,
}

impl Story {
    /// Records an event received by `now`. Returns what is wrong.
    pub(crate) fn tell(&mut self, event: Event, now: BootTime) -> Option<String> {
        match event {
            Event::LeaseAcquired(lease) => {
                let kept = self.lease.replace(lease);
                return kept.map(|kept| format!("another lease replaces {kept:?}, which was not lost"));
            }
            Event::LeaseRenewed(lease) => {
                // I3: after a loss nothing is renewed.
                let Some(before) = self.lease.replace(Arc::clone(&lease)) else {
                    return Some(format!("a lost lease is renewed: {lease:?}"));
                };
                let same = (&before.key, before.subnets) == (&lease.key, lease.subnets);
                return (!same).then(|| format!("a renewal makes {lease:?} of {before:?}"));
            }
            Event::LeaseLost(reason) => {
                let Some(lease) = self.lease.take() else { return Some(format!("lost without a lease: {reason}")) };
                // The agent may learn of its lease's end in any way, especially after a suspend.
                let over = lease.expires.is_some_and(|expires| expires <= now);
                // I2: nothing else here takes a lease away.
                let allowed = reason == LossReason::Expired || over;
                return (!allowed).then(|| format!("lost its lease: {reason}"));
            }
            Event::Snapshot(_) => self.listed = true,
            Event::StoreLost(error) => return flip(&mut self.store_lost, true, &error),
            Event::StoreBack => return flip(&mut self.store_lost, false, "the store is back"),
            Event::UplinkLost(_) => self.uplink_lost = true,
            Event::UplinkBack(_) => return flip(&mut self.uplink_lost, false, "the uplink is back"),
            Event::NotificationsLost => return flip(&mut self.deaf, true, "notifications are lost"),
            Event::NotificationsBack => return flip(&mut self.deaf, false, "notifications are back"),
            Event::Ready if !self.listed => return Some("ready before the store has listed everything".to_owned()),
            Event::Ready if self.lease.is_none() => return Some("ready without a lease".to_owned()),
            Event::Stopped(_) => return Some("has ended".to_owned()),
            // Events are read after each step, so none can be missed.
            Event::Missed(count) => return Some(format!("{count} events were missed")),
            Event::ConflictFound(conflict) => return Some(format!("nothing here is in the way, but {conflict:?}")),
            _ => {}
        }
        None
    }

    /// Compares the status with the reported events, and checks I16: an agent is ready if it has a lease, has received
    /// a complete list, and shows everything that it has left undone.
    pub(crate) fn check(&self, status: &Status) -> Option<String> {
        let parts = |lease: &Arc<Lease>| (lease.key.clone(), lease.subnets, lease.attrs.clone());
        let (told, shown) = (self.lease.as_ref().map(parts), status.lease.as_ref().map(parts));
        if told != shown {
            return Some(format!("its events tell of {told:?}, its status of {shown:?}"));
        }
        let audited = status.lease.is_some() && self.listed && status.audits > 0;
        let ready = audited && status.failed_writes == 0;
        match status.phase {
            // What is left undone is shown, and was done for other peers.
            Phase::Ready if !audited => Some(format!("is ready too soon: {status:#?}")),
            Phase::DeviceReady if ready => Some(format!("is not ready, but nothing is left to do: {status:#?}")),
            Phase::LeaseHeld | Phase::DeviceReady if status.lease.is_none() => {
                Some(format!("says that it holds a lease: {status:#?}"))
            }
            _ => None,
        }
    }
}

/// Sets `flag` to `to`; it must have the other value before.
fn flip(flag: &mut bool, to: bool, what: &str) -> Option<String> {
    (std::mem::replace(flag, to) == to).then(|| format!("tells twice: {what}"))
}
