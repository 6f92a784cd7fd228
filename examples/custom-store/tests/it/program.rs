//! Tests of the program, in a namespace with an uplink.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use testkit::{Families, Namespace, Process, Underlay, wait_until};

use crate::fleet::curl;

const PATIENCE: Duration = Duration::from_secs(20);

/// A running program and the file with its output.
struct Program {
    process: Process,
    printed: PathBuf,
}

impl Program {
    fn start(ns: &Namespace, dir: &Path, args: &[&str]) -> Self {
        let printed = dir.join(args[0]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_custom-store"));
        command.args(args).stdout(File::create(&printed).unwrap());
        // A process inherits the namespace of the thread that starts it.
        let process = ns.run(|| Process::start(&mut command, &printed.with_extension("log"))).unwrap().unwrap();
        Self { process, printed }
    }

    fn until_printed(&self, text: &str) {
        let waited = wait_until(text, PATIENCE, || Ok(fs::read_to_string(&self.printed).unwrap().contains(text)));
        waited.unwrap_or_else(|error| panic!("{error}: {}", self.process.log()));
    }

    fn interrupt(mut self) {
        self.process.signal(Signal::SIGINT).unwrap();
        assert!(self.process.wait(PATIENCE).unwrap().success(), "{}", self.process.log());
    }
}

#[test]
fn a_hub_and_a_node_run_until_they_are_interrupted() {
    let lab = Underlay::new(1, Families::V4).expect("the lab needs root, or: unshare -Urn cargo test");
    let node = &lab.nodes()[0];
    node.ns.set_up("lo").unwrap();
    let dir = testkit::memory_dir().unwrap();
    let addr = SocketAddr::from((node.v4().unwrap(), 7000));
    let hub = Program::start(&node.ns, dir.path(), &["hub", &addr.to_string()]);
    hub.until_printed("hub at http://");
    // A node waits for the configuration.
    let agent = Program::start(&node.ns, dir.path(), &["node", &addr.to_string(), testkit::UNDERLAY_LINK]);
    let network = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    node.ns.run(|| curl(addr, "PUT", "/v1/config", network)).unwrap().unwrap();
    agent.until_printed("ready, with pods in 10.5.");
    agent.interrupt();
    hub.interrupt();
    assert!(node.ns.link("flannel.1").is_ok(), "the node's kernel objects stay");
}

#[test]
fn invalid_arguments_print_the_usage() {
    for args in [&[][..], &["hub"], &["hub", "nowhere"], &["node", "127.0.0.1:1"], &["other", "127.0.0.1:1"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_custom-store")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"), "{args:?}");
    }
}
