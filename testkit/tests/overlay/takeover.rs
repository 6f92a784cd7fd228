//! An agent takes over from the one before, and no packet is lost; a removal leaves nothing.

use flannel_core::kernel::Route as Ours;
use flannel_core::net::Family;
use testkit::sabotage::Plane;
use testkit::{Families, cases};

use crate::support::{Cluster, assert_no_loss};

cases! {
    fn a_restart_loses_no_packet_and_changes_nothing_on_vxlan() = a_restart_changes_nothing(Plane::Vxlan, Families::V4);
    fn a_restart_loses_no_packet_and_changes_nothing_on_vxlan_in_both_families() =
        a_restart_changes_nothing(Plane::Vxlan, Families::Dual);
    fn a_restart_loses_no_packet_and_changes_nothing_on_host_gw() =
        a_restart_changes_nothing(Plane::HostGw, Families::Dual);
}

fn a_restart_changes_nothing(plane: Plane, families: Families) {
    let mut cluster = Cluster::start(2, plane, families);
    let seen = |cluster: &Cluster| {
        let indices: Vec<_> = cluster.devices().iter().map(|name| cluster.ns(0).index_of(name).unwrap()).collect();
        (cluster.objects(0), indices, cluster.lease(0).subnets)
    };
    let before = seen(&cluster);
    let flows = [cluster.flow(0, 1), cluster.flow(1, 0)];
    for _ in 0..8 {
        cluster.stop(0).unwrap();
        cluster.restart(0);
        assert_eq!(seen(&cluster), before, "after an orderly restart");
        cluster.crash(0);
        cluster.restart(0);
        assert_eq!(seen(&cluster), before, "after a crash");
    }
    // A crash before the first look at the kernel, and in the middle of it.
    for _ in 0..3 {
        cluster.crash(0);
        let agent = cluster.agent(0).start();
        cluster.agents[0] = agent;
    }
    cluster.ready(0);
    cluster.settle();
    flows.iter().for_each(|flow| cluster.run_on(flow));
    flows.into_iter().for_each(assert_no_loss);
    assert_eq!(seen(&cluster), before);
}

/// Packets that come while nobody carries them are dropped, and never leave by another way.
#[test]
fn a_restart_over_udp_keeps_device_and_routes_and_goes_on() {
    let mut cluster = Cluster::start(2, Plane::Udp, Families::Dual);
    let seen =
        |cluster: &Cluster| (cluster.objects(0), cluster.ns(0).index_of("flannel0").unwrap(), cluster.lease(0).subnets);
    let before = seen(&cluster);
    for nth in 0..8 {
        if nth % 2 == 0 {
            cluster.stop(0).unwrap()
        } else {
            cluster.crash(0)
        }
        let left = cluster.objects(0);
        assert_eq!(left, before.0, "what is left of an agent that has ended");
        cluster.restart(0);
        assert_eq!(seen(&cluster), before);
        cluster.assert_traffic(0, 1);
        cluster.assert_traffic(1, 0);
    }
}

#[test]
fn peers_that_came_and_went_while_the_agent_was_dead_are_caught_up_with() {
    let mut cluster = Cluster::start(2, Plane::Vxlan, Families::Dual);
    cluster.store.insert((1..=8).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    cluster.crash(0);
    cluster.store.delete_all((1..=4).map(|n| cluster.paper_peer(100 + n).key).collect::<Vec<_>>().iter());
    cluster.store.insert((9..=12).map(|n| cluster.paper_peer(100 + n)));
    cluster.restart(0);
    cluster.settle();
    let routes = cluster.objects(0).0.iter().filter(|text| text.starts_with("route")).count();
    assert_eq!(routes, 2 * 9, "{}", cluster.show(0));
    cluster.assert_traffic(0, 1);
}

#[test]
fn removal_leaves_nothing_of_ours_and_may_be_repeated() {
    for plane in [Plane::Vxlan, Plane::HostGw, Plane::Udp] {
        let mut cluster = Cluster::start(2, plane, Families::Dual);
        cluster.store.insert((1..=20).map(|n| cluster.paper_peer(100 + n)));
        cluster.settle();
        cluster.stop(0).unwrap();
        assert_ne!(cluster.objects(0), Default::default());
        for _ in 0..2 {
            let agent = cluster.agent(0).start();
            cluster.agents[0] = agent;
            cluster.ready(0);
            cluster.remove(0).unwrap();
            nothing_of_ours(&cluster);
            assert!(
                !cluster.store.records().iter().any(|record| record.key.as_str() == "node-1"),
                "the lease is given back"
            );
        }
    }
}

#[track_caller]
fn nothing_of_ours(cluster: &Cluster) {
    let ns = cluster.ns(0);
    let marked = ns.links().unwrap().into_iter().filter(|link| link.group >> 16 == 0x666b);
    assert_eq!(marked.map(|link| link.name).collect::<Vec<_>>(), Vec::<String>::new());
    for family in Family::BOTH {
        let ours = Ours::FIRST_PROTOCOL..Ours::FIRST_PROTOCOL + Ours::PROTOCOLS;
        let routes = ns.routes(family).unwrap().into_iter().filter(|route| ours.contains(&route.protocol));
        assert_eq!(routes.map(|route| route.to_string()).collect::<Vec<_>>(), Vec::<String>::new());
    }
}
