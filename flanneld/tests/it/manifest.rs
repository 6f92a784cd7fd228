//! The manifest for Kubernetes says what this program takes, and `doctor` what the cluster lacks.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use axum::http::Method;
use flannel_core::config::{Allocation, NetworkConfig};
use serde_json::{Value, json};
use testkit::{Families, kubernetes, wait_until};

use crate::harness::{CommandOutput, PATIENCE, Site, VXLAN, bare, command, on_switch, owned, run};
use crate::kube::{self, Kubernetes};
use crate::kubernetes::Cluster;

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
        rule("nodes", json!(["get", "list", "watch"])),
        rule("nodes/status", json!(["patch"])),
        rule("events", json!(["create"])),
    ]);
    assert_eq!(only("ClusterRole")["rules"], needed);
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
    let policy = only("ValidatingAdmissionPolicy");
    assert_eq!(only("ValidatingAdmissionPolicyBinding")["spec"]["policyName"], policy["metadata"]["name"]);
    let account = only("ServiceAccount")["metadata"].clone();
    let user = ["namespace", "name"].map(|key| account[key].as_str().unwrap()).join(":");
    let agents = format!("request.userInfo.username == \"system:serviceaccount:{user}\"");
    assert_eq!(policy["spec"]["matchConditions"][0]["expression"], agents);
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
            is_named || help.contains(&format!("{directory}/")) || directory == "/run/xtables.lock",
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

/// The manifest and the kustomize base are applied as they are, and the overlay beside flannel's own ConfigMap.
#[test]
fn kubectl_takes_every_field_of_the_manifest_and_of_what_is_made_of_it() {
    let site = Site::new(1, VXLAN);
    let cluster = Kubernetes::start(&site, VXLAN);
    let (kubectl, kubeconfig) = (kubernetes::program("kubectl").unwrap(), cluster.server.admin_kubeconfig().unwrap());
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let apply = |kind: &str, what: &str| {
        let mut kubectl = bare(Command::new(&kubectl));
        // It keeps what it read of the server below its home.
        kubectl.env("HOME", site.path("")).args(["apply", "--validate=strict", kind]).arg(deploy.join(what));
        kubectl.arg(format!("--kubeconfig={}", kubeconfig.display()));
        let told = CommandOutput::from(site.underlay.switch().run(|| kubectl.output().unwrap()).unwrap());
        assert_eq!((told.code, told.err.as_str()), (Some(0), ""), "{what}");
        told.out.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    for (kind, what, suffix) in [
        ("-f", "kubernetes/flannel.yaml", " created"),
        ("-f", "kubernetes/flannel.yaml", " unchanged"),
        ("-k", "kubernetes", " unchanged"),
    ] {
        let told = apply(kind, what);
        assert_eq!(told.len(), kubernetes::manifest().unwrap().len(), "{told:#?}");
        assert!(told.iter().all(|line| line.ends_with(suffix)), "{told:#?}");
    }

    let namespace = json!({ "metadata": { "name": "kube-flannel" } });
    on_switch(&site, async || cluster.server.create("/api/v1/namespaces", &namespace).await).unwrap();
    let mut told = apply("-k", "overlays/kube-flannel");
    told.sort();
    let expected = [
        "clusterrole.rbac.authorization.k8s.io/flannelkit unchanged",
        "clusterrolebinding.rbac.authorization.k8s.io/flannelkit configured",
        "daemonset.apps/flanneld created",
        "serviceaccount/flanneld created",
        "validatingadmissionpolicy.admissionregistration.k8s.io/flannelkit configured",
        "validatingadmissionpolicybinding.admissionregistration.k8s.io/flannelkit unchanged",
    ];
    assert_eq!(told, expected);
    let get = |path: &str| on_switch(&site, async || cluster.server.get(path).await).unwrap();
    let set = get("/apis/apps/v1/namespaces/kube-flannel/daemonsets/flanneld");
    let selector = json!({ "kubernetes.io/os": "linux", "flannelkit.io/agent": "true" });
    assert_eq!(set["spec"]["template"]["spec"]["nodeSelector"], selector);
    let binding = get("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/flannelkit");
    assert_eq!(binding["subjects"][0]["namespace"], "kube-flannel");
    let policy = get("/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/flannelkit");
    let agents = "request.userInfo.username == \"system:serviceaccount:kube-flannel:flanneld\"";
    assert_eq!(policy["spec"]["matchConditions"][0]["expression"], agents);
}

/// docs/faults.md, K16.
#[test]
fn an_agent_may_change_only_the_node_of_its_pod() {
    const ANY: &str = "example.com/any";
    let cluster = Cluster::new(2);
    [1, 2].into_iter().for_each(|nth| cluster.register(nth));
    cluster.ask(async |server| server.install().await).unwrap();
    let token = |node| cluster.ask(async |server| server.agent_token(node).await).unwrap();
    let (own, unbound) = (token(Some("node-1")), token(None));
    let ask = |token: &str, method, path: &str, body: &Value| {
        let told = cluster.ask(async |server| server.request_as(token, method, path, Some(body)).await);
        told.map(drop).map_err(|error| error.to_string())
    };
    let change = json!({ "metadata": { "annotations": { ANY: "changed" } } });
    let write = |token: &str, path: &str| ask(token, Method::PATCH, &format!("/api/v1/nodes/{path}"), &change);
    let denies = |told: Result<(), String>, part: &str| {
        told.is_err_and(|error| error.contains("ValidatingAdmissionPolicy 'flannelkit'") && error.contains(part))
    };
    // A server goes by new roles and policies a little later.
    let enforced = || Ok(denies(write(&own, "node-2/status"), "on node node-1 may not change Node node-2"));
    wait_until("the policy", PATIENCE, enforced)
        .unwrap_or_else(|error| panic!("{error}: {:?}", write(&own, "node-2/status")));
    assert_eq!(write(&own, "node-1/status"), Ok(()));
    for path in ["node-1/status", "node-2/status"] {
        assert!(denies(write(&unbound, path), "this token names no node"), "{:?}", write(&unbound, path));
    }

    // Events are limited in the same way.
    let event = |token: &str, about: Value| {
        let event = json!({ "metadata": { "generateName": "e." }, "involvedObject": about, "reason": "Any" });
        ask(token, Method::POST, "/api/v1/namespaces/default/events", &event)
    };
    let node = |name: &str| json!({ "kind": "Node", "name": name });
    let pod = json!({ "kind": "Pod", "name": "node-1", "namespace": "default" });
    assert_eq!(event(&own, node("node-1")), Ok(()));
    for denied in [event(&own, node("node-2")), event(&own, pod)] {
        assert!(denies(denied.clone(), "may create Events of its own Node only"), "{denied:?}");
    }
    assert!(denies(event(&unbound, node("node-1")), "this token names no node"));

    // Whatever else an administrator allows the account.
    let everything = json!([{ "apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["*"] }]);
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/flannelkit";
    cluster.ask(async |server| server.patch(role, &json!({ "rules": everything })).await).unwrap();
    wait_until("the role", PATIENCE, || Ok(write(&own, "node-1").is_ok())).unwrap();
    assert!(denies(write(&own, "node-2"), "may not change Node node-2"));
    // All at once: such a request has no name.
    for token in [&own, &unbound] {
        assert!(ask(token, Method::DELETE, "/api/v1/nodes", &json!({})).is_err());
    }
    let deleted = ask(&own, Method::DELETE, "/api/v1/nodes/node-2", &json!({}));
    assert!(denies(deleted.clone(), "may not change Node node-2"), "{deleted:?}");
    let created = ask(&own, Method::POST, "/api/v1/nodes", &json!({ "metadata": { "name": "node-3" } }));
    assert!(denies(created.clone(), "may not change Node node-3"), "{created:?}");

    // Others are not affected: an administrator, and an account of another name with the same rights.
    let other =
        cluster.ask(async |server| server.service_account("other", kubernetes::rules().unwrap()).await).unwrap();
    wait_until("the other account", PATIENCE, || Ok(write(&other, "node-2/status").is_ok())).unwrap();
    cluster.ask(async |server| server.annotate("node-2", json!({ ANY: "by an administrator" })).await).unwrap();

    // The agent itself works so, and says why it does not on another node.
    let one = cluster.launch(1, cluster.kubernetes.args_with("own", &own), &[("NODE_NAME", "node-1")]).ready();
    wait_until("the condition", PATIENCE, || Ok(cluster.network_unavailable(1).as_deref() == Some("False"))).unwrap();
    let two = cluster.launch(2, cluster.kubernetes.args_with("own", &own), &[("NODE_NAME", "node-2")]);
    two.until("told that it is refused", || two.log().contains("on node node-1 may not change Node node-2"));
    assert_eq!((cluster.annotation(2, "backend-type"), two.is_ready()), (None, false));
    assert!(one.is_ready(), "{}", one.log());
}

#[test]
fn doctor_says_what_the_cluster_lacks() {
    let site = Site::new(1, VXLAN);
    let cluster = Kubernetes::start(&site, VXLAN);
    let node = format!("-node-name={}", kube::name(1));
    let args = [cluster.args(), owned(&[&node, "doctor"])].concat();
    // A server goes by a new account's role a little later.
    let told = |lines: [&str; 4]| {
        let deadline = Instant::now() + PATIENCE;
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
