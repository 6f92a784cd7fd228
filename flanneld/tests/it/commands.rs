//! What operators ask.

use nix::sys::signal::Signal;
use testkit::VxlanLink;

use crate::harness::{Agent, Site, VXLAN};

#[test]
fn status_explain_and_metrics_tell_of_the_running_agent() {
    let site = Site::new(2, VXLAN);
    let down = site.run(1, &["status"]);
    assert_eq!(down.code, Some(1));
    assert!(down.err.contains("not reached at 127.0.0.1:9472"), "{}", down.err);

    let agents = [site.start(1, &[]), site.start(2, &[])].map(Agent::ready);
    agents[0].until("told of its peer", || site.run(1, &["explain", "10.89.0.12"]).code == Some(0));
    std::fs::write(site.path("store/leases/bad.json"), "{}").unwrap();
    agents[0].until("told of the bad record", || site.run(1, &["status"]).out.contains("1 records quarantined"));

    let table = site.run(1, &["status"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    for part in ["flannel (ready", "eth0 (10.89.0.11), mtu 1500", "pod mtu      1450", "1 accepted", "bad.json: "] {
        assert!(table.out.contains(part), "{part} is not in:\n{}", table.out);
    }
    let json = site.run(1, &["status", "-json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&json["ready"], &json["status"]["peers"]["accepted"]), (&true.into(), &1.into()));
    assert_eq!(json["status"]["lease"]["public_ip"]["v4"], "10.89.0.11");

    let table = site.run(1, &["peers"]);
    assert_eq!(table.out.lines().count(), 2, "{table:?}");
    assert!(table.out.contains("10.89.0.12") && table.out.contains("node2.json"), "{table:?}");
    let peers: serde_json::Value = serde_json::from_str(&site.run(1, &["peers", "-json"]).out).unwrap();
    assert_eq!((&peers[0]["public_ip"]["v4"], &peers[1]), (&"10.89.0.12".into(), &serde_json::Value::Null));

    let peer = site.run(1, &["explain", "10.89.0.12"]);
    for part in ["node2.json: accepted as a peer", "fdb ", "neighbour ", "route 10.244."] {
        assert!(peer.out.contains(part), "{part} is not in:\n{}", peer.out);
    }
    let bad = site.run(1, &["explain", "bad.json"]);
    assert!(bad.out.contains("bad.json: quarantined: unreadable"), "{bad:?}");
    let nobody = site.run(1, &["explain", "10.9.9.9"]);
    assert_eq!((nobody.code, nobody.err.contains("no record is meant by \"10.9.9.9\"")), (Some(1), true));

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
    assert!(fresh.out.contains("no lease of this node"), "{}", fresh.out);
    let agent = site.start(1, &[]).ready();
    agent.end(Signal::SIGTERM);
    assert_eq!(site.run(1, &["plan"]).out, "nothing to do\n");
    site.ns(1).delete_link("flannel.1").unwrap();
    let plan = site.run(1, &["plan"]);
    assert!(plan.out.contains("flannel.1") && plan.code == Some(0), "{plan:?}");
    let json: serde_json::Value = serde_json::from_str(&site.run(1, &["plan", "-json"]).out).unwrap();
    assert!(json["writes"][0].as_str().unwrap().contains("flannel.1"), "{json}");
    assert_eq!((&json["leased"], &json["held"]), (&true.into(), &serde_json::json!([])));
    assert!(site.ns(1).link("flannel.1").is_err());
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
    let findings: serde_json::Value = serde_json::from_str(&report.out).unwrap();
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
    let told = || site.run(1, &["status"]).out.contains("own record   not taken for a peer: ");
    agent.until("told", told);
    agent.until_ready();
    let json: serde_json::Value = serde_json::from_str(&site.run(1, &["status", "-json"]).out).unwrap();
    assert!(json["status"]["own_trouble"]["text"].as_str().unwrap().contains("10.89.0.11"), "{json}");
    assert_eq!(agent.metric("flannel_own_record_rejected"), Some(1.0));
    let warned =
        || agent.log().lines().filter(|line| line.contains("WARN") && line.contains("this node's record")).count();
    agent.until("warned", || warned() > 0);
    let doctor = site.run(1, &["doctor"]);
    assert_eq!(doctor.code, Some(1), "{doctor:?}");
    assert!(doctor.out.lines().any(|line| line.starts_with("ERROR    network ")), "{}", doctor.out);
}
