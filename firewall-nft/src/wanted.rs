//! The wanted contents of the overlay's tables. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::firewall::{Forward, Pods, Rules, SourcePorts};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family, Prefix};

/// The bit with which Kubernetes marks packets that another program masquerades (docs/compatibility.md, "iptables").
pub(crate) const MARK: u32 = 0x4000;

/// Every chain that an overlay can have.
pub(crate) const CHAINS: [&str; 3] = [POSTRTG, FORWARD, VXLAN];
/// The set of the guard's peers.
pub(crate) const PEERS: &str = "peers";

const POSTRTG: &str = "postrtg";
const FORWARD: &str = "forward";
const VXLAN: &str = "vxlan";

/// A table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) family: Family,
    pub(crate) name: String,
    /// The elements of the set [`PEERS`], if it is wanted.
    pub(crate) peers: Option<BTreeSet<IpAddr>>,
    pub(crate) chains: Vec<Chain>,
}

/// A base chain with policy accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: &'static str,
    pub(crate) comment: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) hook: &'static str,
    /// In text and in JSON.
    pub(crate) priority: (&'static str, i32),
    pub(crate) rules: Vec<Rule>,
}

/// A rule: its conditions, all of which must hold, and its verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule(pub(crate) Vec<Match>, pub(crate) Verdict);

/// A condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    Marked(u32),
    Address(Side, Is, Prefix),
    UdpTo(u16),
    FromPeer(Family),
}

/// The source or destination of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// Whether an address has to be inside or outside of a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Is {
    In,
    Outside,
}

/// The action of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Return,
    Accept,
    Drop,
    Masquerade(SourcePorts),
}

/// Returns the name of an overlay's table: Go flannel's for overlay `flannel`, with a suffix for others.
pub(crate) fn table_name(overlay: &OverlayName, family: Family) -> String {
    let base = match family {
        Family::V4 => "flannel-ipv4",
        Family::V6 => "flannel-ipv6",
    };
    if *overlay == OverlayName::default() { base.to_owned() } else { format!("{base}-{overlay}") }
}

/// Returns the wanted tables. `most` is the support of tool and kernel for source ports.
pub(crate) fn tables(rules: &Rules, most: SourcePorts) -> Dual<Table> {
    rules.pods.map(|family, pods| {
        let masquerade = rules.masquerade.map(|masquerade| match (masquerade.ports, most) {
            (SourcePorts::FullyRandom, SourcePorts::FullyRandom) => SourcePorts::FullyRandom,
            (SourcePorts::Kernel, _) | (_, SourcePorts::Kernel) => SourcePorts::Kernel,
        });
        let mut chains: Vec<Chain> = masquerade.map(|ports| postrtg(family, pods, ports)).into_iter().collect();
        if rules.forward == Forward::Accept {
            chains.push(forward(pods));
        }
        chains.extend(rules.guard.as_ref().map(|guard| vxlan(family, guard.port)));
        let of_family = |peers: &BTreeSet<IpAddr>| {
            peers.iter().copied().filter(|peer| Family::of(*peer) == family).collect::<BTreeSet<_>>()
        };
        let peers = rules.guard.as_ref().map(|guard| of_family(&guard.peers));
        Table { family, name: table_name(&rules.overlay, family), peers, chains }
    })
}

/// Returns the rules of docs/compatibility.md, "iptables", in that order; not those of "nftables", which never
/// masquerade packets from a node to remote pods.
fn postrtg(family: Family, pods: &Pods, ports: SourcePorts) -> Chain {
    use {Is::*, Side::*, Verdict::*};
    let Pods { network, subnet } = *pods;
    let pair = |source: (Is, Prefix), destination: (Is, Prefix), verdict| {
        let matches =
            [(Source, source), (Destination, destination)].map(|(side, (is, to))| Match::Address(side, is, to));
        Rule(matches.into(), verdict)
    };
    let multicast = multicast(family);
    Chain {
        name: POSTRTG,
        comment: "chain to manage traffic masquerading by flannel",
        kind: "nat",
        hook: "postrouting",
        priority: ("srcnat", 100),
        rules: vec![
            Rule(vec![Match::Marked(MARK)], Return),
            pair((In, subnet), (In, network), Return),
            pair((In, network), (In, subnet), Return),
            pair((Outside, network), (In, subnet), Return),
            pair((In, network), (Outside, multicast), Masquerade(ports)),
            pair((Outside, network), (In, network), Masquerade(ports)),
        ],
    }
}

fn multicast(family: Family) -> Prefix {
    let (addr, len) = match family {
        Family::V4 => (IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4),
        Family::V6 => (IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
    };
    // The lengths are valid for their families, so the fallback is never used.
    Prefix::masked(addr, len).unwrap_or_else(|_| Prefix::host(addr))
}

fn forward(pods: &Pods) -> Chain {
    let accept = |side| Rule(vec![Match::Address(side, Is::In, pods.network)], Verdict::Accept);
    Chain {
        name: FORWARD,
        comment: "chain to accept flannel traffic",
        kind: "filter",
        hook: "forward",
        priority: ("filter", 0),
        rules: vec![accept(Side::Source), accept(Side::Destination)],
    }
}

fn vxlan(family: Family, port: u16) -> Chain {
    Chain {
        name: VXLAN,
        comment: "chain to keep strangers from the VXLAN port",
        kind: "filter",
        hook: "input",
        priority: ("filter", 0),
        rules: vec![
            Rule(vec![Match::UdpTo(port), Match::FromPeer(family)], Verdict::Accept),
            Rule(vec![Match::UdpTo(port)], Verdict::Drop),
        ],
    }
}
