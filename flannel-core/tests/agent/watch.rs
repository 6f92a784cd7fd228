//! The watch of the leases, as stores should not behave.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flannel_core::lease::LeaseEvent;
use flannel_core::overlay::Contact;
use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_core::testing::StoreDouble;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::node::{Node, pass, subnet};

pub(crate) type Watch = BoxStream<'static, Result<LeaseEvent, SubnetError>>;

/// A store whose watches are changed on their way.
#[derive(Clone)]
pub(crate) struct Watched<S> {
    store: S,
    change: fn(Watch) -> Watch,
    watches: Arc<AtomicUsize>,
}

impl<S: Clone> Watched<S> {
    pub(crate) fn new(store: &S, change: fn(Watch) -> Watch) -> Self {
        Self { store: store.clone(), change, watches: Arc::default() }
    }
}

impl<S: SubnetManager> StoreDouble for Watched<S> {
    type Store = S;

    fn store(&self) -> &S {
        &self.store
    }

    fn watch_with(&self) -> Watch {
        self.watches.fetch_add(1, Ordering::Relaxed);
        (self.change)(self.store.watch())
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_is_opened_again() {
    let node = Node::alone();
    let agent = node.run_over(&Watched::new(&node.store, |watch| watch.take(2).boxed())).once_ready().await;
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
    let store = Watched::new(&node.store, |watch| watch.take(0).boxed());
    let agent = node.run_over(&store);
    pass(60.0).await;
    let watches = store.watches.load(Ordering::Relaxed);
    assert!((10..=20).contains(&watches), "{watches}");
    agent.cancelled().await.unwrap();
}
