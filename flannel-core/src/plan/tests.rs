mod external;
mod forwards;

use super::*;
use crate::kernel::{
    Device, FdbKey, Kernel, NeighbourKey, OpText, OverlayName, PeerState, Refusals, RouteKey, RouteKind, RouteSlot,
    SeenLink, Vxlan,
};
use crate::net::{Dual, Family, Vni};
use crate::testing::FakeKernel;
use crate::testing::fake_kernel::{FakeRoute, Placement};
use futures_util::FutureExt;

const OWN: LinkId = LinkId::Own(0);

fn scope() -> Scope {
    scope_of(wanted().links[&OWN].kind.clone())
}

fn scope_of(kind: LinkKind) -> Scope {
    let device = Device { name: LinkName::new("flannel.1").unwrap(), kind };
    let networks = Dual { v4: Some("10.5.0.0/16".parse().unwrap()), v6: Some("fd05::/48".parse().unwrap()) };
    Scope { devices: vec![device], uplink: Some(1), ..Scope::new(OverlayName::default(), networks) }
}

fn mac(n: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, n])
}

fn prefix() -> Prefix {
    "10.5.2.0/24".parse().unwrap()
}

fn ours() -> Route {
    Route::overlay(prefix(), prefix().addr(), OWN)
}

fn foreign() -> Route {
    Route { protocol: 4, ..Route::direct(prefix(), "192.168.0.9".parse().unwrap(), LinkId::Uplink) }
}

/// A device with its address and one peer.
fn wanted() -> State {
    let overlay = OverlayName::default();
    let vxlan = Vxlan {
        port: None,
        local: Some("192.168.0.1".parse().unwrap()),
        lower: Some(LinkId::Uplink),
        ..Vxlan::new(Vni::new(1).unwrap())
    };
    let link = Link {
        name: LinkName::new("flannel.1").unwrap(),
        kind: LinkKind::Vxlan(vxlan),
        mac: Some(mac(0xff)),
        mtu: 1450,
        up: true,
        group: overlay.mark(),
        alias: Some(overlay.alias().into()),
    };
    let mut state = State::default();
    state.links.insert(OWN, link);
    state.addresses.insert(AddressKey { link: OWN, addr: "10.5.1.0".parse().unwrap(), len: 32 }, ());
    state.add(&PeerState {
        fdb: Some((FdbKey { link: OWN, mac: mac(2), nth: 0 }, "192.168.0.2".parse().unwrap())),
        neighbour: Some((NeighbourKey { link: OWN, addr: prefix().addr() }, mac(2))),
        routes: vec![(prefix(), ours())],
        ..PeerState::default()
    });
    state
}

fn with_routes(routes: &[Route]) -> State {
    let mut seen = wanted();
    seen.routes.clear();
    for (nth, route) in (0..).zip(routes) {
        seen.routes.insert(RouteKey { prefix: prefix(), nth }, route.clone());
    }
    seen
}

fn vxlan(link: &mut Link) -> &mut Vxlan {
    let LinkKind::Vxlan(vxlan) = &mut link.kind else { panic!("not a vxlan") };
    vxlan
}

/// The plan for `wanted()`, as text.
fn ops(seen: &State) -> Vec<String> {
    text(&wanted(), seen, &|_| None)
}

fn text(wanted: &State, seen: &State, claims: &Claims<'_>) -> Vec<String> {
    let scope = scope();
    plan(wanted, seen, &scope, claims).ops.iter().map(|op| OpText { op, scope: &scope }.to_string()).collect()
}

fn conflicts(seen: &State) -> Vec<Object> {
    plan(&wanted(), seen, &scope(), &|_| None).conflicts.into_iter().map(|conflict| conflict.object).collect()
}

#[test]
fn from_nothing_a_peer_is_whole_before_its_route_exists() {
    let ops = ops(&State::default());
    let place = |start: &str| ops.iter().position(|op| op.starts_with(start)).unwrap();
    let order = ["link add", "address add", "fdb replace", "neigh replace", "route add"].map(place);
    assert!(order.is_sorted() && ops.len() == 5, "{ops:?}");
}

#[test]
fn exactly_what_go_flannel_makes_is_adopted_and_marked() {
    let mut seen = wanted();
    let link = seen.links.get_mut(&OWN).unwrap();
    (link.group, link.alias) = (0, None);
    vxlan(link).port = Some(8472);
    assert_eq!(ops(&seen), ["link set flannel.1 group 0x666ba808 alias flannelkit:flannel"]);
}

#[test]
fn what_go_flannel_never_makes_is_no_device_of_its() {
    let spoil: [fn(&mut Vxlan); 2] =
        [|vxlan| vxlan.misses = true, |vxlan| vxlan.remote = Some("192.168.0.9".parse().unwrap())];
    for spoil in spoil {
        let mut seen = wanted();
        let link = seen.links.get_mut(&OWN).unwrap();
        (link.group, link.alias) = (0, None);
        spoil(vxlan(link));
        assert_eq!((ops(&seen), conflicts(&seen)), (vec![], vec![Object::Link(OWN)]));
    }
}

#[test]
fn a_device_of_ours_that_reports_misses_is_made_anew() {
    let mut seen = wanted();
    vxlan(seen.links.get_mut(&OWN).unwrap()).misses = true;
    let ops = ops(&seen);
    assert!(ops[0] == "link delete flannel.1" && ops[1].starts_with("link add flannel.1 "), "{ops:?}");
}

#[test]
fn a_default_destination_is_taken_from_a_device_of_ours() {
    let mut seen = wanted();
    vxlan(seen.links.get_mut(&OWN).unwrap()).remote = Some("192.168.0.9".parse().unwrap());
    assert_eq!(ops(&seen), ["link set flannel.1 type vxlan noremote"]);
}

#[test]
fn a_device_of_ours_that_lost_a_part_of_its_mark_is_still_ours_and_marked_again() {
    let alias: Option<Box<str>> = Some(OverlayName::default().alias().into());
    let mark = OverlayName::default().mark();
    for (group, alias) in [(0, alias.clone()), (7, alias), (mark, None), (mark, Some("theirs".into()))] {
        let mut seen = wanted();
        let link = seen.links.get_mut(&OWN).unwrap();
        (link.group, link.alias) = (group, alias);
        assert_eq!(ops(&seen), ["link set flannel.1 group 0x666ba808 alias flannelkit:flannel"]);
        assert_eq!(conflicts(&seen), []);
        assert_eq!(text(&State::default(), &seen, &|_| None).last().unwrap(), "link delete flannel.1");
    }
}

/// The observed state with one device, and on it everything that is wanted.
fn seen_on(link: Link, scope: &Scope, wanted: &State) -> State {
    let id = scope.identify(&[SeenLink { index: 9, link: link.clone(), carrier: true }]).get(&9).copied();
    let mut seen = State::default();
    if let Some(id) = id {
        seen.links.insert(id, link);
        seen.addresses = wanted.addresses.keys().map(|key| (AddressKey { link: id, ..*key }, ())).collect();
        let routes = wanted.routes.iter().map(|(key, route)| (*key, Route { link: Some(id), ..route.clone() }));
        seen.routes = routes.collect();
    }
    seen
}

#[test]
fn what_a_backend_wants_outside_its_scope_is_told_and_not_written() {
    let mut greedy = wanted();
    let (stray, other) = (LinkId::Own(7), LinkId::Uplink);
    let (addr, elsewhere) = ("10.9.0.1".parse().unwrap(), "10.9.0.0/24".parse().unwrap());
    greedy.links.insert(stray, greedy.links[&OWN].clone());
    greedy.addresses.insert(AddressKey { link: other, addr, len: 32 }, ());
    greedy.fdb.insert(FdbKey { link: stray, mac: mac(3), nth: 0 }, addr);
    greedy.neighbours.insert(NeighbourKey { link: other, addr }, mac(3));
    greedy.routes.insert(RouteKey { prefix: elsewhere, nth: 0 }, Route { ..ours() });
    let lost = "10.5.9.0/24".parse().unwrap();
    greedy.routes.insert(RouteKey { prefix: lost, nth: 0 }, Route { link: Some(stray), ..ours() });
    let modest = plan(&wanted(), &State::default(), &scope(), &|_| None);
    let kept = plan(&greedy, &State::default(), &scope(), &|_| None);
    assert_eq!(kept.ops, modest.ops);
    let objects: Vec<_> = kept.conflicts.iter().map(|conflict| conflict.object.to_string()).collect();
    assert_eq!(objects.len(), 6, "{objects:?}");
    assert!(kept.conflicts.iter().all(|conflict| conflict.found.contains("outside the scope")));
    assert_eq!(plan(&greedy, &wanted(), &scope(), &|_| None).ops, []);
    let other_kind = scope_of(LinkKind::Vxlan(Vxlan::new(Vni::new(9).unwrap())));
    assert!(
        plan(&wanted(), &State::default(), &other_kind, &|_| None)
            .ops
            .iter()
            .all(|op| !matches!(op, Op::CreateLink { .. }))
    );
}

#[test]
fn a_marked_device_that_no_overlay_makes_is_not_deleted() {
    let bridge = Link { kind: LinkKind::Other("bridge".into()), ..wanted().links[&OWN].clone() };
    let elsewhere = Link { name: LinkName::new("br0").unwrap(), ..bridge };
    let seen = seen_on(elsewhere, &scope(), &State::default());
    assert!(!seen.links.is_empty());
    assert_eq!(text(&State::default(), &seen, &|_| None), [""; 0]);
}

#[test]
fn an_unmarked_device_of_another_kind_under_our_name_is_foreign() {
    let mut seen = wanted();
    let link = seen.links.get_mut(&OWN).unwrap();
    (link.group, link.alias) = (0, None);
    vxlan(link).vni = Vni::new(7).unwrap();
    assert_eq!(ops(&seen), [""; 0]);
    assert_eq!(conflicts(&seen), [Object::Link(OWN)]);
}

#[test]
fn a_device_that_names_another_overlay_is_foreign_whatever_its_group() {
    let mut seen = wanted();
    seen.links.get_mut(&OWN).unwrap().alias = Some("flannelkit:other".into());
    assert_eq!(ops(&seen), [""; 0]);
    assert_eq!(conflicts(&seen), [Object::Link(OWN)]);
}

#[test]
fn a_foreign_device_that_holds_our_vni_is_a_conflict_and_not_retried() {
    let mut link = wanted().links[&OWN].clone();
    (link.name, link.group, link.alias) = (LinkName::new("theirs").unwrap(), 0, None);
    let mut seen = State::default();
    seen.links.insert(LinkId::Other(9), link);
    assert_eq!(ops(&seen), [""; 0]);
    assert_eq!(conflicts(&seen), [Object::Link(OWN)]);
}

#[test]
fn a_device_of_ours_that_cannot_be_changed_is_deleted_first_and_all_on_it_written_anew() {
    let mut seen = wanted();
    vxlan(seen.links.get_mut(&OWN).unwrap()).vni = Vni::new(7).unwrap();
    let ops = ops(&seen);
    assert_eq!(ops[0], "link delete flannel.1");
    assert!(ops[1].starts_with("link add flannel.1") && ops.len() == 6, "{ops:?}");
}

#[test]
fn a_former_device_of_ours_in_the_way_goes_first_and_another_goes_last() {
    let mut seen = wanted();
    let mut former = seen.links.remove(&OWN).unwrap();
    vxlan(&mut former).local = None;
    former.name = LinkName::new("old0").unwrap();
    seen.links.insert(LinkId::Other(9), former.clone());
    seen.routes.values_mut().for_each(|route| route.link = Some(LinkId::Other(9)));
    assert_eq!(ops(&seen)[0], "link delete old0");
    vxlan(&mut former).vni = Vni::new(9).unwrap();
    seen.links.insert(LinkId::Other(9), former);
    let ops = ops(&seen);
    assert_eq!(ops.last().unwrap(), "link delete old0");
    assert!(ops.iter().any(|op| op.starts_with("route replace")), "{ops:?}");
}

#[test]
fn a_renamed_device_of_ours_gets_its_name_back_unless_a_foreign_one_has_it() {
    let mut seen = wanted();
    seen.links.get_mut(&OWN).unwrap().name = LinkName::new("eth7").unwrap();
    assert_eq!(ops(&seen), ["link set eth7 name flannel.1"]);
    let veth = Link { kind: LinkKind::Other("veth".into()), group: 0, alias: None, ..wanted().links[&OWN].clone() };
    seen.links.insert(LinkId::Other(9), veth);
    assert_eq!(ops(&seen), [""; 0]);
    assert_eq!(conflicts(&seen), [Object::Link(OWN)]);
}

#[test]
fn a_moved_mac_address_writes_the_neighbours_again() {
    let mut seen = wanted();
    seen.links.get_mut(&OWN).unwrap().mac = Some(mac(1));
    let ops = ops(&seen);
    assert_eq!(ops.len(), 2, "{ops:?}");
    assert!(ops[0].contains("address 02:00:00:00:00:ff") && ops[1].starts_with("neigh replace"), "{ops:?}");
}

#[test]
fn a_readdressed_device_has_its_new_address_before_it_loses_the_old_one() {
    let mut seen = wanted();
    seen.addresses.clear();
    seen.addresses.insert(AddressKey { link: OWN, addr: "10.5.9.0".parse().unwrap(), len: 32 }, ());
    seen.addresses.insert(AddressKey { link: OWN, addr: "169.254.7.7".parse().unwrap(), len: 16 }, ());
    assert_eq!(ops(&seen), ["address add 10.5.1.0/32 dev flannel.1", "address delete 10.5.9.0/32 dev flannel.1"]);
}

#[test]
fn a_wrong_address_is_gone_before_its_connected_route_can_be_in_a_routes_place() {
    let mut seen = State::default();
    let down = Link { up: false, ..wanted().links[&OWN].clone() };
    seen.links.insert(OWN, down);
    seen.addresses.insert(AddressKey { link: OWN, addr: prefix().addr(), len: 24 }, ());
    let ops = ops(&seen);
    let place = |start: &str| ops.iter().position(|op| op.starts_with(start)).unwrap();
    let order = ["link set", "address add", "address delete", "route add"].map(place);
    assert!(order.is_sorted(), "{ops:?}");
}

#[test]
fn an_ipv6_address_of_another_length_goes_first() {
    let mut wanted = wanted();
    let key = AddressKey { link: OWN, addr: "fd05::".parse().unwrap(), len: 128 };
    wanted.addresses.insert(key, ());
    let mut seen = wanted.clone();
    seen.addresses.remove(&key);
    seen.addresses.insert(AddressKey { len: 64, ..key }, ());
    let ops = text(&wanted, &seen, &|_| None);
    assert_eq!(ops, ["address delete fd05::/64 dev flannel.1", "address add fd05::/128 dev flannel.1"]);
}

#[test]
fn a_peers_moved_mac_address_is_reachable_before_its_neighbour_points_there() {
    let mut seen = wanted();
    seen.neighbours.values_mut().for_each(|seen| *seen = mac(1));
    let dst = seen.fdb.pop_first().unwrap().1;
    seen.fdb.insert(FdbKey { link: OWN, mac: mac(1), nth: 0 }, dst);
    let ops = ops(&seen);
    let verbs: Vec<_> = ops.iter().map(|op| op.split(" 0").next().unwrap().split(" 1").next().unwrap()).collect();
    assert_eq!(verbs, ["fdb replace", "neigh replace", "fdb delete"]);
}

#[test]
fn what_go_flannel_left_on_our_device_is_rewritten_in_place() {
    let seen = with_routes(&[Route { protocol: Route::BOOT, ..ours() }]);
    assert!(ops(&seen)[0].starts_with("route replace 10.5.2.0/24"));
    // Without `onlink`, or with another next hop, it cannot be recognized as flannel's.
    for other in [Route { onlink: false, ..ours() }, Route { gateway: Some("10.5.2.1".parse().unwrap()), ..ours() }] {
        let seen = with_routes(&[Route { protocol: Route::BOOT, ..other }]);
        assert_eq!((ops(&seen).len(), conflicts(&seen)), (0, vec![Object::Route(prefix())]));
    }
}

#[test]
fn what_go_flannel_left_on_another_device_is_ours_if_a_peer_claims_it() {
    let public: IpAddr = "192.168.0.2".parse().unwrap();
    let seen = with_routes(&[Route { protocol: Route::BOOT, ..Route::direct(prefix(), public, LinkId::Uplink) }]);
    let claims = |of: &Prefix| (*of == prefix()).then_some(public);
    assert!(text(&wanted(), &seen, &claims)[0].starts_with("route replace 10.5.2.0/24"));
    assert_eq!((ops(&seen).len(), conflicts(&seen)), (0, vec![Object::Route(prefix())]));
}

#[test]
fn a_foreign_route_behind_ours_is_left_and_before_ours_reported() {
    let (behind, before) = (with_routes(&[ours(), foreign()]), with_routes(&[foreign(), ours()]));
    assert_eq!((ops(&behind).len(), conflicts(&behind)), (0, vec![]));
    assert_eq!((ops(&before).len(), conflicts(&before)), (0, vec![Object::Route(prefix())]));
}

#[test]
fn a_blackhole_is_there_only_while_no_other_route_holds_its_key() {
    let blackhole = Route { protocol: 207, ..Route::blackhole(prefix()) };
    let connected = Route { kind: RouteKind::Foreign, link: Some(LinkId::Other(9)), protocol: 2, ..blackhole.clone() };
    let mut wanted = with_routes(&[]);
    wanted.routes.insert(RouteKey { prefix: prefix(), nth: 0 }, blackhole.clone());
    let outcome = |seen: &[Route]| {
        let seen = with_routes(seen);
        let plan = plan(&wanted, &seen, &scope(), &|_| None);
        assert_eq!(plan.conflicts, []);
        text(&wanted, &seen, &|_| None)
    };
    assert_eq!(outcome(&[]), ["route add blackhole 10.5.2.0/24 proto 207"]);
    assert_eq!(outcome(std::slice::from_ref(&blackhole)), [""; 0]);
    assert_eq!(outcome(&[blackhole.clone(), connected.clone()]), ["route delete blackhole 10.5.2.0/24 proto 207"]);
    assert_eq!(outcome(&[connected.clone(), blackhole]), ["route delete blackhole 10.5.2.0/24 proto 207"]);
    assert_eq!(outcome(&[connected]), [""; 0]);
}

#[test]
fn an_ipv6_route_that_moves_to_our_device_makes_room_first() {
    let prefix: Prefix = "fd00:5:0:7::/64".parse().unwrap();
    let key = RouteKey { prefix, nth: 0 };
    let state = |route| State { routes: [(key, route)].into(), ..State::default() };
    let scope = Scope { networks: Dual { v4: None, v6: Some("fd00:5::/48".parse().unwrap()) }, ..scope() };
    let direct = state(Route::direct(prefix, "fd01::8".parse().unwrap(), LinkId::Uplink));
    let tunnel = state(Route::overlay(prefix, prefix.addr(), LinkId::Own(0)));
    let kinds = |wanted, seen| {
        let ops = plan(wanted, seen, &scope, &|_| None).ops;
        ops.iter().map(|op| matches!(op, Op::ReplaceRoute { .. })).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&tunnel, &direct), [false, false]);
    assert_eq!(kinds(&direct, &tunnel), [true]);
}

#[test]
fn in_a_former_network_ours_goes_and_nothing_is_wanted() {
    let former: Prefix = "10.6.2.0/24".parse().unwrap();
    let route = Route::overlay(former, former.addr(), LinkId::Own(0));
    let state = State { routes: [(RouteKey { prefix: former, nth: 0 }, route)].into(), ..State::default() };
    let scope = Scope { former: vec!["10.6.0.0/16".parse().unwrap()], ..scope() };
    let plan = plan(&state, &state, &scope, &|_| None);
    assert!(matches!(&plan.ops[..], [Op::DeleteRoute { prefix, .. }] if *prefix == former), "{:?}", plan.ops);
    assert_eq!(plan.conflicts.len(), 1, "what is wanted there is outside the network");
}

#[test]
fn in_a_former_network_a_route_into_another_overlays_device_stays() {
    let (other, stranger) = (OverlayName::new("other").unwrap(), LinkId::Other(9));
    let marked =
        |group, alias: Option<String>| Link { group, alias: alias.map(Into::into), ..wanted().links[&OWN].clone() };
    let former: Prefix = "10.6.2.0/24".parse().unwrap();
    let scope = Scope { former: vec!["10.6.0.0/16".parse().unwrap()], ..scope() };
    let mine = OverlayName::default();
    let cases = [
        (marked(other.mark(), Some(other.alias())), false),
        (marked(other.mark(), None), false),
        (marked(0, Some(other.alias())), false),
        (marked(mine.mark(), Some(mine.alias())), true),
        (marked(0, None), true),
    ];
    for (link, goes) in cases {
        for (prefix, is_former) in [(former, true), (prefix(), false)] {
            let route = Route::overlay(prefix, prefix.addr(), stranger);
            let routes = [(RouteKey { prefix, nth: 0 }, route)].into();
            let link = Link { name: LinkName::new("other.9").unwrap(), ..link.clone() };
            let seen = State { links: [(stranger, link.clone())].into(), routes, ..State::default() };
            let ops = plan(&State::default(), &seen, &scope, &|_| None).ops;
            let is_deleted = ops.iter().any(|op| matches!(op, Op::DeleteRoute { .. }));
            assert_eq!(is_deleted, goes || !is_former, "{prefix} through {link:?}: {ops:?}");
        }
    }
}

#[test]
fn duplicates_of_ours_go_in_full() {
    let seen = with_routes(&[ours(), Route { gateway: Some("10.5.2.9".parse().unwrap()), ..ours() }]);
    let ops = ops(&seen);
    assert!(ops.len() == 1 && ops[0].starts_with("route delete 10.5.2.0/24 via 10.5.2.9"), "{ops:?}");
}

#[test]
fn several_routes_none_of_which_is_wanted_are_cleared_and_made_anew() {
    let one = |n: u8| Route { gateway: Some(IpAddr::from([10, 5, 2, n])), ..ours() };
    let ops = ops(&with_routes(&[one(8), one(9)]));
    let verbs: Vec<_> = ops.iter().map(|op| &op[..9]).collect();
    assert_eq!(verbs, ["route del", "route del", "route add"], "{ops:?}");
}

#[test]
fn a_wanted_route_without_a_key_of_its_own_waits_for_the_foreign_one() {
    let seen = with_routes(&[foreign()]);
    assert_eq!((ops(&seen).len(), conflicts(&seen)), (0, vec![Object::Route(prefix())]));
}

#[test]
fn teardown_takes_what_is_ours_children_first_and_leaves_what_is_foreign() {
    let mut seen = with_routes(&[ours()]);
    seen.routes.insert(RouteKey { prefix: "10.5.7.0/24".parse().unwrap(), nth: 0 }, foreign());
    let ops = text(&State::default(), &seen, &|_| None);
    let verbs: Vec<_> = ops.iter().map(|op| op.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(verbs, ["route delete", "neigh delete", "fdb delete", "address delete", "link delete"]);
}

#[test]
fn teardown_touches_nothing_on_a_foreign_device_under_our_name() {
    let mut seen = wanted();
    seen.routes.clear();
    let link = seen.links.get_mut(&OWN).unwrap();
    (link.group, link.alias) = (0, None);
    assert_eq!(text(&State::default(), &seen, &|_| None), [""; 0]);
}

#[test]
fn a_refused_neighbour_keeps_the_entries_that_the_old_one_may_need() {
    let mut refusals = Refusals::default();
    let key = NeighbourKey { link: OWN, addr: prefix().addr() };
    let neighbour = Op::PutNeighbour { key, mac: mac(2), was: Some(mac(1)) };
    let delete =
        |n| Op::DeleteFdb { key: FdbKey { link: OWN, mac: mac(n), nth: 0 }, dst: "192.168.0.2".parse().unwrap() };
    assert!(!refusals.block(&delete(1)));
    refusals.refused(&neighbour);
    assert!(refusals.block(&delete(1)) && refusals.block(&delete(2)));
    assert!(!refusals.block(&delete(3)), "nobody needs that one");
    assert!(refusals.block(&Op::CreateRoute { prefix: prefix(), route: ours() }));
}

#[test]
fn a_refused_change_of_a_device_stops_only_what_needs_it() {
    let mut seen = State::default();
    let mut link = wanted().links[&OWN].clone();
    (link.mac, link.mtu, link.name) = (Some(mac(1)), 1280, LinkName::new("eth7").unwrap());
    seen.links.insert(OWN, link.clone());
    seen.neighbours.clone_from(&wanted().neighbours);
    let blocked = |seen: &State| {
        let mut refusals = Refusals::default();
        let mut blocked = Vec::new();
        for op in plan(&wanted(), seen, &scope(), &|_| None).ops {
            if matches!(op, Op::UpdateLink { .. }) {
                refusals.refused(&op);
            } else if refusals.block(&op) {
                blocked.push(OpText { op: &op, scope: &scope() }.to_string());
            }
        }
        blocked
    };
    assert_eq!(blocked(&seen), [""; 0]);
    link.up = false;
    seen.links.insert(OWN, link);
    assert_eq!(blocked(&seen).len(), 1, "only the route needs the device to be up");
    assert!(blocked(&seen)[0].starts_with("route add"));
}

#[test]
fn an_entry_that_was_gone_is_written_together_with_its_neighbour() {
    let mut seen = wanted();
    seen.fdb.clear();
    let ops = ops(&seen);
    assert!(ops.len() == 2 && ops[0].starts_with("fdb") && ops[1].starts_with("neigh"), "{ops:?}");
}

#[test]
fn of_many_conflicts_the_first_are_told_and_all_counted() {
    let prefix = |n: u32| Prefix::masked(std::net::Ipv4Addr::from(0x0a05_0000 + (n << 4)).into(), 28).unwrap();
    let (mut wanted, mut seen) = (State::default(), State::default());
    for n in 0..Plan::MOST_TOLD as u32 + 10 {
        let (key, gateway) = (RouteKey { prefix: prefix(n), nth: 0 }, prefix(n).addr());
        wanted.routes.insert(key, Route::direct(prefix(n), gateway, LinkId::Uplink));
        seen.routes.insert(key, Route { protocol: 4, ..Route::direct(prefix(n), gateway, LinkId::Uplink) });
    }
    let conflicts = plan(&wanted, &seen, &scope(), &|_| None).conflicts;
    let told = conflicts.iter().filter(|conflict| !conflict.found.is_empty() && !conflict.remedy.is_empty()).count();
    assert_eq!((conflicts.len(), told), (Plan::MOST_TOLD + 10, Plan::MOST_TOLD));
}

/// Returns the answer of the fake kernel, which never waits.
fn at_once<T>(call: impl Future<Output = T>) -> T {
    call.now_or_never().unwrap()
}

#[test]
fn a_direct_route_with_a_tunnel_behind_it_converges_in_ipv6() {
    let kernel = FakeKernel::new();
    let uplink = kernel.add_uplink("eth0", "192.168.0.1/24".parse().unwrap()).unwrap();
    kernel.add_address("eth0", "2001:db8::1/64".parse().unwrap()).unwrap();
    let slot = RouteSlot::new(254, 2048);
    let scope = Scope { uplink: Some(uplink), slots: vec![slot], ..scope() };
    let prefix: Prefix = "fd05:0:0:2::/64".parse().unwrap();
    let direct = Route::direct(prefix, "2001:db8::2".parse().unwrap(), LinkId::Uplink);
    let tunnel = Route::overlay(prefix, prefix.addr(), OWN).in_slot(slot);
    let mut wanted = State { links: wanted().links, ..State::default() };
    wanted.add(&PeerState::default().with_route(prefix, direct).with_route(prefix, tunnel));
    let mut told = Vec::new();
    for _ in 0..4 {
        let seen = at_once(kernel.observe(&scope)).unwrap();
        let plan = plan(&wanted, &seen, &scope, &|_| None);
        if plan.is_empty() {
            return;
        }
        let ops: Vec<_> = plan.ops.iter().map(|op| OpText { op, scope: &scope }.to_string()).collect();
        let report = at_once(kernel.apply(&scope, std::sync::Arc::new(plan.ops)));
        told.push((ops, report.refused));
    }
    panic!("never as wanted: {told:#?}");
}

#[test]
fn an_ipv6_route_with_the_metric_1024_in_another_table_is_seen_again() {
    let slot = RouteSlot::new(100, 1024);
    let scope = Scope { slots: vec![slot], ..scope() };
    let prefix: Prefix = "fd05:0:0:2::/64".parse().unwrap();
    let route = Route::overlay(prefix, prefix.addr(), OWN).in_slot(slot);
    let mut all = State { links: wanted().links, ..State::default() };
    all.add(&PeerState::default().with_route(prefix, route));
    let plan = plan(&all, &State::default(), &scope, &|_| None);
    let is_written = plan.ops.iter().any(|op| matches!(op, Op::CreateRoute { .. }));
    assert!(
        !is_written || scope.has_slot(slot.normalized(Family::V6), Family::V6),
        "written, and never seen: {:?}",
        plan.conflicts
    );
}

#[test]
fn routes_that_differ_in_their_source_alone_are_two() {
    let kernel = FakeKernel::new();
    let uplink = kernel.add_uplink("eth0", "192.168.0.1/24".parse().unwrap()).unwrap();
    kernel.add_address("eth0", "192.168.0.7/24".parse().unwrap()).unwrap();
    let scope = Scope { uplink: Some(uplink), ..scope() };
    let via = FakeRoute { protocol: 205, ..FakeRoute::via(prefix(), "192.168.0.2".parse().unwrap(), uplink) };
    kernel.add_route(via.clone(), Placement::Exclusive).unwrap();
    let more = FakeRoute { source: Some("192.168.0.7".parse().unwrap()), ..via };
    kernel.add_route(more, Placement::Append).expect("the kernel takes routes that differ in their source");
    let seen = at_once(kernel.observe(&scope)).unwrap();
    assert_eq!(seen.routes.len(), 2);
}
