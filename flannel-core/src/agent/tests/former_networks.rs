//! Networks of former runs.

use super::*;

#[test]
fn a_former_network_is_in_the_scope_until_an_audit_shows_nothing_of_ours_there() {
    let networks: [Prefix; 2] = ["10.98.0.0/16", "10.99.0.0/16"].map(|network| network.parse().unwrap());
    let left: Prefix = "10.99.1.0/24".parse().unwrap();
    let seen = with_route(left, Route::direct(left, samples::node_address(Family::V4, 9), LinkId::Uplink));
    let clean = State { routes: Default::default(), ..seen.clone() };
    let mut machine = machine();
    let inside: Prefix = "10.42.8.0/24".parse().unwrap();
    machine.look_after([&networks[..], &[inside]].concat());
    machine.handle(at(0), Input::Store(Ok(own_record())));
    machine.handle(at(0), Input::Store(Err(SubnetError::Unavailable { doing: "watching", source: "away".into() })));
    // An old state file may name the present network as a former one: nothing is deleted before the store answers.
    assert_eq!(written(&mut machine, at(0), &samples::host(), &seen), []);
    assert_eq!((&machine.scope.former[..], &**machine.status.former), (&[][..], &networks[..]));
    machine.handle(at(1_000), Input::Store(Ok(own_record())));
    let ops = written(&mut machine, at(1_000), &samples::host(), &seen);
    assert!(matches!(&ops[..], [Op::DeleteRoute { prefix, .. }] if *prefix == left), "{ops:?}");
    // The empty network leaves the scope at once, the other once an audit finds it empty.
    assert_eq!((&machine.scope.former[..], machine.has_former()), (&networks[1..], true));
    machine.handle(at(2_000), Input::Timer);
    assert_eq!(written(&mut machine, at(2_000), &samples::host(), &clean), []);
    assert_eq!((machine.has_former(), machine.status.former.len()), (false, 0));
}

#[test]
fn what_is_left_in_a_former_network_makes_no_mass_removal_of_the_present_one() {
    let former: Prefix = "10.99.0.0/16".parse().unwrap();
    let route = |prefix: Prefix| {
        let route = Route::direct(prefix, samples::node_address(Family::V4, 9), LinkId::Uplink);
        (RouteKey { prefix, nth: 0 }, route)
    };
    let gone = samples::node_subnet(Family::V4, 77);
    let left = (0..20u8).map(|n| Prefix::masked(std::net::Ipv4Addr::new(10, 99, n, 0).into(), 24).unwrap());
    let routes = left.chain([gone]).map(route).collect();
    let seen = State { links: [(LinkId::Own(0), device())].into(), routes, ..State::default() };
    let mut present = seen.clone();
    present.routes.retain(|key, _| key.prefix == gone);
    let mut machine = machine();
    machine.look_after(vec![former]);
    machine.handle(at(0), Input::Store(Ok(own_record())));
    machine.handle(at(0), Input::Store(Err(SubnetError::Unavailable { doing: "watching", source: "away".into() })));
    assert_eq!(written(&mut machine, at(0), &samples::host(), &present), []);
    machine.handle(at(1_000), Input::Store(Ok(own_record())));
    let ops = written(&mut machine, at(1_000), &samples::host(), &seen);
    assert_eq!(ops.len(), 21, "held: {:?}", machine.status.withheld.len());
}

#[test]
fn a_foreign_device_in_place_keeps_no_former_network() {
    let former: Prefix = "10.99.0.0/16".parse().unwrap();
    let left: Prefix = "10.99.1.0/24".parse().unwrap();
    let foreign = Link { group: 0, alias: None, kind: LinkKind::Other("dummy".into()), ..device() };
    let route = Route { protocol: Route::BOOT, ..Route::overlay(left, left.addr(), LinkId::Own(0)) };
    let seen = State { links: [(LinkId::Own(0), foreign)].into(), ..with_route(left, route) };
    let mut machine = machine();
    machine.look_after(vec![former]);
    machine.handle(at(0), Input::Store(Ok(own_record())));
    let mut now = at(0);
    for _ in 0..200 {
        assert_eq!(written(&mut machine, now, &samples::host(), &seen), []);
        now = machine.deadline().unwrap();
        machine.handle(now, Input::Timer);
    }
    assert!(!machine.has_former(), "still there at {now:?}");
}

#[test]
fn many_refusals_in_a_former_network_keep_nobody_from_ready() {
    for count in [900u32, 1500] {
        let former: Prefix = "10.96.0.0/12".parse().unwrap();
        let left =
            (0..count).map(|n| Prefix::masked(std::net::Ipv4Addr::from(0x0a60_0000 + (n << 8)).into(), 24).unwrap());
        let route = |prefix: Prefix| {
            let route = Route::direct(prefix, samples::node_address(Family::V4, 9), LinkId::Uplink);
            (RouteKey { prefix, nth: 0 }, route)
        };
        let seen =
            State { links: [(LinkId::Own(0), device())].into(), routes: left.map(route).collect(), ..State::default() };
        let mut machine = machine();
        machine.look_after(vec![former]);
        machine.handle(at(0), Input::Store(Ok(own_record())));
        serve(&mut machine, at(0), &seen);
        serve(&mut machine, at(1_000), &seen);
        assert_eq!(machine.status.phase, Phase::Ready, "{count}");
    }
}

#[test]
fn a_route_of_a_former_network_that_somebody_puts_back_sets_no_pace() {
    // How often the kernel is observed within a minute while another program restores a route of a former network.
    let left: Prefix = "10.99.1.0/24".parse().unwrap();
    let seen = with_route(left, Route::direct(left, samples::node_address(Family::V4, 9), LinkId::Uplink));
    let mut machine = machine();
    machine.look_after(vec!["10.99.0.0/16".parse().unwrap()]);
    machine.handle(at(0), Input::Store(Ok(own_record())));
    let (mut now, mut rounds) = (at(0), 0);
    while now < at(60_000) {
        rounds += written(&mut machine, now, &samples::host(), &seen).len();
        now = machine.deadline().unwrap();
        machine.handle(now, Input::Timer);
    }
    assert!(rounds < 30, "{rounds}");
}
