//! Operations as text, in the style of iproute2.

use std::fmt;

use crate::net::Prefix;

use super::link_kind::{LinkKind, Tun, Vxlan};
use super::objects::{AddressKey, Link, LinkId, Route, RouteKind};
use super::op::{LinkPart, Object, Op};
use super::scope::Scope;

/// An operation as text, with the link names of a scope, as `plan` prints it.
pub struct OpText<'a> {
    /// The operation.
    pub op: &'a Op,
    /// The scope that names the links.
    pub scope: &'a Scope,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(_) => f.write_str("a device of the overlay"),
            Self::LinkPart(_, part) => write!(f, "the {part} of a device of the overlay"),
            Self::Address(key) => write!(f, "address {}/{}", key.addr, key.len),
            Self::Fdb(key) => write!(f, "forwarding entry {}", key.mac),
            Self::Neighbour(key) => write!(f, "neighbour {}", key.addr),
            Self::Forward(key) => write!(f, "forward {}", key.prefix),
            Self::Route(prefix) => write!(f, "route {prefix}"),
        }
    }
}

impl fmt::Display for LinkPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "name",
            Self::Mtu => "MTU",
            Self::Mac => "MAC address",
            Self::Mark => "group and alias",
            Self::Learning => "learning",
            Self::Remote => "default destination",
            Self::Tunnel => "tunnel",
            Self::State => "state",
        })
    }
}

/// A link id as a name, if the scope has one.
struct LinkText<'a>(LinkId, &'a Scope);

impl fmt::Display for LinkText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            LinkId::Own(slot) => match self.1.devices.get(usize::from(slot)) {
                Some(device) => device.name.fmt(f),
                None => write!(f, "own{slot}"),
            },
            LinkId::Uplink => match self.1.uplink {
                Some(index) => self.named(index, f),
                None => f.write_str("uplink"),
            },
            LinkId::Other(index) => self.named(index, f),
        }
    }
}

impl LinkText<'_> {
    /// Writes the link's name, or its index if it appeared after the host was read.
    fn named(&self, index: u32, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1.names.get(index) {
            Some(name) => write!(f, "{name}"),
            None => write!(f, "if{index}"),
        }
    }
}

pub(crate) struct RouteText<'a> {
    pub(crate) prefix: Prefix,
    pub(crate) route: &'a Route,
    pub(crate) scope: &'a Scope,
}

impl fmt::Display for RouteText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { kind, gateway, link, onlink, protocol, .. } = *self.route;
        let (slot, source) = (self.route.slot(), self.route.source());
        match kind {
            RouteKind::Unicast => {}
            RouteKind::Blackhole => f.write_str("blackhole ")?,
            RouteKind::Foreign => f.write_str("(other) ")?,
        }
        write!(f, "{}", self.prefix)?;
        if let Some(gateway) = gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = link {
            write!(f, " dev {}", LinkText(link, self.scope))?;
        }
        match protocol {
            Route::BOOT => f.write_str(" proto boot")?,
            protocol => write!(f, " proto {protocol}")?,
        }
        if !slot.is_in_main_table() {
            write!(f, " table {}", slot.table)?;
        }
        if slot.metric != 0 {
            write!(f, " metric {}", slot.metric)?;
        }
        if let Some(source) = source {
            write!(f, " src {source}")?;
        }
        if onlink { f.write_str(" onlink") } else { Ok(()) }
    }
}

impl fmt::Display for OpText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scope = self.scope;
        let name = |link| LinkText(link, scope);
        let address = |verb: &str, key: &AddressKey, f: &mut fmt::Formatter<'_>| {
            write!(f, "address {verb} {}/{} dev {}", key.addr, key.len, name(key.link))
        };
        match self.op {
            Op::DeleteLink { link, .. } => write!(f, "link delete {}", link.name),
            Op::CreateLink { link, .. } => write!(f, "link add {} mtu {}{}", link.name, link.mtu, KindText(link)),
            Op::UpdateLink { part, from, to, .. } => {
                write!(f, "link set {}", from.name)?;
                match part {
                    LinkPart::Name => write!(f, " name {}", to.name),
                    LinkPart::Mtu => write!(f, " mtu {}", to.mtu),
                    LinkPart::Mac => to.mac.map_or(Ok(()), |mac| write!(f, " address {mac}")),
                    LinkPart::Mark => {
                        write!(f, " group {:#x} alias {}", to.group, to.alias.as_deref().unwrap_or("''"))
                    }
                    LinkPart::Learning => f.write_str(match &to.kind {
                        LinkKind::Vxlan(vxlan) if vxlan.learning => " type vxlan learning",
                        _ => " type vxlan nolearning",
                    }),
                    LinkPart::Remote => match &to.kind {
                        LinkKind::Vxlan(Vxlan { remote: Some(remote), .. }) => write!(f, " type vxlan remote {remote}"),
                        _ => f.write_str(" type vxlan noremote"),
                    },
                    LinkPart::Tunnel => KindText(to).fmt(f),
                    LinkPart::State => f.write_str(if to.up { " up" } else { " down" }),
                }
            }
            Op::AddAddress(key) => address("add", key, f),
            Op::DeleteAddress(key) => address("delete", key, f),
            Op::PutFdb { key, dst } => write!(f, "fdb replace {} dev {} dst {dst}", key.mac, name(key.link)),
            Op::DeleteFdb { key, dst } => write!(f, "fdb delete {} dev {} dst {dst}", key.mac, name(key.link)),
            Op::PutNeighbour { key, mac, .. } => {
                write!(f, "neigh replace {} lladdr {mac} dev {} nud permanent", key.addr, name(key.link))
            }
            Op::PutForward { key, forward } => {
                write!(f, "forward replace {} dev {} to {forward}", key.prefix, name(key.link))
            }
            Op::DeleteForward { key, forward } => {
                write!(f, "forward delete {} dev {} to {forward}", key.prefix, name(key.link))
            }
            Op::DeleteNeighbour { key, .. } => write!(f, "neigh delete {} dev {}", key.addr, name(key.link)),
            Op::CreateRoute { prefix, route } => {
                write!(f, "route add {}", RouteText { prefix: *prefix, route, scope })
            }
            Op::ReplaceRoute { prefix, change } => {
                write!(f, "route replace {}", RouteText { prefix: *prefix, route: &change.1, scope })
            }
            Op::DeleteRoute { prefix, route } => {
                write!(f, "route delete {}", RouteText { prefix: *prefix, route, scope })
            }
        }
    }
}

struct KindText<'a>(&'a Link);

impl fmt::Display for KindText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(mac) = self.0.mac {
            write!(f, " address {mac}")?;
        }
        match &self.0.kind {
            LinkKind::Vxlan(vxlan) => {
                write!(f, " type vxlan id {}", vxlan.vni)?;
                if let Some(local) = vxlan.local {
                    write!(f, " local {local}")?;
                }
                if let Some(port) = vxlan.port {
                    write!(f, " dstport {port}")?;
                }
                f.write_str(if vxlan.learning { " learning" } else { " nolearning" })
            }
            LinkKind::Tun(Tun { tunnel, .. }) => {
                f.write_str(" type tun")?;
                let Some(tunnel) = tunnel else { return Ok(()) };
                for (_, local) in tunnel.local.iter() {
                    write!(f, " local {local}")?;
                }
                write!(f, " port {}", tunnel.port)?;
                if tunnel.is_multi_queue() { write!(f, " queues {}", tunnel.queues) } else { Ok(()) }
            }
            LinkKind::External(kind) | LinkKind::Other(kind) => write!(f, " type {kind}"),
        }
    }
}

pub(crate) fn describe_link(link: &Link) -> String {
    let kind = match &link.kind {
        LinkKind::Vxlan(vxlan) => {
            let remote = vxlan.remote.map(|remote| format!(" remote {remote}")).unwrap_or_default();
            format!("vxlan id {}{remote}{}", vxlan.vni, if vxlan.misses { " l2miss or l3miss" } else { "" })
        }
        LinkKind::Tun(_) => Tun::KIND.to_owned(),
        LinkKind::External(kind) | LinkKind::Other(kind) => kind.to_string(),
    };
    format!("link {} ({kind}, group {:#x})", link.name, link.group)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kernel::{HostFacts, LinkNames, OverlayName};
    use crate::net::Dual;

    #[test]
    fn devices_are_shown_by_name_wherever_the_host_has_one() {
        let mut host = HostFacts::default();
        let link =
            |name: &str| Link::new(super::super::LinkName::new(name).unwrap(), LinkKind::Other("veth".into()), 1500);
        host.links.insert(2, link("eth0").into());
        host.links.insert(3, link("docker0").into());
        let scope = Scope {
            uplink: Some(2),
            names: LinkNames::of(Arc::new(host)),
            ..Scope::new(OverlayName::default(), Dual::default())
        };
        let shown = |link| LinkText(link, &scope).to_string();
        assert_eq!((shown(LinkId::Uplink), shown(LinkId::Other(3))), ("eth0".to_owned(), "docker0".to_owned()));
        assert_eq!(shown(LinkId::Other(4)), "if4");
    }
}
