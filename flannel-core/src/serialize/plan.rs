//! Planned writes, and explanations of peers.

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::kernel::{Op, OpText, PeerState, Scope};
use crate::net::Family;
use crate::overlay::{Explanation, Held, Preview, Verdict};
use crate::plan::{Conflict, Plan};

use super::Text;

impl Serialize for Conflict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut conflict = serializer.serialize_struct("Conflict", 3)?;
        conflict.serialize_field("object", &self.object)?;
        conflict.serialize_field("found", &self.found)?;
        conflict.serialize_field("remedy", &self.remedy)?;
        conflict.end()
    }
}

impl Serialize for Preview {
    /// Lists the first [`Plan::MOST_TOLD`] conflicts.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Waiting<T> {
            write: T,
            reason: String,
        }
        let Self { plan, held, scope } = self;
        fn text<'a>(op: &'a Op, scope: &'a Scope) -> Text<OpText<'a>> {
            Text(OpText { op, scope })
        }
        let writes: Vec<_> = plan.ops.iter().map(|op| text(op, scope)).collect();
        let conflicts: Vec<_> = plan.conflicts.iter().take(Plan::MOST_TOLD).collect();
        let held: Vec<_> = held
            .iter()
            .map(|Held { op, because }| Waiting { write: text(op, scope), reason: because.to_string() })
            .collect();
        let mut preview = serializer.serialize_struct("Preview", 4)?;
        preview.serialize_field("writes", &writes)?;
        preview.serialize_field("conflicts", &conflicts)?;
        preview.serialize_field("conflict_count", &plan.conflicts.len())?;
        preview.serialize_field("deferred", &held)?;
        preview.end()
    }
}

impl Serialize for Verdict {
    /// `{"kind": "accepted"}`, `{"kind": "own"}`, or `{"kind": "quarantined", "reason": …}`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (kind, reason) = match self {
            Self::Accepted => ("accepted", None),
            Self::Own => ("own", None),
            Self::Quarantined(reason) => ("quarantined", Some(reason)),
        };
        let mut verdict = serializer.serialize_struct("Verdict", 1 + usize::from(reason.is_some()))?;
        verdict.serialize_field("kind", kind)?;
        if let Some(reason) = reason {
            verdict.serialize_field("reason", reason)?;
        }
        verdict.end()
    }
}

impl Serialize for PeerState {
    /// `{"routes": [{"prefix": …, "gateway": …, "table": …, "metric": …}], "neighbour": {"address": …, "mac": …},
    /// "fdb": {"mac": …, "destination": …}, "forward": {"prefix": …, "endpoint": …}}`; absent parts are null.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Route<'a, P, G> {
            prefix: &'a P,
            gateway: Option<G>,
            table: u32,
            metric: u32,
        }
        #[derive(Serialize)]
        struct Neighbour<A, M> {
            address: A,
            mac: M,
        }
        #[derive(Serialize)]
        struct Entry<M, D> {
            mac: M,
            destination: D,
        }
        #[derive(Serialize)]
        struct Forward<P, E> {
            prefix: P,
            endpoint: E,
        }
        let routes: Vec<_> = self
            .routes
            .iter()
            .map(|(prefix, route)| {
                let slot = route.slot();
                Route { prefix, gateway: route.gateway, table: slot.table, metric: slot.metric }
            })
            .collect();
        let neighbour = self.neighbour.map(|(key, mac)| Neighbour { address: key.addr, mac });
        let fdb = self.fdb.map(|(key, destination)| Entry { mac: key.mac, destination });
        let forward = self.forward.map(|(key, to)| Forward { prefix: key.prefix, endpoint: to.endpoint });
        let mut state = serializer.serialize_struct("PeerState", 4)?;
        state.serialize_field("routes", &routes)?;
        state.serialize_field("neighbour", &neighbour)?;
        state.serialize_field("fdb", &fdb)?;
        state.serialize_field("forward", &forward)?;
        state.end()
    }
}

impl Serialize for Explanation {
    /// `{"key": …, "verdict": …, "lease": …, "states": [{"family": …, "wanted": …, "skipped": …}], "unsettled": […]}`:
    /// in each state one of `wanted` and `skipped` is null.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct State<'a, W, S> {
            family: &'a Family,
            wanted: Option<W>,
            skipped: Option<S>,
        }
        let states: Vec<_> = self
            .states
            .iter()
            .map(|(family, state)| State { family, wanted: state.as_ref().ok(), skipped: state.as_ref().err() })
            .collect();
        let mut explanation = serializer.serialize_struct("Explanation", 5)?;
        explanation.serialize_field("key", &self.key)?;
        explanation.serialize_field("verdict", &self.verdict)?;
        explanation.serialize_field("lease", &self.lease.as_deref())?;
        explanation.serialize_field("states", &states)?;
        explanation.serialize_field("unsettled", &self.unsettled)?;
        explanation.end()
    }
}
