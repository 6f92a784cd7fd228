//! Whether other nodes take this one for a peer.

use flannel_core::overlay::Handle;

/// Warns when the own record becomes one that others do not take, or for another reason, until the agent ends.
pub(crate) async fn warn(handle: Handle) {
    let mut status = handle.status();
    let mut told = None;
    loop {
        let trouble = status.borrow_and_update().own_trouble.clone();
        if trouble != told {
            match &trouble {
                Some(reason) => {
                    let remedy = reason.remedy();
                    tracing::warn!(%reason, remedy, "other nodes do not take the own record for a peer");
                }
                None => tracing::info!("other nodes take the own record for a peer again"),
            }
            told = trouble;
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}
