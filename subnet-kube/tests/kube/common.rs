//! A server, a proxy before it, and the store behind both.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use flannel_core::testing::store_contract::Watcher;
use flannel_subnet_kube::{Access, ConfigSource, KubeSubnets, NodeName, Options, Timeouts};
use serde_json::{Value, json};
use testkit::etcd::Version;
use testkit::kubernetes::{ApiServer, Proxy};
use tokio::sync::Mutex;

/// The time limit of every wait, in seconds.
pub(crate) const WITHIN: u64 = 30;
const PREFIX: &str = "flannel.alpha.coreos.com/";
pub(crate) const WATCH: &str = "watch=true";
pub(crate) const LIST: &str = "resourceVersionMatch=NotOlderThan";

/// A dual-stack network.
const CONFIG: &str =
    r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;

/// Concurrent tests share a server: each has its own Nodes and proxy.
pub(crate) struct Lab {
    pub(crate) server: Arc<ApiServer>,
    pub(crate) proxy: Proxy,
}

impl Lab {
    pub(crate) async fn new() -> Self {
        static SHARED: Mutex<Weak<ApiServer>> = Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        let server = match shared.upgrade() {
            Some(server) => server,
            None => {
                let server = ApiServer::start(Version::Current).await.unwrap_or_else(|error| panic!("{error}"));
                let server = Arc::new(server);
                *shared = Arc::downgrade(&server);
                server
            }
        };
        let proxy = Proxy::start(&server).await.unwrap();
        Self { server, proxy }
    }

    /// Returns the number of a node that no other test uses.
    pub(crate) fn number(&self) -> u16 {
        static LAST: AtomicU16 = AtomicU16::new(0);
        LAST.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns a client through the proxy.
    pub(crate) async fn client(&self) -> kube::Client {
        Access::in_cluster().at(self.proxy.url()).client().await.unwrap()
    }

    /// Returns the store of node `nth`, through the proxy.
    pub(crate) async fn store(&self, nth: u16) -> KubeSubnets {
        self.store_with(nth, Timeouts::default()).await
    }

    pub(crate) async fn store_with(&self, nth: u16, timeouts: Timeouts) -> KubeSubnets {
        KubeSubnets::new(self.client().await, options(nth).with_timeouts(timeouts))
    }

    /// Creates a Node with podCIDRs of both families.
    pub(crate) async fn node(&self, nth: u16) {
        self.server.create_node(&name(nth), &cidrs(nth)).await.unwrap();
    }

    /// Creates a Node and takes its lease.
    pub(crate) async fn leased(&self) -> (u16, KubeSubnets, Lease) {
        let nth = self.number();
        self.node(nth).await;
        let store = self.store(nth).await;
        let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
        (nth, store, lease)
    }

    /// Returns flannel's annotations of a Node, without their prefix.
    pub(crate) async fn annotations(&self, nth: u16) -> Value {
        let node = self.server.get(&path(nth)).await.unwrap();
        let all = node["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
        all.into_iter().filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?.to_owned(), value))).collect()
    }

    /// Sets flannel's annotations; `null` removes one.
    pub(crate) async fn annotate(&self, nth: u16, annotations: Value) {
        let named =
            annotations.as_object().unwrap().iter().map(|(name, value)| (format!("{PREFIX}{name}"), value.clone()));
        self.server.annotate(&name(nth), named.collect()).await.unwrap();
    }

    pub(crate) async fn delete(&self, nth: u16) {
        self.server.delete(&path(nth)).await.unwrap();
    }

    /// Writes a heartbeat as a kubelet does.
    pub(crate) async fn heartbeat(&self, nth: u16, time: u32) {
        let time = format!("2026-01-01T00:{:02}:{:02}Z", time / 60 % 60, time % 60);
        let condition =
            json!({ "type": "Ready", "status": "True", "lastHeartbeatTime": time, "lastTransitionTime": time });
        self.server.set_condition(&name(nth), &condition).await.unwrap();
    }
}

pub(crate) fn options(nth: u16) -> Options {
    let config = NetworkConfig::parse(CONFIG.as_bytes(), Allocation::External).unwrap();
    Options::new(NodeName::Named(id(nth)), ConfigSource::Fixed(config))
}

pub(crate) fn name(nth: u16) -> String {
    format!("node-{nth}")
}

pub(crate) fn path(nth: u16) -> String {
    format!("/api/v1/nodes/{}", name(nth))
}

pub(crate) fn id(nth: u16) -> NodeIdentity {
    NodeIdentity::new(&name(nth)).unwrap()
}

pub(crate) fn key(nth: u16) -> LeaseKey {
    LeaseKey::new(&name(nth))
}

pub(crate) fn cidrs(nth: u16) -> Vec<String> {
    vec![format!("10.244.{nth}.0/24"), format!("fd00:244:0:{nth}::/64")]
}

pub(crate) fn attrs(nth: u16) -> LeaseAttrs {
    let mac = format!("02:00:5e:00:00:{nth:02x}");
    let data = Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac))]);
    let attrs = LeaseAttrs::new(Dual {
        v4: Some([192, 0, 2, nth.to_be_bytes()[1]].into()),
        v6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, nth].into()),
    });
    attrs.with_backend("vxlan", Dual { v4: Some(data.clone()), v6: Some(data) })
}

pub(crate) async fn watch(store: &KubeSubnets) -> Watcher {
    Watcher::open(store, WITHIN).await
}

/// Returns what the result waits for.
#[track_caller]
pub(crate) fn waits<T: std::fmt::Debug>(result: Result<T, SubnetError>) -> String {
    match result {
        Err(error @ SubnetError::Unconfigured { .. }) => error.to_string(),
        other => panic!("must be Unconfigured, is {other:?}"),
    }
}

/// Returns timeouts with this limit for the silence of a watch.
pub(crate) fn silent_after(silence: Duration) -> Timeouts {
    Timeouts::default().with_request(Duration::from_secs(5)).with_silence(silence)
}
