//! The arrows between the crates of this workspace are those of ARCHITECTURE.md, and no others.
#![expect(clippy::expect_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What each crate may link, development dependencies aside.
const MAY_USE: [(&str, &[&str]); 21] = [
    (
        "flannelkit",
        &[
            "flannel-core",
            "flannel-backend-hostgw",
            "flannel-backend-udp",
            "flannel-backend-vxlan",
            "flannel-firewall-iptables",
            "flannel-firewall-nft",
            "flannel-subnet-cached",
            "flannel-subnet-etcd",
            "flannel-subnet-file",
            "flannel-subnet-kube",
        ],
    ),
    ("flannel-core", &[]),
    ("flannel-backend-vxlan", &["flannel-core"]),
    ("flannel-backend-udp", &["flannel-core"]),
    ("flannel-backend-hostgw", &["flannel-core"]),
    ("flannel-subnet-etcd", &["flannel-core"]),
    ("flannel-subnet-kube", &["flannel-core"]),
    ("flannel-firewall-iptables", &["flannel-core"]),
    ("flannel-firewall-nft", &["flannel-core"]),
    ("flannel-subnet-cached", &["flannel-core"]),
    ("flannel-subnet-file", &["flannel-core"]),
    ("cni-flannel", &["flannel-core"]),
    ("testkit", &["*"]),
    ("bench", &["*"]),
    ("fuzz", &["*"]),
    // The quickstart is a lab: it shares testkit's namespaces, probes and acts of sabotage.
    ("quickstart", &["*"]),
    (
        "flanneld",
        &[
            "cni-flannel",
            "flannel-core",
            "flannel-backend-vxlan",
            "flannel-backend-hostgw",
            "flannel-backend-udp",
            "flannel-firewall-iptables",
            "flannel-firewall-nft",
            "flannel-subnet-cached",
            "flannel-subnet-etcd",
            "flannel-subnet-file",
            "flannel-subnet-kube",
        ],
    ),
    ("embed", &["flannelkit"]),
    ("kube-embed", &["flannelkit"]),
    ("custom-store", &["flannelkit"]),
    ("custom-backend", &["flannelkit"]),
];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

#[test]
fn crates_depend_on_one_another_only_as_the_architecture_says() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let names: BTreeSet<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.into();
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let may = allowed.get(name).unwrap_or_else(|| panic!("{name} is new: say here what it may depend on"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let target = dependency["name"].as_str().unwrap();
            let linked = dependency["kind"].is_null();
            if linked && names.contains(target) && target != name {
                assert!(may.contains(&target) || may.contains(&"*"), "{name} must not depend on {target}");
            }
        }
    }
}

#[test]
fn only_core_links_netlink() {
    for package in metadata()["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        if ["flannel-core", "testkit", "bench"].contains(&name) {
            continue;
        }
        for dependency in package["dependencies"].as_array().unwrap() {
            let target = dependency["name"].as_str().unwrap();
            assert!(!target.contains("netlink"), "{name} must not depend on {target}: core's netlink module does");
        }
    }
}

#[test]
fn published_crates_use_testkit_for_tests_only() {
    for package in metadata()["packages"].as_array().unwrap() {
        let published = package["publish"].as_array().is_none_or(|registries| !registries.is_empty());
        for dependency in package["dependencies"].as_array().unwrap() {
            let normal = dependency["kind"].is_null();
            let testkit = dependency["name"] == "testkit";
            assert!(!(published && normal && testkit), "{} links testkit", package["name"]);
        }
    }
}

#[test]
fn what_is_published_says_what_it_is() {
    for package in metadata()["packages"].as_array().unwrap() {
        if package["publish"].as_array().is_some_and(Vec::is_empty) {
            continue;
        }
        let name = package["name"].as_str().unwrap();
        for field in ["description", "license", "readme", "repository", "documentation", "rust_version"] {
            assert!(package[field].as_str().is_some_and(|text| !text.is_empty()), "{name} has no {field}");
        }
        for (field, most) in [("keywords", 5), ("categories", 5)] {
            let count = package[field].as_array().unwrap().len();
            assert!((1..=most).contains(&count), "{name}: {field}");
        }
    }
}

#[test]
fn a_minimal_embedder_needs_few_packages() {
    let args = ["tree", "-p", "flannelkit", "--no-default-features", "--features", "vxlan", "-e", "normal"];
    let output = Command::new(env!("CARGO"))
        .args(args)
        .args([
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--no-dedupe",
            "--offline",
            "--target",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("cargo prints text");
    let packages: BTreeSet<_> = text.lines().map(|line| line.trim_end_matches(" (proc-macro)")).collect();
    assert!(packages.len() <= 50, "{}: {packages:#?}", packages.len());
}
