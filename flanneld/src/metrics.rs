//! Prometheus metrics: values are taken from the status at each request; events are counted when they happen.

mod exposition;
mod process;

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flannel_backend_udp::CarriedDevice;
use flannel_backend_udp::path::{Counters, Reason, Traffic};
use flannel_core::clock::{BootTime, Clock, SystemClock};
use flannel_core::firewall_keeper::RulesState;
use flannel_core::overlay::{Contact, Event, Handle, Status, UplinkState};
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::status::is_ready;
pub(crate) use exposition::Format;

/// The prefix of the names of all metrics but those about the process.
const PREFIX: &str = "flannel";

/// Metrics that persist between scrapes.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    events: Family<[(&'static str, &'static str); 1], Counter>,
}

/// Names and values of labels.
type Labels = Vec<(&'static str, String)>;

impl Default for Metrics {
    /// With a series for each kind of event, because a rate cannot be computed from a series that begins with 1.
    fn default() -> Self {
        let events = Family::<_, Counter>::default();
        for kind in Event::KINDS {
            drop(events.get_or_create(&[("kind", *kind)]));
        }
        Self { events }
    }
}

/// The values of a scrape.
#[derive(Debug)]
pub(crate) struct Observed<'a> {
    pub(crate) overlay: &'a str,
    pub(crate) status: &'a Status,
    pub(crate) rules: &'a RulesState,
    pub(crate) clocks: Clocks,
    /// Whether lease and peers are those of the state file.
    pub(crate) stale: bool,
    pub(crate) log_lines_dropped: u64,
    /// Devices whose packets this process carries.
    pub(crate) carried: Vec<CarriedDevice>,
}

/// The same moment on two clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clocks {
    boot: BootTime,
    /// Since the Unix epoch.
    wall: Duration,
}

impl Clocks {
    #[expect(clippy::disallowed_methods, reason = "Prometheus compares timestamps with its own wall clock")]
    pub(crate) fn now() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { boot: SystemClock::default().now(), wall }
    }

    /// Returns the Unix time of a moment, to the second: the difference between the clocks varies below that.
    fn unix(&self, at: BootTime) -> i64 {
        let (later, earlier) = (at.since(self.boot), self.boot.since(at));
        let unix = self.wall.saturating_add(later).saturating_sub(earlier);
        i64::try_from(unix.saturating_add(Duration::from_millis(500)).as_secs()).unwrap_or(i64::MAX)
    }
}

impl Metrics {
    /// Counts the agent's events until it ends.
    pub(crate) async fn count(self, handle: Handle) {
        let mut events = handle.events();
        while let Some(event) = events.next().await {
            let times = if let Event::Missed(times) = event { times } else { 1 };
            self.events.get_or_create(&[("kind", event.kind())]).inc_by(times);
        }
    }

    /// Returns the exposition text.
    pub(crate) fn encode(&self, observed: &Observed<'_>, format: Format) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_labels([("overlay".into(), observed.overlay.to_owned().into())].into_iter());
        process::register(&mut registry);
        let ours = registry.sub_registry_with_prefix(PREFIX);
        ours.register("events", "Events of the agent, by kind", self.events.clone());
        register_node(ours, observed);
        register_store(ours, observed);
        register_peers(ours, observed.status);
        register_objects(ours, observed.status);
        register_work(ours, observed);
        register_carried(ours, &observed.carried);
        let mut page = String::new();
        text::encode(&mut page, &registry)?;
        Ok(format.page(page))
    }
}

/// The program, readiness, and what it depends on besides store and peers.
fn register_node(registry: &mut Registry, observed: &Observed<'_>) {
    let Observed { status, rules, .. } = observed;
    let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    gauges(registry, "build_info", "Version of flanneld; the value is always 1", [(version, 1)]);
    let ready = "1 if this node can carry traffic: lease, uplink, devices, peers, firewall and subnet.env are in place";
    gauge(registry, "ready", ready, is_ready(status, rules));
    let degraded = "1 if peers, records, objects or writes are left out; status names them";
    gauge(registry, "degraded", degraded, status.degraded().is_some());
    let uplink = status.uplink.up();
    // Before the uplink is selected, it is neither up nor down.
    if !matches!(status.uplink, UplinkState::Unknown) {
        gauge(registry, "uplink_up", "1 if the uplink has its address and a carrier", uplink.is_some());
    }
    let addresses = status.uplink.last().into_iter().flat_map(|uplink| {
        let labels = |addr: &IpAddr| vec![("device", uplink.name.to_string()), ("address", addr.to_string())];
        uplink.addrs.iter().map(move |(_, addr)| (labels(addr), 1))
    });
    gauges(registry, "uplink_info", "Uplink in use, or the last one; the value is always 1", addresses);
    let firewall = "1 if the firewall rules are in place, or none are wanted";
    // Before there is a lease, the rules are not known.
    if **rules != RulesState::Pending {
        gauge(registry, "firewall_in_place", firewall, **rules == RulesState::InPlace);
    }
    let changed = "1 if the network configuration in the store differs from the one in use; restart flanneld to use it";
    gauge(registry, "config_changed", changed, status.reconfigured.is_some());
    let rejected = "1 if the network configuration in the store cannot be used: a restart would not start";
    gauge(registry, "config_rejected", rejected, status.config_rejected.is_some());
    if let Some(mtu) = status.mtu {
        gauge(registry, "pod_mtu_bytes", "MTU for pods", i64::from(mtu.0));
    }
    let unknown = "Links, addresses and routes of the host that exceed the limit and are ignored";
    gauge(registry, "unknown_host_objects", unknown, count(status.unknown_host_objects));
}

/// The lease, and contact with the store.
fn register_store(registry: &mut Registry, observed: &Observed<'_>) {
    let Observed { status, clocks, .. } = observed;
    gauge(registry, "lease_held", "1 if this node holds a lease", status.lease.is_some());
    if let Some(expires) = status.lease.as_ref().and_then(|lease| lease.expires) {
        let help = "Unix time at which the lease expires unless it is renewed";
        gauge(registry, "lease_expiry_timestamp_seconds", help, clocks.unix(expires));
    }
    let refused = "1 if the store, when it last answered, did not grant or renew the lease; the status has the reason";
    gauge(registry, "lease_refused", refused, status.lease_refused.is_some());
    let contended = "1 if another program writes this node's lease, probably a second agent with the same identity";
    gauge(registry, "lease_contended", contended, status.contended.is_some());
    let rejected = "1 if other nodes reject this node's record as invalid";
    gauge(registry, "own_record_rejected", rejected, status.own_trouble.is_some());
    gauge(
        registry,
        "store_up",
        "1 if the lease store answers; not required for readiness",
        status.store == Contact::Live,
    );
    if let Contact::Lost { since, .. } = status.store {
        let help = "Unix time since which the lease store has not answered; absent while it answers";
        gauge(registry, "store_lost_timestamp_seconds", help, clocks.unix(since));
    }
    let stale = "1 if lease and peers are from the state file because the store has not answered since the start";
    gauge(registry, "stale", stale, observed.stale);
}

fn register_peers(registry: &mut Registry, status: &Status) {
    let peers = &status.peers;
    let states = [
        ("accepted", peers.accepted.saturating_sub(peers.skipped)),
        ("skipped", peers.skipped),
        ("quarantined", peers.quarantined),
        ("dropped", peers.dropped),
    ];
    let help = "Records of other nodes: accepted as peers, accepted but skipped by the backend in a family, \
        quarantined as invalid, dropped because there are too many or their keys are too long";
    let values = states.map(|(state, number)| (vec![("state", state.to_owned())], count(number)));
    gauges(registry, "peers", help, values);
}

/// Kernel objects that are not as wanted.
fn register_objects(registry: &mut Registry, status: &Status) {
    let mut gauge = |name, help, number| gauge(registry, name, help, count(number));
    gauge("conflicts", "Conflicting kernel objects that flanneld does not manage", status.conflict_count);
    gauge("flapping_objects", "Kernel objects that another program keeps changing", status.flapping.len());
    gauge("refused_writes", "Writes that the kernel refused in the last audit", status.refused.len());
    gauge("failed_writes", "Writes that the last audit could not do", status.failed_writes);
    gauge("withheld_prefixes", "Prefixes whose deletion is delayed", status.withheld.len());
    let unprotected = "Prefixes of invalid records that exceed the limit of prefixes protected from deletion";
    gauge("unprotected_prefixes", unprotected, status.unprotected);
}

fn register_work(registry: &mut Registry, observed: &Observed<'_>) {
    let mut counter = |name, help, value| counter(registry, name, help, value);
    counter("audits", "Full kernel audits performed", observed.status.audits);
    counter("lease_rounds", "Updates of the kernel for changed leases", observed.status.lease_rounds);
    let repaired = "Kernel objects restored after another program changed or deleted them";
    counter("drift_repaired", repaired, observed.status.drift_repaired);
    counter("log_lines_dropped", "Log lines dropped because output blocked", observed.log_lines_dropped);
}

/// The data plane of the UDP backend.
fn register_carried(registry: &mut Registry, carried: &[CarriedDevice]) {
    if carried.is_empty() {
        return;
    }
    let by_direction = |number: fn(&Traffic) -> u64| {
        carried.iter().flat_map(move |it| {
            [("sent", &it.counters.sent), ("received", &it.counters.received)]
                .map(|(direction, traffic)| (vec![device(it), ("direction", direction.to_owned())], number(traffic)))
        })
    };
    let packets = "Packets carried by the UDP backend, counted as on the wire";
    counters(registry, "carried_packets", packets, by_direction(|traffic| traffic.packets));
    let bytes = "Bytes of the packets carried by the UDP backend, without the headers of the underlay";
    counters(registry, "carried_bytes", bytes, by_direction(|traffic| traffic.bytes));
    let dropped = carried.iter().flat_map(|it| {
        let reasons = Reason::ALL.map(|reason| (reason.name(), it.counters.dropped(reason)));
        let all = reasons.into_iter().chain([(Counters::OVERFLOWED, it.counters.overflowed)]);
        all.map(|(reason, number)| (vec![device(it), ("reason", reason.to_owned())], number))
    });
    counters(registry, "carried_dropped", "Packets dropped by the UDP backend, by reason", dropped);
    let by_device =
        |number: fn(&Counters) -> u64| carried.iter().map(move |it| (vec![device(it)], number(&it.counters)));
    let unbatched = "Packets sent one by one because the path to a peer has a smaller MTU than the uplink";
    counters(registry, "carried_unbatched", unbatched, by_device(|counters| counters.unbatched));
    let answered = "ICMP errors sent for packets to addresses without a peer";
    counters(registry, "carried_answered", answered, by_device(|counters| counters.answered));
    let limitations = carried.iter().map(|it| (vec![device(it)], count(it.limitations.len())));
    gauges(registry, "carried_limitations", "Reasons why the device is slower than possible", limitations);
}

fn device(carried: &CarriedDevice) -> (&'static str, String) {
    ("device", carried.name.to_string())
}

/// Registers a gauge with a value for each set of labels.
fn gauges(registry: &mut Registry, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, i64)>) {
    let family = Family::<Labels, Gauge>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).set(value);
    }
    registry.register(name, help, family);
}

/// Registers a counter with a value for each set of labels.
fn counters(registry: &mut Registry, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, u64)>) {
    let family = Family::<Labels, Counter>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).inc_by(value);
    }
    registry.register(name, help, family);
}

/// Registers a gauge with one value.
fn gauge(registry: &mut Registry, name: &str, help: &str, value: impl Into<i64>) {
    let gauge = Gauge::<i64>::default();
    gauge.set(value.into());
    registry.register(name, help, gauge);
}

/// Registers a counter with one value.
fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
