//! The manifest in a real Kubernetes cluster of two nodes.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use testkit::cluster::{Cluster, Node, Options, images, isolated, manifests};
use testkit::{Error, Families, Pod, probe};

use crate::screen::{Screen, Style, duration};
use crate::{Args, chain};

/// How long pods may take to reach each other again.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is broken on a node, by a command.
const ACTS: [(&str, &[&str]); 3] = [
    ("the VXLAN device is deleted", &["ip", "link", "delete", "flannel.1"]),
    ("its routes are flushed", &["ip", "route", "flush", "dev", "flannel.1"]),
    ("its neighbour entries are flushed", &["ip", "neigh", "flush", "dev", "flannel.1", "nud", "permanent"]),
];

/// Runs the demonstration in namespaces of its own.
pub(crate) fn run(args: &Args) -> ExitCode {
    let ran = isolated(|dir| demonstrate(args, dir, &mut Screen::stdout()));
    ran.unwrap_or_else(|error| {
        // Standard error may be closed.
        let _ = Screen::stdout().fail(&chain(&error));
        ExitCode::FAILURE
    })
}

fn demonstrate(args: &Args, dir: &Path, screen: &mut Screen) -> Result<(), Error> {
    let shown = |result: std::io::Result<()>| result.map_err(|error| Error::io("writing to the screen", error));
    shown(screen.title("flannelkit quickstart", "Kubernetes, 2 nodes"))?;
    shown(screen.note("API server, containerd, kubelet and kube-proxy run in namespaces of this process,"))?;
    shown(screen.note("and end with it."))?;
    let began = Instant::now();
    let options = Options { nodes: 2, families: Families::V4, images: vec![images::ours()?] };
    let cluster = Cluster::start(dir, &options)?;
    shown(screen.section(&format!("Without a network, after {}", duration(began.elapsed()))))?;
    show(&cluster, screen, &["get", "nodes"])?;

    let applied = Instant::now();
    cluster.kubectl(&["apply", "-f", &manifests::path().display().to_string()])?;
    for (name, nth) in [("one", 1), ("two", 2)] {
        cluster.create_pod(name, nth)?;
    }
    let pods = [cluster.pod("one")?, cluster.pod("two")?];
    reaches(&pods)?;
    let title =
        format!("{} after kubectl apply -f deploy/kubernetes/flannel.yaml, pods ping", duration(applied.elapsed()));
    shown(screen.section(&title))?;
    cluster.until("all nodes are ready", Cluster::nodes_are_ready)?;
    show(&cluster, screen, &["get", "nodes"])?;
    show(&cluster, screen, &["get", "pods", "--all-namespaces"])?;
    show_node(&cluster.nodes()[0], screen)?;

    shown(screen.section("Break and heal, on node-1"))?;
    for (what, command) in ACTS {
        shown(screen.begin(&format!("{what:<50}"), 0))?;
        cluster.nodes()[0].run(command)?;
        let broken = Instant::now();
        reaches(&pods)?;
        shown(screen.end(&format!("{:>9}", duration(broken.elapsed())), Style::Good))?;
    }
    if args.keep {
        shown(screen.section("Left running"))?;
        let line = format!("  {} get pods --all-namespaces", cluster.kubectl_script()?.display());
        shown(screen.line(&[(&line, Style::Bold)]))?;
        shown(screen.line(&[("Ctrl-C ends it all.", Style::Plain)]))?;
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

fn reaches([one, two]: &[Pod; 2]) -> Result<(), Error> {
    for (from, to) in [(one, two), (two, one)] {
        probe::until_reply(&from.ns, to.addr(Family::V4)?, PATIENCE)?;
    }
    Ok(())
}

/// Prints a command of kubectl and its output.
fn show(cluster: &Cluster, screen: &mut Screen, words: &[&str]) -> Result<(), Error> {
    let text = cluster.kubectl(words)?;
    print(screen, &format!("kubectl {}", words.join(" ")), &text)
}

fn show_node(node: &Node, screen: &mut Screen) -> Result<(), Error> {
    for words in [&["ip", "route"][..], &["cat", "/run/flannel/subnet.env"]] {
        print(screen, &format!("{}: {}", node.name(), words.join(" ")), &node.run(words)?)?;
    }
    Ok(())
}

fn print(screen: &mut Screen, command: &str, text: &str) -> Result<(), Error> {
    let shown = (|| {
        screen.line(&[(&format!("  {command}"), Style::Bold)])?;
        text.lines().try_for_each(|line| screen.verbatim(4, line))
    })();
    shown.map_err(|error| Error::io("writing to the screen", error))
}
