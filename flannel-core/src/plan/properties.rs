//! Properties of the planner, for kernel states left by former runs, sabotage and other programs.

mod acts;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use proptest::prelude::*;

use super::{LinkPart, Op, Plan, links_settled, plan, plan_owned, take_settled};
use crate::kernel::{
    AddressKey, ApplyReport, Device, FdbKey, Kernel, Link, LinkId, LinkKind, LinkName, NeighbourKey, OverlayName,
    PeerState, Route, RouteKey, RouteKind, RouteSlot, Scope, State, Vxlan, owns_link, owns_route,
};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix, Vni};
use crate::testing::fake_kernel::{Address, FakeKernel, FakeRoute, Nud, Placement};

use acts::{Act, act, commit, text};

const PEERS: u8 = 5;
const NAMES: [&str; 2] = ["flannel.1", "flannel-v6.1"];

/// The wanted state of a node, small enough to collide with that of another run.
#[derive(Debug, Clone)]
struct Wish {
    vni: u32,
    mac: u8,
    own: u8,
    blackhole: bool,
    devices: [bool; 2],
    peers: Vec<Option<PeerWish>>,
}

#[derive(Debug, Clone)]
struct PeerWish {
    variant: u8,
    overlay: bool,
    /// What it has in each of [`SLOTS`] in addition: nothing, the same route, or a direct one.
    more: [u8; 2],
}

/// Slots in addition to the default one.
const SLOTS: [RouteSlot; 2] = [RouteSlot { table: 200, metric: 0 }, RouteSlot { metric: 70, ..RouteSlot::MAIN }];

fn wish() -> impl Strategy<Value = Wish> {
    let more = prop_oneof![2 => Just([0; 2]), 1 => [0..3u8, 0..3u8]];
    let peer = (0..2u8, any::<bool>(), more);
    let peer = peer.prop_map(|(variant, overlay, more)| PeerWish { variant, overlay, more });
    let peers = prop::collection::vec(prop::option::weighted(0.8, peer), usize::from(PEERS));
    let devices = prop_oneof![4 => Just([true, true]), 1 => Just([true, false]), 1 => Just([false, false])];
    (1..3u32, 0..2u8, 0..2u8, any::<bool>(), devices, peers)
        .prop_map(|(vni, mac, own, blackhole, devices, peers)| Wish { vni, mac, own, blackhole, devices, peers })
}

fn v4(c: u8, d: u8) -> IpAddr {
    Ipv4Addr::new(10, 5, c, d).into()
}

fn public(n: u8) -> IpAddr {
    Ipv4Addr::new(192, 168, 0, n).into()
}

fn public_v6(n: u8) -> IpAddr {
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, n.into()).into()
}

fn subnet(family: Family, n: u8) -> Prefix {
    match family {
        Family::V4 => Prefix::new(v4(n + 1, 0), 24).unwrap(),
        Family::V6 => Prefix::new(Ipv6Addr::new(0xfd05, 0, 0, u16::from(n) + 1, 0, 0, 0, 0).into(), 64).unwrap(),
    }
}

fn slot(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Wish {
    fn scope(&self, uplink: u32) -> Scope {
        let networks = Dual { v4: Some("10.5.0.0/16".parse().unwrap()), v6: Some("fd05::/48".parse().unwrap()) };
        let devices = Family::BOTH
            .map(|family| Device { name: LinkName::new(NAMES[slot(family)]).unwrap(), kind: self.kind(family) });
        let scope = Scope::new(OverlayName::default(), networks);
        Scope { devices: devices.to_vec(), slots: SLOTS.to_vec(), uplink: Some(uplink), ..scope }
    }

    fn kind(&self, family: Family) -> LinkKind {
        let local = match family {
            Family::V4 => public(1),
            Family::V6 => public_v6(1),
        };
        LinkKind::Vxlan(Vxlan {
            port: None,
            local: Some(local),
            lower: Some(LinkId::Uplink),
            ..Vxlan::new(Vni::new(self.vni).unwrap())
        })
    }

    fn state(&self) -> State {
        let mut state = self.base();
        self.peers().iter().for_each(|peer| state.add(peer));
        state
    }

    fn base(&self) -> State {
        let mut state = State::default();
        let overlay = OverlayName::default();
        for family in Family::BOTH {
            let own = LinkId::Own(slot(family) as u8);
            if self.devices[slot(family)] {
                let link = Link {
                    name: LinkName::new(NAMES[slot(family)]).unwrap(),
                    kind: self.kind(family),
                    mac: Some(MacAddr([2, 0, 0, 0, 0xff, self.mac])),
                    mtu: 1430,
                    up: true,
                    group: overlay.mark(),
                    alias: Some(overlay.alias().into()),
                };
                state.links.insert(own, link);
                let addr = subnet(family, 100 + self.own).addr();
                state.addresses.insert(AddressKey { link: own, addr, len: family.bits() }, ());
            }
            if self.blackhole {
                let prefix = subnet(family, 100 + self.own);
                let route = Route::blackhole(prefix);
                state.routes.insert(RouteKey { prefix, nth: 0 }, route);
            }
        }
        state
    }

    fn peers(&self) -> Vec<PeerState> {
        let mut peers = Vec::new();
        for family in Family::BOTH {
            let own = LinkId::Own(slot(family) as u8);
            for (n, peer) in (0..).zip(&self.peers) {
                let Some(peer) = peer else { continue };
                let prefix = subnet(family, n);
                let dst = self.public(n, family);
                let direct = Route::direct(prefix, dst, LinkId::Uplink);
                let routes = |route: Route| {
                    let more = SLOTS.into_iter().zip(peer.more).filter(|(_, more)| *more > 0);
                    let more = more.map(|(slot, more)| if more == 1 { &route } else { &direct }.clone().in_slot(slot));
                    [route.clone()].into_iter().chain(more).map(|route| (prefix, route)).collect()
                };
                if !peer.overlay {
                    peers.push(PeerState { routes: routes(direct.clone()), ..PeerState::default() });
                } else if self.devices[slot(family)] {
                    let mac = MacAddr([2, 0, 0, 0, n, peer.variant]);
                    peers.push(PeerState {
                        fdb: Some((FdbKey { link: own, mac, nth: 0 }, dst)),
                        neighbour: Some((NeighbourKey { link: own, addr: prefix.addr() }, mac)),
                        routes: routes(Route::overlay(prefix, prefix.addr(), own)),
                        ..PeerState::default()
                    });
                }
            }
        }
        peers
    }

    fn public(&self, n: u8, family: Family) -> IpAddr {
        let variant = self.peers[usize::from(n)].as_ref().map_or(0, |peer| peer.variant);
        match family {
            Family::V4 => public(10 + n * 2 + variant),
            Family::V6 => public_v6(10 + n * 2 + variant),
        }
    }

    fn claims(&self, prefix: &Prefix) -> Option<IpAddr> {
        let n = (0..PEERS).find(|n| subnet(prefix.family(), *n) == *prefix)?;
        self.peers[usize::from(n)].as_ref().map(|_| self.public(n, prefix.family()))
    }
}

fn has_mark(line: &&str) -> bool {
    line.contains(&format!(" group {:#x} alias {}", OverlayName::default().mark(), OverlayName::default().alias()))
}

struct Host {
    kernel: FakeKernel,
    uplink: u32,
}

/// A host with foreign objects.
fn host() -> Host {
    let kernel = FakeKernel::new();
    let uplink = kernel.add_uplink("eth0", text("192.168.0.1/24")).unwrap();
    kernel.add_address("eth0", text("fd99::1/64")).unwrap();
    let wg = kernel.add_uplink("wg0", text("172.16.0.1/24")).unwrap();
    let canary = FakeRoute::via("10.5.1.0/24".parse().unwrap(), public(200), uplink);
    kernel.add_route(FakeRoute { metric: 7, ..canary.clone() }, Placement::Exclusive).unwrap();
    kernel.add_route(FakeRoute { table: 100, ..canary.clone() }, Placement::Exclusive).unwrap();
    let default = FakeRoute { prefix: "0.0.0.0/0".parse().unwrap(), ..canary };
    kernel.add_route(default, Placement::Exclusive).unwrap();
    let outside = FakeRoute::via("10.6.0.0/24".parse().unwrap(), "172.16.0.2".parse().unwrap(), wg);
    kernel.add_route(FakeRoute { protocol: 201, ..outside }, Placement::Exclusive).unwrap();
    kernel.put_neighbour("wg0", v4(1, 0), MacAddr([2, 1, 1, 1, 1, 1]), Nud::Permanent).unwrap();
    Host { kernel, uplink }
}

impl Host {
    fn observe(&self, wish: &Wish) -> State {
        futures_util::FutureExt::now_or_never(self.kernel.observe(&wish.scope(self.uplink))).unwrap().unwrap()
    }

    fn plan(&self, wish: &Wish) -> Plan {
        plan(&wish.state(), &self.observe(wish), &wish.scope(self.uplink), &|prefix| wish.claims(prefix))
    }

    fn apply(&self, wish: &Wish, plan: &Plan) -> ApplyReport {
        let scope = wish.scope(self.uplink);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.kernel.apply(&scope, Arc::new(plan.ops.clone())))
    }

    /// Returns all foreign objects that are not on a device of this overlay.
    fn canaries(&self) -> Vec<String> {
        let snapshot = self.kernel.snapshot();
        let foreign = |line: &&String| {
            let ours = ["flannel", "old0", "old1", "swap0"].iter().any(|name| line.contains(name));
            let marks = [" proto 4", " proto 99", " proto 2", " metric 7", "table 100", "nexthop", "wg0", "theirs"];
            let foreign = line.starts_with("link") && line.contains("type veth");
            let own_route = (200..232).any(|n| line.contains(&format!(" proto {n}")))
                || (line.contains(" proto 3") && line.contains("10.5.") || line.contains("fd05"));
            foreign
                || line.contains("10.6.0.0")
                || !ours && marks.iter().any(|mark| line.contains(mark)) && (!own_route || line.contains("nexthop"))
        };
        snapshot.lines().iter().filter(foreign).cloned().collect()
    }

    /// Returns routes of this overlay whose next hop has no neighbour, or whose neighbour has no FDB entry. Objects on
    /// a foreign device are not observed: they count as missing, so that taking the device back does not count as
    /// breaking routes.
    fn half_programmed(&self, wish: &Wish) -> BTreeSet<Prefix> {
        let state = self.observe(wish);
        let scope = wish.scope(self.uplink);
        let broken = |key: &RouteKey, route: &Route| {
            let (Some(link), Some(gateway)) = (route.link, route.gateway) else { return false };
            // Once the overlay's device is gone, a device that another program has marked may be found under its name.
            let is_foreign =
                state.links.get(&link).is_some_and(|link| link.alias.is_some() && !owns_link(link, &scope));
            if link == LinkId::Uplink
                || is_foreign
                || !route.onlink
                || !owns_route(&key.prefix, route, &scope, &state.links, &|prefix| wish.claims(prefix))
            {
                return false;
            }
            let mac = state.neighbours.get(&NeighbourKey { link, addr: gateway });
            !mac.is_some_and(|mac| state.fdb.contains_key(&FdbKey { link, mac: *mac, nth: 0 }))
        };
        state.routes.iter().filter(|(key, route)| broken(key, route)).map(|(key, _)| key.prefix).collect()
    }

    /// Returns wanted objects that are missing, and unwanted objects of this overlay, unless a foreign object is in the
    /// way.
    fn differences(&self, wish: &Wish) -> Vec<String> {
        let (wanted, seen, conflicts) = (wish.state(), self.observe(wish), self.plan(wish).conflicts);
        let scope = wish.scope(self.uplink);
        let in_conflict = |object: super::Object| conflicts.iter().any(|conflict| conflict.object == object);
        let free = |link: LinkId| {
            let ours = |link: &Link| scope.overlay.owns(link.group, link.alias.as_deref());
            !in_conflict(super::Object::Link(link)) && seen.links.get(&link).is_none_or(ours)
        };
        let mut found = Vec::new();
        for (id, link) in &wanted.links {
            let same = seen.links.get(id).is_some_and(|have| {
                (&have.name, have.mac, have.mtu, have.up, &have.alias)
                    == (&link.name, link.mac, link.mtu, link.up, &link.alias)
            });
            if free(*id) && !same {
                found.push(format!("link {id:?}: {:?}", seen.links.get(id)));
            }
        }
        let extra_link = |(id, link): &(&LinkId, &Link)| {
            scope.overlay.owns(link.group, link.alias.as_deref()) && !wanted.links.contains_key(*id)
        };
        found.extend(seen.links.iter().filter(extra_link).map(|extra| format!("extra {extra:?}")));
        for key in wanted.addresses.keys().filter(|key| free(key.link) && !seen.addresses.contains_key(key)) {
            found.push(format!("no {key:?}"));
        }
        for key in seen.addresses.keys().filter(|key| free(key.link) && !wanted.addresses.contains_key(key)) {
            if !crate::net::is_link_local(key.addr) {
                found.push(format!("extra {key:?}"));
            }
        }
        for link in [LinkId::Own(0), LinkId::Own(1)].into_iter().filter(|link| free(*link)) {
            let fdb = |state: &State| -> Vec<_> {
                state.fdb.iter().filter(|(key, _)| key.link == link).map(|(key, dst)| (*key, *dst)).collect()
            };
            let neighbours = |state: &State| -> Vec<_> {
                state.neighbours.iter().filter(|(key, _)| key.link == link).map(|(key, mac)| (*key, *mac)).collect()
            };
            if fdb(&wanted) != fdb(&seen) || neighbours(&wanted) != neighbours(&seen) {
                found.push(format!("on {link:?}: {:?} {:?}", fdb(&seen), neighbours(&seen)));
            }
        }
        let in_slot = |state: &State, prefix: Prefix, slot: RouteSlot| -> Vec<Route> {
            state.routes_to(prefix).map(|(_, route)| route.clone()).filter(|route| route.slot() == slot).collect()
        };
        for (key, route) in &wanted.routes {
            let here = in_slot(&seen, key.prefix, route.slot());
            let first = here.first();
            let others =
                |route: &Route| !owns_route(&key.prefix, route, &scope, &seen.links, &|prefix| wish.claims(prefix));
            let excused = in_conflict(super::Object::Route(key.prefix))
                || route.link.is_some_and(|link| !free(link))
                || route.kind == RouteKind::Blackhole && here.iter().any(others);
            if !excused && !first.is_some_and(|first| first.same(route)) {
                found.push(format!("route {}: {first:?}", key.prefix));
            }
        }
        for (key, route) in &seen.routes {
            let want = in_slot(&wanted, key.prefix, route.slot()).first().cloned();
            // A route elsewhere stays while a foreign device has the place of the device it should use.
            let held = want.as_ref().and_then(|want| want.link).or(route.link).is_some_and(|link| !free(link));
            let covered = route.kind == RouteKind::Blackhole && in_slot(&seen, key.prefix, route.slot()).len() > 1;
            if (covered || !want.as_ref().is_some_and(|want| want.same(route)))
                && !held
                && owns_route(&key.prefix, route, &scope, &seen.links, &|prefix| wish.claims(prefix))
            {
                found.push(format!("extra route {} {route:?}", key.prefix));
            }
        }
        found
    }

    fn heal(&self, wish: &Wish, rounds: usize) -> Result<(), TestCaseError> {
        for _ in 0..rounds {
            let plan = self.plan(wish);
            self.apply(wish, &plan);
        }
        let left = self.plan(wish).ops;
        prop_assert!(left.is_empty(), "left: {left:#?}\n{}", self.kernel.snapshot());
        let differences = self.differences(wish);
        prop_assert!(differences.is_empty(), "{differences:#?}\n{}", self.kernel.snapshot());
        Ok(())
    }
}

fn moves_neighbours(op: &Op) -> bool {
    matches!(op, Op::UpdateLink { part: LinkPart::Mac, .. })
}

/// A host on which `before` ran, and then `acts` happened.
fn aftermath(before: &Option<Wish>, acts: &[Act]) -> Result<Host, TestCaseError> {
    let host = host();
    if let Some(before) = before {
        host.heal(before, 1)?;
    }
    acts.iter().for_each(|act| commit(&host.kernel, act));
    Ok(host)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_plan_reaches_what_is_wanted_and_touches_nothing_foreign(
        before in prop::option::weighted(0.8, wish()), acts in prop::collection::vec(act(), 0..8), now in wish(),
    ) {
        let host = aftermath(&before, &acts)?;
        let canaries = host.canaries();
        let plan = host.plan(&now);
        let start = host.kernel.snapshot();
        let report = host.apply(&now, &plan);
        prop_assert!(report.is_complete(), "{report:#?}\n{plan:#?}\n{start}");
        // A foreign route that hides the overlay's on a device to be deleted disappears only with that device.
        let hidden = start.lines().iter().any(|line| line.contains("nexthop"));
        // A blackhole is written only after the connected route of a wrong address on the overlay's device is gone.
        host.heal(&now, usize::from(hidden || now.blackhole || !plan.conflicts.is_empty()))?;
        let after = host.canaries();
        prop_assert!(canaries.iter().all(|line| after.contains(line)), "{canaries:#?}\n{}", host.kernel.snapshot());
    }

    #[test]
    fn refusals_only_delay_and_half_program_no_peer(
        before in prop::option::weighted(0.8, wish()), acts in prop::collection::vec(act(), 0..6), now in wish(),
        seed in any::<u64>(),
    ) {
        let host = aftermath(&before, &acts)?;
        let canaries = host.canaries();
        let mut dice = seed | 1;
        host.kernel.refuse_if(move |_| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((dice >> 60) < 5).then_some(12)
        });
        for _ in 0..3 {
            let (plan, broken, start) = (host.plan(&now), host.half_programmed(&now), host.kernel.snapshot());
            let report = host.apply(&now, &plan);
            let worse: Vec<_> = host.half_programmed(&now).difference(&broken).copied().collect();
            let moved = plan.ops.iter().any(moves_neighbours);
            let hidden = start.lines().iter().any(|line| line.contains("nexthop"));
            prop_assert!(moved || hidden || worse.is_empty(), "{worse:?}\n{plan:#?}\n{report:#?}\n{start}");
        }
        host.kernel.obey();
        host.heal(&now, 3)?;
        let after = host.canaries();
        prop_assert!(canaries.iter().all(|line| after.contains(line)), "{canaries:#?}\n{}", host.kernel.snapshot());
    }

    #[test]
    fn no_prefix_of_a_plan_half_programs_a_peer(
        before in prop::option::weighted(0.8, wish()), acts in prop::collection::vec(act(), 0..6), now in wish(),
    ) {
        let host = aftermath(&before, &acts)?;
        // Routes of this overlay under a foreign multipath route cannot be observed.
        prop_assume!(host.kernel.snapshot().matching("nexthop").is_empty());
        let plan = host.plan(&now);
        let mut broken = host.half_programmed(&now);
        for op in &plan.ops {
            let step = Plan { ops: vec![op.clone()], conflicts: Vec::new() };
            prop_assert!(host.apply(&now, &step).is_complete(), "{op:?}");
            let worse: BTreeSet<_> = host.half_programmed(&now);
            // A changed MAC address flushes neighbours: they are written again a few messages later.
            prop_assert!(moves_neighbours(op) || worse.is_subset(&broken), "{op:?} of {plan:#?}");
            broken = worse;
        }
    }

    #[test]
    fn leaving_out_settled_peers_does_not_change_the_plan(
        before in prop::option::weighted(0.8, wish()), acts in prop::collection::vec(act(), 0..6), now in wish(),
    ) {
        let host = aftermath(&before, &acts)?;
        let (mut wanted, mut seen, scope) = (now.base(), host.observe(&now), now.scope(host.uplink));
        let whole = host.plan(&now);
        let settled = links_settled(&wanted, &seen, &scope);
        for peer in now.peers() {
            if !(settled && take_settled(&peer, &mut seen)) {
                wanted.add(&peer);
            }
        }
        prop_assert_eq!(plan_owned(wanted, &seen, &scope, &|prefix| now.claims(prefix)), whole);
    }

    #[test]
    fn a_plan_for_what_is_there_is_empty(wish in wish()) {
        let host = aftermath(&Some(wish.clone()), &[])?;
        prop_assert_eq!(host.plan(&wish), Plan::default());
        prop_assert!(plan(&wish.state(), &wish.state(), &wish.scope(1), &|_| None).is_empty());
    }
}
