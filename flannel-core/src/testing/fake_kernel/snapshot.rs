//! The whole state of a fake kernel as text.

use std::fmt;

use crate::kernel::{LinkId, LinkKind, RouteKind, Tun, Vxlan};

use super::tables::{Entry, MAIN, Slot, Tables};
use super::{Nud, mac_text};

/// The state of a [`FakeKernel`](super::FakeKernel) at one moment: one line per object, as iproute2 prints it. Routes
/// with equal keys are in the order of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(Vec<String>);

impl Snapshot {
    /// Returns the lines.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    /// Returns the lines that a later snapshot lacks: objects that were changed or deleted.
    pub fn missing_from(&self, later: &Self) -> Vec<&str> {
        self.0.iter().filter(|line| !later.0.contains(line)).map(String::as_str).collect()
    }

    /// Returns the lines that an earlier snapshot lacks: objects that were added or changed since.
    pub fn added_since(&self, earlier: &Self) -> Vec<&str> {
        self.missing_from(earlier)
    }

    /// Returns the lines that contain `text`, in order.
    pub fn matching(&self, text: &str) -> Vec<&str> {
        self.0.iter().filter(|line| line.contains(text)).map(String::as_str).collect()
    }

    pub(super) fn of(tables: &Tables) -> Self {
        let name = |index: u32| match tables.links.get(&index) {
            Some(link) => link.name.to_string(),
            None => format!("if{index}"),
        };
        let mut lines = Vec::new();
        for (index, link) in &tables.links {
            let state = if link.up { "up" } else { "down" };
            let mac = mac_text(link.mac);
            let mut line = format!("link {index}: {} {state} mtu {} address {mac}", link.name, link.mtu);
            match &link.kind {
                LinkKind::Vxlan(vxlan) => line.push_str(&vxlan_text(vxlan, name)),
                LinkKind::Tun(tun) => line.push_str(&tun_text(tun)),
                LinkKind::External(kind) | LinkKind::Other(kind) if kind.is_empty() => {}
                LinkKind::External(kind) | LinkKind::Other(kind) => line.push_str(&format!(" type {kind}")),
            }
            if link.group != 0 {
                line.push_str(&format!(" group {:#x}", link.group));
            }
            if let Some(alias) = &link.alias {
                line.push_str(&format!(" alias {alias}"));
            }
            lines.push(line);
        }
        for address in &tables.addresses {
            lines.push(format!("addr {}/{} dev {}", address.addr, address.len, name(address.link)));
        }
        for ((link, addr), (mac, nud)) in &tables.neighbours {
            lines.push(format!("neigh {addr} dev {} lladdr {mac} {}", name(*link), nud_text(*nud)));
        }
        for ((link, mac), entries) in &tables.fdb {
            for (dst, nud) in entries {
                lines.push(format!("fdb {mac} dev {} dst {dst} self {}", name(*link), nud_text(*nud)));
            }
        }
        for ((link, prefix), forward) in &tables.forwards {
            lines.push(format!("forward {prefix} dev {} to {forward}", name(*link)));
        }
        for (slot, entries) in &tables.routes {
            lines.extend(entries.iter().map(|entry| route_text(slot, entry, name)));
        }
        Self(lines)
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

fn vxlan_text(vxlan: &Vxlan, name: impl Fn(u32) -> String) -> String {
    let mut text = format!(" type vxlan id {}", vxlan.vni);
    if let Some(local) = vxlan.local {
        text.push_str(&format!(" local {local}"));
    }
    if let Some(LinkId::Other(lower)) = vxlan.lower {
        text.push_str(&format!(" dev {}", name(lower)));
    }
    if let Some(port) = vxlan.port {
        text.push_str(&format!(" dstport {port}"));
    }
    text.push_str(if vxlan.learning { " learning" } else { " nolearning" });
    if let Some(remote) = vxlan.remote {
        text.push_str(&format!(" remote {remote}"));
    }
    if vxlan.misses {
        text.push_str(" misses");
    }
    if vxlan.gbp {
        text.push_str(" gbp");
    }
    text
}

fn tun_text(tun: &Tun) -> String {
    let mut text = String::from(" type tun");
    if tun.multi_queue {
        text.push_str(" multi_queue");
    }
    if let Some(tunnel) = &tun.tunnel {
        for (_, local) in tunnel.local.iter() {
            text.push_str(&format!(" local {local}"));
        }
        text.push_str(&format!(" port {}", tunnel.port));
    }
    text
}

fn nud_text(nud: Nud) -> &'static str {
    match nud {
        Nud::Permanent => "PERMANENT",
        Nud::Learnt => "REACHABLE",
    }
}

fn route_text(slot: &Slot, entry: &Entry, name: impl Fn(u32) -> String) -> String {
    let mut text = String::from("route ");
    match entry.kind {
        RouteKind::Unicast => {}
        RouteKind::Blackhole => text.push_str("blackhole "),
        RouteKind::Foreign => text.push_str("other "),
    }
    text.push_str(&slot.prefix.to_string());
    let mut hop = |gateway: Option<std::net::IpAddr>, link: Option<u32>, lead: &str| {
        text.push_str(lead);
        if let Some(gateway) = gateway {
            text.push_str(&format!(" via {gateway}"));
        }
        if let Some(link) = link {
            text.push_str(&format!(" dev {}", name(link)));
        }
    };
    hop(entry.gateway, entry.link, "");
    for sibling in &entry.siblings {
        hop(sibling.gateway, sibling.link, " nexthop");
    }
    text.push_str(&format!(" proto {}", entry.protocol));
    if slot.metric != 0 {
        text.push_str(&format!(" metric {}", slot.metric));
    }
    if let Some(source) = entry.source {
        text.push_str(&format!(" src {source}"));
    }
    if slot.table != MAIN {
        text.push_str(&format!(" table {}", slot.table));
    }
    if entry.onlink {
        text.push_str(" onlink");
    }
    text
}
