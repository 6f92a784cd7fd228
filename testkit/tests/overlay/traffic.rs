//! Pods talk, in packets as large as they are told.

use std::net::UdpSocket;
use std::time::Duration;

use flannel_core::net::{Family, Mtu};
use testkit::sabotage::Plane;
use testkit::{Families, Pod, cases};

use crate::support::{Cluster, PATIENCE, families_of, pod_mtu};

cases! {
    fn pods_of_every_pair_of_nodes_talk_over_vxlan_in_ipv4() = every_pair_talks(Plane::Vxlan, Families::V4);
    fn pods_of_every_pair_of_nodes_talk_over_vxlan_in_ipv6() = every_pair_talks(Plane::Vxlan, Families::V6);
    fn pods_of_every_pair_of_nodes_talk_over_vxlan_in_both_families() = every_pair_talks(Plane::Vxlan, Families::Dual);
    fn pods_of_every_pair_of_nodes_talk_over_host_gw_in_ipv4() = every_pair_talks(Plane::HostGw, Families::V4);
    fn pods_of_every_pair_of_nodes_talk_over_host_gw_in_ipv6() = every_pair_talks(Plane::HostGw, Families::V6);
    fn pods_of_every_pair_of_nodes_talk_over_host_gw_in_both_families() =
        every_pair_talks(Plane::HostGw, Families::Dual);
    fn pods_of_every_pair_of_nodes_talk_over_udp_in_ipv4() = every_pair_talks(Plane::Udp, Families::V4);
    fn pods_of_every_pair_of_nodes_talk_over_udp_in_ipv6() = every_pair_talks(Plane::Udp, Families::V6);
    fn pods_of_every_pair_of_nodes_talk_over_udp_in_both_families() = every_pair_talks(Plane::Udp, Families::Dual);
}

fn every_pair_talks(plane: Plane, families: Families) {
    let cluster = Cluster::start(3, plane, families);
    for (from, to) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
        cluster.assert_traffic(from, to);
    }
    let mtu = pod_mtu(plane, families);
    assert_eq!(cluster.status(0).mtu, Some(mtu));
    for family in families_of(families) {
        let passes = passes_whole(&cluster.pods[0], &cluster.pods[1], family, mtu, PATIENCE);
        assert!(passes, "{family}: {mtu} bytes do not pass");
    }
    // With pods that may send more, the node says no. The IPv4 device of a dual-stack node takes 20 bytes more than
    // its pods are told, which have one MTU for both families.
    for (link, ns) in [("eth0", &cluster.pods[0].ns), ("veth0", cluster.ns(0)), ("cni0", cluster.ns(0))] {
        ns.set_mtu(link, mtu.0 + 1).unwrap();
    }
    let tight = families_of(families).last().unwrap();
    let more = Mtu(mtu.0 + 1);
    let passes = passes_whole(&cluster.pods[0], &cluster.pods[1], tight, more, Duration::from_millis(300));
    assert!(!passes, "{tight}: {more} bytes pass");
}

/// Whether a packet of this size, headers included, arrives in this time without being fragmented on the way: Linux
/// sets DF on a datagram that fits the link.
fn passes_whole(from: &Pod, to: &Pod, family: Family, size: Mtu, patience: Duration) -> bool {
    let addr = to.addr(family).unwrap();
    let inbox = to.ns.run(|| UdpSocket::bind((addr, 0))).unwrap().unwrap();
    inbox.set_read_timeout(Some(patience)).unwrap();
    let outbox = from.ns.run(|| UdpSocket::bind((from.addr(family).unwrap(), 0))).unwrap().unwrap();
    let headers = match family {
        Family::V4 => 28,
        Family::V6 => 48,
    };
    let payload = vec![7; usize::try_from(size.0).unwrap() - headers];
    let mut buffer = vec![0; 2000];
    outbox.send_to(&payload, inbox.local_addr().unwrap()).is_ok()
        && inbox.recv(&mut buffer).is_ok_and(|len| len == payload.len())
}
