//! Routes to peers whose connected route is missing: the kernel keeps using such a route, but would not accept it
//! again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clock::BootTime;
use crate::kernel::{Op, Route};
use crate::net::Prefix;
use crate::plan::Plan;

/// How long a route whose connected route is missing is not replaced. A network manager that takes over a link deletes
/// the connected route and adds it again within moments; one that is missing for longer will not return.
const REPLACE_WAIT: Duration = Duration::from_secs(10);

/// Whether a route leads to a peer in a prefix of the host's, while the connected route to that prefix is missing.
pub(crate) type IsUnreached<'a> = dyn Fn(&Prefix, &Route) -> bool + 'a;

/// Such routes, as the last round found them: at most one for each prefix of a peer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unreached {
    routes: BTreeMap<Prefix, Noted>,
    /// The earliest time at which one of these may be replaced.
    replace_at: Option<BootTime>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Noted {
    /// Whether the plan deletes the route without a replacement, which is never done.
    deleted: bool,
    /// When it may be replaced by another route.
    replace_at: Option<BootTime>,
}

/// What a write does to a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    Deleted,
    Replaced,
}

impl Unreached {
    /// Notes which routes `plan` would delete or replace while their connected route is missing. The plan covers the
    /// prefixes for which `concerns` is true. Returns the prefixes whose state may have changed.
    pub(crate) fn note(
        &mut self,
        plan: &Plan,
        now: BootTime,
        is_unreached: &IsUnreached<'_>,
        concerns: impl Fn(&Prefix) -> bool,
    ) -> BTreeSet<Prefix> {
        let (old, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.routes).into_iter().partition(|(prefix, _)| concerns(prefix));
        self.routes = others;
        let mut changed: BTreeSet<Prefix> = old.keys().copied().collect();
        let taken: Vec<_> = plan.ops.iter().filter_map(|op| taken_away(op, is_unreached)).collect();
        // A deletion before the creation of another route is a replacement: IPv6 has no other way to some routes.
        let created = plan.ops.iter().filter(|_| !taken.is_empty()).filter_map(|op| match op {
            Op::CreateRoute { prefix, .. } => Some(*prefix),
            _ => None,
        });
        let created: BTreeSet<Prefix> = created.collect();
        for (prefix, write) in taken {
            changed.insert(prefix);
            let write = if created.contains(&prefix) { Write::Replaced } else { write };
            let noted = self.routes.entry(prefix).or_default();
            match write {
                Write::Deleted => noted.deleted = true,
                Write::Replaced => {
                    let before = old.get(&prefix).and_then(|old| old.replace_at);
                    noted.replace_at = before.or_else(|| Some(now.after(REPLACE_WAIT)));
                }
            }
        }
        self.look_ahead(now);
        changed
    }

    /// Keeps only future times: a past one would wake the agent without end.
    fn look_ahead(&mut self, now: BootTime) {
        let ahead = self.routes.values().filter_map(|noted| noted.replace_at).filter(|at| *at > now);
        self.replace_at = ahead.min();
    }

    /// Ends the waits that are over. Returns whether one ended.
    pub(crate) fn expire(&mut self, now: BootTime) -> bool {
        let is_over = self.replace_at.is_some_and(|at| at <= now);
        if is_over {
            self.look_ahead(now);
        }
        is_over
    }

    /// When to call [`expire`](Self::expire) next.
    pub(crate) fn deadline(&self) -> Option<BootTime> {
        self.replace_at
    }

    /// Prefixes whose route is or was recently kept.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = &Prefix> {
        self.routes.keys()
    }

    /// Whether the route to `prefix` is kept.
    pub(crate) fn is_kept(&self, prefix: &Prefix, now: BootTime) -> bool {
        let waits = |noted: &Noted| noted.deleted || noted.replace_at.is_some_and(|at| at > now);
        self.routes.get(prefix).is_some_and(waits)
    }

    /// Whether `op` waits for the connected route of the route that it deletes or replaces.
    pub(crate) fn holds(&self, op: &Op, now: BootTime, is_unreached: &IsUnreached<'_>) -> bool {
        let Some((prefix, write)) = taken_away(op, is_unreached) else { return false };
        // Only the complete plan shows whether a deletion is part of a replacement; `note` has checked that.
        self.routes.get(&prefix).is_none_or(|noted| {
            (write == Write::Deleted && noted.deleted) || noted.replace_at.is_none_or(|at| at > now)
        })
    }
}

/// The prefix of the route that `op` deletes or replaces and whose connected route is missing, and which of the two it
/// does.
fn taken_away(op: &Op, is_unreached: &IsUnreached<'_>) -> Option<(Prefix, Write)> {
    let (prefix, route, write) = match op {
        Op::DeleteRoute { prefix, route } => (prefix, route, Write::Deleted),
        Op::ReplaceRoute { prefix, change } => (prefix, &change.0, Write::Replaced),
        _ => return None,
    };
    is_unreached(prefix, route).then_some((*prefix, write))
}
