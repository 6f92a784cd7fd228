//! Beside the real Go flannel: in one cluster with it, and each in the other's place.

mod cluster;
pub(crate) mod kube;

use testkit::Families;

use cluster::{Cluster, Filter, Network, Plane, Program, Store};

#[test]
fn nodes_of_both_programs_share_vxlan_in_ipv4() {
    share(Network { store: Store::Etcd, plane: Plane::Vxlan, families: Families::V4, filter: Filter::Nftables });
}

#[test]
fn nodes_of_both_programs_share_vxlan_in_both_families() {
    share(Network { store: Store::Etcd, plane: Plane::Vxlan, families: Families::Dual, filter: Filter::Iptables });
}

#[test]
fn nodes_of_both_programs_share_host_gw_in_ipv4() {
    share(Network { store: Store::Etcd, plane: Plane::HostGw, families: Families::V4, filter: Filter::Iptables });
}

#[test]
fn nodes_of_both_programs_share_host_gw_in_both_families() {
    share(Network { store: Store::Etcd, plane: Plane::HostGw, families: Families::Dual, filter: Filter::Nftables });
}

#[test]
fn nodes_of_both_programs_share_a_kubernetes_cluster_over_vxlan_in_both_families() {
    share(Network {
        store: Store::Kubernetes,
        plane: Plane::Vxlan,
        families: Families::Dual,
        filter: Filter::Nftables,
    });
}

#[test]
fn nodes_of_both_programs_share_a_kubernetes_cluster_over_host_gw_in_ipv4() {
    share(Network { store: Store::Kubernetes, plane: Plane::HostGw, families: Families::V4, filter: Filter::Iptables });
}

/// Every pod reaches every pod, and what one program says in the store the other follows: joins, leaves, and a node
/// that comes back with the other program.
fn share(network: Network) {
    let mut cluster = Cluster::new(3, network);
    for (nth, program) in [(1, Program::Go), (2, Program::Ours), (3, Program::Go)] {
        cluster.start(nth, program);
        cluster.attach(nth);
        cluster.all_reach_all();
    }
    assert_eq!(cluster.leases().len(), 3);
    let of_third = cluster.lease(3);

    cluster.stop(3);
    cluster.detach(3);
    cluster.end_lease(3);
    for nth in [1, 2] {
        let named = |line: &String| {
            let addresses = of_third.attrs.public_ip.iter().map(|(_, addr)| addr.to_string());
            let subnets = of_third.subnets.iter().map(|(_, subnet)| subnet.addr().to_string());
            let kernel = ["neighbour", "fdb", "route"].iter().any(|kind| line.starts_with(kind));
            kernel && addresses.chain(subnets).any(|text| line.split(' ').any(|word| word.starts_with(&text)))
        };
        cluster.until(nth, "rid of the node that left", |state| !state.iter().any(named));
    }

    cluster.start(3, Program::Ours);
    cluster.attach(3);
    cluster.all_reach_all();
    assert_eq!(cluster.leases().len(), 3);
}

#[test]
fn a_swap_on_a_host_loses_nothing_on_vxlan_in_ipv4() {
    swap(
        Network { store: Store::Etcd, plane: Plane::Vxlan, families: Families::V4, filter: Filter::Iptables },
        Program::Go,
    );
}

#[test]
fn a_swap_on_a_host_loses_nothing_on_vxlan_in_both_families() {
    swap(
        Network { store: Store::Etcd, plane: Plane::Vxlan, families: Families::Dual, filter: Filter::Nftables },
        Program::Ours,
    );
}

#[test]
fn a_swap_on_a_host_loses_nothing_on_host_gw_in_ipv4() {
    swap(
        Network { store: Store::Etcd, plane: Plane::HostGw, families: Families::V4, filter: Filter::Nftables },
        Program::Ours,
    );
}

#[test]
fn a_swap_on_a_host_loses_nothing_on_host_gw_in_both_families() {
    swap(
        Network { store: Store::Etcd, plane: Plane::HostGw, families: Families::Dual, filter: Filter::Iptables },
        Program::Go,
    );
}

#[test]
fn a_swap_on_a_host_of_a_kubernetes_cluster_loses_nothing_on_vxlan_in_ipv4() {
    let families = Families::V4;
    swap(Network { store: Store::Kubernetes, plane: Plane::Vxlan, families, filter: Filter::Iptables }, Program::Go);
}

#[test]
fn a_swap_on_a_host_of_a_kubernetes_cluster_loses_nothing_on_host_gw_in_both_families() {
    let families = Families::Dual;
    swap(Network { store: Store::Kubernetes, plane: Plane::HostGw, families, filter: Filter::Nftables }, Program::Ours);
}

/// Go flannel, ours, Go flannel on node 1 while packets flow to and from it.
fn swap(network: Network, peer: Program) {
    let mut cluster = Cluster::new(2, network);
    cluster.start(1, Program::Go);
    cluster.start(2, peer);
    cluster.attach(1);
    cluster.attach(2);
    cluster.all_reach_all();
    let (first, lease, env) = (cluster.state(1), cluster.lease(1), cluster.env(1));
    let same_lease = |cluster: &Cluster| {
        let held = cluster.lease(1);
        assert_eq!((&held.key, held.subnets, &held.attrs), (&lease.key, lease.subnets, &lease.attrs));
    };
    let ways = network.families().flat_map(|family| [(1, 2, family), (2, 1, family)]);
    let flows: Vec<_> = ways.map(|(from, to, family)| cluster.flow(from, to, family)).collect();

    // What flannel's rules do not accept is dropped: a moment without them would cost packets.
    cluster.set_forward_policy(1, "DROP");
    cluster.run_on(&flows);
    cluster.swap(1, Program::Ours);
    cluster.run_on(&flows);
    // Go flannel empties its chains when it starts.
    cluster.set_forward_policy(1, "ACCEPT");
    let ours = cluster.state(1);
    same_lease(&cluster);
    assert_eq!(cluster.env(1), cluster.our_env(&env));

    cluster.swap(1, Program::Go);
    cluster.until(1, "as Go flannel made it", |state| cluster.without_marks(state) == first);
    cluster.run_on(&flows);
    same_lease(&cluster);
    assert_eq!(cluster.env(1), env);
    for flow in flows {
        let report = flow.stop().unwrap();
        assert_eq!((report.lost, report.refused), (0, 0), "{report:?}");
    }

    // Nothing was left of Go flannel: the kernel held what a first start makes.
    cluster.stop(1);
    cluster.wipe(1);
    cluster.start(1, Program::Ours);
    assert_eq!(cluster.state(1), ours, "{}", cluster.log(1));
}

#[test]
fn what_go_flannel_kept_of_a_node_that_left_goes_on_vxlan_and_is_reported_on_host_gw() {
    for (plane, filter) in [(Plane::Vxlan, Filter::Nftables), (Plane::HostGw, Filter::Iptables)] {
        let mut cluster = Cluster::new(3, Network { store: Store::Etcd, plane, families: Families::V4, filter });
        for (nth, program) in [(1, Program::Go), (2, Program::Ours), (3, Program::Ours)] {
            cluster.start(nth, program);
        }
        cluster.attach(1);
        cluster.attach(2);
        let left = cluster.lease(3).subnets.v4.unwrap();
        cluster.until(1, "told of the third node", |state| names(state, left));
        cluster.stop(1);
        cluster.stop(3);
        cluster.end_lease(3);

        cluster.start(1, Program::Ours);
        cluster.all_reach_all();
        let command = format!("ip route delete {left} via 10.89.0.13 dev eth0");
        if plane == Plane::Vxlan {
            cluster.until(1, "rid of the node that left", |state| !names(state, left));
        } else {
            // It may be anybody's: so it stays, and is shown with the remedy.
            assert!(names(&cluster.state(1), left), "{:#?}", cluster.state(1));
            let doctor = cluster.doctor(1);
            assert!(doctor.contains("WARNING  routes") && doctor.contains(&command), "{doctor}");
            let words: Vec<_> = command.split(' ').collect();
            assert_eq!(cluster.site.tool(1, &words).code, Some(0));
        }
        let doctor = cluster.doctor(1);
        assert!(doctor.contains("ok       routes"), "{doctor}");
    }
}

/// Whether there is a route to a subnet.
fn names(state: &[String], subnet: flannel_core::net::Prefix) -> bool {
    state.iter().any(|line| line.starts_with(&format!("route {subnet} ")))
}
