//! Shared by the tests of the store: a real etcd, nodes, and waiting.
#![allow(dead_code, reason = "each test program uses what it needs")]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use etcd_client::{Client, GetOptions};
use flannel_core::lease::{Json, Lease, LeaseAttrs, Scalar};
use flannel_core::net::{Dual, Prefix};
use flannel_core::subnet::{NodeIdentity, SubnetManager, Want};
use flannel_core::testing::store_contract::Watcher;
pub(crate) use flannel_core::text::chain;
use flannel_subnet_etcd::{Config, EtcdSubnets};
use testkit::etcd::{Etcd, Options, Version};

pub(crate) const BASE: &str = "/coreos.com/network";
pub(crate) const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// Starts one member with a network of 255 subnets.
pub(crate) async fn single(version: Version) -> (Etcd, EtcdSubnets) {
    let etcd = Etcd::start(Options::single(version)).unwrap_or_else(|error| panic!("{error}"));
    let store = open(&etcd);
    store.put_config_json(CONFIG).await.unwrap();
    (etcd, store)
}

pub(crate) fn open(etcd: &Etcd) -> EtcdSubnets {
    EtcdSubnets::new(Config::new(etcd.endpoints())).unwrap()
}

/// Returns a separate client, to act as operators and other programs.
pub(crate) async fn raw(etcd: &Etcd) -> Client {
    Client::connect(etcd.endpoints(), None).await.unwrap()
}

#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) id: NodeIdentity,
    pub(crate) attrs: LeaseAttrs,
}

pub(crate) fn node(n: u16) -> Node {
    let [high, low] = n.to_be_bytes();
    let addr = Ipv4Addr::new(192, 168, high, low).into();
    let data = Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text("c6:d2:32:6f:8f:44"))]);
    let attrs = LeaseAttrs::new(Dual { v4: Some(addr), v6: None });
    let attrs = attrs.with_backend("vxlan", Dual { v4: Some(data), v6: None });
    Node { id: NodeIdentity::of_address(addr), attrs }
}

impl Node {
    pub(crate) fn want(&self) -> Want {
        Want::new(self.attrs.clone())
    }

    pub(crate) fn preferring(&self, subnet: &str) -> Want {
        self.want().preferring(v4(subnet))
    }

    pub(crate) async fn acquire(&self, store: &EtcdSubnets) -> Lease {
        store.acquire(&self.id, self.want()).await.unwrap_or_else(|error| panic!("{}", chain(&error)))
    }
}

pub(crate) fn v4(subnet: &str) -> Dual<Prefix> {
    Dual { v4: Some(subnet.parse().unwrap()), v6: None }
}

/// Returns everything under the prefix, with each key's etcd lease.
pub(crate) async fn dump(client: &mut Client) -> BTreeMap<String, (String, i64)> {
    let response = client.get(BASE, Some(GetOptions::new().with_prefix())).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    response.kvs().iter().map(|kv| (text(kv.key()), (text(kv.value()), kv.lease()))).collect()
}

pub(crate) async fn leases(client: &mut Client) -> usize {
    client.leases().await.unwrap().leases().len()
}

pub(crate) async fn watch(store: &EtcdSubnets) -> Watcher {
    Watcher::open(store, 20).await
}

/// Waits for an event: then the watch is established, not only the listing done.
pub(crate) async fn established(watcher: &mut Watcher, store: &EtcdSubnets) {
    let lease = node(999).acquire(store).await;
    watcher.until(20, "a first event", |watcher| watcher.good(&lease.key).is_some()).await;
}

/// Returns an established watch through one handle, confirmed by a lease through another.
pub(crate) async fn watching(through: &EtcdSubnets, store: &EtcdSubnets) -> Watcher {
    let mut watcher = watch(through).await;
    established(&mut watcher, store).await;
    watcher
}
