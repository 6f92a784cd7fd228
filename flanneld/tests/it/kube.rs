//! A Kubernetes API server on the switch.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use flannel_core::lease::{LeaseEvent, Record};
use flannel_core::net::Family;
use flannel_core::subnet::{NodeIdentity, SubnetManager};
use flannel_subnet_kube::{Access, ConfigSource, KubeSubnets, NodeName, Options};
use futures_util::StreamExt;
use serde_json::{Value, json};
use testkit::Families;
use testkit::etcd::Version;
use testkit::kubernetes::{self, ApiServer, Proxy};
use tokio::runtime::Builder;
use tokio::sync::oneshot;

use crate::harness::{Site, on_switch};

/// The switch's address, as nodes see it.
const SWITCH: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 89, 0, 1));

/// The name of a node.
pub(crate) fn name(nth: usize) -> String {
    format!("node-{nth}")
}

/// A way to the server for one agent: an account of its own, and a proxy.
pub(crate) struct Way {
    pub(crate) proxy: Proxy,
    pub(crate) token_file: PathBuf,
    kubeconfig: PathBuf,
    /// The thread that runs the proxy ends with it.
    _end: oneshot::Sender<()>,
}

/// The server, and what agents need to use it.
pub(crate) struct Kubernetes {
    pub(crate) server: ApiServer,
    kubeconfig: PathBuf,
    config: PathBuf,
}

impl Kubernetes {
    /// Starts a server, with an account for agents that may do what our manifest allows, which is what Go
    /// flannel's does.
    pub(crate) fn start(site: &Site, config: &str) -> Self {
        let server = on_switch(site, async || ApiServer::start_at(Version::Current, Some(SWITCH)).await).unwrap();
        let token =
            on_switch(site, async || server.service_account("flannel", kubernetes::rules().unwrap()).await).unwrap();
        let kubeconfig = server.kubeconfig("flannel", &token, &server.url()).unwrap();
        let file = site.path("net-conf.json");
        fs::write(&file, config).unwrap();
        Self { server, kubeconfig, config: file }
    }

    /// A way to the server for the account of this name, which is made for it.
    pub(crate) fn way(&self, site: &Site, account: &str) -> Way {
        let token =
            on_switch(site, async || self.server.service_account(account, kubernetes::rules().unwrap()).await.unwrap());
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let start = || runtime.block_on(async { Proxy::start_at(&self.server, SWITCH).await.unwrap() });
        let proxy = site.underlay.switch().run(start).unwrap();
        let (end, ended) = oneshot::channel();
        let serve = move || drop(runtime.block_on(ended));
        drop(site.underlay.switch().spawn(serve).unwrap());
        let kubeconfig = self.server.kubeconfig(account, &token, &proxy.url()).unwrap();
        Way { proxy, token_file: self.server.token_file(account), kubeconfig, _end: end }
    }

    pub(crate) fn args(&self) -> Vec<String> {
        self.args_of(&self.kubeconfig)
    }

    /// The same through a proxy.
    pub(crate) fn args_by(&self, way: &Way) -> Vec<String> {
        self.args_of(&way.kubeconfig)
    }

    /// The same with this token, which a file of this name holds.
    pub(crate) fn args_with(&self, name: &str, token: &str) -> Vec<String> {
        self.args_of(&self.server.kubeconfig(name, token, &self.server.url()).unwrap())
    }

    /// The same with the token that a credential plug-in prints, which is this shell script.
    pub(crate) fn args_by_plug_in(&self, script: &str) -> Vec<String> {
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&self.kubeconfig).unwrap()).unwrap();
        let version = "client.authentication.k8s.io/v1";
        config["users"][0]["user"] = json!({ "exec": {
            "apiVersion": version, "command": "sh", "args": ["-c", script], "interactiveMode": "Never",
        } });
        let file = self.kubeconfig.with_extension("plug-in");
        fs::write(&file, config.to_string()).unwrap();
        self.args_of(&file)
    }

    /// The same in a Pod, which needs no kubeconfig file.
    pub(crate) fn args_in_pod(&self) -> Vec<String> {
        vec!["--kube-subnet-mgr".to_owned(), format!("-net-config-path={}", self.config.display())]
    }

    fn args_of(&self, kubeconfig: &Path) -> Vec<String> {
        let (kubeconfig, config) = (kubeconfig.display(), self.config.display());
        vec![
            "--kube-subnet-mgr".to_owned(),
            format!("-kubeconfig-file={kubeconfig}"),
            format!("-net-config-path={config}"),
        ]
    }

    /// Makes a node's Node unless it is there, as its kubelet and kube-controller-manager do. Go flannel crashes where a
    /// Node has no annotation at all.
    pub(crate) fn register(&self, site: &Site, nth: usize, families: Families) {
        let cidrs = [(Family::V4, format!("10.244.{nth}.0/24")), (Family::V6, format!("fd00:244:0:{nth}::/64"))];
        let cidrs: Vec<_> =
            cidrs.into_iter().filter(|(family, _)| families.has(*family)).map(|(_, cidr)| cidr).collect();
        on_switch(site, async || {
            if self.server.get(&format!("/api/v1/nodes/{}", name(nth))).await.is_ok() {
                return;
            }
            self.server.create_node(&name(nth), &cidrs).await.unwrap();
            self.server.annotate(&name(nth), json!({ "example.com/any": "" })).await.unwrap();
        });
    }

    pub(crate) fn delete(&self, site: &Site, nth: usize) {
        on_switch(site, async || self.server.delete(&format!("/api/v1/nodes/{}", name(nth))).await.map(drop)).unwrap();
    }

    /// The leases as our store reads them: whatever program wrote them.
    pub(crate) fn records(&self, site: &Site) -> Vec<Record> {
        on_switch(site, async || {
            let client = Access::kubeconfig(&self.kubeconfig).client().await.unwrap();
            let node = NodeName::Named(NodeIdentity::new("operator").unwrap());
            let store = KubeSubnets::new(client, Options::new(node, ConfigSource::File(self.config.clone())));
            match store.watch().next().await {
                Some(Ok(LeaseEvent::Reset(records))) => records,
                other => panic!("a watch began with {other:?}"),
            }
        })
    }
}
