//! What an audit would do now.

use std::fmt;

use crate::agent::status::WithheldBecause;
use crate::clock::BootTime;
use crate::kernel::{Op, OpText, Scope};
use crate::plan::Plan;

/// What the next audit would do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Preview {
    /// The writes and the conflicts.
    pub plan: Plan,
    /// Writes that are due but wait.
    pub held: Vec<Held>,
    /// The scope that names the links.
    pub scope: Scope,
}

/// A write that is due but waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The write.
    pub op: Op,
    /// Why it waits.
    pub because: HeldBecause,
}

/// Why a write waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeldBecause {
    /// Its prefix is in [`Status::withheld`](crate::agent::Status::withheld).
    #[error("{0}")]
    Withheld(WithheldBecause),
    /// Another program keeps changing the object. The write waits until this time.
    #[error("another program keeps changing it: find that program; until then writes are spaced out")]
    Flapping(BootTime),
    /// A write that it depends on waits.
    #[error("depends on an object that is deferred")]
    StandsOnHeld,
}

impl Preview {
    /// Creates a preview without waiting writes.
    pub fn new(plan: Plan, scope: Scope) -> Self {
        Self { plan, held: Vec::new(), scope }
    }

    /// Returns whether the kernel is as wanted: no writes, no conflicts, no waiting writes.
    pub fn is_settled(&self) -> bool {
        self.plan.is_empty() && self.plan.conflicts.is_empty() && self.held.is_empty()
    }
}

impl fmt::Display for Preview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for op in &self.plan.ops {
            writeln!(f, "{}", OpText { op, scope: &self.scope })?;
        }
        for conflict in self.plan.conflicts.iter().take(Plan::MOST_TOLD) {
            writeln!(f, "conflict: {conflict}")?;
        }
        let untold = self.plan.conflicts.len().saturating_sub(Plan::MOST_TOLD);
        if untold > 0 {
            writeln!(f, "and {untold} more conflicts")?;
        }
        for Held { op, because } in &self.held {
            writeln!(f, "deferred: {}: {because}", OpText { op, scope: &self.scope })?;
        }
        if self.is_settled() {
            writeln!(f, "nothing to do")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Object, OverlayName};
    use crate::net::Dual;
    use crate::plan::Conflict;

    #[test]
    fn of_many_conflicts_a_preview_tells_the_first_and_counts_the_others() {
        let conflict = |n: usize| Conflict {
            object: Object::Route("10.0.0.0/8".parse().unwrap()),
            found: if n < Plan::MOST_TOLD { format!("found {n}") } else { String::new() },
            remedy: String::new(),
        };
        let scope = Scope::new(OverlayName::default(), Dual::default());
        let preview = |count: usize| {
            let plan = Plan { ops: Vec::new(), conflicts: (0..count).map(conflict).collect() };
            Preview { plan, held: Vec::new(), scope: scope.clone() }.to_string()
        };
        let text = preview(Plan::MOST_TOLD + 7);
        assert_eq!(text.lines().count(), Plan::MOST_TOLD + 1);
        assert_eq!(text.lines().last(), Some("and 7 more conflicts"));
        assert!(!preview(Plan::MOST_TOLD).contains("more conflicts"));
    }
}
