//! A program outside of this workspace that knows the crate `flannelkit` alone.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use testkit::{Families, Underlay};

#[test]
fn a_program_with_ten_overlays_is_built_and_run_outside_of_the_workspace() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let door = root.join("flannelkit");
    let manifest = format!(
        "[package]\nname = \"embedder\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
         flannelkit = {{ path = {door:?}, features = [\"serde\", \"testing\"] }}\nserde_json = \"1\"\n\
         tokio = {{ version = \"1\", features = [\"macros\", \"rt-multi-thread\"] }}\n"
    );
    fs::write(dir.path().join("Cargo.toml"), manifest).unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    fs::copy(root.join("testkit/programs/embedder.rs"), dir.path().join("src/main.rs")).unwrap();
    // The versions that the workspace has: nothing has to be fetched.
    fs::copy(root.join("Cargo.lock"), dir.path().join("Cargo.lock")).unwrap();
    let target = root.join("target/embedder");
    let cargo = Path::new(env!("CARGO"));
    // A build that hangs is a failure, with what it printed so far.
    let built = Command::new("timeout")
        .arg("600")
        .arg(cargo)
        .args(["build", "--offline", "--target-dir"])
        .arg(&target)
        // Outside of the workspace, `rustc` may be another toolchain, which the host may have to fetch first.
        .env("RUSTC", cargo.with_file_name("rustc"))
        .env("CARGO_PROFILE_DEV_DEBUG", "none")
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(built.status.success(), "{}: {}", built.status, String::from_utf8_lossy(&built.stderr));

    let lab = Underlay::new(1, Families::V4).unwrap();
    let node = &lab.nodes()[0].ns;
    node.add_veth("eth1", lab.switch(), "other").unwrap();
    node.ip("address add 192.0.2.1/24 dev eth1").unwrap();
    node.set_up("eth1").unwrap();
    lab.switch().set_up("other").unwrap();
    let program = target.join("debug/embedder");
    // What hangs is a failure.
    let output = node.run(|| Command::new("timeout").arg("60").arg(&program).output()).unwrap().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    let (shown, done): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with('{'));
    let statuses: Vec<serde_json::Value> = shown.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(statuses.len() == 10 && statuses.iter().all(|status| status["ready"] == true), "{text}");
    let subnets: BTreeSet<_> = statuses.iter().map(|status| status["lease"]["subnets"]["v4"].to_string()).collect();
    assert_eq!(subnets.len(), 10, "{subnets:?}");
    let [uplink, network, again, removed] = &done[..] else { panic!("{text}") };
    assert_eq!((*uplink, *again, *removed), ("uplink changed", "run again", "removed"));
    assert!(network.starts_with("network changed: 10.200."), "{network}");
    // One was removed; what the others have stays, as after a crash.
    let left = node.links().unwrap().into_iter().filter(|link| link.name.starts_with("flannel."));
    let left: BTreeSet<_> = left.map(|link| link.name).collect();
    assert_eq!(left, (100..110).filter(|vni| *vni != 103).map(|vni| format!("flannel.{vni}")).collect());
}
