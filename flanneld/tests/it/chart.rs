//! The Helm chart renders the manifest, and a value changes what it is about and nothing else.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use flannel_core::config::{Allocation, NetworkConfig};
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::kubernetes;

use crate::harness::{CommandOutput, bare, command, owned};

const NAMESPACE: &str = "flannelkit";

/// Runs Helm, which keeps its files in `home`.
fn helm(home: &TempDir, args: &[&str]) -> CommandOutput {
    let mut helm = bare(Command::new(kubernetes::helm().unwrap()));
    helm.env("HOME", home.path()).args(args).output().unwrap().into()
}

fn chart() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/flannelkit").display().to_string()
}

/// Objects by kind. The network configuration is an object instead of its text.
type Objects = BTreeMap<String, Value>;

fn by_kind(objects: Vec<Value>) -> Objects {
    let named = |mut object: Value| {
        if let Some(conf) = object.pointer_mut("/data/net-conf.json") {
            *conf = serde_json::from_str(conf.as_str().unwrap()).unwrap();
        }
        (object["kind"].as_str().unwrap().to_owned(), object)
    };
    let count = objects.len();
    let objects: Objects = objects.into_iter().map(named).collect();
    assert_eq!(objects.len(), count, "one of each kind");
    objects
}

/// The manifest without its Namespace.
fn manifest() -> Objects {
    let mut objects = by_kind(kubernetes::manifest().unwrap());
    assert!(objects.remove("Namespace").is_some());
    objects
}

#[track_caller]
fn rendered(home: &TempDir, chart: &str, namespace: &str, values: &[&str]) -> Objects {
    let told = helm(home, &[&["template", "flannelkit", chart, "--namespace", namespace], values].concat());
    assert_eq!(told.code, Some(0), "{values:?}: {}", told.err);
    by_kind(kubernetes::objects(&told.out).unwrap())
}

/// Sets what is at a path of keys and numbers.
fn set(object: &mut Value, path: &str, value: Value) {
    let at = path.split(' ').fold(object, |object, key| match key.parse::<usize>() {
        Ok(nth) => &mut object[nth],
        Err(_) => &mut object[key],
    });
    *at = value;
}

#[test]
fn helm_finds_no_fault_in_the_chart_which_renders_the_manifest_also_once_it_is_packed() {
    let home = tempfile::tempdir().unwrap();
    let lint = helm(&home, &["lint", "--strict", &chart()]);
    assert_eq!(lint.code, Some(0), "{lint:?}");
    assert_eq!(rendered(&home, &chart(), NAMESPACE, &[]), manifest());
    let folder = home.path().display().to_string();
    let packed = helm(&home, &["package", &chart(), "--destination", &folder]);
    assert_eq!(packed.code, Some(0), "{packed:?}");
    // It has the version of the workspace, as the image has.
    let archive = format!("{folder}/flannelkit-{}.tgz", env!("CARGO_PKG_VERSION"));
    assert_eq!(rendered(&home, &archive, NAMESPACE, &[]), manifest());
}

#[test]
fn each_value_changes_what_it_is_about_and_nothing_else() {
    const CONF: &str = "data net-conf.json";
    const POD: &str = "spec template spec";
    const CONTAINER: &str = "spec template spec containers 0";
    let of = |parent: &str, path: &str| format!("{parent} {path}");
    let (conf, pod, container) =
        (|path: &str| of(CONF, path), |path: &str| of(POD, path), |path: &str| of(CONTAINER, path));
    let tolerations = json!([{ "key": "node-role.kubernetes.io/control-plane", "operator": "Exists" }]);
    let resources = json!({ "limits": { "memory": "128Mi" }, "requests": { "cpu": "50m", "memory": "16Mi" } });
    let privileged = json!({
        "privileged": true, "runAsUser": 0, "readOnlyRootFilesystem": true,
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    let is_linux = json!({ "kubernetes.io/os": "linux", "flannelkit.io/agent": "true" });
    let mut args = manifest()["DaemonSet"].pointer("/spec/template/spec/containers/0/args").unwrap().clone();
    args.as_array_mut().unwrap().extend([json!("-iface=eth1"), json!("-v=2")]);
    let (map, set_of_pods) = ("ConfigMap", "DaemonSet");
    let rows = [
        ("--set=backend.Type=host-gw", vec![(map, conf("Backend Type"), json!("host-gw"))]),
        (
            "--set=backend.Type=udp,backend.Port=8286,privileged=true",
            vec![
                (map, conf("Backend"), json!({ "Type": "udp", "Port": 8286 })),
                (set_of_pods, container("securityContext"), privileged),
            ],
        ),
        (
            "--set=mtu=1400,backend.VNI=7,backend.DirectRouting=true",
            vec![(map, conf("Backend"), json!({ "Type": "vxlan", "MTU": 1400, "VNI": 7, "DirectRouting": true }))],
        ),
        ("--set=nftables=false", vec![(map, conf("EnableNFTables"), json!(false))]),
        (
            "--set=network=10.42.0.0/16,ipv6Network=fd00:42::/48",
            vec![
                (map, conf("Network"), json!("10.42.0.0/16")),
                (map, conf("EnableIPv6"), json!(true)),
                (map, conf("IPv6Network"), json!("fd00:42::/48")),
            ],
        ),
        (
            "--set=network=,ipv6Network=fd00:42::/48",
            vec![(
                map,
                CONF.to_owned(),
                json!({
                    "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48", "EnableNFTables": true,
                    "Backend": { "Type": "vxlan" },
                }),
            )],
        ),
        (
            "--set=image.repository=ghcr.io/a/b,image.tag=v7,image.pullPolicy=Always,imagePullSecrets[0].name=c",
            vec![
                (set_of_pods, container("image"), json!("ghcr.io/a/b:v7")),
                (set_of_pods, container("imagePullPolicy"), json!("Always")),
                (set_of_pods, pod("imagePullSecrets"), json!([{ "name": "c" }])),
            ],
        ),
        (
            "--set=resources.limits.memory=128Mi,resources.requests.memory=16Mi",
            vec![(set_of_pods, container("resources"), resources)],
        ),
        (
            &*format!("--set-json=tolerations={tolerations}"),
            vec![(set_of_pods, pod("tolerations"), tolerations.clone())],
        ),
        (
            "--set-json=nodeSelector={\"flannelkit.io/agent\":\"true\"}",
            vec![(set_of_pods, pod("nodeSelector"), is_linux)],
        ),
        ("--set=priorityClassName=mine", vec![(set_of_pods, pod("priorityClassName"), json!("mine"))]),
        (
            "--set=maxUnavailable=10%",
            vec![(set_of_pods, "spec updateStrategy rollingUpdate maxUnavailable".to_owned(), json!("10%"))],
        ),
        ("--set=extraArgs={-iface=eth1,-v=2}", vec![(set_of_pods, container("args"), args)]),
    ];
    let home = tempfile::tempdir().unwrap();
    for (values, changes) in rows {
        let mut expected = manifest();
        for (kind, path, value) in changes {
            set(expected.get_mut(kind).unwrap(), &path, value);
        }
        let found = rendered(&home, &chart(), NAMESPACE, &[values]);
        assert_eq!(found, expected, "{values}");
        // flanneld takes it.
        let text = found[map]["data"]["net-conf.json"].to_string();
        NetworkConfig::parse(text.as_bytes(), Allocation::External).unwrap_or_else(|error| panic!("{values}: {error}"));
        let args = found[set_of_pods].pointer("/spec/template/spec/containers/0/args").unwrap();
        let args: Vec<_> = args.as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
        let told = command(&owned(&[&args[..], &["-version"]].concat())).output().unwrap();
        assert!(told.status.success(), "{values}: {}", String::from_utf8_lossy(&told.stderr));
    }
}

/// In flannel's namespace, with flannel's ConfigMap as it is.
#[test]
fn a_release_in_another_namespace_uses_what_is_there() {
    let home = tempfile::tempdir().unwrap();
    let mut expected = manifest();
    expected.remove("ConfigMap");
    for (kind, path) in [
        ("ServiceAccount", "metadata namespace"),
        ("DaemonSet", "metadata namespace"),
        ("ClusterRoleBinding", "subjects 0 namespace"),
    ] {
        set(expected.get_mut(kind).unwrap(), path, json!("kube-flannel"));
    }
    let agents = "request.userInfo.username == \"system:serviceaccount:kube-flannel:flanneld\"";
    let policy = expected.get_mut("ValidatingAdmissionPolicy").unwrap();
    set(policy, "spec matchConditions 0 expression", json!(agents));
    let volume = "spec template spec volumes 0 configMap name";
    set(expected.get_mut("DaemonSet").unwrap(), volume, json!("another"));
    let values = ["--set=existingConfigMap=another"];
    assert_eq!(rendered(&home, &chart(), "kube-flannel", &values), expected);
}

#[test]
fn a_value_that_is_no_good_is_refused_by_its_name() {
    let home = tempfile::tempdir().unwrap();
    for (values, parts) in [
        ("--set=netwrok=10.42.0.0/16", ["''", "additional properties 'netwrok' not allowed"]),
        ("--set=network=10.42.0.0", ["'/network'", "'10.42.0.0' does not match pattern"]),
        ("--set=ipv6Network=10.42.0.0/16", ["'/ipv6Network'", "'10.42.0.0/16' does not match pattern"]),
        ("--set=network=", ["'/network'", "'/ipv6Network'"]),
        ("--set=backend.Type=wireguard", ["'/backend/Type'", "value must be one of 'vxlan', 'host-gw', 'udp'"]),
        ("--set=backend.Type=host-gw,mtu=1400", ["mtu: the backend host-gw has no such setting", "leave it 0"]),
        ("--set=mtu=many", ["'/mtu'", "got string, want integer"]),
        ("--set=nftables=yes", ["'/nftables'", "got string, want boolean"]),
        ("--set=image.repository=", ["'/image/repository'", "minLength"]),
        ("--set=image.pullPolicy=Sometimes", ["'/image/pullPolicy'", "'Always'"]),
        ("--set=imagePullSecrets={a}", ["'/imagePullSecrets/0'", "got string, want object"]),
        ("--set=extraArgs={iface=eth1}", ["'/extraArgs/0'", "'iface=eth1' does not match pattern"]),
        ("--set=tolerations=all", ["'/tolerations'", "got string, want array"]),
        ("--set=maxUnavailable=0", ["'/maxUnavailable'", "minimum: got 0, want 1"]),
        ("--set=privileged=1", ["'/privileged'", "got number, want boolean"]),
    ] {
        let told = helm(&home, &["template", "flannelkit", &chart(), values]);
        assert_eq!((told.code, &*told.out), (Some(1), ""), "{values}");
        for part in parts {
            assert!(told.err.contains(part), "{values}: {part} is not in:\n{}", told.err);
        }
    }
}
