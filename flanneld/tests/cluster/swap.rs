//! Go flannel and ours in the place of each other.

use std::path::Path;

use testkit::cluster::{images, manifests};
use testkit::{Pod, wait_until};

use crate::bed::{Bed, GO, Kind, OURS, PATIENCE, Traffic, reaches};

pub(crate) fn go_flannel_is_replaced_and_replaces(dir: &Path) {
    let bed = Bed::with_go_flannel(dir);
    bed.apply(&manifests::go_flannel().unwrap());
    bed.until_agents_are_ready(&GO);
    let pods = bed.pods();
    let traffic = Traffic::start(&pods);
    for (from, to, manifest) in [(GO, OURS, manifests::ours().unwrap()), (OURS, GO, manifests::go_flannel().unwrap())] {
        remove(&bed, &from);
        bed.apply(&manifest);
        bed.until_agents_are_ready(&to);
        // A pod that the one's plug-in attached and a pod that the other's attached reach each other.
        let name = format!("of-{}", to.set);
        bed.cluster.create_pod(&name, 1).unwrap();
        let pod = bed.cluster.pod(&name).unwrap();
        reaches(&pod, &pods[1]);
        reaches(&pods[1], &pod);
    }
    traffic.arrived("Go flannel was replaced, and came back");

    // The plug-in of the one with the agent of the other.
    attach(&bed, "by-ours", &format!("{}-unknown-linux-musl/release/flannel", std::env::consts::ARCH), &pods[1]);
    remove(&bed, &GO);
    let installs = "            - -cni-bin-dir=/opt/cni/bin\n";
    let manifest = manifests::ours().unwrap();
    assert!(manifest.contains(installs), "{manifest}");
    bed.apply(&manifest.replace(installs, ""));
    bed.until_agents_are_ready(&OURS);
    attach(&bed, "by-go", "cni-0.9.1/flannel", &pods[1]);
    // What ours attached, the other's plug-in detaches.
    bed.cluster.kubectl(&["delete", "pod", "--all", "--wait"]).unwrap();
    for node in bed.cluster.nodes() {
        let detached = || Ok(node.run(&["ls", "/var/lib/cni/flannel"])?.is_empty());
        wait_until("all pods are detached", PATIENCE, detached).unwrap();
        let addresses = node.run(&["ls", "/var/lib/cni/networks/cbr0"]).unwrap();
        assert!(!addresses.contains("10.244."), "{addresses}");
    }
}

/// Installs a plug-in on node 1, one of the built programs, and attaches a pod there by it.
fn attach(bed: &Bed, name: &str, plugin: &str, other: &Pod) {
    let node = &bed.cluster.nodes()[0];
    node.run(&["install", &format!("/opt/programs/{plugin}"), "/opt/cni/bin/flannel"]).unwrap();
    bed.cluster.create_pod(name, 1).unwrap();
    let pod = bed.cluster.pod(name).unwrap();
    reaches(&pod, other);
    reaches(other, &pod);
}

/// Removes the agents of one kind; the data plane stays.
fn remove(bed: &Bed, kind: &Kind) {
    bed.cluster.kubectl(&["-n", kind.namespace, "delete", "ds", kind.set, "--wait", "--cascade=foreground"]).unwrap();
}

pub(crate) fn go_flannels_manifest_runs_with_our_image(dir: &Path) {
    let bed = Bed::new(dir);
    let manifest = images::GO.iter().fold(manifests::go_flannel().unwrap(), |text, image| {
        assert!(text.contains(image), "{image}: {text}");
        text.replace(image, &images::name())
    });
    bed.apply(&manifest);
    bed.until_agents_are_ready(&GO);
    let pods = bed.pods();
    let traffic = Traffic::start(&pods);
    bed.restart(&GO);
    traffic.arrived("a restart of all agents");
    assert_eq!(bed.failed_sandboxes(), [""; 0]);
}
