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
use crate::status::{changed, reasons};

/// How long an agent has to wait for something before an Event shows it: every start waits for a moment.
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
            tracing::warn!(
                target: "flannel::kubernetes",
                error,
                "cannot set the condition NetworkUnavailable of the Node; retrying"
            );
            said = error;
        }
        sleep(backoff.wait()).await;
    }
    tracing::info!(target: "flannel::kubernetes", "condition NetworkUnavailable of the Node set to False");
}

/// Creates an Event of what the agent waits for, if it does so for [`SETTLE`], and another when it is ready. At most one
/// in [`PAUSE`].
pub(crate) async fn record(mut handle: Handle, mut rules: watch::Receiver<RulesState>, store: KubeSubnets) {
    let mut shown = None;
    loop {
        let Some(before) = waits(&handle, &mut rules) else { return };
        sleep(SETTLE).await;
        let Some(now) = waits(&handle, &mut rules) else { return };
        if before.is_empty() != now.is_empty() {
            continue;
        }
        if shown.as_ref() == Some(&now) {
            if !changed(&mut handle, &mut rules).await {
                return;
            }
            continue;
        }
        let created = match &*now {
            "" => store.record_event(EventKind::Normal, "FlannelReady", "the node's network is ready"),
            waits => store.record_event(EventKind::Warning, "FlannelWaits", waits),
        };
        match created.await {
            Ok(()) => shown = Some(now),
            // An account without the right, as Go flannel's, does not ask again and again.
            Err(error @ SubnetError::Denied { .. }) => {
                // The log has what keeps an agent from getting ready.
                if now.is_empty() {
                    tracing::info!(
                        target: "flannel::kubernetes",
                        error = chain(&error),
                        "no permission to create Events of the Node"
                    );
                }
                shown = Some(now);
            }
            Err(error) => {
                tracing::debug!(
                    target: "flannel::kubernetes",
                    error = chain(&error),
                    "cannot create an Event of the Node; retrying"
                )
            }
        }
        sleep(PAUSE).await;
    }
}

/// Returns what the agent waits for, each with what to do: nothing once it is ready. Returns `None` once it has ended.
fn waits(handle: &Handle, rules: &mut watch::Receiver<RulesState>) -> Option<String> {
    let (status, rules) = (handle.status(), rules.borrow_and_update());
    status.ended.is_none().then(|| reasons(&status, &rules).join("; "))
}
