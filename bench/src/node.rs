//! Our side: an agent on the caller's network namespace, with a store in memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{Overlay, Teardown};
use flannel_core::subnet::{NodeIdentity, ThisNode};
use flannel_core::testing::MemorySubnets;
use testkit::Agent;

use bench::Error;
use bench::peers::{Backend, config, peer};

/// How long anything may take before the benchmark gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A store with node 0, which is ours, and peers 1 to `n`.
pub(crate) fn store(n: u32) -> Result<MemorySubnets, Error> {
    let store = MemorySubnets::new(NetworkConfig::parse(config(Backend::Vxlan).as_bytes(), Allocation::Pool)?);
    // Its own subnet too, so that no later peer is in its way.
    store.insert((0..=n).map(peer));
    Ok(store)
}

/// Starts an agent and waits until everything is programmed.
pub(crate) async fn start(store: &MemorySubnets) -> Result<(Agent, Duration), Error> {
    let started = Instant::now();
    let kernel = Arc::new(NetlinkKernel::new()?);
    let overlay = Overlay::builder()
        .backend("vxlan", Vxlan::new)
        .audit_every(Duration::from_secs(600))
        .build(Arc::new(store.for_node(ThisNode::named(NodeIdentity::new("node-0")?))), kernel)?;
    let agent = Agent::start(overlay, PATIENCE).once_ready().await;
    Ok((agent, started.elapsed()))
}

/// Waits until what followed the start has settled: the second look after the devices were made.
pub(crate) async fn settle(agent: &Agent) {
    agent.until(|status| status.audits >= 2).await;
}

/// Ends an agent.
pub(crate) async fn stop(agent: Agent, teardown: Teardown) -> Result<Duration, Error> {
    let started = Instant::now();
    agent.stop(teardown);
    agent.ended().await?;
    Ok(started.elapsed())
}
