//! Another configuration, and several overlays side by side.

use flannel_core::kernel::{KernelError, OverlayName};
use flannel_core::overlay::{OverlayError, Phase, Teardown};
use flannel_core::testing::MemorySubnets;
use flannel_core::uplink::Select;
use testkit::probe;
use testkit::sabotage::Plane;
use testkit::{Families, VxlanLink};

use crate::support::{Cluster, PATIENCE, config, config_with, parse};

/// Restarts both agents with this configuration.
fn reconfigure(cluster: &mut Cluster, config: &str) {
    cluster.store.set_config(parse(config));
    for nth in 0..2 {
        cluster.stop(nth).unwrap();
    }
    for nth in 0..2 {
        let agent = cluster.agent(nth).start();
        cluster.agents[nth] = agent;
    }
    cluster.ready(0);
    cluster.ready(1);
    cluster.settle();
}

fn vxlan(cluster: &Cluster, name: &str) -> VxlanLink {
    cluster.ns(0).link(name).unwrap().vxlan.unwrap()
}

/// Names of the devices that carry an overlay's mark.
fn marked(cluster: &Cluster) -> Vec<String> {
    let links = cluster.ns(0).links().unwrap().into_iter().filter(|link| link.group == OverlayName::default().mark());
    links.map(|link| link.name).collect()
}

#[test]
fn a_device_of_another_port_or_vni_is_replaced_and_no_old_one_stays() {
    let families = Families::Dual;
    let mut cluster = Cluster::start(2, Plane::Vxlan, families);
    let index = cluster.ns(0).index_of("flannel.1").unwrap();
    reconfigure(&mut cluster, &config_with(families, r#"{"Type":"vxlan","Port":8473}"#));
    assert_eq!(vxlan(&cluster, "flannel.1").port, Some(8473));
    assert_ne!(cluster.ns(0).index_of("flannel.1").unwrap(), index);
    assert_eq!(marked(&cluster).len(), 2);
    cluster.assert_traffic(0, 1);
    reconfigure(&mut cluster, &config_with(families, r#"{"Type":"vxlan","VNI":7}"#));
    assert_eq!(vxlan(&cluster, "flannel.7").vni, 7);
    assert_eq!(vxlan(&cluster, "flannel-v6.7").vni, 7);
    assert_eq!(marked(&cluster).len(), 2, "{:?}", marked(&cluster));
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
}

#[test]
fn a_device_of_another_local_address_is_replaced() {
    let mut cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    let other = "10.89.0.77".parse().unwrap();
    cluster.ns(0).add_address("eth0", other, 16).unwrap();
    cluster.stop(0).unwrap();
    cluster.agents[0] = cluster.agent(0).with(|builder| builder.uplink(Select::Ip(other))).start();
    cluster.ready(0);
    cluster.settle();
    assert_eq!(vxlan(&cluster, "flannel.1").local, Some(other));
    assert_eq!(cluster.lease(0).attrs.public_ip.v4, Some(other));
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
}

#[test]
fn switching_the_backend_and_back_leaves_no_orphan() {
    let families = Families::Dual;
    let mut cluster = Cluster::start(2, Plane::Vxlan, families);
    let before = cluster.objects(0);
    reconfigure(&mut cluster, &config(Plane::HostGw, families));
    cluster.plane = Plane::HostGw;
    assert_eq!(marked(&cluster), Vec::<String>::new());
    assert_eq!(cluster.objects(0).0.len(), 2, "{:#?}", cluster.objects(0));
    cluster.assert_traffic(0, 1);
    reconfigure(&mut cluster, &config(Plane::Udp, families));
    cluster.plane = Plane::Udp;
    assert_eq!(marked(&cluster), ["flannel0"]);
    cluster.assert_traffic(0, 1);
    reconfigure(&mut cluster, &config(Plane::Vxlan, families));
    cluster.plane = Plane::Vxlan;
    assert_eq!(cluster.objects(0), before);
    cluster.assert_traffic(0, 1);
}

#[test]
fn two_overlays_work_side_by_side_and_one_that_clashes_touches_nothing() {
    let mut cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    let network = |prefix: &str, vni: u32| {
        parse(&format!(r#"{{"Network":"{prefix}","SubnetLen":24,"Backend":{{"Type":"vxlan","VNI":{vni}}}}}"#))
    };
    let blue = MemorySubnets::new(network("10.245.0.0/16", 2));
    let name = |text: &str| OverlayName::new(text).unwrap();
    let agents: Vec<_> =
        (0..2).map(|nth| cluster.agent(nth).store(&blue).with(|builder| builder.name(name("blue"))).start()).collect();
    let ready = |agent| cluster.wait(agent, "ready", |it| it.phase == Phase::Ready && it.peers.accepted == 1);
    let leases: Vec<_> = agents.iter().map(|agent| ready(agent).lease.unwrap()).collect();
    for (from, to) in [(0, 1), (1, 0)] {
        cluster.assert_traffic(from, to);
        probe::until_reply(cluster.ns(from), leases[to].subnets.v4.unwrap().addr(), PATIENCE).unwrap();
    }
    cluster.assert_converged(0);

    let seen = |cluster: &Cluster| {
        let ns = cluster.ns(0);
        let links: Vec<_> = ns.links().unwrap().into_iter().map(|link| (link.index, link.name, link.group)).collect();
        (links, cluster.objects(0))
    };
    let before = seen(&cluster);
    for (overlay, prefix) in [("blue", "10.246.0.0/16"), ("green", "10.245.128.0/17"), ("green", "10.240.0.0/12")] {
        let store = MemorySubnets::new(network(prefix, 3));
        let agent = cluster.agent(0).store(&store).with(|builder| builder.name(name(overlay))).start();
        let error = cluster.outcome(agent).unwrap_err();
        assert!(matches!(&error, OverlayError::Kernel(KernelError::Conflict { .. })), "{error:?}");
        assert_eq!(store.records(), []);
        assert_eq!(seen(&cluster), before);
    }
    // The name is free again once its holder has ended.
    cluster.stop(0).unwrap();
    cluster.restart(0);
    assert_eq!(seen(&cluster), before);
    for agent in agents {
        agent.stop(Teardown::Keep);
        cluster.outcome(agent).unwrap();
    }
}
