//! What operators ask.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use testkit::VxlanLink;

use crate::harness::{Agent, HOST_GW, PATIENCE, Site, VXLAN, command, owned, read, routes};

#[test]
fn status_explain_and_metrics_tell_of_the_running_agent() {
    let site = Site::new(2, VXLAN);
    let down = site.run(1, &["status"]);
    assert_eq!(down.code, Some(1));
    assert!(down.err.contains("the agent was not reached at 127.0.0.1:9472"), "{}", down.err);

    let agents = [site.start(1, &[]), site.start(2, &[])].map(Agent::ready);
    agents[0].until("told of its peer", || site.run(1, &["explain", "10.89.0.12"]).code == Some(0));
    std::fs::write(site.path("store/leases/bad.json"), "{}").unwrap();
    agents[0].until("told of the bad record", || site.run(1, &["status"]).out.contains("1 records quarantined"));

    let table = site.run(1, &["status"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    for part in [
        "overlay      flannel\n",
        "state        ready\n",
        "uplink       eth0 (10.89.0.11), MTU 1500\n",
        "pod MTU      1450\n",
        "firewall     rules in place\n",
        "1 accepted",
        "bad.json: ",
    ] {
        assert!(table.out.contains(part), "{part} is not in:\n{}", table.out);
    }
    let json = site.run(1, &["status", "-json"]);
    let json: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&json["ready"], &json["status"]["peers"]["accepted"]), (&true.into(), &1.into()));
    assert_eq!(json["status"]["lease"]["public_ip"]["v4"], "10.89.0.11");

    let table = site.run(1, &["peers"]);
    let rows: Vec<_> = table.out.lines().collect();
    assert_eq!(rows.len(), 3, "{table:?}");
    assert!(rows[0].starts_with("SUBNET ") && rows[0].ends_with("  REASON"), "{table:?}");
    assert!(rows[1].contains("  10.89.0.12  vxlan ") && rows[1].ends_with("  programmed"), "{table:?}");
    assert!(rows[2].contains("  quarantined  unreadable"), "{table:?}");
    let wide = site.run(1, &["peers", "-o", "wide"]).out;
    assert!(wide.contains("node2.json") && wide.contains("bad.json") && wide.contains("EXPIRES IN"), "{wide}");
    let peers: Value = serde_json::from_str(&site.run(1, &["peers", "-json"]).out).unwrap();
    assert_eq!((&peers[0]["public_ip"]["v4"], &peers[0]["state"]), (&"10.89.0.12".into(), &"programmed".into()));
    assert_eq!((&peers[1]["key"], &peers[1]["state"]), (&"bad.json".into(), &"quarantined".into()));

    let peer = site.run(1, &["explain", "10.89.0.12"]);
    for part in ["node2.json: accepted as a peer", "fdb ", "neighbour ", "route 10.244."] {
        assert!(peer.out.contains(part), "{part} is not in:\n{}", peer.out);
    }
    let bad = site.run(1, &["explain", "bad.json"]);
    assert!(bad.out.contains("bad.json: quarantined: unreadable"), "{bad:?}");
    let nobody = site.run(1, &["explain", "10.9.9.9"]);
    assert_eq!((nobody.code, nobody.err.contains("no peer matches \"10.9.9.9\"")), (Some(1), true));
    assert_eq!(agents[0].get(9472, "/explain"), Some((400, "missing parameter: peer\n".to_owned())));

    for name in ["flannel_ready", "flannel_peers{state=\"accepted\"}", "flannel_peers{state=\"quarantined\"}"] {
        assert_eq!(agents[0].metric(name), Some(1.0), "{name}");
    }
    assert_eq!(agents[0].get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())));
}

#[test]
fn plan_shows_what_a_start_would_do_and_touches_nothing() {
    let site = Site::new(1, VXLAN);
    let fresh = site.run(1, &["plan"]);
    assert_eq!(fresh.code, Some(0), "{fresh:?}");
    assert_eq!(fresh.out, "no lease yet; starting will allocate one and create everything\n");
    let agent = site.start(1, &[]).ready();
    agent.end(Signal::SIGTERM);
    assert_eq!(site.run(1, &["plan"]).out, "nothing to do\n");
    site.ns(1).delete_link("flannel.1").unwrap();
    let plan = site.run(1, &["plan"]);
    assert!(plan.out.contains("flannel.1") && plan.code == Some(0), "{plan:?}");
    let json: Value = serde_json::from_str(&site.run(1, &["plan", "-json"]).out).unwrap();
    assert!(json["writes"][0].as_str().unwrap().contains("flannel.1"), "{json}");
    assert_eq!((&json["leased"], &json["deferred"]), (&true.into(), &serde_json::json!([])));
    assert!(site.ns(1).link("flannel.1").is_err());
}

#[test]
fn plan_shows_devices_by_name_in_writes_and_conflicts() {
    let site = Site::new(2, HOST_GW);
    let agents = [site.start(1, &[]), site.start(2, &[])].map(Agent::ready);
    let subnet = site.subnet(2).to_string();
    agents[0].until("the route", || routes(site.ns(1)).contains(&subnet));
    let [one, _two] = agents;
    one.end(Signal::SIGTERM);
    assert_eq!(site.tool(1, &["ip", "route", "delete", &subnet]).code, Some(0));
    let plan = site.run(1, &["plan"]).out;
    assert!(plan.contains("route add ") && plan.contains(" dev eth0"), "{plan}");
    assert_eq!(site.tool(1, &["ip", "route", "add", &subnet, "via", "10.89.0.12", "metric", "7"]).code, Some(0));
    assert_eq!(site.tool(1, &["ip", "route", "add", "blackhole", &subnet]).code, Some(0));
    let plan = site.run(1, &["plan"]).out;
    assert!(plan.contains("conflict: "), "{plan}");
    assert!(!plan.contains(" dev if"), "{plan}");
}

#[test]
fn plan_without_a_network_configuration_answers_at_once_and_names_the_place() {
    let site = Site::new(1, VXLAN);
    std::fs::remove_file(site.path("store/config.json")).unwrap();
    let begin = std::time::Instant::now();
    let plan = site.run(1, &["plan"]);
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    assert_eq!(plan.code, Some(1), "{plan:?}");
    assert!(plan.err.contains("config.json: no network configuration; write "), "{plan:?}");
}

#[test]
fn explain_shows_every_record_with_an_address() {
    let site = Site::new(2, VXLAN);
    let agents = [site.start(1, &[]), site.start(2, &[])].map(Agent::ready);
    agents[0].until("the peer", || site.run(1, &["explain", "10.89.0.12"]).code == Some(0));
    let record = read(&site.path("store/leases/node2.json"));
    let copy = record.replace(&site.subnet(2).to_string(), "10.244.200.0/24");
    assert_ne!(copy, record);
    std::fs::write(site.path("store/leases/copy.json"), copy).unwrap();
    let keys = || {
        let found = site.run(1, &["explain", "10.89.0.12", "-o", "json"]);
        let found: Value = serde_json::from_str(&found.out).unwrap();
        found.as_array().unwrap().iter().map(|found| found["key"].clone()).collect::<Vec<_>>()
    };
    agents[0].until("both", || keys().len() == 2);
    let text = site.run(1, &["explain", "10.89.0.12"]).out;
    assert!(text.contains("node2.json: ") && text.contains("copy.json: "), "{text}");
}

#[test]
fn the_json_of_every_command_is_as_its_schema_says() {
    let site = Site::new(2, VXLAN);
    let agents = [site.start(1, &[]), site.start(2, &[])].map(Agent::ready);
    agents[0].until("the peer", || site.run(1, &["explain", "10.89.0.12"]).code == Some(0));
    std::fs::write(site.path("store/leases/bad.json"), "{}").unwrap();
    agents[0].until("the bad record", || site.run(1, &["status"]).out.contains("1 records quarantined"));
    for (name, words) in [
        ("status", &["status"][..]),
        ("peers", &["peers"]),
        ("explain", &["explain", "10.89.0.12"]),
        ("explain", &["explain", "bad.json"]),
        ("plan", &["plan"]),
        ("doctor", &["doctor"]),
        ("version", &["version"]),
    ] {
        let output = site.run(1, &[words, &["-o", "json"]].concat());
        assert_eq!(output.err, "", "{words:?}");
        assert_valid(name, &serde_json::from_str(&output.out).unwrap());
    }
    let [one, two] = agents;
    drop((one, two));
    site.ns(1).delete_link("flannel.1").unwrap();
    let plan = site.run(1, &["plan", "-o=json"]);
    assert_valid("plan", &serde_json::from_str(&plan.out).unwrap());
}

/// Checks a document against its schema. Fields that the schema does not name are errors here.
fn assert_valid(name: &str, document: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/schema/{name}.json"));
    let mut schema: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    close(&mut schema);
    let schema = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<_> =
        schema.iter_errors(document).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(errors.is_empty(), "{name}: {errors:?}\n{document:#}");
}

/// Forbids further fields in all objects of a schema.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(close);
            if object.get("properties").is_some_and(Value::is_object) && object.get("type") == Some(&"object".into()) {
                object.entry("additionalProperties").or_insert(false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

#[test]
fn status_and_peers_are_followed_until_they_are_interrupted() {
    let site = Site::new(2, VXLAN);
    let one = site.start(1, &[]).ready();
    let args = [site.args(1), owned(&["peers", "-w"])].concat();
    let mut child = site.ns(1).run(|| command(&args).stdout(Stdio::piped()).spawn().unwrap()).unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().starts_with("SUBNET "));
    let _two = site.start(2, &[]).ready();
    assert_eq!(lines.next().as_deref(), Some(""));
    assert!(lines.next().unwrap().starts_with("SUBNET "));
    assert!(lines.next().unwrap().contains("10.89.0.12"));
    // It survives a restart of the agent.
    one.end(Signal::SIGTERM);
    assert!(lines.by_ref().any(|line| line.starts_with("the agent was not reached")));
    let _one = site.start(1, &[]).ready();
    assert!(lines.by_ref().any(|line| line.contains("10.89.0.12")));
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    let ended = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(Signal::SIGINT as i32));
    assert_eq!(lines.next(), None);
}

#[test]
fn doctor_finds_a_foreign_device_and_says_how_to_mend_it() {
    let site = Site::new(1, VXLAN);
    let vxlan = VxlanLink { vni: 1, lower: Some("eth0".to_owned()), ..VxlanLink::default() };
    site.ns(1).add_vxlan("vx7", &vxlan, None).unwrap();
    site.ns(1).set_sysctl("net/ipv4/ip_forward", "0").unwrap();
    let report = site.run(1, &["doctor"]);
    assert_eq!(report.code, Some(1), "{report:?}");
    for part in ["ip link delete vx7", "sysctl -w net.ipv4.ip_forward=1", "(the interface of the default route)"] {
        assert!(report.out.contains(part), "{part} is not in:\n{}", report.out);
    }
    site.ns(1).delete_link("vx7").unwrap();
    site.ns(1).set_sysctl("net/ipv4/ip_forward", "1").unwrap();
    let report = site.run(1, &["doctor", "--json"]);
    let findings: Value = serde_json::from_str(&report.out).unwrap();
    let findings = findings["findings"].as_array().unwrap();
    assert!(findings.iter().all(|finding| finding["severity"] != "error"), "{findings:?}");
    assert_eq!(report.code, Some(0));
    assert!(findings.iter().any(|finding| finding["check"] == "store" && finding["severity"] == "ok"));
}

#[test]
fn a_network_over_the_nodes_own_addresses_is_shown_everywhere() {
    let over = r#"{"Network":"10.89.0.0/16","SubnetLen":24,"SubnetMin":"10.89.16.0","Backend":{"Type":"vxlan"}}"#;
    let site = Site::new(1, over);
    let agent = site.start(1, &[]);
    let told = || site.run(1, &["status"]).out.contains("own record   not accepted by other nodes: ");
    agent.until("told", told);
    agent.until_ready();
    let json: Value = serde_json::from_str(&site.run(1, &["status", "-json"]).out).unwrap();
    assert!(json["status"]["own_trouble"]["text"].as_str().unwrap().contains("10.89.0.11"), "{json}");
    assert_eq!(agent.metric("flannel_own_record_rejected"), Some(1.0));
    let warned =
        || agent.log().lines().filter(|line| line.contains("WARN") && line.contains("this node's record")).count();
    agent.until("warned", || warned() > 0);
    let doctor = site.run(1, &["doctor"]);
    assert_eq!(doctor.code, Some(1), "{doctor:?}");
    assert!(doctor.out.lines().any(|line| line.starts_with("ERROR    network ")), "{}", doctor.out);
}
