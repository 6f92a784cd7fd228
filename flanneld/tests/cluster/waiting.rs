//! A manifest that lacks something: agents wait, show what is missing, and continue once it is there.

use std::path::Path;

use serde_json::Value;
use testkit::cluster::{Cluster, condition, manifests};

use crate::bed::{Bed, OURS, reaches};

pub(crate) fn agents_wait_for_what_is_missing(dir: &Path) {
    let bed = Bed::new(dir);
    let manifest = manifests::ours().unwrap();
    let without = |kind: &str| {
        let parts = manifest.split("\n---\n").filter(|part| !part.contains(&format!("\nkind: {kind}\n")));
        parts.collect::<Vec<_>>().join("\n---\n")
    };
    let network = manifest.replace("10.244.0.0/16", "10.99.0.0/16");
    for (what, manifest, said, has_event) in [
        ("no rights", without("ClusterRoleBinding"), "cannot get", false),
        ("another network", network, "10.99.0.0/16", true),
    ] {
        bed.apply(&manifest);
        for nth in [1, 2] {
            bed.cluster.until(what, |_| Ok(bed.log(&OURS, nth).contains(said))).unwrap_or_else(|error| {
                panic!("{error}\n{}", bed.log(&OURS, nth));
            });
        }
        for agent in bed.agents(&OURS) {
            assert!(!condition(&agent, "Ready"), "{what}: {agent}");
            let restarts = agent["status"]["containerStatuses"][0]["restartCount"].as_u64();
            assert_eq!(restarts.unwrap_or_default(), 0, "{what}: {agent}");
        }
        assert!(!bed.cluster.nodes_are_ready().unwrap(), "{what}");
        if has_event {
            let shown = |cluster: &Cluster| {
                let events = cluster.get("/api/v1/namespaces/default/events")?;
                let is_shown = |event: &Value| {
                    event["reason"] == "FlannelWaits"
                        && event["message"].as_str().is_some_and(|text| text.contains(said))
                };
                Ok(events["items"].as_array().is_some_and(|events| events.iter().any(is_shown)))
            };
            bed.cluster.until("an Event of the Node", shown).unwrap();
        }
        bed.cluster.kubectl(&["delete", "ns", OURS.namespace, "--wait"]).unwrap();
    }
    // The kubelet waits for it.
    bed.apply(&without("ConfigMap"));
    let shown = |cluster: &Cluster| {
        let events = cluster.get("/api/v1/namespaces/flannelkit/events")?;
        let is_shown = |event: &Value| event["message"].as_str().is_some_and(|text| text.contains("kube-flannel-cfg"));
        Ok(events["items"].as_array().is_some_and(|events| events.iter().any(is_shown)))
    };
    bed.cluster.until("an Event of the agent's Pod", shown).unwrap();
    bed.install();
    let pods = bed.pods();
    reaches(&pods[1], &pods[0]);
}
