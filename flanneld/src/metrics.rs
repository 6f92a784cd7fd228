//! Prometheus metrics: values are taken from the status at each request; events are counted when they happen.

use std::fmt;
use std::sync::atomic::AtomicU64;

use flannel_backend_udp::CarriedDevice;
use flannel_backend_udp::path::{Counters, Reason};
use flannel_core::clock::BootTime;
use flannel_core::overlay::{Contact, Event, Handle, Status};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::status::is_ready;
use flannel_core::firewall_keeper::RulesState;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OnDevice {
    device: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    device: String,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropReason {
    device: String,
    reason: &'static str,
}

/// Metrics that persist between scrapes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    events: Family<Kind, Counter>,
}

/// Values that are not in the status.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outside {
    /// Whether lease and peers are those of the state file.
    pub(crate) stale: bool,
    pub(crate) log_lines_dropped: u64,
    /// Devices whose packets this process carries.
    pub(crate) carried: Vec<CarriedDevice>,
}

impl Metrics {
    /// Counts the agent's events until it ends.
    pub(crate) async fn count(self, handle: Handle) {
        let mut events = handle.events();
        while let Some(event) = events.next().await {
            let times = if let Event::Missed(times) = event { times } else { 1 };
            self.events.get_or_create(&Kind { kind: event.kind() }).inc_by(times);
        }
    }

    /// Returns the exposition text.
    pub(crate) fn encode(
        &self,
        status: &Status,
        rules: &RulesState,
        now: BootTime,
        outside: Outside,
    ) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("flannel");
        registry.register("events", "Events of the agent, by kind", self.events.clone());
        let mut gauge = |name: &str, help: &str, value: i64| {
            let gauge = Gauge::<i64>::default();
            gauge.set(value);
            registry.register(name, help, gauge);
        };
        gauge(
            "ready",
            "1 when this node can carry traffic: lease, uplink, devices, peers, rules and subnet.env are there",
            i64::from(is_ready(status, rules)),
        );
        let degraded = "Peers, records, objects and writes that are done without, each reason counted by itself";
        gauge("degraded", degraded, count(status.degraded().map_or(0, |degraded| degraded.total())));
        let up = i64::from(status.uplink.up().is_some());
        gauge("uplink_up", "1 while the uplink has its address and a carrier", up);
        let in_place = i64::from(*rules == RulesState::InPlace);
        gauge("firewall_in_place", "1 when the firewall's rules are as wanted", in_place);
        gauge("lease_held", "1 while the lease is this node's", i64::from(status.lease.is_some()));
        if let Some(expires) = status.lease.as_ref().and_then(|lease| lease.expires) {
            gauge("lease_left_seconds", "Until the lease runs out unless renewed", seconds(expires, now));
        }
        let live = matches!(status.store, Contact::Live);
        gauge("store_contact", "1 while the lease store answers; no part of readiness", i64::from(live));
        let lost = match &status.store {
            Contact::Lost { since, .. } => seconds(now, *since),
            _ => 0,
        };
        gauge("store_lost_seconds", "How long the lease store has not answered", lost);
        gauge("stale", "1 while lease and peers are those of the state file", i64::from(outside.stale));
        gauge("peers_accepted", "Records accepted as peers", count(status.peers.accepted));
        gauge("peers_skipped", "Peers the backend gives nothing", count(status.peers.skipped));
        gauge("records_quarantined", "Records that are no peers", count(status.peers.quarantined));
        let dropped = "Records dropped since the last list: too many, or keys that are too long";
        gauge("records_dropped", dropped, count(status.peers.dropped));
        let own = "1 while other nodes do not take the own record for a peer: see status";
        gauge("own_trouble", own, i64::from(status.own_trouble.is_some()));
        gauge("conflicts", "Objects of others that stand in the way", count(status.conflict_count));
        gauge("flapping_objects", "Objects that somebody else keeps changing", count(status.flapping.len()));
        gauge("withheld_prefixes", "Prefixes whose deletion waits", count(status.withheld.len()));
        gauge(
            "unprotected_prefixes",
            "Prefixes of bad records that are too many to withhold",
            count(status.unprotected),
        );
        let unknown = "Links, addresses and routes of the host that are too many to be known";
        gauge("unknown_host_objects", unknown, count(status.unknown_host_objects));
        gauge("refused_objects", "Writes that the kernel refused in the last audit", count(status.refused.len()));
        gauge("undone_objects", "Writes that the last round could not do", count(status.undone));
        if let Some(mtu) = status.mtu {
            gauge("pod_mtu_bytes", "The MTU for pods", i64::from(mtu.0));
        }
        let mut counter = |name: &str, help: &str, value: u64| {
            let counter = Counter::<u64, AtomicU64>::default();
            counter.inc_by(value);
            registry.register(name, help, counter);
        };
        counter("audits", "Comparisons of everything", status.audits);
        counter("lease_rounds", "Rounds for changed leases", status.lease_rounds);
        counter("drift_repaired", "Writes on objects that had been right before", status.drift_repaired);
        counter("log_lines_dropped", "Log lines that nobody read in time", outside.log_lines_dropped);
        register_carried(&mut registry, &outside.carried);
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }
}

fn register_carried(registry: &mut Registry, carried: &[CarriedDevice]) {
    if carried.is_empty() {
        return;
    }
    let (packets, bytes) = (Family::<Direction, Counter>::default(), Family::<Direction, Counter>::default());
    let (dropped, limitations) = (Family::<DropReason, Counter>::default(), Family::<OnDevice, Gauge>::default());
    let (unbatched, answered) = (Family::<OnDevice, Counter>::default(), Family::<OnDevice, Counter>::default());
    for it in carried {
        let device = it.name.to_string();
        for (direction, traffic) in [("sent", &it.counters.sent), ("received", &it.counters.received)] {
            let label = Direction { device: device.clone(), direction };
            packets.get_or_create(&label).inc_by(traffic.packets);
            bytes.get_or_create(&label).inc_by(traffic.bytes);
        }
        let by_reason = Reason::ALL.map(|reason| (reason.name(), it.counters.dropped(reason)));
        for (reason, count) in by_reason.into_iter().chain([(Counters::OVERFLOWED, it.counters.overflowed)]) {
            dropped.get_or_create(&DropReason { device: device.clone(), reason }).inc_by(count);
        }
        let device = OnDevice { device };
        unbatched.get_or_create(&device).inc_by(it.counters.unbatched);
        answered.get_or_create(&device).inc_by(it.counters.answered);
        limitations.get_or_create(&device).set(count(it.limitations.len()));
    }
    registry.register("carried_packets", "Packets carried in user space, as they are on the wire", packets);
    registry.register("carried_bytes", "Their bytes, without the headers of the underlay", bytes);
    registry.register("carried_dropped", "Packets dropped in user space, by reason", dropped);
    registry.register(
        "carried_unbatched",
        "Packets sent one by one because the path carries less than the device takes",
        unbatched,
    );
    registry.register("carried_answered", "ICMP answers to packets for which there is no peer", answered);
    registry.register("carried_limitations", "What makes the device slower than it could be", limitations);
}

fn seconds(later: BootTime, earlier: BootTime) -> i64 {
    i64::try_from(later.since(earlier).as_secs()).unwrap_or(i64::MAX)
}

fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_gauges_counters_and_an_end() {
        let mut status = Status::default();
        (status.peers.accepted, status.audits) = (3, 7);
        let metrics = Metrics::default();
        metrics.events.get_or_create(&Kind { kind: "ready" }).inc();
        let text = metrics.encode(&status, &RulesState::InPlace, BootTime::default(), Outside::default()).unwrap();
        for line in [
            "flannel_ready 0",
            "flannel_peers_accepted 3",
            "flannel_audits_total 7",
            "flannel_events_total{kind=\"ready\"} 1",
            "# EOF",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in:\n{text}");
        }
    }
}
