//! A node: namespaces with a file system of its own, containerd, kubelet and kube-proxy.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::kubernetes::VERSION;
use crate::{Context, Error, Namespace, Process, wait_until};

const BOOT: &str = include_str!("node.sh");
/// How long a command, or the start of a service, may take.
const PATIENCE: Duration = Duration::from_secs(120);
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/opt/cni/bin";
const CONTAINERD: &str = r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "PAUSE"
# Lower scores need CAP_SYS_RESOURCE.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#;
const KUBELET: &str = r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: { enabled: false }
  webhook: { enabled: true }
  x509: { clientCAFile: /etc/kubernetes/ca.pem }
authorization: { mode: Webhook }
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
resolvConf: ""
staticPodPath: /etc/kubernetes/manifests
evictionHard: { memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%" }
imageGCHighThresholdPercent: 100
"#;
const PROXY: &str = r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: { kubeconfig: /etc/kubernetes/proxy.kubeconfig }
clusterCIDR: ""
mode: iptables
conntrack: { maxPerCore: 0, min: 0 }
"#;

/// A service of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The container runtime.
    Containerd,
    /// The kubelet.
    Kubelet,
    /// kube-proxy.
    Proxy,
}

impl Service {
    fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::Proxy => "kube-proxy",
        }
    }
}

/// What a node needs from its cluster.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    /// The root file system, which is not written.
    pub(super) root: PathBuf,
    /// The folder of programs.
    pub(super) programs: PathBuf,
    /// Archives of images.
    pub(super) images: Vec<PathBuf>,
    /// The control groups.
    pub(super) groups: Vec<PathBuf>,
    /// The node's own directory, with its credentials in `etc`.
    pub(super) data: PathBuf,
    /// The node's addresses, separated by commas.
    pub(super) addresses: String,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    name: String,
    ns: Namespace,
    setup: Setup,
    machine: Option<Machine>,
}

/// What ends when a node loses its power.
#[derive(Debug)]
struct Machine {
    /// The node's first process, as this process sees it.
    pid: Pid,
    process: Process,
    services: Vec<(Service, Process)>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // All processes of the node end with its first one.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = self.process.wait(PATIENCE);
    }
}

impl Node {
    /// Boots a node whose network is `ns`.
    pub(super) fn boot(name: &str, ns: Namespace, setup: Setup) -> Result<Self, Error> {
        let etc = setup.data.join("etc");
        let containerd = CONTAINERD.replace("PAUSE", super::PAUSE);
        for (file, text) in [("containerd.toml", &*containerd), ("kubelet.yaml", KUBELET), ("proxy.yaml", PROXY)] {
            fs::write(etc.join(file), text).context(|| format!("writing {file} of {name}"))?;
        }
        let mut node = Self { name: name.to_owned(), ns, setup, machine: None };
        node.power_on()?;
        for archive in node.setup.images.clone() {
            let file = archive.file_name().unwrap_or_default().to_owned();
            let inside = format!("/var/lib/kubelet/{}", file.display());
            let copied = fs::copy(&archive, node.setup.data.join("kubelet").join(&file));
            copied.context(|| format!("copying {}", archive.display()))?;
            node.run(&["ctr", "-n", "k8s.io", "images", "import", &inside])?;
            node.run(&["rm", &inside])?;
        }
        node.start(Service::Kubelet)?;
        node.start(Service::Proxy)?;
        Ok(node)
    }

    /// Returns the name of the node's object.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the network namespace of the host.
    pub fn ns(&self) -> &Namespace {
        &self.ns
    }

    /// Returns a path of the node's file system, as this process sees it.
    ///
    /// # Errors
    /// If the node is off.
    pub fn path(&self, path: &str) -> Result<PathBuf, Error> {
        let pid = self.machine()?.pid.to_string();
        Ok(Path::new("/proc").join(pid).join("root").join(path.trim_start_matches('/')))
    }

    fn machine(&self) -> Result<&Machine, Error> {
        self.machine.as_ref().ok_or_else(|| Error::new(format!("{} is off", self.name)))
    }

    /// Returns the beginning of a command that runs on the node, in its control groups.
    fn enter(&self) -> Result<[String; 5], Error> {
        let pid = self.machine()?.pid.to_string();
        Ok(["nsenter", "--all", "--target", &pid, "/run/enter"].map(str::to_owned))
    }

    /// Runs a command on the node and returns what it printed.
    ///
    /// # Errors
    /// If it fails, with what it printed, or takes more than two minutes.
    pub fn run(&self, words: &[&str]) -> Result<String, Error> {
        let mut command = Command::new("timeout");
        command.arg(PATIENCE.as_secs().to_string()).args(self.enter()?).args(words);
        let output = command.env_clear().env("PATH", PATH).stdin(Stdio::null()).output();
        let Output { status, stdout, stderr } = output.context(|| format!("{}: running {words:?}", self.name))?;
        if !status.success() {
            let error = String::from_utf8_lossy(&stderr);
            return Err(Error::new(format!("{}: {}: {status}: {error}", self.name, words.join(" "))));
        }
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    /// Returns the network namespaces of the node's pods that run or are being made, by the names of their files.
    ///
    /// # Errors
    /// The system's error.
    pub fn pod_namespaces(&self) -> Result<Vec<Namespace>, Error> {
        let dir = self.path("/run/netns")?;
        let entries = fs::read_dir(&dir).context(|| format!("reading {}", dir.display()))?;
        // One that is just being made or removed is an ordinary file.
        let open = |entry: fs::DirEntry| Namespace::open(&entry.file_name().to_string_lossy(), &entry.path()).ok();
        Ok(entries.filter_map(Result::ok).filter_map(open).collect())
    }

    /// Starts a service, which is started again if it ends. Starting one that runs restarts it: it is killed first.
    ///
    /// # Errors
    /// If it does not start, with the end of its log.
    pub fn start(&mut self, service: Service) -> Result<(), Error> {
        let program = format!("/opt/programs/{}-{VERSION}", service.name());
        // As a machine's service manager does.
        let [nsenter, options @ ..] = self.enter()?;
        let mut command = Command::new(nsenter);
        command.env_clear().env("PATH", PATH).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        command.args(options).args(["sh", "-c", "while :; do \"$@\"; sleep 0.2; done", "supervisor"]);
        match service {
            Service::Containerd => command.args(["containerd", "--config", "/etc/kubernetes/containerd.toml"]),
            Service::Kubelet => command
                .arg(program)
                .args(["--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig"])
                .arg(format!("--hostname-override={}", self.name))
                .arg(format!("--node-ip={}", self.setup.addresses)),
            Service::Proxy => command
                .arg(program)
                .arg("--config=/etc/kubernetes/proxy.yaml")
                .arg(format!("--hostname-override={}", self.name)),
        };
        let log = self.setup.data.join(format!("{}.log", service.name()));
        self.stop(service)?;
        let process = Process::start(&mut command, &log)?;
        if let Some(machine) = &mut self.machine {
            machine.services.push((service, process));
        }
        if service == Service::Containerd {
            let waited = wait_until("containerd", PATIENCE, || Ok(self.run(&["ctr", "version"]).is_ok()));
            waited.map_err(|error| Error::new(format!("{error}:\n{}", self.log(service))))?;
        }
        Ok(())
    }

    /// Kills a service and waits for its end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn stop(&mut self, service: Service) -> Result<(), Error> {
        let Some(machine) = &mut self.machine else { return Ok(()) };
        let Some(place) = machine.services.iter().position(|(found, _)| *found == service) else { return Ok(()) };
        let (_, mut process) = machine.services.remove(place);
        // nsenter, the supervisor and the service; the containers' shims have groups of their own.
        let group = Pid::from_raw(process.id().cast_signed());
        killpg(group, Signal::SIGKILL).context(|| format!("killing {}", service.name()))?;
        process.wait(PATIENCE)?;
        // nsenter's children become this process's, which is the first one of its namespace.
        let ended = || {
            let reaped = waitpid(Pid::from_raw(-group.as_raw()), Some(WaitPidFlag::WNOHANG));
            Ok(reaped == Err(nix::Error::ECHILD) && killpg(group, None).is_err())
        };
        wait_until(&format!("the end of {}", service.name()), PATIENCE, ended).map(drop)
    }

    /// Returns the end of a service's log, for messages.
    pub fn log(&self, service: Service) -> String {
        let machine = self.machine.as_ref();
        let found = machine.and_then(|machine| machine.services.iter().find(|(found, _)| *found == service));
        found.map(|(_, process)| process.last_words()).unwrap_or_default()
    }

    /// Ends all processes of the node at once, as a loss of power does. Its disk stays.
    pub fn power_off(&mut self) {
        self.machine = None;
    }

    /// Boots the node again, in another network namespace, whose links are new.
    ///
    /// # Errors
    /// If a service does not start.
    pub fn power_on_in(&mut self, ns: Namespace) -> Result<(), Error> {
        self.machine = None;
        self.ns = ns;
        self.power_on()?;
        self.start(Service::Kubelet)?;
        self.start(Service::Proxy)
    }

    /// Starts the first process and the container runtime.
    fn power_on(&mut self) -> Result<(), Error> {
        let Setup { root, programs, groups, data, .. } = &self.setup;
        let enter: String = groups.iter().map(|group| format!("echo $$ >{}/cgroup.procs\n", group.display())).collect();
        let mut command = Command::new("bash");
        command
            .arg("-euc")
            .arg(enter + "exec unshare --mount --uts --ipc --pid --cgroup --fork --kill-child bash -c \"$@\"")
            .args(["enter", BOOT, "node"])
            .args([root, data, programs])
            .arg(&self.name);
        command.env_clear().env("PATH", PATH).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = self.ns.run(|| Process::start(&mut command, &data.join("boot.log")))??;
        let mut pid = None;
        let started = wait_until("its first process", PATIENCE, || {
            if let Some(status) = process.ended()? {
                return Err(Error::new(format!("its first process: {status}")));
            }
            pid = child_of(process.id()).ok();
            let started = |pid: Pid| Path::new(&format!("/proc/{pid}/root/run/started")).exists();
            Ok(pid.is_some_and(started))
        });
        started.map_err(|error| Error::new(format!("{}: {error}:\n{}", self.name, process.last_words())))?;
        let pid = pid.ok_or_else(|| Error::new("no first process"))?;
        self.machine = Some(Machine { pid, process, services: Vec::new() });
        self.start(Service::Containerd)
    }
}

/// Returns the only child of a process.
pub(super) fn child_of(id: u32) -> Result<Pid, Error> {
    let path = format!("/proc/{id}/task/{id}/children");
    let text = fs::read_to_string(&path).context(|| format!("reading {path}"))?;
    let pid = text.split_whitespace().next().and_then(|pid| pid.parse().ok());
    pid.map(Pid::from_raw).ok_or_else(|| Error::new(format!("process {id} has no child")))
}
