use std::sync::Arc;

use axum::http::{HeaderMap, header};
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Lease, LeaseKey};

use super::*;

/// A moment 1000 s after the boot.
const CLOCKS: Clocks =
    Clocks { boot: BootTime(Duration::from_secs(1000)), wall: Duration::from_millis(1_790_000_000_400) };

#[track_caller]
fn page(metrics: &Metrics, status: &Status, format: Format) -> String {
    let rules = RulesState::InPlace;
    let observed = Observed {
        overlay: "flannel",
        status,
        rules: &rules,
        clocks: CLOCKS,
        stale: false,
        log_lines_dropped: 0,
        carried: Vec::new(),
    };
    metrics.encode(&observed, format).unwrap()
}

#[track_caller]
fn assert_has(page: &str, lines: &[&str]) {
    for line in lines {
        assert!(page.lines().any(|shown| shown == *line), "{line} is not in:\n{page}");
    }
}

#[test]
fn counters_have_their_whole_name_in_the_text_format_and_openmetrics_has_an_end() {
    let mut status = Status::default();
    status.audits = 7;
    let text = page(&Metrics::default(), &status, Format::Text);
    let described =
        ["# HELP flannel_audits_total Full kernel audits performed.", "# TYPE flannel_audits_total counter"];
    let values = ["flannel_audits_total{overlay=\"flannel\"} 7", "flannel_ready{overlay=\"flannel\"} 0"];
    assert_has(&text, &[&described[..], &values, &["# TYPE flannel_ready gauge"]].concat());
    assert!(!text.contains("# EOF"), "{text}");

    let openmetrics = page(&Metrics::default(), &status, Format::OpenMetrics);
    assert_has(&openmetrics, &[&["# TYPE flannel_audits counter"], &values[..]].concat());
    assert!(openmetrics.ends_with("\n# EOF\n"), "{openmetrics}");
}

#[test]
fn openmetrics_is_for_clients_that_accept_it() {
    let format = |accept: Option<&str>| {
        let mut headers = HeaderMap::new();
        headers.extend(accept.map(|accept| (header::ACCEPT, accept.parse().unwrap())));
        Format::accepted_by(&headers)
    };
    for accept in [None, Some("*/*"), Some("text/plain;version=0.0.4"), Some("text/html,application/xml;q=0.9")] {
        assert_eq!(format(accept), Format::Text, "{accept:?}");
    }
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    assert_eq!(format(Some(prometheus)), Format::OpenMetrics);
}

#[test]
fn every_kind_of_event_counts_from_zero() {
    let metrics = Metrics::default();
    metrics.events.get_or_create(&[("kind", "ready")]).inc();
    let page = page(&metrics, &Status::default(), Format::Text);
    let counts = page.lines().filter_map(|line| line.strip_prefix("flannel_events_total{overlay=\"flannel\",kind=\""));
    let counts: Vec<_> = counts.filter_map(|line| line.split_once("\"} ")).collect();
    assert_eq!(counts.len(), Event::KINDS.len(), "{page}");
    for (kind, count) in counts {
        assert_eq!(count, if kind == "ready" { "1" } else { "0" }, "{kind}");
    }
}

#[test]
fn peers_are_counted_once_by_state() {
    let mut status = Status::default();
    let peers = &mut status.peers;
    (peers.accepted, peers.skipped, peers.quarantined, peers.dropped) = (5, 2, 7, 11);
    let page = page(&Metrics::default(), &status, Format::Text);
    for (state, number) in [("accepted", 3), ("skipped", 2), ("quarantined", 7), ("dropped", 11)] {
        assert_has(&page, &[&format!("flannel_peers{{overlay=\"flannel\",state=\"{state}\"}} {number}")]);
    }
}

#[test]
fn times_are_of_the_wall_clock() {
    let mut status = Status::default();
    let key = LeaseKey::new("10.5.1.0-24");
    let lease = Lease::new(key, Default::default(), Default::default());
    status.lease = Some(Arc::new(lease.expiring(Some(BootTime(Duration::from_secs(4600))))));
    status.store = Contact::Lost { since: BootTime(Duration::from_secs(400)), error: "unavailable".to_owned() };
    let lost = page(&Metrics::default(), &status, Format::Text);
    let expiry = "flannel_lease_expiry_timestamp_seconds{overlay=\"flannel\"} 1790003600";
    let since = "flannel_store_lost_timestamp_seconds{overlay=\"flannel\"} 1789999400";
    assert_has(&lost, &[expiry, since, "flannel_store_up{overlay=\"flannel\"} 0"]);
    (status.lease, status.store) = (None, Contact::Live);
    let live = page(&Metrics::default(), &status, Format::Text);
    assert!(!live.contains("timestamp_seconds"), "{live}");
    assert_has(&live, &["flannel_store_up{overlay=\"flannel\"} 1"]);
}

#[test]
fn a_changed_configuration_is_shown() {
    let mut status = Status::default();
    assert_has(&page(&Metrics::default(), &status, Format::Text), &["flannel_config_changed{overlay=\"flannel\"} 0"]);
    let config = NetworkConfig::parse(br#"{"Network":"10.5.0.0/16"}"#, Allocation::Pool).unwrap();
    status.reconfigured = Some(Arc::new(config));
    assert_has(&page(&Metrics::default(), &status, Format::Text), &["flannel_config_changed{overlay=\"flannel\"} 1"]);
}
