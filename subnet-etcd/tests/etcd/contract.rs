//! The store contract, with both versions of etcd.

use std::sync::Arc;

use crate::common;
use async_trait::async_trait;
use etcd_client::Client;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::LeaseKey;
use flannel_core::subnet::SubnetManager;
use flannel_core::testing::store_contract::{self, Harness, Outage};
use flannel_subnet_etcd::{Config, EtcdSubnets, KeyPrefix};
use testkit::etcd::{Etcd, Options, Version};

struct Backing {
    etcd: Etcd,
    client: Client,
    count: u32,
}

impl Backing {
    async fn start(version: Version, members: usize) -> Self {
        let options = Options { members, ..Options::single(version) };
        let etcd = Etcd::start(options).unwrap_or_else(|error| panic!("{error}"));
        let client = common::raw(&etcd).await;
        Self { etcd, client, count: 0 }
    }

    fn store(&self) -> EtcdSubnets {
        let prefix = KeyPrefix::new(&format!("/test/{}", self.count)).unwrap();
        EtcdSubnets::new(Config::new(self.etcd.endpoints()).with_prefix(prefix)).unwrap()
    }

    fn key(&self, key: &LeaseKey) -> String {
        format!("/test/{}/subnets/{key}", self.count)
    }
}

#[async_trait]
impl Harness for Backing {
    async fn fresh(&mut self, config: &NetworkConfig) {
        self.count += 1;
        self.put_config(config).await;
    }

    async fn open(&self) -> Arc<dyn SubnetManager> {
        Arc::new(self.store())
    }

    async fn put_config(&self, config: &NetworkConfig) {
        self.store().put_config(config).await.unwrap();
    }

    async fn delete(&self, key: &LeaseKey) {
        self.client.clone().delete(self.key(key), None).await.unwrap();
    }

    async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
        self.client.clone().put(self.key(key), "{\"PublicIP\":", None).await.unwrap();
        true
    }

    async fn expire(&self, key: &LeaseKey) -> bool {
        let mut client = self.client.clone();
        let response = client.get(self.key(key), None).await.unwrap();
        client.lease_revoke(response.kvs()[0].lease()).await.unwrap();
        true
    }

    fn is_by_address(&self) -> bool {
        true
    }

    async fn outage(&mut self, outage: Outage) -> bool {
        match outage {
            Outage::Begins => (0..self.etcd.endpoints().len()).for_each(|n| self.etcd.kill(n)),
            Outage::Ends => self.etcd.restart_all().unwrap(),
        }
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_debians_etcd() {
    store_contract::all(&mut Backing::start(Version::Debian, 1).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_a_current_etcd() {
    store_contract::all(&mut Backing::start(Version::Current, 1).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_three_members() {
    store_contract::all(&mut Backing::start(Version::Current, 3).await).await;
}
