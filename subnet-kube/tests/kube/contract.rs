//! The store contract, on a real API server with both supported versions of etcd.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::LeaseKey;
use flannel_core::net::{Dual, Prefix};
use flannel_core::subnet::{NodeIdentity, SubnetManager};
use flannel_core::testing::store_contract::{self, Harness, Outage};
use flannel_subnet_kube::{Access, ConfigSource, KubeSubnets, NodeName, Options};
use serde_json::json;
use tempfile::TempDir;
use testkit::etcd::Version;
use testkit::kubernetes::ApiServer;

const THIS_NODE: &str = "this-node";

struct Backing {
    server: ApiServer,
    dir: TempDir,
}

impl Backing {
    async fn start(version: Version) -> Self {
        let server = ApiServer::start(version).await.unwrap_or_else(|error| panic!("{error}"));
        Self { server, dir: TempDir::new().unwrap() }
    }

    fn config_file(&self) -> PathBuf {
        self.dir.path().join("net-conf.json")
    }
}

#[async_trait]
impl Harness for Backing {
    async fn fresh(&mut self, config: &NetworkConfig) {
        self.server.delete("/api/v1/nodes").await.unwrap();
        self.server.create_node(THIS_NODE, &[]).await.unwrap();
        self.put_config(config).await;
    }

    async fn open(&self) -> Arc<dyn SubnetManager> {
        let client = Access::kubeconfig(self.server.admin_kubeconfig().unwrap()).client().await.unwrap();
        let node = NodeName::Named(NodeIdentity::new(THIS_NODE).unwrap());
        Arc::new(KubeSubnets::new(client, Options::new(node, ConfigSource::File(self.config_file()))))
    }

    async fn put_config(&self, config: &NetworkConfig) {
        std::fs::write(self.config_file(), config.to_json()).unwrap();
    }

    async fn delete(&self, key: &LeaseKey) {
        self.server.delete(&format!("/api/v1/nodes/{key}")).await.unwrap();
    }

    async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
        let bad =
            json!({ "flannel.alpha.coreos.com/public-ip": "192.0.2", "flannel.alpha.coreos.com/public-ipv6": "x" });
        self.server.annotate(key.as_str(), bad).await.unwrap();
        true
    }

    /// Leases do not expire.
    async fn expire(&self, _: &LeaseKey) -> bool {
        false
    }

    fn allocates(&self) -> bool {
        false
    }

    /// A Node's podCIDRs never change: other podCIDRs need another Node.
    async fn assign(&self, node: &NodeIdentity, subnets: &Dual<Prefix>) {
        let _ = self.server.delete(&format!("/api/v1/nodes/{node}")).await;
        let cidrs: Vec<_> = subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
        self.server.create_node(node.as_str(), &cidrs).await.unwrap();
    }

    async fn set_public(&self, node: &NodeIdentity, public: Dual<IpAddr>) -> bool {
        let text = |addr: Option<IpAddr>| json!(addr.map(|addr| addr.to_string()));
        let annotations = json!({
            "flannel.alpha.coreos.com/node-public-ip": text(public.v4),
            "flannel.alpha.coreos.com/node-public-ipv6": text(public.v6),
        });
        self.server.annotate(node.as_str(), annotations).await.unwrap();
        true
    }

    /// A Node's creation time has a resolution of one second.
    async fn tick(&self) {
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }

    fn holds_config(&self) -> bool {
        false
    }

    async fn outage(&mut self, outage: Outage) -> bool {
        match outage {
            Outage::Begins => self.server.kill(),
            Outage::Ends => self.server.restart().await.unwrap(),
        }
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_over_a_current_etcd() {
    store_contract::all(&mut Backing::start(Version::Current).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_over_the_etcd_before_it() {
    store_contract::all(&mut Backing::start(Version::Previous).await).await;
}
