//! The contract of lease stores, against a hub on loopback.

use std::sync::Arc;

use async_trait::async_trait;
use custom_store::Hub;
use flannelkit::config::NetworkConfig;
use flannelkit::lease::LeaseKey;
use flannelkit::spi::subnet::{NodeIdentity, SubnetManager};
use flannelkit::testing::store_contract::{self, Harness, Outage};
use serde_json::{Value, json};

use crate::fleet::Fleet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract_of_lease_stores() {
    store_contract::all(&mut Fleet::new().await).await;
}

impl Fleet {
    /// Changes a lease without its node.
    async fn edit(&self, key: &LeaseKey, change: impl FnOnce(&mut Value)) {
        let path = format!("/v1/leases/{key}");
        let entry: Value = serde_json::from_str(&self.curl("GET", &path, String::new()).await.unwrap()).unwrap();
        let mut write = json!({ "revision": entry["revision"], "ttl_ms": 60_000, "claim": entry["claim"] });
        change(&mut write);
        self.curl("PUT", &path, write.to_string()).await.unwrap();
    }
}

#[async_trait]
impl Harness for Fleet {
    async fn fresh(&mut self, config: &NetworkConfig) {
        self.stop().await;
        *self = Self::new().await;
        self.put_config(config).await;
    }

    async fn open(&self) -> Arc<dyn SubnetManager> {
        Arc::new(Hub::new(self.addr, NodeIdentity::new("this-node").unwrap()))
    }

    async fn put_config(&self, config: &NetworkConfig) {
        self.curl("PUT", "/v1/config", config.to_json()).await.unwrap();
    }

    async fn delete(&self, key: &LeaseKey) {
        self.curl("DELETE", &format!("/v1/leases/{key}"), String::new()).await.unwrap();
    }

    async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
        self.edit(key, |write| write["claim"]["attrs"] = json!({ "PublicIP": 7 })).await;
        true
    }

    async fn expire(&self, key: &LeaseKey) -> bool {
        self.edit(key, |write| write["ttl_ms"] = json!(1)).await;
        true
    }

    async fn outage(&mut self, outage: Outage) -> bool {
        match outage {
            Outage::Begins => self.stop().await,
            Outage::Ends => self.start().await,
        }
        true
    }
}
