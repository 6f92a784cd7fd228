//! The manifest for Kubernetes says what this program takes, and `doctor` what the cluster lacks.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use flannel_core::config::{Allocation, NetworkConfig};
use serde_json::{Value, json};
use testkit::{Families, kubernetes};

use crate::harness::{Site, VXLAN, command, on_switch, owned, run};
use crate::kube::{self, Kubernetes};

/// The only object of this kind.
fn only(kind: &str) -> Value {
    let mut found: Vec<_> =
        kubernetes::manifest().unwrap().into_iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}");
    found.remove(0)
}

fn names<'a>(list: &'a Value, key: &str) -> BTreeSet<&'a str> {
    list.as_array().unwrap().iter().map(|entry| entry[key].as_str().unwrap()).collect()
}

#[test]
fn the_manifest_grants_what_is_needed_and_no_more() {
    let rule = |resource, verbs| json!({ "apiGroups": [""], "resources": [resource], "verbs": verbs });
    let needed = json!([
        rule("pods", json!(["get"])),
        rule("nodes", json!(["get", "list", "watch"])),
        rule("nodes/status", json!(["patch"])),
    ]);
    assert_eq!(kubernetes::rules().unwrap(), needed);
    let (binding, account) = (only("ClusterRoleBinding"), only("ServiceAccount"));
    assert_eq!(binding["roleRef"]["name"], only("ClusterRole")["metadata"]["name"]);
    for key in ["name", "namespace"] {
        assert_eq!(binding["subjects"][0][key], account["metadata"][key]);
    }
    let pod = &only("DaemonSet")["spec"]["template"]["spec"];
    assert_eq!(pod["serviceAccountName"], account["metadata"]["name"]);
    let capabilities = &pod["containers"][0]["securityContext"]["capabilities"];
    assert_eq!(*capabilities, json!({ "drop": ["ALL"], "add": ["NET_ADMIN"] }));
}

#[test]
fn the_manifests_objects_belong_together() {
    let (namespace, set) = (only("Namespace"), only("DaemonSet"));
    for kind in ["ServiceAccount", "ConfigMap", "DaemonSet"] {
        assert_eq!(only(kind)["metadata"]["namespace"], namespace["metadata"]["name"], "{kind}");
    }
    assert_eq!(set["spec"]["selector"]["matchLabels"], set["spec"]["template"]["metadata"]["labels"]);
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["hostNetwork"], true);
    let container = &pod["containers"][0];
    assert_eq!(names(&container["volumeMounts"], "name"), names(&pod["volumes"], "name"));
    assert_eq!(pod["volumes"][0]["configMap"]["name"], only("ConfigMap")["metadata"]["name"]);
    let node = json!({ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } });
    assert_eq!(container["env"], json!([node]));
}

#[test]
fn the_manifests_flags_files_and_configuration_are_understood() {
    let set = only("DaemonSet");
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let args: Vec<_> = container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    let told = command(&owned(&[&args[..], &["-version"]].concat())).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let text = only("ConfigMap");
    let port = container["readinessProbe"]["httpGet"]["port"].to_string();
    assert!(args.contains(&&*format!("-metrics-port={port}")), "{args:?}");

    let help = command(&owned(&["-help"])).output().unwrap();
    let help = [help.stdout, help.stderr].concat();
    let help = String::from_utf8_lossy(&help);
    for directory in names(&container["volumeMounts"], "mountPath") {
        let is_named = args.iter().any(|arg| arg.ends_with(&format!("={directory}")));
        assert!(
            is_named || help.contains(&format!("{directory}/")),
            "no default is in {directory}, and no flag names it"
        );
    }
    let conf = text["data"]["cni-conf.json"].as_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let installed = cni_flannel::install::configuration(conf, dir.path()).unwrap();
    assert!(installed.written && args.contains(&"-cni-conf=/etc/kube-flannel/cni-conf.json"), "{args:?}");
    let text = text["data"]["net-conf.json"].as_str().unwrap();
    NetworkConfig::parse(text.as_bytes(), Allocation::External).unwrap();
}

#[test]
fn a_real_server_takes_every_field_of_the_manifest() {
    let site = Site::new(1, VXLAN);
    let cluster = Kubernetes::start(&site, VXLAN);
    let within = "namespaces/flannelkit";
    for object in kubernetes::manifest().unwrap() {
        let path = match object["kind"].as_str().unwrap() {
            "Namespace" => "/api/v1/namespaces".to_owned(),
            "ServiceAccount" => format!("/api/v1/{within}/serviceaccounts"),
            "ConfigMap" => format!("/api/v1/{within}/configmaps"),
            "ClusterRole" => "/apis/rbac.authorization.k8s.io/v1/clusterroles".to_owned(),
            "ClusterRoleBinding" => "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings".to_owned(),
            "DaemonSet" => format!("/apis/apps/v1/{within}/daemonsets"),
            kind => panic!("{kind} is new"),
        };
        let path = format!("{path}?fieldValidation=Strict");
        on_switch(&site, async || cluster.server.create(&path, &object).await).unwrap();
    }
}

#[test]
fn doctor_says_what_the_cluster_lacks() {
    let site = Site::new(1, VXLAN);
    let cluster = Kubernetes::start(&site, VXLAN);
    let node = format!("-node-name={}", kube::name(1));
    let args = [cluster.args(), owned(&[&node, "doctor"])].concat();
    // A server goes by a new account's role a little later.
    let told = |lines: [&str; 4]| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let told = run(site.ns(1), &args);
            match lines.iter().find(|line| !told.out.contains(**line)) {
                None => return told.code,
                Some(line) if Instant::now() > deadline => panic!("{line} is not in:\n{}", told.out),
                Some(_) => {}
            }
        }
    };
    let node = "ERROR    node           Node node-1: there is no such Node";
    assert_eq!(told(["ok       api server ", "ok       rbac ", "ok       server clock ", node]), Some(1));
    cluster.register(&site, 1, Families::V4);
    let node = "ok       node           Node node-1 has podCIDRs 10.244.1.0/24";
    told(["ok       api server ", "ok       rbac ", node, "ok       annotations "]);
}
