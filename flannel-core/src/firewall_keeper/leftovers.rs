//! What another packet filter has of a former run.

use std::sync::Arc;

use crate::firewall::{Firewall, FirewallError};
use crate::kernel::OverlayName;
use crate::text::chain;

/// Rules of a former run that another tool wrote. They are removed once the new ones are in place; what could not be
/// removed is tried again with every check of the rules.
#[derive(Default)]
pub(super) struct Leftovers {
    /// The tool, until nothing of it is left.
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
                    tracing::warn!(error = text, "rules of the other packet filter were not removed: trying again");
                    self.logged = Some(text);
                }
            }
        }
    }
}
