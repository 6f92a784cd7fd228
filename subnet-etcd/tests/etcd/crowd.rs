//! Hundreds of nodes that join at the same time.

use std::collections::BTreeSet;

use flannel_core::testing::store_contract::Watcher;
use futures_util::StreamExt;
use testkit::etcd::Version;

use crate::common::{leases, node, open, raw, single, watch};

const NODES: u16 = 400;
/// How many of them run at a time.
const AT_ONCE: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_nodes_that_join_have_a_subnet_each_by_one_write_each_and_every_watch_shows_them() {
    let (etcd, store) = single(Version::Current).await;
    store.put_config_json(r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#).await.unwrap();
    let mut watchers = [watch(&open(&etcd)).await, watch(&open(&etcd)).await];
    let mut client = raw(&etcd).await;
    let before = client.get("x", None).await.unwrap().header().unwrap().revision();
    let taken: Vec<_> = futures_util::stream::iter(0..NODES)
        .map(|n| {
            let store = store.clone();
            async move { node(n).acquire(&store).await }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let after = client.get("x", None).await.unwrap().header().unwrap().revision();
    let subnets: BTreeSet<_> = taken.iter().map(|lease| lease.subnets.v4.unwrap()).collect();
    assert_eq!(subnets.len(), usize::from(NODES));
    assert_eq!((after - before, leases(&mut client).await), (i64::from(NODES), usize::from(NODES)));
    for watcher in &mut watchers {
        let all = |watcher: &Watcher| taken.iter().all(|lease| watcher.good(&lease.key).is_some());
        watcher.until(20, "all of them", all).await;
        assert_eq!((watcher.resets, watcher.seen.len()), (1, usize::from(NODES)));
    }
}
