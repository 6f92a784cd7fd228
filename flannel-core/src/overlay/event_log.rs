//! Events as log lines for operators, limited in rate.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::agent::{End, Event, PeerCounts};
use crate::clock::BootTime;
use crate::lease::{Lease, LeaseKey};
use crate::net::{Dual, Prefix};
use crate::plan::Conflict;

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
    suppressed: u64,
}

#[derive(Debug, Clone, Copy)]
enum Level {
    Debug,
    Info,
    Warn,
}

/// Logs at a level that is known only at run time. `$part` is the end of the target: a literal, because targets are
/// constants.
macro_rules! log {
    ($part:literal, $level:expr, $suppressed:expr, $($line:tt)*) => {
        match $level {
            Level::Debug => tracing::debug!(target: concat!("flannel::", $part), suppressed = $suppressed, $($line)*),
            Level::Info => tracing::info!(target: concat!("flannel::", $part), suppressed = $suppressed, $($line)*),
            Level::Warn => tracing::warn!(target: concat!("flannel::", $part), suppressed = $suppressed, $($line)*),
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
        let rate = self.rates.entry(group(event)).or_insert(Rate { left: BURST, refilled: now, suppressed: 0 });
        rate.refill(now);
        if rate.left == 0 {
            rate.suppressed += 1;
            return say(event, Level::Debug, None);
        }
        rate.left -= 1;
        let suppressed = std::mem::take(&mut rate.suppressed);
        say(event, level, (suppressed > 0).then_some(suppressed));
    }

    /// Logs how many lines were suppressed, once the rate allows a line.
    pub(crate) fn settle(&mut self, now: BootTime) {
        for (kind, rate) in self.rates.iter_mut().filter(|(_, rate)| rate.suppressed > 0) {
            rate.refill(now);
            if rate.left > 0 {
                rate.left -= 1;
                let suppressed = std::mem::take(&mut rate.suppressed);
                tracing::info!(target: "flannel::agent", kind, suppressed, "suppressed similar lines");
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
        | Event::UplinkChanged { .. }
        | Event::LeaseUncontended
        | Event::UplinkBack(_)
        | Event::Ready
        | Event::Stopped(End::Stopped) => Level::Info,
        Event::LeaseLost(_)
        | Event::LeaseRefused(_)
        | Event::LeaseContended(_)
        | Event::ConfigChanged(_)
        | Event::ConfigRejected(_)
        | Event::PeerSkipped(..)
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

fn say(event: &Event, level: Level, suppressed: Option<u64>) {
    macro_rules! line { ($part:literal, $($line:tt)*) => { log!($part, level, suppressed, $($line)*) } }
    match event {
        Event::LeaseAcquired(lease) => {
            let (key, subnets, address) = shown(lease);
            line!("lease", %key, %subnets, %address, "lease acquired");
        }
        Event::LeaseRenewed(lease) => line!("lease", key = %lease.key, subnets = %lease.subnets, "lease renewed"),
        Event::LeaseLost(reason) => line!("lease", %reason, "lease lost"),
        Event::LeaseRefused(error) => {
            line!("lease", error, "the lease store did not grant this node's lease; retrying")
        }
        Event::LeaseContended(contended) => {
            let remedy = "find the other agent with this node name or public address, and stop it";
            line!("lease", times = contended.times, remedy, "another agent is writing this node's lease");
        }
        Event::LeaseUncontended => line!("lease", "no other agent is writing this node's lease any more"),
        Event::OwnTrouble(Some(reason)) => {
            line!("lease", %reason, remedy = reason.remedy(), "other nodes reject this node's record");
        }
        Event::OwnTrouble(None) => line!("lease", "other nodes accept this node's record again"),
        Event::AdvertiseFailed(error) => {
            line!("lease", error, "cannot determine what to publish; the published record stays");
        }
        Event::ConfigChanged(_) => {
            let remedy = "restart the agent to use it";
            line!(
                "store",
                remedy,
                "the network configuration in the lease store changed; this agent keeps the former one"
            );
        }
        Event::ConfigRejected(error) => {
            line!(
                "store",
                error,
                "the network configuration in the lease store is unusable; this agent keeps the former one"
            );
        }
        Event::Snapshot(PeerCounts { accepted, quarantined, .. }) => {
            line!("store", peers = accepted, quarantined, "peers loaded");
        }
        Event::StoreLost(error) => line!("store", error, "lease store unreachable; traffic is not affected, retrying"),
        Event::StoreBack => line!("store", "lease store reachable again"),
        Event::RecordsDropped(dropped) => {
            let remedy = "delete records that no node wrote";
            line!("store", dropped, remedy, "too many records, or keys that are too long; ignoring the newest");
        }
        Event::PeerAdded(lease) => {
            let (key, subnets, address) = shown(lease);
            line!("peer", %key, %subnets, %address, "peer added");
        }
        Event::PeerChanged(lease) => {
            let (key, subnets, address) = shown(lease);
            line!("peer", %key, %subnets, %address, "peer changed");
        }
        Event::PeerRemoved(lease) => {
            let (key, subnets, address) = shown(lease);
            line!("peer", %key, %subnets, %address, "peer removed");
        }
        Event::PeerQuarantined(key, reason) => {
            line!("peer", %key, %reason, remedy = reason.remedy(), "ignored invalid peer record");
        }
        Event::PeerSkipped(key, family, skip) => {
            line!("peer", %key, %family, reason = %skip, "peer skipped: not programmed");
        }
        Event::DeletionsWithheld(prefixes) => {
            line!("peer", prefixes, "most peers disappeared at once; delaying the deletion of their routes for 60 s");
        }
        Event::DriftRepaired { writes, took } => {
            line!("kernel", writes, ?took, "restored objects that another program had changed");
        }
        Event::ConflictFound(Conflict { found, remedy, .. }) => {
            line!("kernel", found, remedy, "conflicting object not managed by this overlay");
        }
        Event::Flapping(object) => line!("kernel", %object, "another program keeps changing this object"),
        Event::Limited(device, limitation) => {
            line!("kernel", %device, %limitation, "packets are carried more slowly than possible");
        }
        Event::LimitationGone(device, limitation) => {
            line!("kernel", %device, limitation = limitation.what, "packets are no longer slowed down");
        }
        Event::Refused(_, refusal) => {
            let peer = refusal.peer.as_ref().map(tracing::field::display);
            line!("kernel", peer, error = refusal.error, remedy = refusal.remedy(), "the kernel refused a write");
        }
        Event::KernelTrouble(error) => line!("kernel", error, "a kernel operation failed; retrying"),
        Event::NotificationsLost => {
            line!("kernel", "kernel notifications do not arrive; only audits find changes by other programs");
        }
        Event::NotificationsBack => line!("kernel", "kernel notifications arrive again"),
        Event::UplinkChanged { before, uplink } if before == uplink => {
            line!("uplink", interface = %uplink.name, "published address changed");
        }
        Event::UplinkChanged { before, uplink } => line!(
            "uplink",
            interface = change(&before.name, &uplink.name),
            address = change(&before.addrs, &uplink.addrs),
            mtu = change(&before.mtu, &uplink.mtu),
            "uplink changed"
        ),
        Event::UplinkLost(error) => line!("uplink", error, "no usable uplink; waiting for it"),
        Event::UplinkBack(uplink) => line!(
            "uplink",
            interface = %uplink.name,
            address = %uplink.addrs,
            "uplink available"
        ),
        Event::Missed(events) => line!("agent", events, "a reader of events was too slow and missed some"),
        Event::Ready => line!("agent", "all devices and routes are configured"),
        Event::Stopped(end) => line!("agent", reason = %end, "the agent has stopped"),
    }
}

/// Returns the values before and after, or only one if they are equal.
fn change<T: fmt::Display + PartialEq>(before: &T, after: &T) -> String {
    if before == after { after.to_string() } else { format!("{before} -> {after}") }
}

/// Returns the key, the subnets and the public addresses of a lease.
fn shown(lease: &Lease) -> (&LeaseKey, &Dual<Prefix>, &Dual<IpAddr>) {
    (&lease.key, &lease.subnets, &lease.attrs.public_ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_a_kind_is_a_burst_then_a_line_a_minute_with_the_count_of_the_rest() {
        let at = |secs: u64| BootTime(Duration::from_secs(secs));
        let mut journal = EventLog::default();
        let lines = |journal: &EventLog| journal.rates["store_back"].suppressed;
        for second in 0..30 {
            journal.tell(at(second), &Event::StoreBack);
        }
        assert_eq!(lines(&journal), 25);
        journal.tell(at(30), &Event::Ready);
        assert_eq!(journal.rates["ready"].suppressed, 0, "another kind has a rate of its own");
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
