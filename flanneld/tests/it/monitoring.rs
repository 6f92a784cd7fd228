//! The page of metrics, and the alerts and the dashboard that use it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, iter};

use flannel_core::overlay::Event;
use regex::Regex;
use serde_json::{Value, json};
use testkit::{kubernetes, monitoring};

use crate::harness::{Agent, CommandOutput, Site, VXLAN, bare};
use crate::store::Cluster;

const UDP: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"udp"}}"#;
/// What Prometheus adds to each series.
const TARGET: [&str; 2] = ["job", "instance"];

/// Names of metrics, each with its labels.
type Known = BTreeMap<String, BTreeSet<String>>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring")
}

fn run(program: PathBuf, args: &[&str], input: &str) -> CommandOutput {
    let mut program = bare(Command::new(program));
    program.args(args).current_dir(folder());
    program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = program.spawn().unwrap();
    program.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    program.wait_with_output().unwrap().into()
}

fn promtool(args: &[&str], input: &str) -> CommandOutput {
    run(monitoring::promtool().unwrap(), args, input)
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

/// Metrics of agents with the UDP backend and etcd, with and without contact.
fn known() -> Known {
    let mut cluster = Cluster::new(2, UDP);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let mut known = Known::new();
    learn(&mut known, &page(&agents[0], "*/*").1);
    cluster.stop_etcd();
    agents[0].until("without its store", || agents[0].metric("flannel_store_up") == Some(0.0));
    learn(&mut known, &page(&agents[0], "*/*").1);
    known
}

/// The alerts: name and expression.
fn alerts() -> Vec<(String, String)> {
    let rules = fs::read_to_string(folder().join("alerts.yaml")).unwrap();
    let groups = kubernetes::objects(&rules).unwrap().remove(0)["groups"].take();
    let rules = groups.as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
    rules.map(|rule| (text(&rule["alert"]).to_owned(), text(&rule["expr"]).to_owned())).collect()
}

fn dashboard() -> String {
    fs::read_to_string(folder().join("dashboard.json")).unwrap()
}

/// The dashboard's queries: title of the panel, expression and legend.
fn queries() -> Vec<(String, String, String)> {
    let dashboard: Value = serde_json::from_str(&dashboard()).unwrap();
    let targets = |panel: &Value| {
        let title = text(&panel["title"]).to_owned();
        let targets = panel["targets"].as_array().unwrap().clone();
        iter::repeat(title).zip(targets)
    };
    let queries = dashboard["panels"].as_array().unwrap().iter().flat_map(targets);
    queries.map(|(title, it)| (title, text(&it["expr"]).to_owned(), text(&it["legendFormat"]).to_owned())).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

/// Checks that an expression uses only metrics and labels that exist.
#[track_caller]
fn assert_known(known: &Known, place: &str, expr: &str, legend: &str) {
    let (names, matched) =
        (Regex::new(r"\b(?:flannel|process)_\w+").unwrap(), Regex::new(r#"(\w+)\s*[=!]~?\s*""#).unwrap());
    let (lists, legends) =
        (Regex::new(r"\b(?:by|on|left)\s*\(([\w, ]*)\)").unwrap(), Regex::new(r"\{\{(\w+)\}\}").unwrap());
    let mut labels: BTreeSet<&str> = TARGET.into();
    for name in names.find_iter(expr) {
        let known = known.get(name.as_str()).unwrap_or_else(|| panic!("{place}: no metric {}", name.as_str()));
        labels.extend(known.iter().map(String::as_str));
    }
    let matched = matched.captures_iter(expr).map(|it| it[1].to_owned());
    let listed =
        lists.captures_iter(expr).flat_map(|it| it[1].split(',').map(|it| it.trim().to_owned()).collect::<Vec<_>>());
    let shown = legends.captures_iter(legend).map(|it| it[1].to_owned());
    for label in matched.chain(listed).chain(shown) {
        assert!(labels.contains(label.as_str()), "{place}: no label {label} in {expr}");
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

#[test]
fn alerts_and_dashboard_use_only_metrics_and_labels_that_exist() {
    let (known, alerts, queries) = (known(), alerts(), queries());
    assert!(alerts.len() > 20 && queries.len() > 20);
    for (name, expr) in &alerts {
        assert_known(&known, name, expr, "");
    }
    for (title, expr, legend) in &queries {
        assert_known(&known, title, expr, legend);
    }
}

#[test]
fn promtool_accepts_the_alerts_their_tests_and_the_queries_of_the_dashboard() {
    let checked = promtool(&["check", "rules", "alerts.yaml"], "");
    assert_eq!(checked.code, Some(0), "{checked:?}");
    let tests = fs::read_dir(folder().join("tests")).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    let files = tests.iter().map(|file| file.to_str().unwrap());
    let tested = promtool(&["test", "rules"].into_iter().chain(files).collect::<Vec<_>>(), "");
    assert_eq!(tested.code, Some(0), "{tested:?}");
    let tests = tests.iter().map(|file| fs::read_to_string(file).unwrap()).collect::<String>();
    for (name, _) in alerts() {
        assert!(tests.contains(&format!("alertname=\"{name}\"")), "{name} has no test");
    }

    let queries = queries().into_iter().map(|(_, expr, _)| expr.replace("$__rate_interval", "5m"));
    let rules = queries.enumerate().map(|(n, expr)| json!({ "record": format!("query:{n}"), "expr": expr }));
    let rules = json!({ "groups": [{ "name": "dashboard", "rules": rules.collect::<Vec<_>>() }] }).to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), rules).unwrap();
    let checked = promtool(&["check", "rules", file.path().to_str().unwrap()], "");
    assert_eq!(checked.code, Some(0), "{checked:?}");
}

#[test]
fn the_dashboard_has_all_fields_of_grafanas_schema_and_no_others() {
    let check = |dashboard: &str| run(monitoring::grafana_schema().unwrap(), &[], dashboard);
    let checked = check(&dashboard());
    assert_eq!((checked.code, checked.err.as_str()), (Some(0), ""), "{checked:?}");
    let refused = check(&dashboard().replace("\"legendFormat\"", "\"legend\""));
    assert!(refused.code == Some(1) && refused.err.contains("unexpected field 'legend'"), "{refused:?}");
}
