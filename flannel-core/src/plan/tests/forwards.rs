//! Tests for devices whose packets a data plane carries, and for their forwards.

use super::*;
use crate::kernel::{Forward, ForwardKey, PeerState, Tun, Tunnel};

fn tunnel() -> Tunnel {
    let local = Dual { v4: Some("192.168.0.1".parse().unwrap()), v6: None };
    let subnets = Dual { v4: Some("10.5.1.0/24".parse().unwrap()), v6: None };
    Tunnel::new(8285, local, subnets)
}

fn network() -> Prefix {
    "10.5.0.0/16".parse().unwrap()
}

fn key() -> ForwardKey {
    ForwardKey { link: OWN, prefix: prefix() }
}

fn forward(n: u8) -> Forward {
    Forward::to(([192, 168, 0, n], 8285).into())
}

/// A carried device with its address, the network's route and one peer.
fn carried() -> State {
    let link = wanted().links[&OWN].clone();
    let kind = LinkKind::Tun(Tun::carried(tunnel()));
    let mut state = State::default();
    state.links.insert(OWN, Link { name: LinkName::new("flannel0").unwrap(), kind, mac: None, ..link });
    state.addresses.insert(AddressKey { link: OWN, addr: "10.5.1.0".parse().unwrap(), len: 32 }, ());
    state.routes.insert(RouteKey { prefix: network(), nth: 0 }, Route::into_device(network(), OWN));
    state.add(&PeerState::default().with_forward(key(), forward(2)));
    state
}

fn scope() -> Scope {
    let link = &carried().links[&OWN];
    Scope { devices: vec![Device::of(link)], ..super::scope() }
}

fn ops(wanted: &State, seen: &State) -> Vec<String> {
    let scope = scope();
    plan(wanted, seen, &scope, &|_| None).ops.iter().map(|op| OpText { op, scope: &scope }.to_string()).collect()
}

fn tun(state: &mut State) -> &mut Tun {
    let LinkKind::Tun(tun) = &mut state.links.get_mut(&OWN).unwrap().kind else { panic!("not a TUN device") };
    tun
}

/// The state that an ended agent leaves.
fn left_behind() -> State {
    let mut seen = carried();
    tun(&mut seen).tunnel = None;
    seen.forwards.clear();
    seen
}

#[test]
fn a_forward_is_there_before_a_route_leads_to_it_and_goes_after_it() {
    let made = ops(&carried(), &State::default());
    let order = ["link add flannel0", "address add", "forward replace", "route add"];
    let places = order.map(|start| made.iter().position(|op| op.starts_with(start)).unwrap());
    assert!(places.is_sorted() && made.len() == 4, "{made:?}");
    let verbs: Vec<_> = ops(&State::default(), &carried())
        .iter()
        .map(|op| op.split(' ').take(2).collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(verbs, ["route delete", "forward delete", "address delete", "link delete"]);
    assert_eq!(ops(&carried(), &carried()), [""; 0]);
}

#[test]
fn a_peer_that_moves_or_leaves_changes_its_forward_alone() {
    let mut moved = carried();
    moved.forwards.insert(key(), forward(3));
    assert_eq!(ops(&moved, &carried()), ["forward replace 10.5.2.0/24 dev flannel0 to 192.168.0.3:8285"]);
    let mut left = carried();
    left.forwards.clear();
    assert_eq!(ops(&left, &carried()), ["forward delete 10.5.2.0/24 dev flannel0 to 192.168.0.2:8285"]);
}

#[test]
fn a_device_that_a_former_run_left_is_opened_again_and_keeps_its_routes() {
    let expected = [
        "link set flannel0 type tun local 192.168.0.1 port 8285",
        "forward replace 10.5.2.0/24 dev flannel0 to 192.168.0.2:8285",
    ];
    assert_eq!(ops(&carried(), &left_behind()), expected);
}

#[test]
fn another_port_changes_the_tunnel_in_place_and_another_kind_of_queue_makes_the_device_anew() {
    let mut wanted = carried();
    tun(&mut wanted).tunnel.as_mut().unwrap().port = 9000;
    assert_eq!(ops(&wanted, &carried()), ["link set flannel0 type tun local 192.168.0.1 port 9000"]);
    let mut several = tunnel();
    several.queues = std::num::NonZeroU8::new(4).unwrap();
    *tun(&mut wanted) = Tun::carried(several);
    let anew = ops(&wanted, &carried());
    assert_eq!(
        anew[..2],
        ["link delete flannel0", "link add flannel0 mtu 1450 type tun local 192.168.0.1 port 8285 queues 4"]
    );
    assert!(anew.iter().any(|op| op.starts_with("forward replace")), "{anew:?}");
}

#[test]
fn what_cannot_be_carried_takes_no_forwards_and_its_routes_stay() {
    let plan = plan(&carried(), &left_behind(), &scope(), &|_| None);
    let mut refusals = Refusals::default();
    let blocked: Vec<bool> = plan
        .ops
        .iter()
        .map(|op| {
            let opens = matches!(op, Op::UpdateLink { part: LinkPart::Tunnel, .. });
            let blocked = refusals.block(op);
            if opens || blocked {
                refusals.refused(op);
            }
            blocked
        })
        .collect();
    assert_eq!(blocked, [false, true]);
    // An existing socket continues, whatever the outcome of its change.
    let mut wanted = carried();
    tun(&mut wanted).tunnel.as_mut().unwrap().port = 9000;
    wanted.forwards.insert(key(), forward(3));
    let plan = super::plan(&wanted, &carried(), &scope(), &|_| None);
    let mut refusals = Refusals::default();
    refusals.refused(&plan.ops[0]);
    assert!(!refusals.block(&plan.ops[1]), "{:?}", plan.ops);
}

#[test]
fn an_unmarked_tun_device_is_somebody_elses() {
    let mut seen = left_behind();
    let link = seen.links.get_mut(&OWN).unwrap();
    (link.group, link.alias) = (0, None);
    let plan = plan(&carried(), &seen, &scope(), &|_| None);
    assert!(plan.ops.iter().all(|op| op.link() != Some(OWN)), "{:?}", plan.ops);
    let [conflict] = &plan.conflicts[..] else { panic!("{:?}", plan.conflicts) };
    assert_eq!(conflict.object, Object::Link(OWN));
    assert!(conflict.found.contains("flannel0 (tun"), "{}", conflict.found);
}

#[test]
fn a_marked_tun_device_goes_where_none_is_wanted_but_not_while_another_program_makes_it() {
    let mut seen = left_behind();
    seen.addresses.clear();
    seen.routes.clear();
    let deleted = |scope: &Scope| plan(&State::default(), &seen, scope, &|_| None).ops.len();
    assert_eq!(deleted(&scope()), 1);
    assert_eq!(deleted(&scope_of(LinkKind::External("tun".into()))), 0);
}

#[test]
fn a_device_that_lost_its_mark_is_still_ours_while_its_packets_are_carried_here() {
    let mut seen = carried();
    let link = seen.links.get_mut(&OWN).unwrap();
    (link.group, link.alias) = (0, None);
    assert_eq!(ops(&carried(), &seen), ["link set flannel0 group 0x666ba808 alias flannelkit:flannel"]);
}
