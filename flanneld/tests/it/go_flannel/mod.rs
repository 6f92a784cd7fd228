//! Beside the real Go flannel: in one cluster with it, and each in the other's place.

mod cluster;
mod wire;

use flannel_core::lease::Lease;
use flannel_core::net::Family;
use testkit::{Families, cases};

use cluster::{Cluster, Filter, Network, Plane, Program, Store};

use crate::store::assert_no_loss;

cases! {
    fn nodes_of_both_programs_share_vxlan_in_ipv4() = share(Store::Etcd, Plane::Vxlan, Families::V4, Filter::Nftables);
    fn nodes_of_both_programs_share_vxlan_in_both_families() = share(Store::Etcd, Plane::Vxlan, Families::Dual, Filter::Iptables);
    fn nodes_of_both_programs_share_host_gw_in_ipv4() = share(Store::Etcd, Plane::HostGw, Families::V4, Filter::Iptables);
    fn nodes_of_both_programs_share_host_gw_in_both_families() =
        share(Store::Etcd, Plane::HostGw, Families::Dual, Filter::Nftables);
    fn nodes_of_both_programs_share_udp() = share(Store::Etcd, Plane::Udp, Families::V4, Filter::Nftables);
    fn nodes_of_both_programs_share_a_kubernetes_cluster_over_udp() =
        share(Store::Kubernetes, Plane::Udp, Families::V4, Filter::Iptables);
    fn nodes_of_both_programs_share_a_kubernetes_cluster_over_vxlan_in_ipv4() =
        share(Store::Kubernetes, Plane::Vxlan, Families::V4, Filter::Iptables);
    fn nodes_of_both_programs_share_a_kubernetes_cluster_over_vxlan_in_both_families() =
        share(Store::Kubernetes, Plane::Vxlan, Families::Dual, Filter::Nftables);
    fn nodes_of_both_programs_share_a_kubernetes_cluster_over_host_gw_in_ipv4() =
        share(Store::Kubernetes, Plane::HostGw, Families::V4, Filter::Iptables);
    fn nodes_of_both_programs_share_a_kubernetes_cluster_over_host_gw_in_both_families() =
        share(Store::Kubernetes, Plane::HostGw, Families::Dual, Filter::Nftables);
}

/// Every pod reaches every pod, and what one program says in the store the other follows: joins, leaves, and a node
/// that comes back with the other program.
fn share(store: Store, plane: Plane, families: Families, filter: Filter) {
    let mut cluster = Cluster::new(3, Network { store, plane, families, filter });
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
        cluster.until(nth, "rid of the node that left", |state| !names(state, &of_third));
    }

    cluster.start(3, Program::Ours);
    cluster.attach(3);
    cluster.all_reach_all();
    assert_eq!(cluster.leases().len(), 3);
}

cases! {
    fn a_swap_on_a_host_loses_nothing_on_vxlan_in_ipv4() =
        swap(Store::Etcd, Plane::Vxlan, Families::V4, Filter::Iptables, Program::Go);
    fn a_swap_on_a_host_loses_nothing_on_vxlan_in_both_families() =
        swap(Store::Etcd, Plane::Vxlan, Families::Dual, Filter::Nftables, Program::Ours);
    fn a_swap_on_a_host_loses_nothing_on_host_gw_in_ipv4() =
        swap(Store::Etcd, Plane::HostGw, Families::V4, Filter::Nftables, Program::Ours);
    fn a_swap_on_a_host_loses_nothing_on_host_gw_in_both_families() =
        swap(Store::Etcd, Plane::HostGw, Families::Dual, Filter::Iptables, Program::Go);
    fn a_swap_on_a_host_of_a_kubernetes_cluster_loses_nothing_on_vxlan_in_ipv4() =
        swap(Store::Kubernetes, Plane::Vxlan, Families::V4, Filter::Iptables, Program::Go);
    fn a_swap_on_a_host_of_a_kubernetes_cluster_loses_nothing_on_vxlan_in_both_families() =
        swap(Store::Kubernetes, Plane::Vxlan, Families::Dual, Filter::Nftables, Program::Ours);
    fn a_swap_on_a_host_of_a_kubernetes_cluster_loses_nothing_on_host_gw_in_ipv4() =
        swap(Store::Kubernetes, Plane::HostGw, Families::V4, Filter::Iptables, Program::Go);
    fn a_swap_on_a_host_of_a_kubernetes_cluster_loses_nothing_on_host_gw_in_both_families() =
        swap(Store::Kubernetes, Plane::HostGw, Families::Dual, Filter::Nftables, Program::Ours);
}

/// Go flannel, ours, Go flannel on node 1 while packets flow to and from it.
fn swap(store: Store, plane: Plane, families: Families, filter: Filter, peer: Program) {
    let network = Network { store, plane, families, filter };
    let mut cluster = Cluster::connected(network, [Program::Go, peer]);
    let (first, lease, env) = (cluster.state(1), cluster.lease(1), cluster.env(1));
    let devices = |cluster: &Cluster| ["flannel.1", "flannel-v6.1"].map(|name| cluster.site.ns(1).index_of(name).ok());
    let made = devices(&cluster);
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
    assert_eq!(devices(&cluster), made, "the devices are the same ones");
    assert_eq!(cluster.env(1), cluster.our_env(&env));

    cluster.swap(1, Program::Go);
    cluster.until(1, "as Go flannel made it", |state| cluster.without_marks(state) == first);
    cluster.run_on(&flows);
    same_lease(&cluster);
    assert_eq!(cluster.env(1), env);
    for flow in flows {
        assert_no_loss(flow);
    }

    // Nothing was left of Go flannel: the kernel held what a first start makes.
    cluster.stop(1);
    cluster.wipe(1);
    cluster.start(1, Program::Ours);
    assert_eq!(cluster.state(1), ours, "{}", cluster.log(1));
}

#[test]
fn cleanup_spares_a_go_flannel_that_runs_and_names_what_it_leaves_of_one_that_does_not() {
    let network = Network { store: Store::Etcd, plane: Plane::Vxlan, families: Families::V4, filter: Filter::Iptables };
    let mut cluster = Cluster::new(1, network);
    cluster.start(1, Program::Go);
    let (state, lease) = (cluster.state(1), cluster.lease(1));
    for words in [&["cleanup"][..], &["cleanup", "-dry-run"]] {
        let refused = cluster.run(1, words);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.err.contains("go-flanneld") && refused.err.contains("stop it first (-force"), "{refused:?}");
    }
    assert_eq!((cluster.state(1), cluster.lease(1)), (state, lease));
    cluster.stop(1);
    // Our agent never ran here: nothing but the lease is known to be this overlay's.
    let cleaned = cluster.run(1, &["cleanup"]);
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    assert!(cleaned.out.contains("may belong to another program: ip link delete flannel.1\n"), "{cleaned:?}");
    assert!(cluster.site.ns(1).link("flannel.1").is_ok() && cluster.leases().is_empty());

    cluster.start(1, Program::Go);
    assert_eq!(cluster.run(1, &["cleanup", "-force"]).code, Some(0));
    assert!(cluster.leases().is_empty());
}

/// The commands of the walk-through in docs/operations.md, as they are there.
#[test]
fn an_upgrade_goes_as_the_documentation_says() {
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md")).unwrap();
    let section = docs.split("## Upgrade from Go flannel, and back").nth(1).unwrap();
    let steps: Vec<_> = section.split("```").nth(1).unwrap().lines().skip(1).map(str::trim).collect();
    let network = Network { store: Store::Etcd, plane: Plane::Vxlan, families: Families::V4, filter: Filter::Iptables };
    let mut cluster = Cluster::connected(network, [Program::Go, Program::Go]);
    let lease = cluster.lease(1);
    let flows = [(1, 2), (2, 1)].map(|(from, to)| cluster.flow(from, to, Family::V4));
    let mut commands = 0;
    for step in steps {
        let command = step.split('#').next().unwrap_or_default().trim();
        cluster.run_on(&flows);
        match command.split(' ').collect::<Vec<_>>()[..] {
            ["systemctl", "stop", ..] => cluster.stop(1),
            ["systemctl", "start", "flanneld"] => cluster.start(1, Program::Ours),
            ["systemctl", "start", "go-flannel"] => cluster.start(1, Program::Go),
            ["flanneld", ref words @ ..] => {
                let told = cluster.run(1, words);
                assert_eq!(told.code, Some(0), "{command}: {told:?}");
            }
            _ => panic!("a step that this test cannot take: {step:?}"),
        }
        commands += 1;
    }
    assert!(commands > 6, "{commands}");
    for flow in flows {
        assert_no_loss(flow);
    }
    assert_eq!((cluster.lease(1).key, cluster.lease(1).subnets), (lease.key, lease.subnets));
}

/// Go flannel's device goes with it, so packets are lost in between; the lease is not, and either program works where the
/// other one was.
#[test]
fn a_swap_on_a_host_goes_on_over_udp() {
    let network = Network { store: Store::Etcd, plane: Plane::Udp, families: Families::V4, filter: Filter::Nftables };
    let mut cluster = Cluster::connected(network, [Program::Go, Program::Go]);
    let (lease, env) = (cluster.lease(1), cluster.env(1));
    for program in [Program::Ours, Program::Go, Program::Ours] {
        cluster.swap(1, program);
        cluster.all_reach_all();
        let held = cluster.lease(1);
        assert_eq!((&held.key, held.subnets, &held.attrs), (&lease.key, lease.subnets, &lease.attrs), "{program:?}");
        assert_eq!(cluster.env(1), env, "{program:?}");
    }
}

#[test]
fn what_go_flannel_kept_of_a_node_that_left_goes_on_vxlan_and_is_reported_on_host_gw() {
    for (plane, families, filter) in
        [(Plane::Vxlan, Families::Dual, Filter::Nftables), (Plane::HostGw, Families::V4, Filter::Iptables)]
    {
        let mut cluster = Cluster::new(3, Network { store: Store::Etcd, plane, families, filter });
        for (nth, program) in [(1, Program::Go), (2, Program::Ours), (3, Program::Ours)] {
            cluster.start(nth, program);
        }
        cluster.attach(1);
        cluster.attach(2);
        let left = cluster.lease(3);
        cluster.until(1, "told of the third node", |state| names(state, &left));
        cluster.stop(1);
        cluster.stop(3);
        cluster.end_lease(3);

        cluster.start(1, Program::Ours);
        cluster.all_reach_all();
        let command = format!("ip route delete {} via 10.89.0.13 dev eth0", left.subnets.v4.unwrap());
        if plane == Plane::Vxlan {
            cluster.until(1, "rid of the node that left", |state| !names(state, &left));
        } else {
            // It may be anybody's: so it stays, and is shown with the remedy.
            assert!(names(&cluster.state(1), &left), "{:#?}", cluster.state(1));
            let doctor = cluster.doctor(1);
            assert!(doctor.contains("WARNING  routes") && doctor.contains(&command), "{doctor}");
            let words: Vec<_> = command.split(' ').collect();
            assert_eq!(cluster.site.tool(1, &words).code, Some(0));
        }
        let doctor = cluster.doctor(1);
        assert!(doctor.contains("ok       routes"), "{doctor}");
    }
}

/// Whether there is a route, a neighbour or a forwarding entry of a node.
fn names(state: &[String], lease: &Lease) -> bool {
    let addresses = lease.attrs.public_ip.iter().map(|(_, addr)| addr.to_string());
    let words: Vec<_> = addresses.chain(lease.subnets.iter().map(|(_, subnet)| subnet.addr().to_string())).collect();
    let of_peers = |line: &&String| ["neighbour", "fdb", "route"].iter().any(|kind| line.starts_with(kind));
    let named = |line: &String| words.iter().any(|word| line.split(' ').any(|part| part.starts_with(word)));
    state.iter().filter(of_peers).any(named)
}
