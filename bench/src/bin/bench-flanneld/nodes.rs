//! A Kubernetes API server with as many Nodes as wanted, in the caller's network namespace.

use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Ipv4Addr;
use std::path::Path;

use futures_util::{StreamExt, TryStreamExt, stream};
use http::{Method, Request};
use serde_json::{Value, json};
use testkit::etcd::Version;
use testkit::kubernetes::{self, ApiServer};

use bench::Error;
use bench::bed::{output, run};
use bench::peers::{NETWORK, mac, public};

/// Length of a Node's podCIDR.
pub(crate) const LEN: u8 = 24;
/// More Nodes than these do not fit.
pub(crate) const MOST: u32 = 60_000;
/// Where agents reach the server. This program reaches it on the loopback, which is not counted.
const SERVER: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);
/// Requests under way while the store is filled.
const ABREAST: usize = 32;
/// Images that a kubelet reports, each under two names.
const IMAGES: u32 = 40;
/// Images that there are: Nodes of a cluster have many in common.
const ALL_IMAGES: u64 = 200;

/// The server, a client of it, and what agents need.
pub(crate) struct Nodes {
    server: ApiServer,
    client: kube::Client,
    args: [String; 3],
    /// Heartbeats so far, each of a second of its own: one that changes nothing would not be told to anybody.
    beats: Cell<u32>,
}

impl Nodes {
    /// A server with node 0, which has no lease yet, and peers 1 to `n`. What agents need is put into `dir`.
    pub(crate) async fn with_peers(n: u32, dir: &Path) -> Result<Self, Error> {
        let server = ApiServer::start_at(Version::Current, Some(SERVER.into())).await?;
        let token = server.service_account("flannel", kubernetes::rules()?).await?;
        let kubeconfig = server.kubeconfig("flannel", &token, &server.url())?;
        let config = dir.join("net-conf.json");
        std::fs::write(&config, json!({ "Network": NETWORK, "Backend": { "Type": "vxlan" } }).to_string())?;
        let args = [
            "-kube-subnet-mgr".to_owned(),
            format!("-kubeconfig-file={}", kubeconfig.display()),
            format!("-net-config-path={}", config.display()),
        ];
        let nodes = Self { client: server.client().await?, server, args, beats: Cell::new(0) };
        nodes.count()?;
        let all = stream::iter((0..=n).map(|n| nodes.create(node(n))));
        all.buffer_unordered(ABREAST).try_collect::<()>().await?;
        Ok(nodes)
    }

    /// How agents are told where it is.
    pub(crate) fn args(&self) -> &[String] {
        &self.args
    }

    /// Makes a Node.
    pub(crate) async fn create(&self, node: Vec<u8>) -> Result<(), Error> {
        self.send(Method::POST, "/api/v1/nodes", node).await
    }

    /// Removes the Nodes of peers.
    pub(crate) async fn remove(&self, peers: impl Iterator<Item = u32>) -> Result<(), Error> {
        for n in peers {
            self.send(Method::DELETE, &format!("/api/v1/nodes/{}", name(n)), Vec::new()).await?;
        }
        Ok(())
    }

    /// What a kubelet says every few minutes.
    pub(crate) async fn heartbeat(&self, n: u32) -> Result<(), Error> {
        self.beats.set(self.beats.get() + 1);
        let patch = json!({ "status": { "conditions": conditions(self.beats.get()) } }).to_string().into();
        self.send(Method::PATCH, &format!("/api/v1/nodes/{}/status", name(n)), patch).await
    }

    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<(), Error> {
        let content = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let request = Request::builder().method(method).uri(path).header("content-type", content).body(body)?;
        self.client.request_text(request).await?;
        Ok(())
    }

    /// Makes the kernel count what agents read from the server, so that no program in between takes time.
    fn count(&self) -> Result<(), Error> {
        let rule = format!("ip saddr {SERVER} tcp sport {} counter name read", self.server.port());
        let table = format!(
            "table ip bench {{ counter read {{ }}; chain in {{ type filter hook input priority -300; {rule}; }}; }}"
        );
        run("nft", &[&table])
    }

    /// Bytes that agents have read from the server, with the headers of packets, since this was called last.
    pub(crate) fn read(&self) -> Result<u64, Error> {
        let text = output("nft", &["reset", "counter", "ip", "bench", "read"])?;
        let number = text.split_whitespace().skip_while(|word| *word != "bytes").nth(1);
        Ok(number.ok_or("nft shows no bytes")?.parse()?)
    }
}

/// The first address of peer `n`'s subnet.
pub(crate) fn subnet(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 5, 0, 0)) + (n << (32 - LEN)))
}

/// The Node of peer `n`, as its kubelet, kube-controller-manager and flannel left it. Node 0, ours, has no lease yet.
pub(crate) fn node(n: u32) -> Vec<u8> {
    let annotation = |name: &str| format!("flannel.alpha.coreos.com/{name}");
    let mut annotations = json!({
        "node.alpha.kubernetes.io/ttl": "0",
        "volumes.kubernetes.io/controller-managed-attach-detach": "true",
    });
    if n > 0 {
        annotations[annotation("backend-data")] = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, mac(n)).into();
        annotations[annotation("backend-type")] = "vxlan".into();
        annotations[annotation("kube-subnet-manager")] = "true".into();
        annotations[annotation("public-ip")] = public(n).to_string().into();
    }
    let (name, cidr) = (name(n), format!("{}/{LEN}", subnet(n)));
    let images: Vec<Value> = (0..IMAGES).map(|nth| image(hash((n, nth)) % ALL_IMAGES)).collect();
    let labels = json!({
        "beta.kubernetes.io/arch": "amd64",
        "beta.kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
    });
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name, "labels": labels, "annotations": annotations },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        "status": {
            "addresses": [
                { "type": "InternalIP", "address": public(n).to_string() },
                { "type": "Hostname", "address": name },
            ],
            "conditions": conditions(0),
            "images": images,
        },
    });
    node.to_string().into()
}

fn name(n: u32) -> String {
    format!("node-{n}")
}

fn image(nth: u64) -> Value {
    let digest: String = (0..4).map(|part| format!("{:016x}", hash((nth, part)))).collect();
    let repository = format!("registry.example.com/app-{nth}");
    let tag = format!("v1.{nth}.0-{:016x}-linux-amd64-release-build", hash(nth));
    let size = 10_000_000 + hash(nth) % 900_000_000;
    json!({ "names": [format!("{repository}@sha256:{digest}"), format!("{repository}:{tag}")], "sizeBytes": size })
}

fn conditions(at: u32) -> Value {
    let time = format!("2026-01-{:02}T{:02}:{:02}:{:02}Z", 1 + at / 86_400, at / 3600 % 24, at / 60 % 60, at % 60);
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": time, "lastTransitionTime": "2026-01-01T00:00:00Z",
        })
    };
    json!([
        condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node"),
        condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
    ])
}

/// The same in each run.
fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
