//! The nodes, their agents and their pods.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel_backend_hostgw::HostGw;
use flannel_backend_udp::{Udp, UdpDataPlane};
use flannel_backend_vxlan::Vxlan;
use flannel_core::lease::Lease;
use flannel_core::net::{Family, Mtu};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{Handle, Overlay, OverlayError, Phase, Status, Teardown};
use flannel_core::subnet::NodeIdentity;
use flannel_subnet_file::{FileSubnets, Options};
use testkit::{Node, Pod, PodNet, Underlay};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::Error;
use crate::args::Args;
use crate::screen::{Screen, Style, duration};

/// How long an agent may take to have everything programmed.
const READY: Duration = Duration::from_secs(10);

/// All of it. Dropped, it tells the agents to end.
pub(crate) struct Cluster {
    underlay: Arc<Underlay>,
    /// One for each node, in their order.
    pub(crate) members: Vec<Member>,
    families: Vec<Family>,
    store: PathBuf,
    cancel: DropGuard,
}

/// What there is of a node beside its namespace.
pub(crate) struct Member {
    pub(crate) handle: Handle,
    pub(crate) pod: Pod,
    pub(crate) lease: Arc<Lease>,
    /// The MTU of its pods.
    pub(crate) mtu: Mtu,
    task: Task,
}

type Task = JoinHandle<Result<(), OverlayError>>;

impl Cluster {
    pub(crate) async fn start(
        args: &Args,
        screen: &mut Screen,
        store: &Path,
        agents: &TaskTracker,
    ) -> Result<Self, Error> {
        const WIDTH: usize = 60;
        let (count, families) = (usize::from(args.nodes), args.families());
        let step = Instant::now();
        screen.begin(&format!("{count} namespaces on one underlay"), WIDTH)?;
        let underlay = Arc::new(blocking(move || Underlay::new(count, families)).await?);
        screen.end(&duration(step.elapsed()), Style::Dim)?;

        let step = Instant::now();
        screen.begin("an agent in each, ready with all peers", WIDTH)?;
        FileSubnets::open(store, Options::default())?.put_config_json(&args.network()).await?;
        let cancel = CancellationToken::new();
        // An error before the end of this function has to end the agents, too.
        let guard = cancel.clone().drop_guard();
        let ready = agents_ready(&underlay, store, agents, &cancel).await?;
        screen.end(&duration(step.elapsed()), Style::Dim)?;

        let step = Instant::now();
        screen.begin("a cni0 bridge and a pod behind each", WIDTH)?;
        let members = with_pods(&underlay, ready).await?;
        screen.end(&duration(step.elapsed()), Style::Dim)?;
        let families = Family::BOTH.into_iter().filter(|family| families.has(*family)).collect();
        Ok(Self { underlay, members, families, store: store.to_owned(), cancel: guard })
    }

    /// The lab, to be used elsewhere too.
    pub(crate) fn underlay(&self) -> &Arc<Underlay> {
        &self.underlay
    }

    /// The nodes.
    pub(crate) fn nodes(&self) -> &[Node] {
        self.underlay.nodes()
    }

    /// Nodes with what else there is of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Node, &Member)> {
        self.nodes().iter().zip(&self.members)
    }

    /// The families in use.
    pub(crate) fn families(&self) -> &[Family] {
        &self.families
    }

    /// Ends the agents in order, and makes sure that they took away what was theirs.
    pub(crate) async fn remove(self, screen: &mut Screen) -> Result<(), Error> {
        screen.section("End")?;
        let step = Instant::now();
        drop(self.cancel);
        for (node, member) in self.underlay.nodes().iter().zip(self.members) {
            member.task.await?.map_err(|error| format!("{}: {}", node.name, crate::chain(&error)))?;
        }
        let lab = Arc::clone(&self.underlay);
        let left = blocking(move || {
            let mut left = Vec::new();
            for node in lab.nodes() {
                let links = node.ns.links()?.into_iter().filter(|link| link.name.starts_with("flannel"));
                left.extend(links.map(|link| format!("{} in {}", link.name, node.name)));
            }
            Ok(left)
        });
        let mut left = left.await?;
        for record in fs::read_dir(self.store.join("leases"))? {
            left.push(format!("the lease {}", record?.path().display()));
        }
        if !left.is_empty() {
            return Err(format!("the agents left behind: {}", left.join(", ")).into());
        }
        let text = format!("Agents ended; devices, routes and leases removed in {}.", duration(step.elapsed()));
        Ok(screen.line(&[(&text, Style::Plain)])?)
    }
}

/// Work that waits for the kernel, where waiting does no harm.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, testkit::Error> + Send + 'static,
) -> Result<T, Error> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

/// An agent that has programmed all its peers.
struct Ready {
    handle: Handle,
    lease: Arc<Lease>,
    mtu: Mtu,
    task: Task,
}

async fn agents_ready(
    underlay: &Underlay,
    store: &Path,
    agents: &TaskTracker,
    cancel: &CancellationToken,
) -> Result<Vec<Ready>, Error> {
    let mut running = Vec::new();
    for node in underlay.nodes() {
        let overlay = overlay(node, store)?;
        running.push((overlay.handle(), agents.spawn(overlay.run(cancel.clone()))));
    }
    let peers = running.len() - 1;
    let mut ready = Vec::new();
    for (node, (handle, task)) in underlay.nodes().iter().zip(running) {
        ready.push(when_ready(node, handle, task, peers).await?);
    }
    Ok(ready)
}

async fn with_pods(underlay: &Arc<Underlay>, ready: Vec<Ready>) -> Result<Vec<Member>, Error> {
    // The kernel may take a second to announce a carrier, so they do not wait in turn.
    let attach = |(nth, ready): (usize, &Ready)| {
        let (lab, net) = (Arc::clone(underlay), PodNet { subnets: ready.lease.subnets, mtu: ready.mtu });
        tokio::spawn(blocking(move || lab.nodes()[nth].attach_pod(&net)))
    };
    let pods: Vec<_> = ready.iter().enumerate().map(attach).collect();
    let mut members = Vec::new();
    for (pod, Ready { handle, lease, mtu, task }) in pods.into_iter().zip(ready) {
        members.push(Member { handle, pod: pod.await??, lease, mtu, task });
    }
    Ok(members)
}

fn overlay(node: &Node, store: &Path) -> Result<Overlay, Error> {
    let kernel = NetlinkKernel::in_namespace(node.ns.as_fd().try_clone_to_owned()?)?;
    let kernel = kernel.with_data_plane(UdpDataPlane::new())?;
    let subnets = FileSubnets::open(store, Options::default().for_node(NodeIdentity::new(&node.name)?))?;
    let overlay = Overlay::builder()
        .backend("vxlan", Vxlan::new)
        .backend("host-gw", |_| Ok(HostGw))
        .backend("udp", Udp::new)
        .teardown(Teardown::Remove)
        .build(Arc::new(subnets), Arc::new(kernel))?;
    Ok(overlay)
}

/// Waits until an agent has programmed all its peers.
async fn when_ready(node: &Node, handle: Handle, mut task: Task, peers: usize) -> Result<Ready, Error> {
    let done = |status: &Status| status.phase == Phase::Ready && status.peers.accepted == peers;
    let status = match tokio::time::timeout(READY, handle.wait_for(done)).await {
        Ok(Ok(status)) => status,
        Ok(Err(_)) => {
            let error =
                (&mut task).await?.err().map_or_else(|| "its agent ended".to_owned(), |error| crate::chain(&error));
            return Err(format!("{}: {error}", node.name).into());
        }
        Err(_) => {
            let status = handle.status();
            let known = format!("{} of {peers} peers known", status.peers.accepted);
            let why = status.last_error.clone().unwrap_or(known);
            return Err(format!("{} is not ready after {}: {why}", node.name, duration(READY)).into());
        }
    };
    match (status.lease.clone(), status.mtu) {
        (Some(lease), Some(mtu)) => Ok(Ready { handle, lease, mtu, task }),
        _ => Err(format!("{} is ready without a lease", node.name).into()),
    }
}
