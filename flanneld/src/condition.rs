//! What a Kubernetes Node shows of its network: the condition `NetworkUnavailable`, and Events.

use std::time::Duration;

use flannel_core::backoff::Backoff;
use flannel_core::firewall_keeper::RulesState;
use flannel_core::lease::Fence;
use flannel_core::overlay::{Handle, Status};
use flannel_core::subnet::SubnetError;
use flannel_subnet_kube::{EventKind, KubeSubnets};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::chain;
use crate::status::reasons;

/// How long an agent has to wait for something before an Event shows it: at each start it waits for a moment.
const SETTLE: Duration = Duration::from_secs(3);
/// The shortest time between two Events.
const PAUSE: Duration = Duration::from_secs(60);

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
        sleep(backoff.wait()).await;
    }
    tracing::info!("the node's condition NetworkUnavailable is False");
}

/// Creates an Event when the agent is not ready, with what it waits for, and another once it is ready again. At most one
/// in [`PAUSE`].
pub(crate) async fn record(mut handle: Handle, mut rules: watch::Receiver<RulesState>, store: KubeSubnets) {
    let (mut told, mut was_denied) = (String::new(), false);
    loop {
        sleep(SETTLE).await;
        let waits = {
            let (status, rules) = (handle.status(), rules.borrow_and_update());
            if status.ended.is_some() {
                return;
            }
            reasons(&status, &rules).join("; ")
        };
        if waits == told {
            tokio::select! {
                changed = handle.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                Ok(()) = rules.changed() => {}
            }
            continue;
        }
        let created = match &*waits {
            "" => store.record_event(EventKind::Normal, "FlannelReady", "the node's network is ready"),
            waits => store.record_event(EventKind::Warning, "FlannelWaits", waits),
        };
        match created.await {
            Ok(()) => told = waits,
            Err(error @ SubnetError::Denied { .. }) if !was_denied => {
                was_denied = true;
                let error = chain(&error);
                tracing::info!(
                    error,
                    "the Node gets no Events: the account may not create events in the namespace default"
                );
            }
            // The log says already that the server does not answer. The next one is tried after the pause.
            Err(_) => {}
        }
        sleep(PAUSE).await;
    }
}
