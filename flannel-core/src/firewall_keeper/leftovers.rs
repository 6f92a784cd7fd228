//! Rules of a former run in another packet filter.

use std::sync::Arc;

use crate::firewall::{Firewall, FirewallError};
use crate::kernel::OverlayName;
use crate::text::chain;

/// Rules that a former run wrote with another tool. They are removed once the new rules are in place; a failed removal
/// is retried with every check of the rules.
#[derive(Default)]
pub(super) struct Leftovers {
    /// The tool, until all its rules are removed.
    tool: Option<Arc<dyn Firewall>>,
    logged: Option<String>,
}

impl Leftovers {
    pub(super) fn of(tool: Option<Arc<dyn Firewall>>) -> Self {
        Self { tool, logged: None }
    }

    pub(super) async fn clear(&mut self, overlay: &OverlayName) {
        let Some(tool) = &self.tool else { return };
        match tool.remove(overlay).await {
            // A tool that is not installed has no rules.
            Ok(()) | Err(FirewallError::Unsupported { .. }) => self.tool = None,
            Err(error) => {
                let text = chain(&error);
                if self.logged.as_ref() != Some(&text) {
                    tracing::warn!(
                        target: "flannel::firewall",
                        error = text,
                        "cannot remove the rules of the other packet filter; retrying"
                    );
                    self.logged = Some(text);
                }
            }
        }
    }
}
