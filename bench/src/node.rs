//! Our side: an agent on the caller's network namespace, with a store in memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{Handle, Overlay, OverlayError, Phase, Status, Teardown};
use flannel_core::subnet::{NodeIdentity, ThisNode};
use flannel_core::testing::MemorySubnets;
use tokio_util::sync::CancellationToken;

use bench::Error;
use bench::peers::{config, peer};

/// How long anything may take before the benchmark gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A store with node 0, which is ours, and peers 1 to `n`.
pub(crate) fn store(n: u32) -> Result<MemorySubnets, Error> {
    let store = MemorySubnets::new(NetworkConfig::parse(config().as_bytes(), Allocation::Pool)?);
    // Its own subnet too, so that no later peer is in its way.
    store.insert((0..=n).map(peer));
    Ok(store)
}

/// An agent that is running.
pub(crate) struct Node {
    pub(crate) handle: Handle,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), OverlayError>>,
}

impl Node {
    /// Starts an agent and waits until everything is programmed.
    pub(crate) async fn start(store: &MemorySubnets, teardown: Teardown) -> Result<(Self, Duration), Error> {
        let started = Instant::now();
        let kernel = Arc::new(NetlinkKernel::new()?);
        let overlay = Overlay::builder()
            .backend("vxlan", Vxlan::new)
            .teardown(teardown)
            .audit_every(Duration::from_secs(600))
            .build(Arc::new(store.for_node(ThisNode::named(NodeIdentity::new("node-0")?))), kernel)?;
        let handle = overlay.handle();
        let cancel = CancellationToken::new();
        let task = tokio::spawn(overlay.run(cancel.clone()));
        let node = Self { handle, cancel, task };
        node.until(|status| status.phase == Phase::Ready).await?;
        Ok((node, started.elapsed()))
    }

    /// Waits for a status.
    pub(crate) async fn until(&self, reached: impl Fn(&Status) -> bool) -> Result<(), Error> {
        let waited = tokio::time::timeout(PATIENCE, self.handle.wait_for(reached)).await;
        match waited.map_err(|_| "the agent did not get there")? {
            Ok(_) => Ok(()),
            Err(ended) => Err(format!("{ended}: {:?}", self.handle.status().last_error).into()),
        }
    }

    /// Waits until what followed the start has settled: the second look after the devices were made.
    pub(crate) async fn settle(&self) -> Result<(), Error> {
        self.until(|status| status.audits >= 2).await
    }

    /// Ends the agent as its teardown policy says.
    pub(crate) async fn stop(self) -> Result<Duration, Error> {
        let started = Instant::now();
        self.cancel.cancel();
        self.task.await??;
        Ok(started.elapsed())
    }
}
