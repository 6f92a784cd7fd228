//! A cluster, and what scenarios do with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use serde_json::Value;
use testkit::cluster::{Cluster, Options, images, manifests};
use testkit::probe::{Flow, FlowReport};
use testkit::{Families, Pod, probe};

/// How long traffic may take to flow on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Datagrams per second of a flow.
pub(crate) const RATE: u32 = 500;

/// A kind of agent, by its manifest.
pub(crate) struct Kind {
    /// The namespace of its objects.
    pub(crate) namespace: &'static str,
    /// Its DaemonSet.
    pub(crate) set: &'static str,
}

pub(crate) const OURS: Kind = Kind { namespace: "flannelkit", set: "flanneld" };
pub(crate) const GO: Kind = Kind { namespace: "kube-flannel", set: "kube-flannel-ds" };

pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    dir: PathBuf,
}

impl Bed {
    /// Starts a cluster of two nodes that have our image.
    pub(crate) fn new(dir: &Path) -> Self {
        Self::with(dir, Families::V4, vec![images::ours().unwrap()])
    }

    /// Starts one that also has Go flannel's images.
    pub(crate) fn with_go_flannel(dir: &Path) -> Self {
        let mut all = images::go_flannel(dir).unwrap();
        all.push(images::ours().unwrap());
        Self::with(dir, Families::V4, all)
    }

    pub(crate) fn with(dir: &Path, families: Families, images: Vec<PathBuf>) -> Self {
        let cluster = Cluster::start(dir, &Options { nodes: 2, families, images }).unwrap();
        Self { cluster, dir: dir.to_owned() }
    }

    /// Applies a manifest as it is.
    pub(crate) fn apply(&self, manifest: &str) {
        let file = self.dir.join("manifest.yaml");
        fs::write(&file, manifest).unwrap();
        self.cluster.kubectl(&["apply", "-f", file.to_str().unwrap()]).unwrap();
    }

    /// Applies our manifest and waits until the agents are ready.
    pub(crate) fn install(&self) {
        self.apply(&manifests::ours().unwrap());
        self.until_agents_are_ready(&OURS);
    }

    /// Waits until all agents of this kind are ready and of the last revision.
    pub(crate) fn until_agents_are_ready(&self, kind: &Kind) -> Duration {
        let path = format!("/apis/apps/v1/namespaces/{}/daemonsets/{}", kind.namespace, kind.set);
        let ready = |cluster: &Cluster| {
            let set = cluster.get(&path)?;
            let status = |name: &str| set["status"][name].as_i64();
            let all = status("desiredNumberScheduled").filter(|all| *all > 0);
            let observed = status("observedGeneration") == set["metadata"]["generation"].as_i64();
            Ok(observed && all.is_some() && status("numberReady") == all && status("updatedNumberScheduled") == all)
        };
        self.cluster.until("all agents are ready", ready).unwrap()
    }

    /// Restarts all agents one by one, and waits for the last.
    pub(crate) fn restart(&self, kind: &Kind) -> Duration {
        let start = Instant::now();
        self.cluster.kubectl(&["-n", kind.namespace, "rollout", "restart", &format!("ds/{}", kind.set)]).unwrap();
        self.until_agents_are_ready(kind);
        start.elapsed()
    }

    /// Creates two pods, `one` and `two` on the nodes 1 and 2, and waits until they reach each other.
    pub(crate) fn pods(&self) -> [Pod; 2] {
        let pods = [("one", 1), ("two", 2)].map(|(name, node)| {
            self.cluster.create_pod(name, node).unwrap();
            name
        });
        let pods = pods.map(|name| self.cluster.pod(name).unwrap());
        reaches(&pods[0], &pods[1]);
        pods
    }

    /// Returns the agents' Pods.
    pub(crate) fn agents(&self, kind: &Kind) -> Vec<Value> {
        let pods = self.cluster.get(&format!("/api/v1/namespaces/{}/pods", kind.namespace)).unwrap();
        pods["items"].as_array().unwrap().clone()
    }

    /// Returns the messages of the Events of sandboxes that could not be created.
    pub(crate) fn failed_sandboxes(&self) -> Vec<String> {
        let events = self.cluster.get("/api/v1/events").unwrap();
        let failed = |event: &&Value| event["reason"] == "FailedCreatePodSandBox";
        events["items"].as_array().unwrap().iter().filter(failed).map(|event| event["message"].to_string()).collect()
    }

    /// Returns the log of the agent on a node, from its first start.
    pub(crate) fn log(&self, kind: &Kind, nth: usize) -> String {
        let node = &self.cluster.nodes()[nth - 1];
        node.run(&["sh", "-c", &format!("cat /var/log/pods/{}_*/*/*.log", kind.namespace)]).unwrap_or_default()
    }
}

/// Waits until a pod gets an answer of another, in each family that both have.
pub(crate) fn reaches(from: &Pod, to: &Pod) {
    for (family, addr) in to.addrs.iter() {
        assert!(from.addrs.get(family).is_some(), "{from:?} {to:?}");
        probe::until_reply(&from.ns, *addr, PATIENCE).unwrap();
    }
}

/// Traffic in both directions between two pods.
pub(crate) struct Traffic([Flow; 2]);

impl Traffic {
    pub(crate) fn start([one, two]: &[Pod; 2]) -> Self {
        let flow = |from: &Pod, to: &Pod| Flow::start(&from.ns, &to.ns, to.addr(Family::V4).unwrap(), RATE).unwrap();
        Self([flow(one, two), flow(two, one)])
    }

    /// Waits until it has lasted this long.
    pub(crate) fn until_lasted(&self, time: Duration) {
        let enough = time.as_secs() * u64::from(RATE);
        let sent = || Ok(self.0.iter().all(|flow| flow.sent() >= enough));
        testkit::wait_until("traffic", time + PATIENCE, sent).unwrap();
    }

    /// Ends it, and checks that every datagram arrived.
    pub(crate) fn arrived(self, what: &str) {
        for report in self.0.map(|flow| flow.stop().unwrap()) {
            let FlowReport { sent, refused, lost, .. } = report;
            assert!(sent > 0 && refused == 0 && lost == 0, "{what}: {report:?}");
        }
    }
}
