//! The command line.

use std::fmt;

use clap::{Parser, ValueEnum};
use flannel_core::net::Family;
use testkit::Families;
use testkit::sabotage::Plane;

/// Builds an overlay of several nodes, shows it, breaks it, and times how it heals.
///
/// Nodes and pods are network namespaces of this process, so it needs neither
/// root nor any other program, and leaves nothing behind. The exit status is 0
/// only if every pair of pods pinged and every act healed.
#[derive(Debug, Clone, Parser)]
#[command(name = "quickstart", verbatim_doc_comment)]
pub(crate) struct Args {
    /// How many nodes: 2 to 16
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=16))]
    pub(crate) nodes: u8,
    /// How packets get from node to node
    #[arg(long, value_enum, default_value_t = Backend::Vxlan)]
    pub(crate) backend: Backend,
    /// IPv6 instead of IPv4
    #[arg(long, conflicts_with = "dual_stack")]
    pub(crate) ipv6: bool,
    /// IPv4 and IPv6
    #[arg(long)]
    pub(crate) dual_stack: bool,
    /// Leave it running afterwards, and say how to look inside
    #[arg(long)]
    pub(crate) keep: bool,
    /// A real Kubernetes cluster of two nodes, with what `testkit/cluster/build target` has built. Needs root
    #[cfg(feature = "kubernetes")]
    #[arg(long, conflicts_with_all = ["nodes", "backend", "ipv6", "dual_stack", "json"])]
    pub(crate) kubernetes: bool,
    /// Print one JSON object, and nothing else, on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// The selectable backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// In UDP packets by the kernel, over any network
    Vxlan,
    /// By plain routes, for nodes on one link
    HostGw,
    /// In UDP packets by this process, without VXLAN
    Udp,
}

impl Args {
    pub(crate) fn families(&self) -> Families {
        match (self.ipv6, self.dual_stack) {
            (_, true) => Families::Dual,
            (true, false) => Families::V6,
            (false, false) => Families::V4,
        }
    }

    /// Returns the network's configuration, flannel's document.
    pub(crate) fn network(&self) -> String {
        let families = self.families();
        let (v4, v6) = (families.has(Family::V4), families.has(Family::V6));
        let mut fields = vec![format!(r#""EnableIPv4":{v4},"EnableIPv6":{v6}"#)];
        if v4 {
            fields.push(r#""Network":"10.244.0.0/16","SubnetLen":24"#.to_owned());
        }
        if v6 {
            fields.push(r#""IPv6Network":"fd00:10:244::/48","IPv6SubnetLen":64"#.to_owned());
        }
        format!(r#"{{{},"Backend":{{"Type":"{}"}}}}"#, fields.join(","), self.backend)
    }

    /// Returns a summary for a title.
    pub(crate) fn summary(&self) -> String {
        let families = match self.families() {
            Families::V4 => "IPv4",
            Families::V6 => "IPv6",
            Families::Dual => "IPv4 and IPv6",
        };
        format!("{} nodes, {}, {families}", self.nodes, self.backend)
    }
}

impl Backend {
    pub(crate) fn plane(self) -> Plane {
        match self {
            Self::Vxlan => Plane::Vxlan,
            Self::HostGw => Plane::HostGw,
            Self::Udp => Plane::Udp,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp => "udp",
        })
    }
}
