//! An overlay on each of two hosts, both in this process, with one store in memory.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel_backend_udp::{Observer, Udp, UdpDataPlane};
use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::Overlay;
use flannel_core::subnet::{NodeIdentity, ThisNode};
use flannel_core::testing::MemorySubnets;
use testkit::{Agent, wait_until};
use tokio::runtime::Runtime;

use bench::Error;
use bench::peers::{Backend, config, lease};

use crate::udp::pair::Pair;

/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two agents that are ready. They end when it is dropped.
#[derive(Debug)]
pub(crate) struct Library {
    _runtime: Runtime,
    store: MemorySubnets,
    backend: Backend,
    peers: u32,
    /// Of the second host's data plane.
    observer: Observer,
}

impl Library {
    /// Starts them among `peers` peers, of whom the second host is one; the others exist on paper.
    pub(crate) fn start(pair: &Pair, backend: Backend, peers: u32) -> Result<Self, Error> {
        let store = MemorySubnets::new(NetworkConfig::parse(config(backend).as_bytes(), Allocation::Pool)?);
        store.insert((0..=peers).map(|n| lease(backend, n)));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (mut agents, mut observer) = (Vec::new(), Observer::default());
        for (n, host) in pair.hosts.iter().enumerate() {
            let kernel = NetlinkKernel::in_namespace(host.ns.as_fd().try_clone_to_owned()?)?;
            let plane = UdpDataPlane::new();
            observer = plane.observer();
            let kernel = kernel.with_data_plane(plane)?;
            let node = ThisNode::named(NodeIdentity::new(&format!("node-{n}"))?);
            let overlay = Overlay::builder()
                .backend(Backend::Vxlan.name(), Vxlan::new)
                .backend(Backend::Udp.name(), Udp::new)
                .audit_every(Duration::from_secs(600))
                .build(Arc::new(store.for_node(node)), Arc::new(kernel))?;
            let _inside = runtime.enter();
            agents.push(Agent::start(overlay, PATIENCE));
        }
        for agent in &agents {
            runtime
                .block_on(agent.try_until(|status| status.audits >= 2 && status.peers.accepted == peers as usize))?;
        }
        Ok(Self { _runtime: runtime, store, backend, peers, observer })
    }

    /// Has the store tell of one more peer. Returns how long it takes until the second host forwards to it.
    pub(crate) fn change(&self) -> Result<Duration, Error> {
        let forwards = || self.observer.devices().iter().map(|device| device.forwards).sum::<usize>();
        let (before, start) = (forwards(), Instant::now());
        self.store.insert([lease(self.backend, self.peers + 1)]);
        wait_until("the change", PATIENCE, || Ok(forwards() > before))?;
        let took = start.elapsed();
        self.store.delete(&lease(self.backend, self.peers + 1).key);
        wait_until("the change back", PATIENCE, || Ok(forwards() == before))?;
        Ok(took)
    }
}
