//! The contract of lease stores, over several handles on one directory.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::LeaseKey;
use flannel_core::subnet::SubnetManager;
use flannel_core::testing::store_contract::{self, Harness};
use flannel_subnet_file::{FileSubnets, Options, Ttl};
use tempfile::TempDir;

struct Files {
    dir: TempDir,
    ttl: Ttl,
}

impl Files {
    fn handle(&self) -> FileSubnets {
        // The contract has fifty concurrent writers.
        let lock_wait = Duration::from_secs(60);
        let options = Options::default().with_ttl(self.ttl).with_lock_wait(lock_wait);
        FileSubnets::open(self.dir.path(), options).unwrap()
    }
}

#[async_trait]
impl Harness for Files {
    async fn fresh(&mut self, config: &NetworkConfig) {
        self.dir = tempfile::tempdir().unwrap();
        self.put_config(config).await;
    }

    async fn open(&self) -> Arc<dyn SubnetManager> {
        Arc::new(self.handle())
    }

    async fn put_config(&self, config: &NetworkConfig) {
        self.handle().put_config(config).await.unwrap();
    }

    async fn delete(&self, key: &LeaseKey) {
        fs::remove_file(self.dir.path().join("leases").join(key.as_str())).unwrap();
    }

    async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
        fs::write(self.dir.path().join("leases").join(key.as_str()), r#"{"PublicIP":"192.1"#).unwrap();
        true
    }

    async fn expire(&self, key: &LeaseKey) -> bool {
        let path = self.dir.path().join("leases").join(key.as_str());
        let text = fs::read_to_string(&path).unwrap();
        let Some((kept, _)) = text.split_once("\"ExpiresUnixMs\"") else { return false };
        fs::write(path, format!("{kept}\"ExpiresUnixMs\":1}}")).unwrap();
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract_of_lease_stores() {
    store_contract::all(&mut Files { dir: tempfile::tempdir().unwrap(), ttl: Ttl::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract_where_leases_never_end() {
    store_contract::all(&mut Files { dir: tempfile::tempdir().unwrap(), ttl: Ttl::Never }).await;
}
