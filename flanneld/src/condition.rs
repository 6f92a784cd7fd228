//! The condition of a Kubernetes Node that shows whether its network is up.

use flannel_core::backoff::Backoff;
use flannel_core::lease::Fence;
use flannel_core::overlay::{Handle, Status};
use flannel_subnet_kube::KubeSubnets;

use crate::chain;

/// Writes `NetworkUnavailable=False` once the overlay is ready, with retries until it succeeds, and again if the Node
/// was deleted and created again. The condition is never reset, because the data plane outlives the agent.
pub(crate) async fn tell(handle: Handle, store: KubeSubnets) {
    let mut told: Option<Fence> = None;
    loop {
        // The lease of a Node that was created again has another fence.
        let is_due = |status: &Status| {
            status.is_ready() && status.lease.as_ref().is_some_and(|lease| told.as_ref() != Some(&lease.fence))
        };
        // An error means that the agent has ended.
        let Ok(status) = handle.wait_for(is_due).await else { return };
        write(&store).await;
        told = status.lease.as_ref().map(|lease| lease.fence.clone());
    }
}

async fn write(store: &KubeSubnets) {
    let (mut backoff, mut said) = (Backoff::default(), String::new());
    while let Err(error) = store.set_network_unavailable(false).await {
        let error = chain(&error);
        if error != said {
            tracing::warn!(error, "the node's condition NetworkUnavailable was not written; it is tried again");
            said = error;
        }
        tokio::time::sleep(backoff.wait()).await;
    }
    tracing::info!("the node's condition NetworkUnavailable is False");
}
