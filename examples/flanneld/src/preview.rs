//! What a start would change, as a document for programs.

use flannel_core::overlay::{Held, Preview};
use flannel_core::plan::{Op, OpText};
use serde::Serialize;

use crate::status::{Conflict, Named};

/// What `plan -json` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Document {
    /// Whether the store has a lease of this node; if not, nothing else is known.
    leased: bool,
    writes: Vec<String>,
    conflicts: Vec<Conflict>,
    /// Writes that are due and wait, with the reason.
    held: Vec<Named>,
}

impl Document {
    pub(crate) fn new(preview: Option<&Preview>) -> Self {
        let Some(Preview { plan, held, scope, .. }) = preview else {
            return Self { leased: false, writes: Vec::new(), conflicts: Vec::new(), held: Vec::new() };
        };
        let text = |op: &Op| OpText { op, scope }.to_string();
        let conflict = |conflict: &flannel_core::plan::Conflict| Conflict {
            found: conflict.found.clone(),
            remedy: conflict.remedy.clone(),
        };
        let waits = |Held { op, because, .. }: &Held| Named { name: text(op), reason: because.to_string() };
        Self {
            leased: true,
            writes: plan.ops.iter().map(text).collect(),
            conflicts: plan.conflicts.iter().map(conflict).collect(),
            held: held.iter().map(waits).collect(),
        }
    }
}
