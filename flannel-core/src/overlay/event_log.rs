//! Events as log lines for operators, limited in rate.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::agent::{End, Event};
use crate::clock::BootTime;
use crate::lease::Lease;

/// The number of lines of a kind at once …
const BURST: u32 = 5;
/// … and one more each time this has passed. Lines above that are logged at DEBUG, and counted.
const REFILL: Duration = Duration::from_secs(60);

/// The recent number of lines of each kind.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    rates: BTreeMap<&'static str, Rate>,
}

#[derive(Debug)]
struct Rate {
    left: u32,
    refilled: BootTime,
    /// Lines above the rate since the last line within it.
    unsaid: u64,
}

#[derive(Debug, Clone, Copy)]
enum Level {
    Debug,
    Info,
    Warn,
}

macro_rules! say {
    ($level:expr, $($line:tt)*) => {
        match $level {
            Level::Debug => tracing::debug!($($line)*),
            Level::Info => tracing::info!($($line)*),
            Level::Warn => tracing::warn!($($line)*),
        }
    };
}

impl EventLog {
    /// Logs an event.
    pub(crate) fn tell(&mut self, now: BootTime, event: &Event) {
        let level = level(event);
        if matches!(level, Level::Debug) {
            return say(event, level, None);
        }
        let rate = self.rates.entry(group(event)).or_insert(Rate { left: BURST, refilled: now, unsaid: 0 });
        rate.refill(now);
        if rate.left == 0 {
            rate.unsaid += 1;
            return say(event, Level::Debug, None);
        }
        rate.left -= 1;
        let unsaid = std::mem::take(&mut rate.unsaid);
        say(event, level, (unsaid > 0).then_some(unsaid));
    }

    /// Logs how many lines were suppressed, once the rate allows a line.
    pub(crate) fn settle(&mut self, now: BootTime) {
        for (kind, rate) in self.rates.iter_mut().filter(|(_, rate)| rate.unsaid > 0) {
            rate.refill(now);
            if rate.left > 0 {
                rate.left -= 1;
                let unsaid = std::mem::take(&mut rate.unsaid);
                tracing::info!(kind, unsaid, "more of the same");
            }
        }
    }
}

impl Rate {
    fn refill(&mut self, now: BootTime) {
        let times = u32::try_from(now.since(self.refilled).as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        if times > 0 {
            self.left = self.left.saturating_add(times).min(BURST);
            self.refilled = now;
        }
    }
}

fn level(event: &Event) -> Level {
    match event {
        Event::LeaseRenewed(_) | Event::Missed(_) => Level::Debug,
        Event::LeaseAcquired(_)
        | Event::Snapshot(_)
        | Event::PeerAdded(_)
        | Event::PeerChanged(_)
        | Event::PeerRemoved(_)
        | Event::DriftRepaired { .. }
        | Event::OwnTrouble(None)
        | Event::StoreBack
        | Event::LimitationGone(..)
        | Event::NotificationsBack
        | Event::UplinkChanged(_)
        | Event::UplinkBack(_)
        | Event::Ready
        | Event::Stopped(End::Stopped) => Level::Info,
        Event::LeaseLost(_)
        | Event::ConfigChanged(_)
        | Event::PeerQuarantined(..)
        | Event::OwnTrouble(Some(_))
        | Event::RecordsDropped(_)
        | Event::ConflictFound(_)
        | Event::Flapping(_)
        | Event::Limited(..)
        | Event::Refused(..)
        | Event::DeletionsWithheld(_)
        | Event::StoreLost(_)
        | Event::KernelTrouble(_)
        | Event::NotificationsLost
        | Event::UplinkLost(_)
        | Event::AdvertiseFailed(_)
        | Event::Stopped(_) => Level::Warn,
    }
}

/// The rate that an event counts towards: all changes of peers share one.
fn group(event: &Event) -> &'static str {
    match event {
        Event::PeerAdded(_) | Event::PeerChanged(_) | Event::PeerRemoved(_) => "peers",
        other => other.kind(),
    }
}

fn say(event: &Event, level: Level, unsaid: Option<u64>) {
    match event {
        Event::LeaseAcquired(lease) => say!(level, unsaid, key = %lease.key, subnets = subnets(lease), "lease taken"),
        Event::LeaseRenewed(lease) => say!(level, unsaid, key = %lease.key, subnets = subnets(lease), "lease renewed"),
        Event::LeaseLost(reason) => say!(level, unsaid, %reason, "lease lost"),
        Event::ConfigChanged(_) => {
            let remedy = "restart the agent; until then it goes by the former one";
            say!(level, unsaid, remedy, "the network configuration changed");
        }
        Event::Snapshot(peers) => {
            say!(level, unsaid, peers = peers.accepted, quarantined = peers.quarantined, "the store listed the leases");
        }
        Event::PeerAdded(peer) => say!(level, unsaid, key = %peer.key, subnets = subnets(peer), "peer added"),
        Event::PeerChanged(peer) => say!(level, unsaid, key = %peer.key, subnets = subnets(peer), "peer changed"),
        Event::PeerRemoved(peer) => say!(level, unsaid, key = %peer.key, subnets = subnets(peer), "peer removed"),
        Event::PeerQuarantined(key, reason) => {
            say!(level, unsaid, %key, %reason, remedy = reason.remedy(), "record not taken for a peer");
        }
        Event::OwnTrouble(Some(reason)) => {
            let remedy = reason.remedy();
            say!(level, unsaid, %reason, remedy, "other nodes do not take the own record for a peer");
        }
        Event::OwnTrouble(None) => say!(level, unsaid, "other nodes take the own record for a peer again"),
        Event::RecordsDropped(dropped) => {
            say!(
                level,
                unsaid,
                dropped,
                remedy = "delete the records that no node wrote",
                "the store holds too many records, or keys that are too long: the youngest are dropped"
            );
        }
        Event::DriftRepaired { writes, took } => {
            say!(level, unsaid, writes, ?took, "wrote again what somebody had changed");
        }
        Event::ConflictFound(conflict) => {
            say!(level, unsaid, found = conflict.found, remedy = conflict.remedy, "a foreign object is in the way");
        }
        Event::Flapping(object) => say!(level, unsaid, %object, "somebody keeps changing an object of ours"),
        Event::Limited(device, limitation) => {
            say!(level, unsaid, device = device.as_str(), %limitation, "packets are carried more slowly than they could be");
        }
        Event::LimitationGone(device, limitation) => {
            say!(level, unsaid, device = device.as_str(), limitation = limitation.what, "a limitation has ended");
        }
        Event::Refused(_, refusal) => {
            let peer = refusal.peer.as_ref().map(tracing::field::display);
            say!(level, unsaid, peer, error = refusal.error, remedy = refusal.remedy(), "the kernel refused a write");
        }
        Event::DeletionsWithheld(prefixes) => {
            say!(level, unsaid, prefixes, "most peers went at once: looking twice before anything is deleted");
        }
        Event::StoreLost(error) => say!(level, unsaid, error, "waiting for the lease store"),
        Event::StoreBack => say!(level, unsaid, "the lease store is back"),
        Event::KernelTrouble(error) => say!(level, unsaid, error, "trouble with the kernel"),
        Event::NotificationsLost => say!(level, unsaid, "kernel notifications are not heard: audits go on"),
        Event::NotificationsBack => say!(level, unsaid, "kernel notifications are heard again"),
        Event::UplinkChanged(uplink) => say!(level, unsaid, uplink = uplink.name.as_str(), "uplink changed"),
        Event::UplinkLost(error) => say!(level, unsaid, error, "waiting for an uplink"),
        Event::UplinkBack(uplink) => say!(level, unsaid, uplink = uplink.name.as_str(), "the uplink is back"),
        Event::AdvertiseFailed(error) => say!(level, unsaid, error, "what this node has to publish cannot be told"),
        Event::Missed(events) => say!(level, unsaid, events, "events were lost to a slow reader"),
        Event::Ready => say!(level, unsaid, "everything is programmed"),
        Event::Stopped(end) => say!(level, unsaid, because = %end, "the agent has ended"),
    }
}

fn subnets(lease: &Lease) -> String {
    let texts: Vec<_> = lease.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
    texts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_a_kind_is_a_burst_then_a_line_a_minute_with_the_count_of_the_rest() {
        let at = |secs: u64| BootTime(Duration::from_secs(secs));
        let mut journal = EventLog::default();
        let lines = |journal: &EventLog| journal.rates["store_back"].unsaid;
        for second in 0..30 {
            journal.tell(at(second), &Event::StoreBack);
        }
        assert_eq!(lines(&journal), 25);
        journal.tell(at(30), &Event::Ready);
        assert_eq!(journal.rates["ready"].unsaid, 0, "another kind has a rate of its own");
        journal.settle(at(59));
        assert_eq!(lines(&journal), 25);
        journal.settle(at(60));
        assert_eq!(lines(&journal), 0);
        journal.tell(at(61), &Event::StoreBack);
        assert_eq!(lines(&journal), 1);
        journal.tell(at(600), &Event::StoreBack);
        assert_eq!((lines(&journal), journal.rates["store_back"].left), (0, BURST - 1));
    }
}
