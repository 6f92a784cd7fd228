//! What is not ours stays as it is, also where it stands in our way.

use testkit::canary::{Canaries, Place, Where};
use testkit::sabotage::{Act, Plane};
use testkit::{Families, Namespace, Route, VxlanLink, cases, wait_until};

use flannel_core::clock::{Clock, SystemClock};
use flannel_core::kernel::{LinkId, LinkPart, Object};
use flannel_core::net::{Family, MacAddr};
use flannel_core::overlay::{Held, HeldBecause, Phase, Status};

use crate::support::{Cluster, Objects, PATIENCE};

cases! {
    fn canaries_outlive_start_joins_leaves_and_removal_beside_vxlan() =
        canaries_outlive_an_agent(Plane::Vxlan, Families::Dual);
    fn canaries_outlive_start_joins_leaves_and_removal_beside_host_gw() =
        canaries_outlive_an_agent(Plane::HostGw, Families::Dual);
}

fn canaries_outlive_an_agent(plane: Plane, families: Families) {
    let mut cluster = Cluster::without_agents(2, plane, families);
    let papers: Vec<_> = (1..=20).map(|n| cluster.paper_peer(100 + n)).collect();
    let mut peers = Vec::new();
    for lease in &papers[..3] {
        // In IPv6 a foreign route to a peer, of whatever metric, keeps ours out.
        peers.extend(lease.subnets.v4);
    }
    let target = cluster.target();
    let places = [Place::Apart, Place::Main, Place::Uplink];
    let canaries =
        Canaries::place(cluster.node(0), &Where { places: &places, overlay: &target, peers: &peers }).unwrap();
    assert!(canaries.len() >= 50, "{}", canaries.len());
    let before = canaries.snapshot().unwrap();
    let unchanged = |when: &str| {
        let changes = canaries.snapshot().unwrap().changes_since(&before);
        assert_eq!(changes, Vec::<String>::new(), "{when}");
    };
    for nth in 0..2 {
        let agent = cluster.agent(nth).start();
        cluster.agents.push(agent);
        cluster.ready(nth);
    }
    unchanged("after the start");
    cluster.store.insert(papers.clone());
    cluster.settle();
    assert_eq!(cluster.status(0).quarantined, Default::default());
    unchanged("after joins");
    cluster.store.delete_all(papers[..10].iter().map(|lease| &lease.key));
    cluster.settle();
    unchanged("after leaves");
    cluster.remove(0).unwrap();
    assert_eq!(cluster.objects(0), Objects::default());
    unchanged("after removal");
}

#[test]
fn routes_appended_to_a_peers_are_left_alone_when_it_goes_and_comes() {
    let cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    let paper = cluster.paper_peer(101);
    cluster.store.insert([paper.clone()]);
    cluster.settle();
    let peers = [paper.subnets.v4.unwrap()];
    let target = cluster.target();
    let places = [Place::SameKey, Place::Device];
    let canaries =
        Canaries::place(cluster.node(0), &Where { places: &places, overlay: &target, peers: &peers }).unwrap();
    let before = canaries.snapshot().unwrap();
    cluster.store.delete(&paper.key);
    cluster.settle();
    assert_eq!(canaries.snapshot().unwrap().changes_since(&before), Vec::<String>::new());
    cluster.store.insert([paper]);
    cluster.until(0, "aware of the foreign routes", |status| status.conflicts.len() == 1);
    assert_eq!(canaries.snapshot().unwrap().changes_since(&before), Vec::<String>::new());
}

#[test]
fn a_bridge_under_our_name_is_refused_untouched_and_waited_for() {
    a_foreign_device_is_waited_for(|cluster| {
        cluster.ns(0).add_bridge("flannel.1").unwrap();
        cluster.ns(0).set_up("flannel.1").unwrap();
    });
}

#[test]
fn an_unmarked_vxlan_of_another_vni_under_our_name_is_refused_untouched_and_waited_for() {
    a_foreign_device_is_waited_for(|cluster| {
        let vxlan = VxlanLink { vni: 99, port: Some(4789), ..VxlanLink::default() };
        cluster.ns(0).add_vxlan("flannel.1", &vxlan, None).unwrap();
    });
}

fn a_foreign_device_is_waited_for(make: impl FnOnce(&Cluster)) {
    let mut cluster = Cluster::without_agents(1, Plane::Vxlan, Families::V4);
    make(&cluster);
    cluster.store.insert([cluster.paper_peer(101)]);
    let before = cluster.ns(0).link("flannel.1").unwrap();
    let agent = cluster.agent(0).start();
    cluster.agents.push(agent);
    let conflicts = |status: &Status| status.conflicts.iter().any(|it| matches!(it.object, Object::Link(_)));
    let status = cluster.until(0, "in conflict", conflicts);
    assert!(!status.phase.has_reached(Phase::Ready), "{status:?}");
    let conflict = &status.conflicts[0];
    assert!(conflict.remedy.contains("ip link delete flannel.1"), "{conflict:?}");
    assert_eq!(cluster.ns(0).link("flannel.1").unwrap(), before);
    cluster.ns(0).delete_link("flannel.1").unwrap();
    let status = cluster.until(0, "ready without the foreign device", |status| status.phase == Phase::Ready);
    assert_eq!(*status.conflicts, []);
    cluster.assert_converged(0);
}

#[test]
fn a_foreign_vxlan_that_has_our_vni_and_port_is_not_deleted_and_waited_for() {
    let mut cluster = Cluster::without_agents(1, Plane::Vxlan, Families::V4);
    let vxlan = VxlanLink { vni: 1, ..VxlanLink::default() };
    cluster.ns(0).add_vxlan("foreign0", &vxlan, None).unwrap();
    let before = cluster.ns(0).link("foreign0").unwrap();
    let agent = cluster.agent(0).start();
    cluster.agents.push(agent);
    let status = cluster.until(0, "in conflict", |status| !status.conflicts.is_empty());
    assert!(status.conflicts[0].remedy.contains("foreign0"), "{:?}", status.conflicts);
    assert!(!status.phase.has_reached(Phase::Ready), "{status:?}");
    assert_eq!(cluster.ns(0).link("foreign0").unwrap(), before);
    cluster.ns(0).delete_link("foreign0").unwrap();
    cluster.ready(0);
}

cases! {
    fn a_foreign_route_on_a_peers_prefix_is_a_conflict_and_healed_once_it_goes_on_vxlan() =
        a_foreign_route_is_waited_for(Plane::Vxlan);
    fn a_foreign_route_on_a_peers_prefix_is_a_conflict_and_healed_once_it_goes_on_host_gw() =
        a_foreign_route_is_waited_for(Plane::HostGw);
}

fn a_foreign_route_is_waited_for(plane: Plane) {
    let cluster = Cluster::start(2, plane, Families::Dual);
    let paper = cluster.paper_peer(101);
    let mut routes = Vec::new();
    for (family, gateway) in [(Family::V4, "10.89.0.1"), (Family::V6, "fd00:89::1")] {
        let to = *paper.subnets.get(family).unwrap();
        let route = Route::to(to).via(gateway.parse().unwrap()).dev("eth0").protocol(Route::STATIC);
        cluster.ns(0).add_route(&route).unwrap();
        routes.push(route);
    }
    let there = || -> Vec<String> {
        let all = Family::BOTH.into_iter().flat_map(|family| cluster.ns(0).routes(family).unwrap());
        all.filter(|it| it.protocol == Route::STATIC).map(|it| it.to_string()).collect()
    };
    let before = there();
    assert_eq!(before.len(), 2);
    cluster.store.insert([paper]);
    let status = cluster.until(0, "in conflict", |status| status.conflicts.len() == 2 && status.phase == Phase::Ready);
    assert!(status.conflicts.iter().all(|it| it.remedy.contains("ip route delete")), "{:?}", status.conflicts);
    assert_eq!((status.peers.accepted, status.quarantined.len()), (2, 0));
    assert_eq!(there(), before);
    cluster.assert_traffic(0, 1);
    routes.iter().for_each(|route| cluster.ns(0).delete_route(route).unwrap());
    cluster.until(0, "healed", |status| status.conflicts.is_empty());
    cluster.converged(0);
    let peers = cluster.peer_prefixes(0);
    wait_until("both peers' routes", PATIENCE, || {
        Ok(peers.iter().all(|prefix| cluster.objects(0).0.iter().any(|it| it.starts_with(&format!("route {prefix} ")))))
    })
    .unwrap();
}

#[test]
fn a_foreign_ipv6_route_over_which_the_kernel_takes_none_of_ours_is_a_conflict_of_that_peer_alone() {
    let cluster = Cluster::start(2, Plane::Vxlan, Families::Dual);
    let paper = cluster.paper_peer(101);
    let route = Route::to(paper.subnets.v6.unwrap()).dev("eth0").metric(7);
    cluster.ns(0).add_route(&route).unwrap();
    cluster.store.insert([paper]);
    let status = cluster.until(0, "in conflict", |it| it.phase == Phase::Ready && !it.conflicts.is_empty());
    assert!(status.conflicts[0].remedy.contains("ip -6 route"), "{:?}", status.conflicts);
    assert_eq!((status.conflicts.len(), status.failed_writes, status.last_error), (1, 0, None));
    cluster.assert_traffic(0, 1);
    cluster.ns(0).delete_route(&route).unwrap();
    cluster.until(0, "healed", |status| status.conflicts.is_empty());
    cluster.converged(0);
}

#[test]
fn a_fight_over_a_part_of_the_device_keeps_no_route_away() {
    std::thread::scope(|scope| {
        for part in [LinkPart::Mtu, LinkPart::Mark, LinkPart::Mac] {
            scope.spawn(move || a_fight_keeps_no_route_away(part));
        }
    });
}

fn a_fight_keeps_no_route_away(part: LinkPart) {
    let other: MacAddr = "02:01:01:01:01:01".parse().unwrap();
    let fight = |ns: &Namespace| match part {
        LinkPart::Mtu => ns.set_mtu("flannel.1", 1300),
        LinkPart::Mark => ns.set_link("flannel.1", "group 0").and_then(|()| ns.set_alias("flannel.1", "")),
        _ if ns.link("flannel.1")?.mac == Some(other) => Ok(()),
        _ => ns.set_mac("flannel.1", other),
    };
    let cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let before = cluster.objects(0);
    let object = Object::LinkPart(LinkId::Own(0), part);
    // Until it is left alone for longer than the routes may take.
    let left_alone = |held: &Held| match held.because {
        HeldBecause::Flapping(until) => until > SystemClock::default().now().after(PATIENCE + PATIENCE / 5),
        _ => false,
    };
    wait_until("a long wait for what flaps", 6 * PATIENCE, || {
        fight(cluster.ns(0))?;
        Ok(*cluster.status(0).flapping == [object.clone()] && cluster.preview(0).held.iter().any(left_alone))
    })
    .unwrap_or_else(|error| panic!("{part:?}: {error}\n{}", cluster.show(0)));
    Act::RoutesFlushed.apply(cluster.node(0), &cluster.target()).unwrap();
    wait_until("the routes", PATIENCE, || {
        fight(cluster.ns(0))?;
        let now = cluster.objects(0);
        Ok(before.0.iter().filter(|text| text.starts_with("route ")).all(|text| now.0.contains(text)))
    })
    .unwrap_or_else(|error| panic!("{part:?}: {error}\n{}", cluster.show(0)));
    wait_until("peace", 6 * PATIENCE, || Ok(cluster.objects(0) == before)).unwrap();
    cluster.assert_traffic(0, 1);
}

#[test]
fn a_device_that_somebody_makes_a_port_of_a_bridge_stays_one_and_carries_traffic() {
    let cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    let (ns, before) = (cluster.ns(0), cluster.objects(0));
    ns.add_bridge("theirs0").unwrap();
    ns.set_up("theirs0").unwrap();
    let audits = cluster.status(0).audits;
    ns.set_link("flannel.1", "master theirs0").unwrap();
    cluster.until(0, "audited", |status| status.audits > audits && status.phase == Phase::Ready);
    cluster.converged(0);
    assert_eq!((ns.link("flannel.1").unwrap().master.as_deref(), cluster.objects(0)), (Some("theirs0"), before));
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
}

#[test]
fn foreign_routes_beside_a_peers_do_not_quarantine_it() {
    for plane in [Plane::Vxlan, Plane::HostGw] {
        let cluster = Cluster::start(2, plane, Families::Dual);
        let paper = cluster.paper_peer(101);
        for device in cluster.devices() {
            // Something behind a pod of the peer, through our own device.
            let v4 = device == "flannel.1";
            let (to, via) = if v4 { ("10.99.0.0/24", "10.244.101.9") } else { ("fd00:99::/64", "fd00:244:0:65::9") };
            let route = Route::to(to.parse().unwrap()).via(via.parse().unwrap()).dev(&device).onlink();
            cluster.ns(0).add_route(&route).unwrap();
        }
        let on_link = |family| {
            // As if the peer's pods were on the underlay.
            let to = *paper.subnets.get(family).unwrap();
            cluster.ns(0).add_route(&Route::to(to).dev("eth0").metric(50)).unwrap();
        };
        on_link(Family::V4);
        cluster.store.insert([paper.clone()]);
        let known = |status: &Status| status.peers.accepted + status.peers.quarantined == 2;
        let status = cluster.until(0, "showing the change", known);
        assert_eq!(status.quarantined, Default::default(), "{plane:?}");
        cluster.settle();
        // A fresh look at the host changes nothing. (In IPv6 the kernel takes no route of ours where such a one is
        // already.)
        let audits = cluster.status(0).audits;
        on_link(Family::V6);
        cluster.until(0, "audited", |status| status.audits > audits);
        assert_eq!(cluster.status(0).quarantined, Default::default(), "{plane:?}");
    }
}
