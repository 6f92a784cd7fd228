//! The condition of a Kubernetes Node that tells whether its network is up.

use flannel_core::backoff::Backoff;
use flannel_core::overlay::{Handle, Phase};
use flannel_subnet_kube::KubeSubnets;

use crate::chain;

/// Writes `NetworkUnavailable=False` once the overlay is ready, and tries until that is done. It is never written back:
/// the data plane outlives the agent.
pub(crate) async fn tell(handle: Handle, store: KubeSubnets) {
    // An error: the agent ended before it was ready.
    if handle.wait_for(|status| status.phase == Phase::Ready).await.is_err() {
        return;
    }
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
