//! The manifest, the image and the plug-in in a real Kubernetes cluster: `./test cluster`.
//!
//! Each scenario has a cluster of its own. Names given as arguments select scenarios.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test program")]

mod bed;
mod figures;
mod install;
mod modes;
mod outages;
mod swap;
mod waiting;

use std::panic::catch_unwind;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use testkit::Error;
use testkit::cluster::isolated;

type Scenario = (&'static str, fn(&Path));

const SCENARIOS: [Scenario; 11] = [
    ("a_fresh_cluster_gets_its_network", install::a_fresh_cluster_gets_its_network),
    ("agents_restart_under_traffic", outages::agents_restart_under_traffic),
    ("kubelet_and_runtime_restart_under_traffic", outages::kubelet_and_runtime_restart_under_traffic),
    ("a_node_reboots", outages::a_node_reboots),
    ("pods_start_while_the_server_is_away", outages::pods_start_while_the_server_is_away),
    ("nodes_come_and_go", outages::nodes_come_and_go),
    ("go_flannel_is_replaced_and_replaces", swap::go_flannel_is_replaced_and_replaces),
    ("go_flannels_manifest_runs_with_our_image", swap::go_flannels_manifest_runs_with_our_image),
    ("iptables_and_host_gw", modes::iptables_and_host_gw),
    ("dual_stack", modes::dual_stack),
    ("agents_wait_for_what_is_missing", waiting::agents_wait_for_what_is_missing),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let ran = isolated(|dir| {
        if words.first().is_some_and(|word| word == "figures") {
            figures::compare(dir);
            return Ok(());
        }
        let chosen = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
        if !SCENARIOS.iter().any(|(name, _)| chosen(name)) {
            let names = SCENARIOS.map(|(name, _)| name).join("\n  ");
            return Err(Error::new(format!("no scenario has one of {words:?} in its name; there are\n  {names}")));
        }
        let mut failed = Vec::new();
        for (name, scenario) in SCENARIOS.into_iter().filter(|(name, _)| chosen(name)) {
            let start = Instant::now();
            let dir = dir.join(name);
            std::fs::create_dir(&dir).unwrap();
            let passed = catch_unwind(|| scenario(&dir)).is_ok();
            println!("{name} ... {} ({:.1?})", if passed { "ok" } else { "FAILED" }, start.elapsed());
            // The disk is needed for the next one.
            std::fs::remove_dir_all(&dir).unwrap();
            if !passed {
                failed.push(name);
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(Error::new(format!("failed: {}", failed.join(", ")))) }
    });
    ran.unwrap_or_else(|error| {
        println!("{error}");
        ExitCode::FAILURE
    })
}
