//! A real Kubernetes cluster on this machine: API server, controllers and scheduler on a switch, and nodes in
//! namespaces, each with containerd, kubelet and kube-proxy.
//!
//! Needs root, control groups of version 1, util-linux, and what `testkit/cluster/build target` builds. Everything runs in
//! namespaces of its own ([`isolated`]) and ends with them, whatever ends the program.

mod cgroups;
pub mod images;
mod isolation;
pub mod manifests;
mod node;

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use flannel_core::net::{Dual, Family};
use serde_json::{Value, json};
use tokio::runtime::Builder;

use crate::etcd::Version;
use crate::kubernetes::{ApiServer, program};
use crate::programs::target;
use crate::{Context, Error, Families, Namespace, Pod, Process, Underlay};

pub use isolation::isolated;
pub use node::{Node, Service};

use cgroups::Groups;
use node::Setup;

/// The switch's address, as nodes see it.
const SWITCH: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 89, 0, 1));
/// The image of pods that wait.
pub const WAITING: &str = "flannelkit.test/wait:1";
/// The image of what keeps the namespaces of a pod.
const PAUSE: &str = "flannelkit.test/pause:1";
/// How long a change of the cluster may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a cluster has.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many nodes.
    pub nodes: usize,
    /// The families of nodes and pods: IPv4, alone or with IPv6.
    pub families: Families,
    /// Archives of images that are imported on each node.
    pub images: Vec<PathBuf>,
}

/// A running cluster. Dropping it ends it.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    nodes: Vec<Node>,
    images: Vec<PathBuf>,
    groups: Groups,
    _controllers: Process,
    _scheduler: Process,
    server: ApiServer,
    underlay: Underlay,
}

impl Cluster {
    /// Starts a cluster in `dir`, inside of [`isolated`]. Its nodes are registered and not ready: there is no network for
    /// pods.
    ///
    /// # Errors
    /// What is missing, or the end of a log.
    pub fn start(dir: &Path, options: &Options) -> Result<Self, Error> {
        let cidrs = match options.families {
            Families::V4 => "10.244.0.0/16",
            Families::Dual => "10.244.0.0/16,fd00:244::/48",
            Families::V6 => {
                return Err(Error::new("a cluster needs IPv4: its API server and Services have such addresses"));
            }
        };
        let root = root()?;
        let underlay = Underlay::new(options.nodes, options.families)?;
        let mut images = options.images.clone();
        for (name, file) in [(PAUSE, "pause.tar"), (WAITING, "wait.tar")] {
            let archive = dir.join(file);
            images::busybox(&root, name, &["/bin/sleep", "2147483647"], &archive)?;
            images.push(archive);
        }
        let server = on(underlay.switch(), async || ApiServer::start_at(Version::Current, Some(SWITCH)).await)?;
        let controllers = underlay.switch().run(|| server.run_controllers(cidrs))??;
        let scheduler = underlay.switch().run(|| server.run_scheduler())??;
        let groups = Groups::of(&isolation::run_dir()?)?;
        let groups = groups.create(&dir.file_name().unwrap_or_default().to_string_lossy())?;
        let mut cluster = Self {
            dir: dir.to_owned(),
            nodes: Vec::new(),
            images,
            groups,
            _controllers: controllers,
            _scheduler: scheduler,
            server,
            underlay,
        };
        for nth in 0..options.nodes {
            cluster.boot(nth)?;
        }
        cluster.until_registered()?;
        Ok(cluster)
    }

    /// Adds a node, the one after the last.
    ///
    /// # Errors
    /// If a service does not start.
    pub fn add_node(&mut self) -> Result<(), Error> {
        self.underlay.add_node()?;
        self.boot(self.nodes.len())?;
        self.until_registered()
    }

    /// Reboots the node of this number, from 1: all its processes end, and its network is new.
    ///
    /// # Panics
    /// If there is no such node.
    ///
    /// # Errors
    /// If a service does not start.
    pub fn reboot(&mut self, nth: usize) -> Result<(), Error> {
        let node = &mut self.nodes[nth - 1];
        node.power_off();
        let ns = self.underlay.replace_node(nth)?.ns.clone();
        node.power_on_in(ns)
    }

    fn until_registered(&self) -> Result<(), Error> {
        let registered = |cluster: &Self| {
            let nodes = cluster.get("/api/v1/nodes")?;
            Ok(nodes["items"].as_array().is_some_and(|items| items.len() == cluster.nodes.len()))
        };
        self.until("all nodes are registered", registered).map(drop)
    }

    fn boot(&mut self, nth: usize) -> Result<(), Error> {
        let host = &self.underlay.nodes()[nth];
        let name = format!("node-{}", nth + 1);
        let data = self.dir.join(&name);
        let etc = data.join("etc");
        let pods = etc.join("manifests");
        fs::create_dir_all(&pods).context(|| format!("creating {}", pods.display()))?;
        self.server.write_credentials(&etc, "kubelet", &format!("system:node:{name}"), "system:nodes")?;
        self.server.write_credentials(&etc, "proxy", "system:kube-proxy", "system:kube-proxy")?;
        let addresses: Vec<_> = host.addrs.iter().map(|(_, addr)| addr.to_string()).collect();
        let setup = Setup {
            root: root()?,
            programs: target(),
            images: self.images.clone(),
            groups: self.groups.create(&name)?.dirs().to_vec(),
            data,
            addresses: addresses.join(","),
        };
        self.nodes.push(Node::boot(&name, host.ns.clone(), setup)?);
        Ok(())
    }

    /// Returns the nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns a node by its number, from 1.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn node(&mut self, nth: usize) -> &mut Node {
        &mut self.nodes[nth - 1]
    }

    /// Returns the switch's namespace, a host outside of the cluster.
    pub fn outside(&self) -> &Namespace {
        self.underlay.switch()
    }

    /// Kills the API server.
    pub fn stop_server(&mut self) {
        self.server.kill();
    }

    /// Starts the API server again.
    ///
    /// # Errors
    /// The end of its log.
    pub fn start_server(&mut self) -> Result<(), Error> {
        let server = &mut self.server;
        on(self.underlay.switch(), async || server.restart().await)
    }

    /// Asks the API server.
    ///
    /// # Errors
    /// What `question` returns.
    pub fn ask<T: Send>(&self, question: impl AsyncFnOnce(&ApiServer) -> Result<T, Error> + Send) -> Result<T, Error> {
        on(self.underlay.switch(), async || question(&self.server).await)
    }

    /// Reads an object.
    ///
    /// # Errors
    /// The server's error.
    pub fn get(&self, path: &str) -> Result<Value, Error> {
        self.ask(async |server| server.get(path).await)
    }

    /// Runs kubectl as the administrator and returns what it printed.
    ///
    /// # Errors
    /// If it fails, with what it printed, or takes more than three minutes.
    pub fn kubectl(&self, words: &[&str]) -> Result<String, Error> {
        let mut command = Command::new("timeout");
        command.arg(PATIENCE.as_secs().to_string()).arg(program("kubectl")?);
        command.arg("--kubeconfig").arg(self.server.admin_kubeconfig()?).args(words);
        command.env_clear().env("HOME", &self.dir).env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
        let output = self.underlay.switch().run(|| command.output())?;
        let Output { status, stdout, stderr } = output.context(|| "running kubectl".to_owned())?;
        if !status.success() {
            let error = String::from_utf8_lossy(&stderr);
            return Err(Error::new(format!("kubectl {}: {status}: {error}", words.join(" "))));
        }
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    /// Writes a script that runs kubectl as the administrator, for a person outside of the cluster's namespaces, and
    /// returns its path.
    ///
    /// # Errors
    /// The system's error.
    pub fn kubectl_script(&self) -> Result<PathBuf, Error> {
        let pid = isolation::outer_pid()?;
        let net = self.underlay.switch().as_fd().as_raw_fd();
        let script = self.dir.join("kubectl");
        let text = format!(
            "#!/bin/sh\nexec nsenter --target {pid} --mount --pid --net=/proc/{pid}/fd/{net} {} --kubeconfig {} \"$@\"\n",
            program("kubectl")?.canonicalize().context(|| "kubectl's path".to_owned())?.display(),
            self.server.admin_kubeconfig()?.display(),
        );
        fs::write(&script, text).context(|| format!("writing {}", script.display()))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&script, mode).context(|| format!("making {} a program", script.display()))?;
        script.canonicalize().context(|| "the script's path".to_owned())
    }

    /// Polls `condition` until it holds, and returns how long that took.
    ///
    /// # Errors
    /// If it does not hold within three minutes. An error of the condition is one of the server, and does not end the wait.
    pub fn until(&self, what: &str, condition: impl Fn(&Self) -> Result<bool, Error>) -> Result<Duration, Error> {
        let start = Instant::now();
        loop {
            let last = condition(self);
            if matches!(last, Ok(true)) {
                return Ok(start.elapsed());
            }
            if start.elapsed() > PATIENCE {
                return Err(Error::new(format!("{what}: not within {PATIENCE:?}: {last:?}\n{}", self.state())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether all nodes are ready.
    ///
    /// # Errors
    /// The server's error.
    pub fn nodes_are_ready(&self) -> Result<bool, Error> {
        let nodes = self.get("/api/v1/nodes")?;
        Ok(nodes["items"].as_array().is_some_and(|nodes| nodes.iter().all(|node| condition(node, "Ready"))))
    }

    /// Creates a pod that waits, on the node of this number.
    ///
    /// # Errors
    /// The server's error.
    pub fn create_pod(&self, name: &str, nth: usize) -> Result<(), Error> {
        let pod = json!({
            "metadata": { "name": name, "labels": { "app": name } },
            "spec": {
                "nodeName": format!("node-{nth}"),
                "terminationGracePeriodSeconds": 0,
                // A kubelet cannot mount the token until its network is ready, and retries with back-off.
                "automountServiceAccountToken": false,
                "containers": [{ "name": "wait", "image": WAITING }],
            },
        });
        self.create(&pod)
    }

    /// Creates a pod in the default namespace.
    ///
    /// # Errors
    /// The server's error.
    pub fn create(&self, pod: &Value) -> Result<(), Error> {
        // A new namespace gets its account after a moment.
        self.until("the pod is accepted", |cluster| {
            let created = cluster.ask(async |server| server.create("/api/v1/namespaces/default/pods", pod).await);
            match created {
                // The answer to an earlier request was lost.
                Err(error) if error.to_string().contains("already exists") => Ok(true),
                created => created.map(|_| true),
            }
        })
        .map(drop)
    }

    /// Returns a pod of the default namespace that runs, by its own network namespace.
    ///
    /// # Errors
    /// If it does not run within three minutes.
    pub fn pod(&self, name: &str) -> Result<Pod, Error> {
        let path = format!("/api/v1/namespaces/default/pods/{name}");
        self.until(&format!("{name} runs"), |cluster| Ok(condition(&cluster.get(&path)?, "Ready")))?;
        let pod = self.get(&path)?;
        let mut addrs = Dual::default();
        for addr in pod["status"]["podIPs"].as_array().into_iter().flatten() {
            let addr: IpAddr = addr["ip"]
                .as_str()
                .unwrap_or_default()
                .parse()
                .map_err(|_| Error::new(format!("{name} has the address {addr}")))?;
            *addrs.slot(Family::of(addr)) = Some(addr);
        }
        let node = self.nodes.iter().find(|node| pod["spec"]["nodeName"] == node.name());
        let node = node.ok_or_else(|| Error::new(format!("{name} has no node")))?;
        let has = |ns: &Namespace| {
            let found = ns.addresses().unwrap_or_default();
            addrs.iter().all(|(_, addr)| found.iter().any(|found| found.addr == *addr))
        };
        let ns = node.pod_namespaces()?.into_iter().find(has);
        let ns = ns.ok_or_else(|| Error::new(format!("no pod of {} has {addrs:?}", node.name())))?;
        Ok(Pod { ns, addrs })
    }

    /// Returns what a person would look at first, for messages.
    pub fn state(&self) -> String {
        let mut text = String::new();
        for words in [
            &["get", "nodes", "-o", "wide"][..],
            &["get", "pods", "-A", "-o", "wide"],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
        ] {
            let shown = self.kubectl(words).unwrap_or_else(|error| error.to_string());
            text += &format!("kubectl {}\n{shown}\n", words.join(" "));
        }
        for node in &self.nodes {
            text += &format!("{}: kubelet:\n{}\n", node.name(), node.log(Service::Kubelet));
        }
        text
    }
}

/// Whether a condition of an object is true.
pub fn condition(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == kind && condition["status"] == "True")
}

/// Returns the root file system of nodes.
fn root() -> Result<PathBuf, Error> {
    let root = target().join("node-root-bookworm");
    match root.is_dir() {
        true => Ok(root),
        false => {
            Err(Error::new(format!("no root file system at {}: run testkit/cluster/build target", root.display())))
        }
    }
}

/// Runs a future in a network namespace.
fn on<T: Send>(ns: &Namespace, work: impl AsyncFnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    ns.run(|| {
        let runtime = Builder::new_current_thread().enable_all().build();
        runtime.context(|| "starting a runtime".to_owned())?.block_on(work())
    })?
}
