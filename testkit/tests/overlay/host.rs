//! The host under an agent: no uplink, another one, one that comes and goes.

use std::net::IpAddr;

use caps::{CapSet, Capability};
use flannel_core::kernel::{Kernel, KernelError, OverlayName, Residence};
use flannel_core::net::{Dual, Family};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{OverlayError, Phase, Status, Wait};
use testkit::sabotage::{Act, Plane};
use testkit::{Families, Route, UNDERLAY_LINK, cases, wait_until};

use crate::support::{Cluster, PATIENCE, assert_no_loss, config_with, families_of, parse};

#[test]
fn without_an_uplink_an_agent_ends_with_a_typed_error() {
    let cluster = Cluster::without_agents(1, Plane::Vxlan, Families::V4);
    cluster.ns(0).flush_main_routes().unwrap();
    let error = cluster.outcome(cluster.agent(0).start()).unwrap_err();
    let OverlayError::Uplink(source) = error else { panic!("{error:?}") };
    assert!(source.to_string().contains("eth0"), "{source}");
    assert_eq!(cluster.store.records(), []);
}

cases! {
    fn an_underlay_that_is_renamed_and_back_needs_no_restart() = an_underlay_comes_back(Act::UnderlayRenamed);
    fn an_underlay_that_is_deleted_and_back_needs_no_restart() = an_underlay_comes_back(Act::UnderlayDeleted);
    fn an_underlay_that_is_down_for_a_while_needs_no_restart() = an_underlay_comes_back(Act::UnderlayDownUp);
}

fn an_underlay_comes_back(act: Act) {
    [Plane::Vxlan, Plane::HostGw].into_iter().for_each(|plane| an_underlay_of_a_plane_comes_back(plane, act));
}

fn an_underlay_of_a_plane_comes_back(plane: Plane, act: Act) {
    let cluster = Cluster::start(2, plane, Families::Dual);
    cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let (wanted, node, target) = (cluster.objects(0), cluster.node(0), cluster.target());
    act.strike(node, &target).unwrap();
    let status = cluster.until(0, "showing the loss", |status| status.uplink.up().is_none());
    assert!(status.lease.is_some(), "{status:?}");
    // Peers come and go meanwhile.
    cluster.store.insert([cluster.paper_peer(150)]);
    cluster.until(0, "showing the change", |status| status.peers.accepted == 7);
    cluster.store.delete(&cluster.paper_peer(150).key);
    act.restore(node).unwrap();
    let healed = wait_until(act.name(), PATIENCE, || Ok(cluster.objects(0) == wanted));
    let healed =
        healed.unwrap_or_else(|error| panic!("{error}\n{wanted:#?}\n{:#?}\n{}", cluster.objects(0), cluster.show(0)));
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
    eprintln!("{plane:?}: {} for a while: healed {healed:.1?} after it was back", act.name());
    cluster.until(0, "ready with its uplink", |it| it.phase == Phase::Ready && it.uplink.up().is_some());
    cluster.converged(0);
}

#[test]
fn without_a_carrier_a_node_is_not_ready_until_it_is_back_and_nothing_is_written() {
    for plane in [Plane::Vxlan, Plane::HostGw, Plane::Udp] {
        let cluster = Cluster::start(2, plane, Families::Dual);
        let (wanted, node, target) = (cluster.objects(0), cluster.node(0), cluster.target());
        cluster.until(0, "ready", Status::is_ready);
        Act::UnderlayCarrier.strike(node, &target).unwrap();
        let status = cluster.until(0, "not ready", |status| !status.is_ready());
        let waits = status.waits_for();
        assert!(
            matches!(&waits[..], [Wait::Uplink { error: Some(error) }] if error.contains("no carrier")),
            "{waits:?}"
        );
        assert_eq!(cluster.objects(0), wanted);
        Act::UnderlayCarrier.restore(node).unwrap();
        cluster.until(0, "ready again", Status::is_ready);
        cluster.assert_traffic(0, 1);
        assert_eq!(cluster.objects(0), wanted);
    }
}

#[test]
fn routes_to_peers_stay_while_the_connected_route_is_missing() {
    let mut cluster = Cluster::start(2, Plane::HostGw, Families::Dual);
    cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let (wanted, target) = (cluster.objects(0), cluster.target());
    let unreached = |status: &Status| status.skipped.len() == 12 && status.phase == Phase::Ready;
    Act::UnderlayConnected.strike(cluster.node(0), &target).unwrap();
    let status = cluster.until(0, "showing the loss", unreached);
    let reason = status.skipped.values().next().unwrap().to_string();
    assert!(reason.contains("connected route"), "{reason}");
    // What an audit shows of skipped peers is said before it writes.
    let audits = status.audits;
    cluster.ns(0).add_address("lo", "198.51.100.7".parse().unwrap(), 32).unwrap();
    cluster.until(0, "audited again", |status| status.audits > audits && unreached(status));
    assert_eq!(cluster.objects(0), wanted);
    // Nor does an agent that starts meanwhile take them away.
    cluster.crash(0);
    cluster.restart(0);
    cluster.until(0, "showing the loss", unreached);
    assert_eq!(cluster.objects(0), wanted);
    Act::UnderlayConnected.restore(cluster.node(0)).unwrap();
    cluster.until(0, "ready with all peers", |status| status.skipped.is_empty() && status.phase == Phase::Ready);
    cluster.converged(0);
    assert_eq!(cluster.objects(0), wanted);
    cluster.assert_traffic(0, 1);
}

#[test]
fn direct_routing_goes_on_while_somebody_takes_over_the_uplink() {
    let families = Families::Dual;
    let mut cluster = Cluster::without_agents(2, Plane::Vxlan, families);
    let config = config_with(families, r#"{"Type":"vxlan","DirectRouting":true}"#);
    cluster.store.set_config(parse(&config));
    cluster.start_all();
    cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let (wanted, target) = (cluster.objects(0), cluster.target());
    let routes: Vec<_> = wanted.0.iter().filter(|text| text.starts_with("route ")).collect();
    let direct = routes.iter().all(|text| text.contains(&format!("dev Some({UNDERLAY_LINK:?}) ")));
    assert!(direct && routes.len() == 12, "{routes:#?}");
    let flow = cluster.flow(0, 1);
    for _ in 0..2 {
        Act::UnderlayConnected.strike(cluster.node(0), &target).unwrap();
        cluster.until(0, "keeping the routes", |status| status.withheld.len() == 12 && status.phase == Phase::Ready);
        let now = cluster.objects(0);
        assert!(routes.iter().all(|text| now.0.contains(*text)), "{}", cluster.show(0));
        cluster.run_on(&flow);
        Act::UnderlayConnected.restore(cluster.node(0)).unwrap();
        cluster.until(0, "at rest", |status| status.withheld.is_empty() && status.phase == Phase::Ready);
        cluster.converged(0);
        assert_eq!(cluster.objects(0), wanted);
    }
    assert_no_loss(flow);
}

cases! {
    fn another_uplink_address_is_published_and_peers_follow_on_vxlan() = another_address_is_followed(Plane::Vxlan);
    fn another_uplink_address_is_published_and_peers_follow_on_host_gw() = another_address_is_followed(Plane::HostGw);
}

fn another_address_is_followed(plane: Plane) {
    let cluster = Cluster::start(2, plane, Families::Dual);
    let ns = cluster.ns(0);
    let subnets = cluster.lease(0).subnets;
    let new: [(&str, &str, u8); 2] = [("10.89.0.111", "10.89.0.1", 16), ("fd00:89::6f", "fd00:89::1", 64)];
    for (family, (new, gateway, len)) in families_of(cluster.families).zip(new) {
        let (new, gateway): (IpAddr, IpAddr) = (new.parse().unwrap(), gateway.parse().unwrap());
        ns.delete_address(UNDERLAY_LINK, cluster.node(0).addr(family).unwrap(), len).unwrap();
        ns.add_address(UNDERLAY_LINK, new, len).unwrap();
        let default = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
        let route = Route::to(default.parse().unwrap()).via(gateway).dev(UNDERLAY_LINK);
        ns.replace_route(&route).unwrap();
    }
    let moved = |addrs: &Dual<IpAddr>| {
        addrs.v4 == Some(new[0].0.parse().unwrap()) && addrs.v6 == Some(new[1].0.parse().unwrap())
    };
    cluster.until(0, "published anew", |status| {
        status.lease.as_ref().is_some_and(|lease| moved(&lease.attrs.public_ip) && lease.subnets == subnets)
    });
    let records = cluster.store.records();
    let own = records.iter().find(|record| record.key.as_str() == "node-1").unwrap();
    assert!(moved(&own.lease.as_ref().unwrap().attrs.public_ip), "{own:?}");
    wait_until("the peer to follow", PATIENCE, || {
        let (here, there) = (cluster.objects(0), cluster.objects(1));
        let old = |text: &String| {
            families_of(cluster.families).any(|family| {
                let addr = cluster.node(0).addr(family).unwrap();
                text.contains(&format!("Some({addr})")) || text.contains(&format!("dst {addr} "))
            })
        };
        Ok(!here.0.iter().chain(&there.0).any(old))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}\n{}", cluster.show(0), cluster.show(1)));
    cluster.settle();
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
}

#[test]
fn a_second_link_that_comes_goes_down_and_comes_back_is_used_and_missed_at_once() {
    let cluster = Cluster::start(1, Plane::HostGw, Families::V4);
    let (ns, mut peer) = (cluster.ns(0), cluster.paper_peer(101));
    let gateway: IpAddr = "198.51.100.7".parse().unwrap();
    peer.attrs.public_ip.v4 = Some(gateway);
    let (key, subnet) = (peer.key.clone(), peer.subnets.v4.unwrap());
    cluster.store.insert([peer]);
    // Each well before the next periodic look.
    let skipped = |is: bool| {
        let what = if is { "skipped" } else { "routed" };
        cluster.until(0, what, |status| status.skipped.keys().any(|(peer, _)| *peer == key) == is);
        wait_until(what, PATIENCE, || {
            let routes = ns.routes(Family::V4)?;
            Ok(routes.iter().any(|route| route.to == subnet && route.via == Some(gateway)) != is)
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", cluster.show(0)));
    };
    skipped(true);
    ns.add_veth("second0", ns, "second1").unwrap();
    ns.set_up("second1").unwrap();
    ns.set_up("second0").unwrap();
    ns.add_address("second0", "198.51.100.1".parse().unwrap(), 24).unwrap();
    skipped(false);
    ns.set_down("second0").unwrap();
    skipped(true);
    ns.set_up("second0").unwrap();
    skipped(false);
}

/// An agent whose backend writes nothing may run without the capability, and knows another one by its name.
#[test]
fn a_name_is_claimed_once_among_those_without_privilege_too() {
    let cluster = Cluster::without_agents(1, Plane::Vxlan, Families::V4);
    let claims = cluster.ns(0).run(move || {
        caps::drop(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap();
        let (one, two) = (NetlinkKernel::new().unwrap(), NetlinkKernel::new().unwrap());
        let (name, networks) = (OverlayName::default(), Dual { v4: "10.244.0.0/16".parse().ok(), v6: None });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let first = one.claim(&name, &networks, Residence::Present).await;
            let second = two.claim(&name, &networks, Residence::Present).await;
            (first, second)
        })
    });
    let (first, second) = claims.unwrap();
    assert!(first.is_ok(), "{first:?}");
    assert!(matches!(second, Err(KernelError::Conflict { .. })), "{second:?}");
}
