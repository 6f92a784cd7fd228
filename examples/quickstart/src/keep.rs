//! How to look inside what is left running.

use std::os::fd::{AsFd, AsRawFd};
use std::process;

use testkit::Namespace;

use crate::Error;
use crate::cluster::Cluster;
use crate::screen::{Align, Screen, Style};

/// The namespaces that a process outside has to enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Network namespaces only.
    Net,
    /// The user namespace of this process, which owns the network namespaces.
    UserAndNet,
}

/// Prints how to run programs in the namespaces.
pub(crate) fn invite(screen: &mut Screen, cluster: &Cluster, entry: Entry) -> Result<(), Error> {
    screen.section("Left running")?;
    let Some(node) = cluster.nodes().first() else { return Ok(()) };
    let pid = process::id();
    screen.line(&[("Any program can be run inside. What node1 routes where, for example:", Style::Plain)])?;
    screen.blank()?;
    let net = format!("--net={}", path(&node.ns));
    match entry {
        // Entering the user namespace that the process is already in is an error.
        Entry::Net => screen.line(&[(&format!("  nsenter {net} ip route"), Style::Bold)])?,
        Entry::UserAndNet => {
            screen.line(&[(&format!("  nsenter -t {pid} -U --preserve-credentials {net} \\"), Style::Bold)])?;
            screen.line(&[("    ip route", Style::Bold)])?;
        }
    }
    screen.blank()?;
    screen.line(&[("The others, for --net:", Style::Plain)])?;
    let mut rows = vec![["node", "namespace", "its pod's", "pod address"].map(str::to_owned).to_vec()];
    for (node, member) in cluster.iter() {
        let addr = member.pod.addrs.iter().next().map(|(_, addr)| addr.to_string());
        rows.push(vec![node.name.clone(), path(&node.ns), path(&member.pod.ns), addr.unwrap_or_default()]);
    }
    screen.table(&[Align::Left; 4], &rows)?;
    screen.blank()?;
    Ok(screen.line(&[("Break what you like: the agents are running. Ctrl-C ends it all.", Style::Plain)])?)
}

fn path(ns: &Namespace) -> String {
    format!("/proc/{}/fd/{}", process::id(), ns.as_fd().as_raw_fd())
}
