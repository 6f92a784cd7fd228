//! What can go wrong with the UDP backend alone: its port, its device, its driver.

use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use flannel_backend_udp::path::{OpenMode, Tun};
use flannel_core::kernel::{Device, Kernel, KernelError, LinkKind, LinkName, LinkPart, Object, Tun as TunKind};
use flannel_core::net::Family;
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::Phase;
use testkit::sabotage::Plane;
use testkit::{Families, UNDERLAY_LINK, probe};

use crate::support::{Cluster, PATIENCE, config_with, parse};

const DEVICE: &str = "flannel0";

#[test]
fn a_port_that_another_program_has_is_named_and_taken_once_it_is_free() {
    let mut cluster = Cluster::start(2, Plane::Udp, Families::V4);
    cluster.stop(0).unwrap();
    let addr = cluster.node(0).v4().unwrap();
    // A command that is being started may still hold the agent's socket.
    drop(testkit::hold_commands());
    let mut other = None;
    let bound = testkit::wait_until("the port", PATIENCE, || {
        other = cluster.ns(0).run(|| UdpSocket::bind((addr, 8285)))?.ok();
        Ok(other.is_some())
    });
    bound.unwrap();
    cluster.agents[0] = cluster.agent(0).start();
    let is_tunnel = |object: &Object| matches!(object, Object::LinkPart(_, LinkPart::Tunnel));
    let status = cluster.until(0, "refused", |status| status.refused.keys().any(is_tunnel));
    let refusal = status.refused.iter().find(|(object, _)| is_tunnel(object)).unwrap().1;
    let text = refusal.error.to_string();
    assert!(text.contains("in use") && text.contains("10.89.0.11:8285"), "{text}");
    assert_ne!(status.phase, Phase::Ready);
    // The routes are there all the same: packets are dropped, and leave by no other way.
    let way = cluster.ns(0).ip("-o route get 10.244.99.9").unwrap();
    assert!(way.contains(DEVICE), "{way}");
    drop(other);
    cluster.ready(0);
    cluster.settle();
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
}

#[test]
fn a_device_that_another_program_has_under_our_name_is_left_alone_until_it_goes() {
    let mut cluster = Cluster::without_agents(2, Plane::Udp, Families::V4);
    let theirs = cluster.ns(0).run(|| Tun::open(DEVICE, OpenMode::Create, 1)).unwrap().unwrap();
    let index = cluster.ns(0).index_of(DEVICE).unwrap();
    cluster.agents.push(cluster.agent(0).start());
    let status = cluster.until(0, "in conflict", |status| !status.conflicts.is_empty());
    assert!(status.conflicts[0].found.contains("link flannel0 (tun"), "{:?}", status.conflicts);
    let link = cluster.ns(0).link(DEVICE).unwrap();
    assert_eq!((link.index, link.group, link.alias, link.mtu), (index, 0, None, 1500));
    drop(theirs);
    cluster.ready(0);
    assert_ne!(cluster.ns(0).index_of(DEVICE).unwrap(), index);
    cluster.assert_converged(0);
}

#[test]
fn a_device_for_one_queue_is_made_anew_for_several_and_traffic_goes_on() {
    let families = Families::Dual;
    let mut cluster = Cluster::start(2, Plane::Udp, families);
    let before = cluster.ns(0).index_of(DEVICE).unwrap();
    cluster.stop(0).unwrap();
    cluster.store.set_config(parse(&config_with(families, r#"{"Type":"udp","Queues":3}"#)));
    cluster.restart(0);
    cluster.settle();
    assert_ne!(cluster.ns(0).index_of(DEVICE).unwrap(), before);
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
    // The same again is the same device.
    let made = cluster.ns(0).index_of(DEVICE).unwrap();
    cluster.crash(0);
    cluster.restart(0);
    cluster.settle();
    assert_eq!(cluster.ns(0).index_of(DEVICE).unwrap(), made);
    cluster.assert_traffic(0, 1);
}

#[test]
fn a_path_that_carries_less_than_the_link_is_in_the_status() {
    let mut cluster = Cluster::start(2, Plane::Udp, Families::V4);
    (0..2).for_each(|nth| cluster.attach_pod(nth));
    assert_eq!(*cluster.status(0).limitations, []);
    let peer = cluster.node(1).v4().unwrap();
    cluster.ns(0).ip(&format!("route add {peer}/32 dev {UNDERLAY_LINK} mtu 1300")).unwrap();
    let to = cluster.pods[1].addr(Family::V4).unwrap();
    probe::throughput(&cluster.pods[0].ns, &cluster.pods[1].ns, to, Duration::from_millis(200)).unwrap();
    let status = cluster.until(0, "limited", |status| !status.limitations.is_empty());
    let (device, limitation) = &status.limitations[0];
    assert_eq!((device.as_str(), limitation.what.as_str()), (DEVICE, &*format!("path to {peer}:8285")));
    assert!(status.phase == Phase::Ready && limitation.cause.contains("MTU"), "{status:?}");
}

#[test]
fn without_a_data_plane_such_a_device_is_an_error_with_its_remedy() {
    let cluster = Cluster::without_agents(1, Plane::Udp, Families::V4);
    let namespace: OwnedFd = cluster.ns(0).as_fd().try_clone_to_owned().unwrap();
    let kernel = NetlinkKernel::in_namespace(namespace).unwrap();
    let kind = LinkKind::Tun(TunKind::new(false));
    let device = Device::new(LinkName::new(DEVICE).unwrap(), kind);
    let error = cluster.block_on(kernel.probe(&[device])).unwrap_err();
    let KernelError::Unsupported { hint, .. } = &error else { panic!("{error}") };
    assert!(hint.contains("with_data_plane"), "{hint}");
    assert!(cluster.ns(0).routes(Family::V4).is_ok());
}
