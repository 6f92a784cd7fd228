//! What a start would change, as a document for programs.

use flannel_core::kernel::{Op, OpText};
use flannel_core::overlay::{Held, Preview};
use flannel_core::plan::Plan;
use serde::Serialize;

use crate::status::{Conflict, Named};

/// What `plan -json` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Document {
    /// Whether the store has a lease of this node; if not, nothing else is known.
    leased: bool,
    writes: Vec<String>,
    /// No more than [`Plan::MOST_TOLD`].
    conflicts: Vec<Conflict>,
    /// How many there are, with those that are not listed.
    conflict_count: usize,
    /// Writes that are due and wait, with the reason.
    held: Vec<Named>,
}

impl Document {
    pub(crate) fn new(preview: Option<&Preview>) -> Self {
        let Some(Preview { plan, held, scope, .. }) = preview else {
            let (writes, conflicts, held) = (Vec::new(), Vec::new(), Vec::new());
            return Self { leased: false, writes, conflicts, conflict_count: 0, held };
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
            conflicts: plan.conflicts.iter().take(Plan::MOST_TOLD).map(conflict).collect(),
            conflict_count: plan.conflicts.len(),
            held: held.iter().map(waits).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::kernel::{Object, OverlayName, Scope};
    use flannel_core::net::Dual;

    #[test]
    fn of_many_conflicts_the_first_are_listed_and_all_counted() {
        let object = Object::Route("10.0.0.0/8".parse().unwrap());
        let conflict = flannel_core::plan::Conflict { object, found: String::new(), remedy: String::new() };
        let plan = Plan { ops: Vec::new(), conflicts: vec![conflict; Plan::MOST_TOLD + 7] };
        let preview = Preview::new(plan, Scope::new(OverlayName::default(), Dual::default()));
        let document = Document::new(Some(&preview));
        assert_eq!((document.conflicts.len(), document.conflict_count), (Plan::MOST_TOLD, Plan::MOST_TOLD + 7));
    }
}
