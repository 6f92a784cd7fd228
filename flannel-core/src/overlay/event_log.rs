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
    suppressed: u64,
}

#[derive(Debug, Clone, Copy)]
enum Level {
    Debug,
    Info,
    Warn,
}

/// Logs at a level that is known only at run time. The target must be a literal.
macro_rules! say {
    ($target:literal, $level:expr, $suppressed:expr, $($line:tt)*) => {
        match $level {
            Level::Debug => tracing::debug!(target: $target, suppressed = $suppressed, $($line)*),
            Level::Info => tracing::info!(target: $target, suppressed = $suppressed, $($line)*),
            Level::Warn => tracing::warn!(target: $target, suppressed = $suppressed, $($line)*),
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
    match event {
        Event::LeaseAcquired(_)
        | Event::LeaseRenewed(_)
        | Event::LeaseLost(_)
        | Event::LeaseContended(_)
        | Event::LeaseUncontended
        | Event::OwnTrouble(_)
        | Event::AdvertiseFailed(_) => lease(event, level, suppressed),
        Event::ConfigChanged(_)
        | Event::ConfigRejected(_)
        | Event::Snapshot(_)
        | Event::StoreLost(_)
        | Event::StoreBack
        | Event::RecordsDropped(_) => store(event, level, suppressed),
        Event::PeerAdded(_)
        | Event::PeerChanged(_)
        | Event::PeerRemoved(_)
        | Event::PeerQuarantined(..)
        | Event::PeerSkipped(..)
        | Event::DeletionsWithheld(_) => peer(event, level, suppressed),
        Event::DriftRepaired { .. }
        | Event::ConflictFound(_)
        | Event::Flapping(_)
        | Event::Limited(..)
        | Event::LimitationGone(..)
        | Event::Refused(..)
        | Event::KernelTrouble(_)
        | Event::NotificationsLost
        | Event::NotificationsBack => kernel(event, level, suppressed),
        Event::UplinkChanged { .. } | Event::UplinkLost(_) | Event::UplinkBack(_) => uplink(event, level, suppressed),
        Event::Missed(events) => {
            say!("flannel::agent", level, suppressed, events, "a reader of events was too slow and missed some");
        }
        Event::Ready => say!("flannel::agent", level, suppressed, "all devices and routes are configured"),
        Event::Stopped(end) => say!("flannel::agent", level, suppressed, reason = %end, "the agent has stopped"),
    }
}

fn lease(event: &Event, level: Level, suppressed: Option<u64>) {
    macro_rules! line { ($($line:tt)*) => { say!("flannel::lease", level, suppressed, $($line)*) } }
    match event {
        Event::LeaseAcquired(lease) => {
            line!(key = %lease.key, subnets = subnets(lease), address = addresses(lease), "lease acquired");
        }
        Event::LeaseRenewed(lease) => line!(key = %lease.key, subnets = subnets(lease), "lease renewed"),
        Event::LeaseLost(reason) => line!(%reason, "lease lost"),
        Event::LeaseContended(contended) => {
            let remedy = "find the other agent with this node name or public address, and stop it";
            line!(times = contended.times, remedy, "another agent is writing this node's lease");
        }
        Event::LeaseUncontended => line!("no other agent is writing this node's lease any more"),
        Event::OwnTrouble(Some(reason)) => {
            line!(%reason, remedy = reason.remedy(), "other nodes reject this node's record");
        }
        Event::OwnTrouble(None) => line!("other nodes accept this node's record again"),
        Event::AdvertiseFailed(error) => line!(error, "cannot determine what to publish; the published record stays"),
        _ => {}
    }
}

fn store(event: &Event, level: Level, suppressed: Option<u64>) {
    macro_rules! line { ($($line:tt)*) => { say!("flannel::store", level, suppressed, $($line)*) } }
    match event {
        Event::ConfigChanged(_) => {
            let remedy = "restart the agent to use it";
            line!(remedy, "the network configuration in the lease store changed; this agent keeps the former one");
        }
        Event::ConfigRejected(error) => {
            line!(
                error,
                "the network configuration in the lease store cannot be used; this agent keeps the former one"
            );
        }
        Event::Snapshot(peers) => line!(peers = peers.accepted, quarantined = peers.quarantined, "peers loaded"),
        Event::StoreLost(error) => line!(error, "lease store unreachable; traffic is not affected, retrying"),
        Event::StoreBack => line!("lease store reachable again"),
        Event::RecordsDropped(dropped) => {
            let remedy = "delete records that no node wrote";
            line!(
                dropped,
                remedy,
                "the lease store has too many records, or keys that are too long; ignoring the newest"
            );
        }
        _ => {}
    }
}

fn peer(event: &Event, level: Level, suppressed: Option<u64>) {
    macro_rules! line { ($($line:tt)*) => { say!("flannel::peer", level, suppressed, $($line)*) } }
    match event {
        Event::PeerAdded(peer) => {
            line!(key = %peer.key, subnets = subnets(peer), address = addresses(peer), "peer added");
        }
        Event::PeerChanged(peer) => {
            line!(key = %peer.key, subnets = subnets(peer), address = addresses(peer), "peer changed");
        }
        Event::PeerRemoved(peer) => {
            line!(key = %peer.key, subnets = subnets(peer), address = addresses(peer), "peer removed");
        }
        Event::PeerQuarantined(key, reason) => {
            line!(%key, %reason, remedy = reason.remedy(), "ignored invalid peer record");
        }
        Event::PeerSkipped(key, family, skip) => line!(%key, %family, reason = %skip, "peer skipped: not programmed"),
        Event::DeletionsWithheld(prefixes) => {
            line!(prefixes, "most peers disappeared at once; delaying the deletion of their routes for 60 s");
        }
        _ => {}
    }
}

fn kernel(event: &Event, level: Level, suppressed: Option<u64>) {
    macro_rules! line { ($($line:tt)*) => { say!("flannel::kernel", level, suppressed, $($line)*) } }
    match event {
        Event::DriftRepaired { writes, took } => {
            line!(writes, ?took, "restored objects that another program had changed");
        }
        Event::ConflictFound(conflict) => {
            line!(found = conflict.found, remedy = conflict.remedy, "conflicting object not managed by this overlay");
        }
        Event::Flapping(object) => line!(%object, "another program keeps changing this object"),
        Event::Limited(device, limitation) => {
            line!(device = device.as_str(), %limitation, "packets are carried more slowly than possible");
        }
        Event::LimitationGone(device, limitation) => {
            line!(device = device.as_str(), limitation = limitation.what, "packets are no longer slowed down");
        }
        Event::Refused(_, refusal) => {
            let peer = refusal.peer.as_ref().map(tracing::field::display);
            line!(peer, error = refusal.error, remedy = refusal.remedy(), "the kernel refused a write");
        }
        Event::KernelTrouble(error) => line!(error, "a kernel operation failed; retrying"),
        Event::NotificationsLost => {
            line!("kernel notifications do not arrive; changes by other programs are found by audits only");
        }
        Event::NotificationsBack => line!("kernel notifications arrive again"),
        _ => {}
    }
}

fn uplink(event: &Event, level: Level, suppressed: Option<u64>) {
    macro_rules! line { ($($line:tt)*) => { say!("flannel::uplink", level, suppressed, $($line)*) } }
    match event {
        Event::UplinkChanged { before, uplink } if before == uplink => {
            line!(interface = uplink.name.as_str(), "published address changed");
        }
        Event::UplinkChanged { before, uplink } => line!(
            interface = change(&before.name, &uplink.name),
            address = change(before.addrs.to_string(), uplink.addrs.to_string()),
            mtu = change(before.mtu, uplink.mtu),
            "uplink changed"
        ),
        Event::UplinkLost(error) => line!(error, "no usable uplink; waiting for it"),
        Event::UplinkBack(uplink) => {
            line!(interface = uplink.name.as_str(), address = uplink.addrs.to_string(), "uplink available");
        }
        _ => {}
    }
}

/// Returns the values before and after, or only one if they are equal.
fn change<T: ToString + PartialEq>(before: T, after: T) -> String {
    if before == after { after.to_string() } else { format!("{} -> {}", before.to_string(), after.to_string()) }
}

fn subnets(lease: &Lease) -> String {
    lease.subnets.to_string()
}

fn addresses(lease: &Lease) -> String {
    lease.attrs.public_ip.to_string()
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
