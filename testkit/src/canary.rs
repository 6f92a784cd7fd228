//! Foreign objects beside an overlay. If they are not byte for byte the same afterwards, the overlay changed foreign
//! objects.

mod dump;
mod kinds;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use flannel_core::net::{Family, MacAddr, Prefix};

use crate::sabotage::{Act, Overlay};
use crate::{Error, Fdb, Namespace, Neighbour, Node, Route, Rule, UNDERLAY_LINK, VxlanLink, wait_until};

use kinds::{Canary, Dumps};

const LINK: &str = "canary0";
const FAR_END: &str = "canary1";
const BRIDGE: &str = "canarybr";
const VXLAN: &str = "canaryvx";
/// Tables that nothing else uses.
const TABLE: u32 = 4242;
const RULE_TABLE: u8 = 142;
const SETTLE: Duration = Duration::from_secs(10);

/// Where canaries are, which determines the acts that they survive ([`Place::survives`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// On links, in tables and under names of their own, at least fifty: links, a VXLAN device of another VNI and port,
    /// addresses, rules, neighbours, FDB entries, routes of peers' prefixes, sysctls, and nft tables if there is `nft`.
    /// They survive all acts.
    Apart,
    /// Routes of the main table through a link of their own: peers' prefixes with other metrics, and other prefixes.
    Main,
    /// Routes of peers' prefixes through the underlay with another metric, protocol, gateway or table.
    Uplink,
    /// The same through the overlay's own devices.
    Device,
    /// Routes with exactly the key of a peer's route, appended; IPv4 only, where such routes remain separate. Once the
    /// peer's own route is gone, such a prefix is a conflict: it does not heal, and must not.
    SameKey,
}

impl Place {
    /// All places.
    pub const ALL: [Self; 5] = [Self::Apart, Self::Main, Self::Uplink, Self::Device, Self::SameKey];

    /// Whether canaries here still exist after the act, if the agent does nothing.
    pub fn survives(self, act: Act) -> bool {
        let flushed = matches!(act, Act::RoutesFlushed | Act::Everything);
        match self {
            Self::Apart => true,
            Self::Main | Self::SameKey => !flushed,
            Self::Uplink => {
                !flushed
                    && !matches!(
                        act,
                        Act::UnderlayDownUp | Act::UnderlayAddresses | Act::UnderlayRenamed | Act::UnderlayDeleted
                    )
            }
            Self::Device => {
                !flushed
                    && !matches!(
                        act,
                        Act::OverlayDownUp | Act::OverlayAddresses | Act::OverlayDeleted | Act::UnderlayDeleted
                    )
            }
        }
    }
}

/// Where to put canaries.
#[derive(Debug, Clone, Copy)]
pub struct Where<'a> {
    /// The places.
    pub places: &'a [Place],
    /// The overlay beside which they are placed.
    pub overlay: &'a Overlay,
    /// Peers' prefixes whose routes already exist.
    pub peers: &'a [Prefix],
}

/// The canaries on a node. They stay when this is dropped, until the node ends.
#[derive(Debug)]
pub struct Canaries {
    ns: Namespace,
    canaries: Vec<Canary>,
}

impl Canaries {
    /// Creates the canaries.
    ///
    /// # Errors
    /// If one already exists, if a device or a peer's route is missing, or the kernel's error.
    pub fn place(node: &Node, place: &Where<'_>) -> Result<Self, Error> {
        let mut placed = Self { ns: node.ns.clone(), canaries: Vec::new() };
        // Even main-table routes need a link that no act takes away.
        placed.links(node)?;
        for place_of in place.places {
            match place_of {
                Place::Apart => placed.apart(place.peers)?,
                Place::Main => placed.routes_of(place.peers, LINK, Route::MAIN)?,
                Place::Uplink => {
                    placed.routes_of(place.peers, UNDERLAY_LINK, Route::MAIN)?;
                    placed.routes_of(place.peers, UNDERLAY_LINK, TABLE + 1)?;
                }
                Place::Device => {
                    for (nth, device) in place.overlay.devices.iter().enumerate() {
                        let table = TABLE + 2 + nth as u32;
                        let shift = 100 * (1 + nth as u32);
                        placed.routes_with(place.peers, device, Route::MAIN, shift)?;
                        placed.routes_with(place.peers, device, table, shift)?;
                    }
                }
                Place::SameKey => placed.same_key(place.peers)?,
            }
        }
        Ok(placed)
    }

    /// Returns the number of canaries.
    pub fn len(&self) -> usize {
        self.canaries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.canaries.is_empty()
    }

    /// Returns the kernel's present data of each canary, without what changes by itself (counters, ages), and the order
    /// of the routes among them.
    ///
    /// # Errors
    /// If the kernel refuses a dump.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        let dumps = Dumps::read(&self.ns)?;
        let mut seen = Vec::with_capacity(self.canaries.len());
        for canary in &self.canaries {
            seen.push((canary.to_string(), canary.bytes(&dumps, &self.ns)?));
        }
        Ok(Snapshot { seen, order: dumps.route_order(&self.canaries) })
    }

    fn links(&mut self, node: &Node) -> Result<(), Error> {
        let ns = &self.ns.clone();
        ns.add_veth(LINK, ns, FAR_END)?;
        ns.add_bridge(BRIDGE)?;
        let foreign = VxlanLink { vni: 424_242, port: Some(4789), ..VxlanLink::default() };
        ns.add_vxlan(VXLAN, &foreign, None)?;
        for (nth, link) in [LINK, FAR_END, BRIDGE, VXLAN].into_iter().enumerate() {
            ns.set_mac(link, mac(0x10, nth as u8))?;
            ns.set_up(link)?;
            self.canaries.push(Canary::Link(link.to_owned()));
        }
        // The states follow asynchronously; a bridge without ports ends as DOWN.
        wait_until("the canaries' links to settle", SETTLE, || {
            let state = |name| Ok::<_, Error>(ns.link(name)?.state);
            let ends_up = state(LINK)? == "UP" && state(FAR_END)? == "UP";
            Ok(ends_up && state(BRIDGE)? == "DOWN" && state(VXLAN)? == "UNKNOWN")
        })?;
        for (family, _) in node.addrs.iter() {
            let (addr, len) = (address(family, 1), length(family));
            ns.add_address(LINK, addr, len)?;
            self.canaries.push(Canary::Address(LINK.to_owned(), addr));
        }
        Ok(())
    }

    fn apart(&mut self, peers: &[Prefix]) -> Result<(), Error> {
        let ns = self.ns.clone();
        let families: Vec<Family> = ns
            .addresses()?
            .iter()
            .filter(|address| address.dev == LINK && !address.is_link_local())
            .map(|address| Family::of(address.addr))
            .collect();
        let (mut neighbours, mut entries, mut routes) = (Vec::new(), Vec::new(), Vec::new());
        for family in families {
            for nth in 0..8 {
                let rule = Rule { priority: 4200 + nth, from: host(address(family, 64 + nth)), table: RULE_TABLE };
                ns.add_rule(&rule)?;
                self.canaries.push(Canary::Rule(family, rule.priority));
                let neighbour = Neighbour::permanent(LINK, address(family, 2 + nth), mac(0x20, nth as u8));
                self.canaries.push(Canary::Neighbour(LINK.to_owned(), neighbour.addr));
                neighbours.push(neighbour);
                let entry = Fdb::permanent(VXLAN, mac(0x30 + family.bits(), nth as u8), address(Family::V4, 2 + nth));
                self.canaries.push(Canary::Fdb(VXLAN.to_owned(), entry.mac));
                entries.push(entry);
            }
            for nth in 0..24 {
                let route = Route::to(host(address(family, 128 + nth))).via(address(family, 2)).dev(LINK).metric(42);
                routes.push(route.table(TABLE).protocol([Route::BOOT, Route::STATIC, 186, 213][nth as usize % 4]));
            }
        }
        ns.put_neighbours(&neighbours)?;
        ns.put_fdb(&entries)?;
        self.routes(routes)?;
        self.routes_of(peers, LINK, TABLE)?;
        for (name, value) in [("rp_filter", "1"), ("arp_ignore", "1"), ("log_martians", "1"), ("accept_redirects", "0")]
        {
            let name = format!("net/ipv4/conf/{LINK}/{name}");
            ns.set_sysctl(&name, value)?;
            self.canaries.push(Canary::Sysctl(name));
        }
        for table in ["canary", "flannel-canary"] {
            if kinds::add_nft_table(&ns, table)? {
                self.canaries.push(Canary::Nft(table.to_owned()));
            }
        }
        Ok(())
    }

    fn routes_of(&mut self, peers: &[Prefix], dev: &str, table: u32) -> Result<(), Error> {
        // One key has one metric: routes through different links may not share it.
        self.routes_with(peers, dev, table, if dev == UNDERLAY_LINK { 50 } else { 0 })
    }

    /// Adds routes of the peers' prefixes that differ from the agent's own routes in one property each.
    fn routes_with(&mut self, peers: &[Prefix], dev: &str, table: u32, shift: u32) -> Result<(), Error> {
        let mut routes = Vec::new();
        for peer in peers {
            let gateway = last_gateway(peer);
            let base = Route::to(*peer).dev(dev).via(gateway).onlink().table(table);
            for (nth, protocol) in [Route::BOOT, Route::STATIC, 186, 200, 213].into_iter().enumerate() {
                routes.push(base.clone().protocol(protocol).metric(7 + shift + nth as u32));
            }
        }
        self.routes(routes)
    }

    fn same_key(&mut self, peers: &[Prefix]) -> Result<(), Error> {
        for peer in peers.iter().filter(|peer| peer.family() == Family::V4) {
            let there = |route: &Route| route.to == *peer && route.table == Route::MAIN && route.metric == 0;
            if !self.ns.routes(Family::V4)?.iter().any(there) {
                return Err(Error::new(format!("there is no route to {peer} to append to")));
            }
            let base = Route::to(*peer).dev(LINK).onlink();
            for (protocol, gateway) in [(Route::BOOT, address(Family::V4, 3)), (Route::STATIC, address(Family::V4, 4))]
            {
                let route = base.clone().via(gateway).protocol(protocol);
                self.ns.put_route("append", &route)?;
                self.canaries.push(Canary::Route(route));
            }
        }
        Ok(())
    }

    fn routes(&mut self, routes: Vec<Route>) -> Result<(), Error> {
        self.ns.add_routes(&routes)?;
        self.canaries.extend(routes.into_iter().map(Canary::Route));
        Ok(())
    }
}

/// The kernel's data of all canaries at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot {
    seen: Vec<(String, Option<Vec<u8>>)>,
    order: Vec<usize>,
}

impl Snapshot {
    /// Returns the canaries that differ from `before`, and how. Empty if all are byte for byte the same.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let mut changes: Vec<String> = before
            .seen
            .iter()
            .zip(&self.seen)
            .filter(|(before, after)| before != after)
            .map(|((name, _), (_, after))| format!("{name}: {}", if after.is_some() { "changed" } else { "gone" }))
            .collect();
        if changes.is_empty() && self.order != before.order {
            changes.push("the routes are in another order".to_owned());
        }
        changes
    }

    /// Returns the canaries that did not exist.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.seen.iter().filter(|(_, bytes)| bytes.is_none()).map(|(name, _)| name.as_str())
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.seen.iter().map(|(name, _)| name)).finish()
    }
}

fn address(family: Family, host: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(u32::from(Ipv4Addr::new(192, 0, 2, 0)) + host).into(),
        Family::V6 => {
            Ipv6Addr::from(u128::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 42, 0, 0, 0, 0)) + u128::from(host)).into()
        }
    }
}

fn length(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

/// Returns an address in the peer's own prefix: on any link it needs `onlink`, like an overlay's gateways. Not in IPv6,
/// where the kernel refuses an `onlink` gateway that the table has behind another link.
fn last_gateway(peer: &Prefix) -> IpAddr {
    match peer.last() {
        IpAddr::V4(last) => Ipv4Addr::from(u32::from(last).wrapping_sub(1)).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xca).into(),
    }
}

fn host(addr: IpAddr) -> Prefix {
    Prefix::host(addr)
}

fn mac(kind: u8, nth: u8) -> MacAddr {
    MacAddr([0x02, 0xca, 0, 0, kind, nth])
}
