//! Shows the cluster in the form of `ip` and `bridge`.

use flannel_core::lease::Lease;
use flannel_core::net::Family;
use testkit::{Listing, Namespace};

use crate::Error;
use crate::cluster::Cluster;
use crate::screen::{Align, Screen, Style};

/// The most nodes that are shown one by one.
const NODES: usize = 3;
/// The most lines shown of one listing.
const LINES: usize = 8;

/// Shows the leases and the pods' settings.
pub(crate) fn leases(screen: &mut Screen, cluster: &Cluster) -> Result<(), Error> {
    screen.section("Leases")?;
    let mut rows = vec![["node", "subnet", "public address", "MTU of pods", "VTEP"].map(str::to_owned).to_vec()];
    for (node, member) in cluster.iter() {
        for (family, subnet) in member.lease.subnets.iter() {
            let public = member.lease.attrs.public_ip.get(family).map(ToString::to_string);
            let mut row =
                vec![node.name.clone(), subnet.to_string(), public.unwrap_or_default(), member.mtu.0.to_string()];
            row.extend(vtep(&member.lease, family));
            rows.push(row);
        }
    }
    if rows.iter().skip(1).all(|row| row.len() < rows[0].len()) {
        rows[0].pop();
    }
    Ok(screen.table(&[Align::Left, Align::Left, Align::Left, Align::Right, Align::Left], &rows)?)
}

/// Returns the published MAC address of a VXLAN device.
fn vtep(lease: &Lease, family: Family) -> Option<String> {
    let data = lease.attrs.backend_data.get(family)?;
    let data: serde_json::Value = serde_json::from_str(data.as_str()).ok()?;
    Some(data.get("VtepMAC")?.as_str()?.to_owned())
}

/// Shows each node's links, routes, neighbours and FDB.
pub(crate) fn nodes(screen: &mut Screen, cluster: &Cluster) -> Result<(), Error> {
    for node in cluster.nodes().iter().take(NODES) {
        screen.section(&format!("In {}", node.name))?;
        let ns = &node.ns;
        links(screen, ns)?;
        for family in cluster.families() {
            let command = match family {
                Family::V4 => "ip route",
                Family::V6 => "ip -6 route | grep -v fe80",
            };
            let routes = ns.show(Listing::Routes(*family))?;
            listing(screen, command, routes.lines().filter(|line| !line.starts_with("fe80")))?;
        }
        let (neighbours, entries) = (ns.show(Listing::Neighbours)?, ns.show(Listing::Fdb)?);
        let mut devices: Vec<_> = ns.links()?.into_iter().map(|link| link.name).collect();
        devices.retain(|name| name.starts_with("flannel"));
        for device in &devices {
            let on_device = |line: &&str| line.contains(&format!(" dev {device} "));
            // If a device is given, these commands do not print it.
            let brief = |line: &str| line.replace(&format!(" dev {device}"), "");
            let shown = neighbours.lines().filter(on_device).map(brief);
            listing(screen, &format!("ip neigh show dev {device}"), shown)?;
            let shown = entries.lines().filter(on_device).map(brief);
            listing(screen, &format!("bridge fdb show dev {device}"), shown)?;
        }
        if devices.is_empty() {
            listing(screen, "ip neigh", neighbours.lines())?;
            screen.note(&format!("{} has no overlay device, and so no FDB.", node.name))?;
        }
    }
    if cluster.members.len() > NODES {
        let more = cluster.members.len() - NODES;
        screen.blank()?;
        screen.note(&format!("{more} more nodes look alike; with --keep you can look inside."))?;
    }
    Ok(())
}

fn links(screen: &mut Screen, ns: &Namespace) -> Result<(), Error> {
    let text = ns.show(Listing::Links)?;
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.len()).max().unwrap_or(0);
    let (name, state) = (width(0), width(1));
    let lines = rows.iter().map(|row| match row[..] {
        [link, up, mac, flags] => format!("{link:<name$}  {up:<state$}  {mac} {flags}"),
        _ => row.join(" "),
    });
    listing(screen, "ip -br link", lines)
}

fn listing<T: AsRef<str>>(screen: &mut Screen, command: &str, lines: impl IntoIterator<Item = T>) -> Result<(), Error> {
    screen.line(&[("$ ", Style::Dim), (command, Style::Bold)])?;
    let lines: Vec<T> = lines.into_iter().collect();
    // A line that says that there is one more saves nothing.
    let shown = if lines.len() <= LINES + 1 { lines.len() } else { LINES };
    if lines.is_empty() {
        screen.note("  (nothing)")?;
    }
    for line in &lines[..shown] {
        screen.verbatim(4, line.as_ref())?;
    }
    if shown < lines.len() {
        screen.verbatim(4, &format!("... and {} more", lines.len() - shown))?;
    }
    Ok(())
}
