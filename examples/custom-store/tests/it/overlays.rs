//! Two overlays in one process, on in-memory kernels, with a hub that stops and restarts.

use std::sync::Arc;
use std::time::Duration;

use custom_store::{Hub, Server};
use flannelkit::net::{Family, Prefix};
use flannelkit::spi::subnet::NodeIdentity;
use flannelkit::testing::FakeKernel;
use flannelkit::testing::fake_kernel::{FakeRoute, Placement};
use flannelkit::vxlan::Vxlan;
use flannelkit::{Contact, Overlay, Running, Status, Teardown};

use crate::fleet::Fleet;

const NETWORK: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

struct Node {
    kernel: FakeKernel,
    running: Running,
}

impl Node {
    fn start(fleet: &Fleet, n: u8) -> Self {
        let kernel = FakeKernel::new();
        let eth0 = kernel.add_uplink("eth0", format!("192.0.2.{n}/24").parse().unwrap()).unwrap();
        let default = FakeRoute::via("0.0.0.0/0".parse().unwrap(), "192.0.2.254".parse().unwrap(), eth0);
        kernel.add_route(default, Placement::Exclusive).unwrap();
        let hub = Hub::new(fleet.addr, NodeIdentity::new(&format!("node-{n}")).unwrap());
        let overlay = Overlay::builder().backend("vxlan", Vxlan::new);
        let overlay = overlay.build(Arc::new(hub), Arc::new(kernel.clone())).unwrap();
        Self { kernel, running: overlay.spawn().unwrap() }
    }

    async fn until(&self, what: &str, reached: impl Fn(&Status) -> bool) -> Arc<Status> {
        let handle = self.running.handle();
        match tokio::time::timeout(Duration::from_secs(30), handle.wait_for(|status| reached(status))).await {
            Ok(status) => status.unwrap(),
            Err(_) => panic!("never {what}: {:?}", handle.status()),
        }
    }

    /// Waits until the kernel is as the overlay needs it: a peer is counted before it is programmed.
    async fn until_settled(&self) {
        let handle = self.running.handle();
        let settled = async {
            while !handle.plan().await.unwrap().is_settled() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), settled).await.unwrap();
    }
}

fn subnet(status: &Status) -> Option<Prefix> {
    status.lease.as_ref()?.subnets.get(Family::V4).copied()
}

fn is_connected(status: &Status) -> bool {
    status.is_ready() && status.peers.accepted == 1 && status.store == Contact::Live
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_overlays_connect_and_survive_restarts_of_the_hub() {
    let mut fleet = Fleet::new().await;
    fleet.curl("PUT", "/v1/config", NETWORK.to_owned()).await.unwrap();
    let [one, two] = [1, 2].map(|n| Node::start(&fleet, n));
    let mut subnets = Vec::new();
    for node in [&one, &two] {
        subnets.push(subnet(&*node.until("connected", is_connected).await).unwrap());
        node.until_settled().await;
    }
    assert_ne!(subnets[0], subnets[1]);
    let programmed = [&one, &two].map(|node| node.kernel.snapshot());
    let are_as_programmed = || [&one, &two].map(|node| node.kernel.snapshot()) == programmed;

    // The hub is unreachable: the status reports it, and the nodes stay ready.
    fleet.stop().await;
    for node in [&one, &two] {
        let status = node.until("without the hub", |status| matches!(status.store, Contact::Lost { .. })).await;
        assert!(status.is_ready() && status.peers.accepted == 1, "{status:?}");
    }
    fleet.start().await;
    for node in [&one, &two] {
        node.until("connected again", is_connected).await;
    }
    assert!(are_as_programmed());

    // A new hub refuses watches until it has a configuration. The nodes then acquire their former subnets.
    fleet.stop().await;
    fleet.server = Server::default();
    fleet.start().await;
    for node in [&one, &two] {
        let says = |error: &str| error.contains("no network configuration");
        let lost = |status: &Status| matches!(&status.store, Contact::Lost { error, .. } if says(error));
        let status = node.until("told that the new hub has no configuration", lost).await;
        assert!(status.is_ready() && status.peers.accepted == 1, "{status:?}");
    }
    assert!(are_as_programmed());
    fleet.curl("PUT", "/v1/config", NETWORK.to_owned()).await.unwrap();
    for (node, had) in [&one, &two].into_iter().zip(&subnets) {
        node.until("connected to the new hub", |status| is_connected(status) && subnet(status) == Some(*had)).await;
    }

    // The watches are live: a node that leaves disappears from the other's peers.
    two.running.shutdown(Teardown::Remove).await.unwrap();
    one.until("alone", |status| status.peers.accepted == 0).await;
    fleet.curl("GET", "/v1/leases/node-1", String::new()).await.unwrap();
    fleet.curl("GET", "/v1/leases/node-2", String::new()).await.unwrap_err();
    one.running.shutdown(Teardown::Remove).await.unwrap();
}
