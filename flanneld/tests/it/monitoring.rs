//! The page of metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use flannel_core::overlay::Event;
use regex::Regex;

use crate::harness::{Agent, Site, Told, VXLAN, bare};
use crate::store::Cluster;

const UDP: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"udp"}}"#;

/// Names of metrics, each with its labels.
type Known = BTreeMap<String, BTreeSet<String>>;

fn promtool(args: &[&str], input: &str) -> Told {
    let mut promtool = bare(Command::new(testkit::prometheus::promtool().unwrap()));
    promtool.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().unwrap();
    promtool.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    promtool.wait_with_output().unwrap().into()
}

/// Head and body of the page, for a client that accepts `accept`.
fn page(agent: &Agent, accept: &str) -> (String, String) {
    let answer = agent.ask(9472, &format!("GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

/// Adds the metrics of a page.
fn learn(known: &mut Known, page: &str) {
    let labels = Regex::new(r#"(\w+)="[^"]*""#).unwrap();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, rest) = series.split_once('{').unwrap_or((series, ""));
        known.entry(name.to_owned()).or_default().extend(labels.captures_iter(rest).map(|label| label[1].to_owned()));
    }
}

#[test]
fn promtool_accepts_the_page_of_an_agent_and_openmetrics_is_served_on_request() {
    let site = Site::new(1, UDP);
    let agent = site.start(1, &["-ip-masq"]).ready();
    let (head, text) = page(&agent, "*/*");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    let checked = promtool(&["check", "metrics"], &text);
    assert_eq!((checked.code, checked.err.as_str()), (Some(0), ""), "{checked:?}\n{text}");

    let accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    let (head, openmetrics) = page(&agent, accept);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    assert!(openmetrics.ends_with("\n# EOF\n"), "{openmetrics}");
    let (mut one, mut other) = (Known::new(), Known::new());
    learn(&mut one, &text);
    learn(&mut other, &openmetrics);
    assert_eq!(one, other);
}

#[test]
fn metrics_show_the_node_its_process_and_the_times_of_its_lease() {
    let mut cluster = Cluster::new(1, VXLAN);
    let agent = cluster.start(1, &[]).ready();
    let info = format!("flannel_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    let uplink = "flannel_uplink_info{device=\"eth0\",address=\"10.89.0.11\"}";
    for name in [&info, uplink, "flannel_store_up", "flannel_events_total{kind=\"ready\"}"] {
        assert_eq!(agent.metric(name), Some(1.0), "{name} in {:?}", agent.get(9472, "/metrics"));
    }
    for kind in Event::KINDS {
        assert!(agent.metric(&format!("flannel_events_total{{kind=\"{kind}\"}}")).is_some(), "{kind}");
    }
    let is_near = |name: &str, expected: f64| {
        let shown = agent.metric(name).unwrap();
        assert!((shown - expected).abs() < 600.0, "{name}: {shown} instead of {expected}");
    };
    is_near("process_start_time_seconds", unix_time());
    is_near("flannel_lease_expiry_timestamp_seconds", unix_time() + 24.0 * 3600.0);
    for name in ["process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds"] {
        assert!(agent.metric(name) > Some(0.0), "{name}");
    }
    assert_eq!(agent.metric("flannel_store_lost_timestamp_seconds"), None);
    cluster.stop_etcd();
    agent.until("without its store", || agent.metric("flannel_store_up") == Some(0.0));
    is_near("flannel_store_lost_timestamp_seconds", unix_time());
}

#[expect(clippy::disallowed_methods, reason = "is compared with metrics, which are of the wall clock")]
fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}
