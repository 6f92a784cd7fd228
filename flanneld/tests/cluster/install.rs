//! A fresh install, and every way between pods, hosts, Services and the outside.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use flannel_core::net::Family;
use serde_json::{Value, json};
use testkit::cluster::{WAITING, condition};
use testkit::probe::{Mirror, seen_at};
use testkit::{Namespace, Pod, probe, wait_until};

use crate::bed::{Bed, OURS, PATIENCE, reaches};

const PORT: u16 = 8080;
const HOST_PORT: u16 = 30_080;

pub(crate) fn a_fresh_cluster_gets_its_network(dir: &Path) {
    let bed = Bed::new(dir);
    let cluster = &bed.cluster;
    assert!(!cluster.nodes_are_ready().unwrap(), "without a network");
    // These wait for the network from the start.
    cluster.create_pod("two", 2).unwrap();
    cluster
        .create(&json!({
            "metadata": { "name": "one", "labels": { "app": "one" } },
            "spec": { "nodeName": "node-1", "containers": [{
                "name": "wait",
                "image": WAITING,
                "ports": [{ "containerPort": PORT, "hostPort": HOST_PORT }],
            }] },
        }))
        .unwrap();
    bed.install();
    cluster.until("all nodes are ready", |cluster| cluster.nodes_are_ready()).unwrap();
    let [one, two] = ["one", "two"].map(|name| cluster.pod(name).unwrap());
    assert_eq!(bed.failed_sandboxes(), [""; 0]);
    for node in cluster.get("/api/v1/nodes").unwrap()["items"].as_array().unwrap() {
        let is_off = |found: &Value| found["type"] == "NetworkUnavailable" && found["status"] == "False";
        assert!(node["status"]["conditions"].as_array().unwrap().iter().any(is_off), "{node}");
    }

    cluster.create_pod("three", 1).unwrap();
    let three = cluster.pod("three").unwrap();
    let pods = [&one, &two, &three];
    for (from, to) in pods.iter().flat_map(|from| pods.iter().map(move |to| (from, to))) {
        reaches(from, to);
    }
    let address = |pod: &Pod| pod.addr(Family::V4).unwrap();
    let host = |nth: usize| -> IpAddr { format!("10.89.0.{}", 10 + nth).parse().unwrap() };
    let mirror = |pod: &Pod| Mirror::start(&pod.ns, (address(pod), PORT).into()).unwrap();
    let [at_one, at_two] = [&one, &two].map(mirror);

    // Between pods nothing is translated: on one node, and across.
    assert_eq!(seen(&three.ns, at_one.addr()), address(&three));
    assert_eq!(seen(&one.ns, at_two.addr()), address(&one));
    // Hosts reach the pods of both nodes, and pods reach hosts.
    for (nth, pod) in [(1, &one), (1, &two), (2, &one), (2, &two)] {
        probe::until_reply(cluster.nodes()[nth - 1].ns(), address(pod), PATIENCE).unwrap();
        probe::until_reply(&pod.ns, host(nth), PATIENCE).unwrap();
    }
    // The outside sees the node's address, and does not reach pods.
    let outside = Mirror::start(cluster.outside(), "10.89.0.1:0".parse().unwrap()).unwrap();
    assert_eq!(seen(&one.ns, outside.addr()), host(1));
    assert_eq!(seen(&two.ns, outside.addr()), host(2));
    assert!(probe::ping(cluster.outside(), address(&one), Duration::from_millis(200)).is_err());
    // A port of the node leads to the pod.
    assert_eq!(seen(cluster.outside(), (host(1), HOST_PORT).into()), "10.89.0.1".parse::<IpAddr>().unwrap());

    let service = json!({
        "metadata": { "name": "two" },
        "spec": { "selector": { "app": "two" }, "ports": [{ "port": 80, "targetPort": PORT }] },
    });
    let service = cluster.ask(async |server| server.create("/api/v1/namespaces/default/services", &service).await);
    let of_service: IpAddr = service.unwrap()["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
    assert_eq!(seen(&one.ns, (of_service, 80).into()), address(&one), "by the Service");
    for node in cluster.nodes() {
        seen(node.ns(), (of_service, 80).into());
    }

    // Each agent is ready, and was not restarted.
    for agent in bed.agents(&OURS) {
        assert!(condition(&agent, "Ready"), "{agent}");
        assert_eq!(agent["status"]["containerStatuses"][0]["restartCount"], 0, "{agent}");
    }
}

/// Returns the client's address as a [`Mirror`] sees it, once it can be reached: a Service needs a moment.
fn seen(from: &Namespace, target: SocketAddr) -> IpAddr {
    let mut found = None;
    let mut last = None;
    let waited = wait_until("an answer", PATIENCE, || {
        match seen_at(from, target) {
            Ok(addr) => found = Some(addr),
            Err(error) => last = Some(error),
        }
        Ok(found.is_some())
    });
    waited.unwrap_or_else(|error| panic!("{error}: {last:?}"));
    found.unwrap()
}
