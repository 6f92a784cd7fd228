//! The watch of the leases, as stores should not behave.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::overlay::Contact;
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use flannel_core::testing::MemorySubnets;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::node::{Node, pass, subnet};

/// A store whose watches end after so many events.
struct Ending {
    store: MemorySubnets,
    events: usize,
    watches: Arc<AtomicUsize>,
}

#[async_trait]
impl SubnetManager for Ending {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        self.store.this_node().await
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.store.network_config().await
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        self.store.previous(node).await
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        self.store.acquire(node, want).await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.store.renew(lease).await
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.store.release(lease).await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        self.watches.fetch_add(1, Ordering::Relaxed);
        self.store.watch().take(self.events).boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_is_opened_again() {
    let node = Node::alone();
    let watches = Arc::new(AtomicUsize::new(0));
    let store = Ending { store: node.store.clone(), events: 2, watches: Arc::clone(&watches) };
    let agent = node.run_on(node.builder(), Arc::new(node.kernel.clone()), Arc::new(store));
    agent.ready().await;
    node.join([1]);
    agent.until(|status| matches!(&status.store, Contact::Lost { error, .. } if error.contains("ended"))).await;
    node.join([2]);
    agent.until(|status| status.peers.accepted == 2 && status.store == Contact::Live).await;
    pass(1.0).await;
    assert!(node.has_route(subnet(2)));
}

#[tokio::test(start_paused = true)]
async fn watches_that_end_at_once_are_opened_ever_later() {
    let node = Node::alone();
    let watches = Arc::new(AtomicUsize::new(0));
    let store = Ending { store: node.store.clone(), events: 0, watches: Arc::clone(&watches) };
    let agent = node.run_on(node.builder(), Arc::new(node.kernel.clone()), Arc::new(store));
    pass(60.0).await;
    let watches = watches.load(Ordering::Relaxed);
    assert!((10..=20).contains(&watches), "{watches}");
    agent.cancelled().await.unwrap();
}
