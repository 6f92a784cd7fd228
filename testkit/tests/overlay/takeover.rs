//! One agent takes over from another, and no packet is lost: Go flannel's, or our own from before.

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel_core::kernel::Route as Ours;
use flannel_core::lease::Lease;
use flannel_core::net::{Family, MacAddr, Prefix};
use flannel_core::overlay::Teardown;
use testkit::sabotage::Plane;
use testkit::{Families, Fdb, Neighbour, PodNet, Route, VxlanLink};

use crate::support::{Cluster, assert_no_loss, cases, device, families_of, pod_mtu};

/// Peers that Go flannel knew and that are gone: with the one that is there, fewer prefixes than the guard against
/// mass removal looks at.
const GONE: u8 = 6;

cases! {
    fn go_flannels_vxlan_is_taken_over_in_ipv4_without_a_lost_packet() =
        go_flannel_is_taken_over(Plane::Vxlan, Families::V4);
    fn go_flannels_vxlan_is_taken_over_in_both_families_without_a_lost_packet() =
        go_flannel_is_taken_over(Plane::Vxlan, Families::Dual);
    fn go_flannels_host_gw_is_taken_over_in_ipv4_without_a_lost_packet() =
        go_flannel_is_taken_over(Plane::HostGw, Families::V4);
    fn go_flannels_host_gw_is_taken_over_in_both_families_without_a_lost_packet() =
        go_flannel_is_taken_over(Plane::HostGw, Families::Dual);
}

fn go_flannel_is_taken_over(plane: Plane, families: Families) {
    let mut cluster = Cluster::without_agents(2, plane, families);
    let mut own = cluster.paper_peer(50);
    own.key = flannel_core::lease::LeaseKey::new("node-1");
    own.attrs.public_ip = cluster.node(0).addrs;
    cluster.store.insert([own.clone()]);
    // The peer has our agent already; its pod and ours talk.
    let peer = cluster.agent(1).start();
    let status = cluster.wait(&peer, "ready", |status| status.phase == flannel_core::overlay::Phase::Ready);
    let theirs = status.lease.unwrap();
    let gone: Vec<Lease> = (1..=GONE).map(|n| cluster.paper_peer(100 + n)).collect();
    write_as_go_flannel(&cluster, &own, &theirs, &gone);
    for (nth, subnets) in [(0, own.subnets), (1, theirs.subnets)] {
        let net = PodNet { subnets, mtu: pod_mtu(plane, families) };
        let pod = cluster.node(nth).attach_pod(&net).unwrap();
        cluster.pods.push(pod);
    }
    let indices = |cluster: &Cluster| -> Vec<u32> {
        cluster.devices().iter().map(|name| cluster.ns(0).index_of(name).unwrap()).collect()
    };
    let before = indices(&cluster);
    for (from, to) in [(0, 1), (1, 0)] {
        let family = families_of(families).next().unwrap();
        let addr = cluster.pods[to].addr(family).unwrap();
        testkit::probe::until_reply(&cluster.pods[from].ns, addr, crate::support::PATIENCE).unwrap();
    }
    let flows = [cluster.flow(0, 1), cluster.flow(1, 0)];
    let agent = cluster.agent(0).start();
    cluster.agents = vec![agent, peer];
    cluster.ready(0);
    cluster.settle();
    flows.iter().for_each(|flow| cluster.run_on(flow));
    flows.into_iter().for_each(assert_no_loss);

    assert_eq!(indices(&cluster), before, "the devices are the same ones");
    let lease = cluster.lease(0);
    assert_eq!((lease.subnets, &lease.attrs), (own.subnets, &own.attrs), "the lease is the same one");
    let mut written = BTreeSet::new();
    for family in families_of(families) {
        for route in cluster.ns(0).routes(family).unwrap() {
            if route.to == *theirs.subnets.get(family).unwrap() {
                let ours = Ours::FIRST_PROTOCOL..Ours::FIRST_PROTOCOL + Ours::PROTOCOLS;
                assert!(ours.contains(&route.protocol), "{route}");
                written.insert(family);
            }
            let boot = route.protocol == Route::BOOT && gone.iter().any(|it| it.subnets.get(family) == Some(&route.to));
            // A `boot` route through the uplink to nobody we know may be anybody's.
            assert_eq!(boot, plane == Plane::HostGw && boot, "{route}");
        }
    }
    assert_eq!(written.len(), families_of(families).count());
    let left = cluster.objects(0);
    let of_gone = |text: &String| {
        gone.iter().any(|lease| lease.attrs.public_ip.iter().any(|(_, addr)| text.contains(&format!("dst {addr} "))))
    };
    assert!(!left.0.iter().any(of_gone), "{left:#?}");
    for (nth, other) in [(0, 1), (1, 0)] {
        cluster.assert_traffic(nth, other);
    }
}

/// Exactly what flannel leaves on a node (docs/compatibility.md, "Device", "Messages", "host-gw").
fn write_as_go_flannel(cluster: &Cluster, own: &Lease, peer: &Lease, gone: &[Lease]) {
    let ns = cluster.ns(0);
    for family in families_of(cluster.families) {
        let of = |lease: &Lease| (*lease.subnets.get(family).unwrap(), *lease.attrs.public_ip.get(family).unwrap());
        let dev = device(family);
        if cluster.plane == Plane::Vxlan {
            let vxlan =
                VxlanLink { vni: 1, local: Some(of(own).1), lower: Some("eth0".to_owned()), ..VxlanLink::default() };
            ns.add_vxlan(dev, &vxlan, Some(1450)).unwrap();
            ns.set_mac(dev, mac(own, family)).unwrap();
            ns.add_address(dev, of(own).0.addr(), family.bits()).unwrap();
            ns.set_up(dev).unwrap();
        }
        for lease in gone.iter().chain([peer]) {
            let (subnet, public): (Prefix, IpAddr) = of(lease);
            let route = match cluster.plane {
                Plane::HostGw => Route::to(subnet).via(public).dev("eth0"),
                Plane::Vxlan => {
                    let mac = mac(lease, family);
                    ns.put_neighbours(&[Neighbour::permanent(dev, subnet.addr(), mac)]).unwrap();
                    ns.put_fdb(&[Fdb::permanent(dev, mac, public)]).unwrap();
                    Route::to(subnet).via(subnet.addr()).dev(dev).onlink()
                }
            };
            ns.add_route(&route).unwrap();
        }
    }
}

/// The MAC address that a lease publishes.
fn mac(lease: &Lease, family: Family) -> MacAddr {
    let data = lease.attrs.backend_data.get(family).unwrap();
    let (_, rest) = data.as_str().split_once(r#""VtepMAC":""#).unwrap();
    rest[..17].parse().unwrap()
}

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
    for plane in [Plane::Vxlan, Plane::HostGw] {
        let mut cluster = Cluster::start(2, plane, Families::Dual);
        cluster.store.insert((1..=20).map(|n| cluster.paper_peer(100 + n)));
        cluster.settle();
        cluster.stop(0).unwrap();
        assert_ne!(cluster.objects(0), Default::default());
        for _ in 0..2 {
            let agent = cluster.agent(0).teardown(Teardown::Remove).start();
            cluster.agents[0] = agent;
            cluster.ready(0);
            cluster.stop(0).unwrap();
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
