//! Restarts, reboots and losses.

use std::fs;
use std::path::Path;
use std::time::Duration;

use flannel_core::net::Family;
use serde_json::{Value, json};
use testkit::cluster::{Cluster, Service, WAITING};
use testkit::{Namespace, Pod, probe, wait_until};

use crate::bed::{Bed, OURS, PATIENCE, Traffic, reaches};

/// How long the server is away.
const AWAY: Duration = Duration::from_secs(60);

pub(crate) fn agents_restart_under_traffic(dir: &Path) {
    let bed = Bed::new(dir);
    bed.install();
    let pods = bed.pods();
    let traffic = Traffic::start(&pods);
    bed.restart(&OURS);
    traffic.arrived("a restart of all agents");

    let traffic = Traffic::start(&pods);
    for node in bed.cluster.nodes() {
        node.run(&["pkill", "-KILL", "-x", "flanneld"]).unwrap();
    }
    let restarted = |cluster: &Cluster| {
        let pods = cluster.get("/api/v1/namespaces/flannelkit/pods")?;
        let restarted = |pod: &&Value| pod["status"]["containerStatuses"][0]["restartCount"] == 1;
        Ok(pods["items"].as_array().is_some_and(|pods| pods.iter().filter(restarted).count() == 2))
    };
    bed.cluster.until("all agents run again", restarted).unwrap();
    bed.until_agents_are_ready(&OURS);
    traffic.arrived("agents were killed");
}

pub(crate) fn kubelet_and_runtime_restart_under_traffic(dir: &Path) {
    let mut bed = Bed::new(dir);
    bed.install();
    let pods = bed.pods();
    let traffic = Traffic::start(&pods);
    for nth in [1, 2] {
        let node = bed.cluster.node(nth);
        node.start(Service::Kubelet).unwrap();
        node.start(Service::Containerd).unwrap();
    }
    // Both work again: a pod starts on each node.
    for (name, nth) in [("three", 1), ("four", 2)] {
        bed.cluster.create_pod(name, nth).unwrap();
    }
    let [three, four] = ["three", "four"].map(|name| bed.cluster.pod(name).unwrap());
    reaches(&three, &four);
    bed.until_agents_are_ready(&OURS);
    traffic.arrived("kubelet and containerd were restarted");
    assert_eq!(bed.failed_sandboxes(), [""; 0]);
}

pub(crate) fn a_node_reboots(dir: &Path) {
    let mut bed = Bed::new(dir);
    bed.install();
    bed.pods();
    let subnet = bed.cluster.get("/api/v1/nodes/node-2").unwrap()["spec"]["podCIDR"].clone();
    bed.cluster.reboot(2).unwrap();
    // The kubelet makes new sandboxes for the pods that it had.
    bed.cluster
        .until("the pod runs again", |cluster| {
            let pod = cluster.get("/api/v1/namespaces/default/pods/two")?;
            Ok(pod["status"]["containerStatuses"][0]["restartCount"] == 1)
        })
        .unwrap();
    let [one, two] = ["one", "two"].map(|name| bed.cluster.pod(name).unwrap());
    reaches(&one, &two);
    reaches(&two, &one);
    bed.until_agents_are_ready(&OURS);
    assert_eq!(bed.cluster.get("/api/v1/nodes/node-2").unwrap()["spec"]["podCIDR"], subnet);
}

/// The kubelet starts a pod of its own folder without the server, and so does the plug-in.
pub(crate) fn pods_start_while_the_server_is_away(dir: &Path) {
    let mut bed = Bed::new(dir);
    bed.install();
    let pods = bed.pods();
    let traffic = Traffic::start(&pods);
    bed.cluster.stop_server();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "own", "namespace": "default" },
        "spec": { "containers": [{ "name": "wait", "image": WAITING }] },
    });
    let node = &bed.cluster.nodes()[0];
    let before: Vec<_> = node.pod_namespaces().unwrap();
    fs::write(node.path("/etc/kubernetes/manifests/own.yaml").unwrap(), pod.to_string()).unwrap();
    let is_new = |ns: &Namespace| before.iter().all(|before| before.name() != ns.name());
    let has_link = |ns: &Namespace| ns.links().is_ok_and(|links| links.iter().any(|link| link.name == "eth0"));
    let mut own = None;
    wait_until("the pod", PATIENCE, || {
        own = node.pod_namespaces()?.into_iter().find(|ns| is_new(ns) && has_link(ns));
        Ok(own.is_some())
    })
    .unwrap();
    probe::until_reply(&own.unwrap(), pods[1].addr(Family::V4).unwrap(), PATIENCE).unwrap();
    traffic.until_lasted(AWAY);
    bed.cluster.start_server().unwrap();
    traffic.arrived("the server was away for a minute");
    bed.until_agents_are_ready(&OURS);
}

pub(crate) fn nodes_come_and_go(dir: &Path) {
    let mut bed = Bed::new(dir);
    bed.install();
    let pods = bed.pods();
    let traffic = Traffic::start(&pods);
    bed.cluster.add_node().unwrap();
    bed.cluster.create_pod("three", 3).unwrap();
    let three: Pod = bed.cluster.pod("three").unwrap();
    for pod in &pods {
        reaches(pod, &three);
        reaches(&three, pod);
    }
    bed.cluster.node(3).power_off();
    bed.cluster.kubectl(&["delete", "node", "node-3"]).unwrap();
    let route = format!("{}", three.addr(Family::V4).unwrap());
    for node in bed.cluster.nodes().iter().take(2) {
        wait_until("its route is removed", PATIENCE, || {
            Ok(node.ns().ip(&format!("route get {route}"))?.contains("via 10.89.0.1 "))
        })
        .unwrap();
    }
    traffic.arrived("a node came and went");
}
