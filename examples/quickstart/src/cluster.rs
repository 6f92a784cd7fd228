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
use flannel_core::overlay::{Handle, Overlay, Running, Status, Teardown};
use flannel_core::subnet::NodeIdentity;
use flannel_subnet_file::{FileSubnets, Options};
use futures_util::future::join_all;
use testkit::{Node, Pod, PodNet, Underlay};

use crate::Error;
use crate::args::Args;
use crate::screen::{Screen, Style, duration};

/// How long an agent may take to program everything.
const READY: Duration = Duration::from_secs(10);

/// The whole cluster. Dropping it aborts the agents: anything left is in namespaces that end with this process.
pub(crate) struct Cluster {
    underlay: Arc<Underlay>,
    /// One per node, in the nodes' order.
    pub(crate) members: Vec<Member>,
    families: Vec<Family>,
    store: PathBuf,
}

/// The parts of a node besides its namespace.
pub(crate) struct Member {
    running: Running,
    pub(crate) pod: Pod,
    pub(crate) lease: Arc<Lease>,
    /// The MTU of its pods.
    pub(crate) mtu: Mtu,
}

impl Member {
    pub(crate) fn handle(&self) -> &Handle {
        self.running.handle()
    }
}

impl Cluster {
    pub(crate) async fn start(args: &Args, screen: &mut Screen, store: &Path) -> Result<Self, Error> {
        const WIDTH: usize = 60;
        let (count, families) = (usize::from(args.nodes), args.families());
        let step = Instant::now();
        screen.begin(&format!("{count} namespaces on one underlay"), WIDTH)?;
        let underlay = Arc::new(blocking(move || Underlay::new(count, families)).await?);
        screen.end(&duration(step.elapsed()), Style::Dim)?;

        let step = Instant::now();
        screen.begin("an agent in each, ready with all peers", WIDTH)?;
        FileSubnets::open(store, Options::default())?.put_config_json(&args.network()).await?;
        let ready = agents_ready(&underlay, store).await?;
        screen.end(&duration(step.elapsed()), Style::Dim)?;

        let step = Instant::now();
        screen.begin("a cni0 bridge and a pod behind each", WIDTH)?;
        let members = with_pods(&underlay, ready).await?;
        screen.end(&duration(step.elapsed()), Style::Dim)?;
        let families = Family::BOTH.into_iter().filter(|family| families.has(*family)).collect();
        Ok(Self { underlay, members, families, store: store.to_owned() })
    }

    /// Returns the lab, for use elsewhere.
    pub(crate) fn underlay(&self) -> &Arc<Underlay> {
        &self.underlay
    }

    /// Returns the nodes.
    pub(crate) fn nodes(&self) -> &[Node] {
        self.underlay.nodes()
    }

    /// Returns the nodes with their other parts.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Node, &Member)> {
        self.nodes().iter().zip(&self.members)
    }

    /// Returns the families in use.
    pub(crate) fn families(&self) -> &[Family] {
        &self.families
    }

    /// Ends the agents in order, and checks that they removed everything they created.
    pub(crate) async fn remove(self, screen: &mut Screen) -> Result<(), Error> {
        screen.section("End")?;
        let step = Instant::now();
        let ends = self.members.into_iter().map(|member| member.running.shutdown(Teardown::Remove));
        for (node, end) in self.underlay.nodes().iter().zip(join_all(ends).await) {
            end.map_err(|error| format!("{}: {}", node.name, crate::chain(&error)))?;
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

/// Runs work that waits for the kernel on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, testkit::Error> + Send + 'static,
) -> Result<T, Error> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

/// An agent that has programmed all its peers.
struct Ready {
    running: Running,
    lease: Arc<Lease>,
    mtu: Mtu,
}

async fn agents_ready(underlay: &Underlay, store: &Path) -> Result<Vec<Ready>, Error> {
    let running = underlay.nodes().iter().map(|node| Ok(overlay(node, store)?.spawn()?));
    let running = running.collect::<Result<Vec<_>, Error>>()?;
    let peers = running.len() - 1;
    let mut ready = Vec::new();
    for (node, running) in underlay.nodes().iter().zip(running) {
        ready.push(when_ready(node, running, peers).await?);
    }
    Ok(ready)
}

async fn with_pods(underlay: &Arc<Underlay>, ready: Vec<Ready>) -> Result<Vec<Member>, Error> {
    // The kernel may take a second to announce a carrier, so all wait at the same time.
    let attach = |(nth, ready): (usize, &Ready)| {
        let (lab, net) = (Arc::clone(underlay), PodNet { subnets: ready.lease.subnets, mtu: ready.mtu });
        tokio::spawn(blocking(move || lab.nodes()[nth].attach_pod(&net)))
    };
    let pods: Vec<_> = ready.iter().enumerate().map(attach).collect();
    let mut members = Vec::new();
    for (pod, Ready { running, lease, mtu }) in pods.into_iter().zip(ready) {
        members.push(Member { running, pod: pod.await??, lease, mtu });
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
        .build(Arc::new(subnets), Arc::new(kernel))?;
    Ok(overlay)
}

/// Waits until an agent has programmed all its peers.
async fn when_ready(node: &Node, running: Running, peers: usize) -> Result<Ready, Error> {
    let done = |status: &Status| status.is_ready() && status.peers.accepted == peers;
    let status = match tokio::time::timeout(READY, running.handle().wait_for(done)).await {
        Ok(Ok(status)) => status,
        Ok(Err(ended)) => return Err(format!("{}: {ended}", node.name).into()),
        Err(_) => {
            let status = running.handle().status();
            let known = format!("{} of {peers} peers known", status.peers.accepted);
            let why = status.waits_for().first().map_or(known, |wait| format!("it waits for {wait}"));
            return Err(format!("{} is not ready after {}: {why}", node.name, duration(READY)).into());
        }
    };
    match (status.lease.clone(), status.mtu) {
        (Some(lease), Some(mtu)) => Ok(Ready { running, lease, mtu }),
        _ => Err(format!("{} is ready without a lease", node.name).into()),
    }
}
