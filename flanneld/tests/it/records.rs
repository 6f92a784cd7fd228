//! What others write into the store (docs/design.md, "Hostile records"), and what is gone from it.

use flannel_core::net::Family;
use nix::sys::signal::Signal;

use crate::harness::{Agent, HOST_GW, PATIENCE, VXLAN, routes};
use crate::store::{Cluster, SUBNETS, assert_no_loss, flow, reaches, status};

/// A well-formed record of a peer that is nobody's node.
fn record(public: &str, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    )
}

/// The key of peer `n` of many.
pub(crate) fn peer_key(n: u8) -> String {
    format!("{SUBNETS}/10.244.{n}.0-24")
}

/// Puts in peers that are nobody's node: `n` is at 10.89.1.`n`.
pub(crate) fn put_peers(cluster: &Cluster, peers: std::ops::Range<u8>) {
    for n in peers {
        cluster.put(&peer_key(n), &record(&format!("10.89.1.{n}"), &format!("02:00:00:00:01:{n:02x}")));
    }
}

/// Records that are no peers, at keys of their own: node 1 is 10.89.0.11 with `own` as its MAC address, node 2 is
/// 10.89.0.12 with `other`.
fn hostile(own: &str, other: &str) -> Vec<(String, String)> {
    let good = |mac: u8| record("10.89.2.1", &format!("02:00:00:00:02:{mac:02x}"));
    let public = |addr: &str| record(addr, "02:00:00:00:02:01");
    let mac = |mac: &str| record("10.89.2.2", mac);
    let values = [
        String::new(),
        "{".to_owned(),
        "null".to_owned(),
        "[]".to_owned(),
        "{}".to_owned(),
        "\u{feff}{}".to_owned(),
        good(3).replace("vxlan\"", "vxlan\",\"Pad\":\"") + &"x".repeat(5000),
        good(4).replace(r#""vxlan""#, r#""host-gw""#),
        good(5).replace(r#""vxlan""#, r#""VXLAN2""#),
        good(6).replace(r#""BackendType":"vxlan","#, ""),
        good(7).replace(r#""PublicIP":"10.89.2.1","#, ""),
        good(8).replace(r#"{"VNI":1,"VtepMAC":"02:00:00:00:02:08"}"#, r#""02:00:00:00:02:08""#),
        good(9).replace(r#""VtepMAC":"02:00:00:00:02:09""#, r#""VtepMAC":7"#),
        public("10.89.0.11"),
        public("0.0.0.0"),
        public("127.0.0.1"),
        public("169.254.1.1"),
        public("224.0.0.1"),
        public("255.255.255.255"),
        public("10.89.0.0"),
        public("10.89.255.255"),
        public("10.244.3.3"),
        public("fd00::1"),
        public("10.89.2"),
        public("nowhere"),
        mac("00:00:00:00:00:00"),
        mac("01:00:5e:00:00:01"),
        mac("ff:ff:ff:ff:ff:ff"),
        mac("02:00:00:00:02:01:02:03"),
        mac("02:00"),
        mac("zz"),
        mac(own),
        mac(other),
    ];
    let at_keys = [
        "10.244.200.7-24",
        "10.244.200.0-31",
        "10.244.0.0-20",
        "10.244.0.0-16",
        "0.0.0.0-0",
        "10.99.0.0-24",
        "10.89.0.0-24",
        "10.89.0.0-16",
        "10.244.200.0-33",
        "10.244.300.0-24",
        "010.244.201.0-24",
        "10.244.201.0-024",
        "10.244.202.0-24&fd00::",
        "10.244.1.0-25",
        "10.244.2.128-25",
        "x",
        "10.244.203.0-24/x",
        "",
    ];
    let valued = values.into_iter().zip(100..).map(|(value, n)| (format!("{SUBNETS}/10.244.{n}.0-24"), value));
    let keyed = at_keys.iter().zip(50..).map(|(key, n)| (format!("{SUBNETS}/{key}"), good(n)));
    valued.chain(keyed).collect()
}

#[test]
fn a_peer_that_the_backend_skips_is_named_in_the_log() {
    let cluster = Cluster::new(1, HOST_GW);
    let peer = r#"{"PublicIP":"203.0.113.9","BackendType":"host-gw"}"#;
    cluster.put(&format!("{SUBNETS}/10.244.99.0-24"), peer);
    let agent = cluster.start(1, &[]).ready();
    let is_named = |line: &str| line.contains("peer skipped") && line.contains("10.244.99.0-24");
    agent.until("warned", || agent.log().lines().any(|line| line.contains("WARN") && is_named(line)));
    agent.until("told that it is ready without it", || agent.log().contains("1 peer skipped"));
}

#[test]
fn hostile_records_harm_neither_the_agent_nor_its_peers_nor_newcomers() {
    let cluster = Cluster::placed(2, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let pods = [cluster.pod(1), cluster.pod(2)];
    reaches(&pods[0], &pods[1]);
    let mac = |nth: usize| cluster.ns(nth).link("flannel.1").unwrap().mac.unwrap().to_string();
    let before = routes(cluster.ns(1));
    let flow = flow(&pods[0], &pods[1], Family::V4);

    let hostile = hostile(&mac(1), &mac(2));
    for (key, value) in &hostile {
        cluster.put(key, value);
    }
    let no_peers = || {
        let shown = status(&agents[0]);
        let named = |list: &str| shown["status"][list].as_array().unwrap().clone();
        [named("quarantined"), named("skipped")].concat()
    };
    agents[0].until("told of all of them", || no_peers().len() == hostile.len());
    assert!(no_peers().iter().all(|record| record["reason"]["text"] != ""), "{:?}", no_peers());
    assert_eq!(routes(cluster.ns(1)), before);

    put_peers(&cluster, 9..10);
    let joined = || Ok::<_, testkit::Error>(routes(cluster.ns(1)).contains("10.244.9.0/24 "));
    let took = testkit::wait_until("the newcomer", PATIENCE, joined).unwrap_or_else(|error| panic!("{error}"));
    println!("a newcomer among hostile records: {took:?}");

    // A peer whose record turns bad keeps its last good state.
    cluster.put(&peer_key(9), &record("10.89.1.9", "02:00:00:00:01:09").replace("vxlan", "udp"));
    agents[0].until("told of one more", || no_peers().len() == hostile.len() + 1);
    assert!(joined().unwrap(), "{}", routes(cluster.ns(1)));
    put_peers(&cluster, 9..10);
    agents[0].until("told that it is a peer again", || no_peers().len() == hostile.len());

    // One that starts among them finds its way too.
    let [one, two] = agents;
    assert_eq!(one.end(Signal::SIGKILL).0, None);
    let one = cluster.start(1, &[]).ready();
    assert_eq!(routes(cluster.ns(1)).replace(&line(cluster.ns(1), "10.244.9.0/24 "), ""), before);
    for (key, _) in &hostile {
        cluster.delete(key);
    }
    one.until("rid of them", || status(&one)["status"]["quarantined"].as_array().unwrap().is_empty());
    reaches(&pods[0], &pods[1]);
    assert_no_loss(flow);
    assert_eq!(two.end(Signal::SIGTERM).0, Some(0));
}

/// The line of a route, with its end.
fn line(ns: &testkit::Namespace, start: &str) -> String {
    let routes = routes(ns);
    format!("{}\n", routes.lines().find(|line| line.starts_with(start)).unwrap())
}

#[test]
fn peers_that_left_while_it_was_dead_are_gone_when_it_is_ready_and_most_at_once_are_withheld() {
    let cluster = Cluster::placed(1, VXLAN);
    let put = |peers| put_peers(&cluster, peers);
    let remove = |peers: std::ops::Range<u8>| peers.for_each(|n| cluster.delete(&peer_key(n)));
    let there = || (100..140).filter(|n| routes(cluster.ns(1)).contains(&format!("10.244.{n}.0/24 "))).count();
    put(100..140);
    let agent = cluster.start(1, &[]).ready();
    assert_eq!(there(), 40);
    agent.end(Signal::SIGKILL);
    remove(100..130);
    let agent = cluster.start(1, &[]).ready();
    assert_eq!(there(), 10);
    put(100..130);
    agent.until("told of them", || there() == 40);

    agent.end(Signal::SIGKILL);
    remove(100..131);
    let agent = cluster.start(1, &[]).ready();
    assert_eq!(there(), 40);
    let withheld = status(&agent)["status"]["withheld"].as_array().unwrap().clone();
    assert_eq!(withheld.len(), 31, "{withheld:?}");
    assert!(withheld[0]["kind"] == "mass_removal", "{withheld:?}");
    assert_eq!(agent.metric("flannel_withheld_prefixes"), Some(31.0));
    // One that comes back is a peer like any other, and its going is nobody's doubt.
    put(100..101);
    agent.until("one less", || status(&agent)["status"]["withheld"].as_array().unwrap().len() == 30);
    remove(100..101);
    agent.until("rid of it", || there() == 39);
}
