//! The decision core of an agent: it turns inputs into calls. It has no runtime, reads no clock and does no I/O; the
//! caller passes the time in.
//!
//! After each input, a driver calls:
//!
//! 1. [`handle`](Machine::handle) with each [`Input`]: an event of the store, a hint or an answer of the kernel, an
//!    answer about the lease, or the timer.
//! 2. [`kernel_call`](Machine::kernel_call) if no kernel call is under way, and [`store_call`](Machine::store_call) if
//!    no store call is. The driver carries the returned calls out, and passes their answers in as inputs.
//! 3. [`take_status`](Machine::take_status) and [`take_events`](Machine::take_events), to publish them.
//! 4. [`deadline`](Machine::deadline): when to pass in [`Input::Timer`] if nothing else happens.
//!
//! Any number of inputs may be handled before the calls are requested: a burst becomes one round.

mod contention;
mod divergence;
mod explain;
mod flapping;
mod former_networks;
mod guard;
mod host;
pub(crate) mod inputs;
mod own_lease;
mod peer_list;
mod preview;
mod protected;
mod readiness;
mod reconfiguration;
mod refused;
mod relist;
mod removals;
mod renewal;
mod rounds;
mod settings;
mod show;
mod status;
mod store_events;
mod store_health;
#[cfg(test)]
mod tests;
mod unreached;
mod wanted;

use crate::kernel::{ApplyReport, Hint, HostFacts, KernelError, LinkNames, Object, Op, Route, Scope, State};
use crate::plan::{Conflict, Plan};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::admit::Admission;
use crate::agent::divergence::Divergence;
use crate::agent::guard::{Guard, Over, Restrained};
use crate::agent::host::Selection;
use crate::agent::inputs::Settling;
use crate::agent::reconfiguration::Reconfiguration;
use crate::agent::refused::Refused;
use crate::agent::renewal::Renewal;
use crate::agent::store_health::{Source, StoreHealth};
use crate::backend::{Backend, LocalNode, NodeContext};
use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent, LeaseKey};
use crate::net::{Dual, Prefix};

use crate::subnet::SubnetError;
use crate::text::chain;
use crate::uplink::Select;

use relist::Relist;

pub use explain::{Explanation, Verdict};
pub use peer_list::{PeerList, PeerRow, Standing};
pub use preview::{Held, HeldBecause, Preview};
pub use readiness::{Degraded, End, UplinkState, Wait};
pub use settings::{ConfigPolicy, LossPolicy, Masquerade, MissingUplink, SubnetEnvFile, Teardown};
pub use status::{
    Contact, Contended, EnvFile, Event, LossReason, PeerCounts, Phase, Refusal, Status, SubscriptionState,
    WithheldBecause,
};

pub(crate) use explain::explain;
pub(crate) use renewal::StoreCall;
pub(crate) use settings::Settings;

/// The minimum interval of audits after hints, so that a storm of notifications uses a bounded share of a core.
const SPACING: Duration = Duration::from_millis(200);

/// An input of the machine.
#[derive(Debug)]
pub(crate) enum Input {
    Store(Result<LeaseEvent, SubnetError>),
    Hint(Hint),
    Facts(Result<HostFacts, KernelError>),
    Seen(Result<State, KernelError>),
    Applied(ApplyReport),
    Lease(Result<Lease, SubnetError>),
    /// The configuration in the store.
    Config(Result<NetworkConfig, SubnetError>),
    /// The state of `subnet.env`, which the driver writes.
    EnvFile(EnvFile),
    /// Another uplink selection.
    Uplink(Select),
    Timer,
}

/// A call to the kernel.
#[derive(Debug)]
pub(crate) enum KernelCall {
    /// Read the host. Of the far routes, only those to these addresses are kept.
    Facts(Vec<IpAddr>),
    Observe(Scope),
    Apply(Scope, Arc<Vec<Op>>),
}

pub(crate) struct Machine {
    settings: Arc<Settings>,
    backend: Arc<dyn Backend>,
    local: Arc<LocalNode>,
    scope: Scope,
    admission: Admission,
    /// The number of accepted peers, and of their prefixes.
    accepted: usize,
    prefixes: usize,
    renewal: Renewal,
    guard: Guard,
    /// The writes of the last audit that the kernel refused.
    refused: Refused,
    divergence: Divergence,
    /// Peers that changed since the last round, each from its written to its wanted lease.
    changes: BTreeMap<LeaseKey, Change>,
    /// Whether the store has listed all records.
    synced: bool,
    relist: Relist,
    round: Round,
    /// Networks of former runs that are not part of the scope yet.
    former: Vec<Prefix>,
    /// A change of uplink that waits to be stable.
    settling: Option<Settling>,
    selection: Selection,
    /// When the MAC address was last changed because an older record has the same one.
    mac_changed: Option<BootTime>,
    audit: Schedule,
    backoff: Backoff,
    jitter: Jitter,
    /// The state of contact with the store.
    health: StoreHealth,
    reconfiguration: Reconfiguration,
    status: Status,
    /// Whether the status has changed since it was last taken.
    status_changed: bool,
    /// The parts of the status that are not up to date with the records.
    stale: Stale,
    /// An error that no retry can fix.
    fatal: Option<KernelError>,
    events: Vec<Event>,
}

#[derive(Debug, Default)]
struct Change {
    old: Option<Arc<Lease>>,
    new: Option<Arc<Lease>>,
}

/// The parts of the status that are not up to date. They are tracked so that the cost of an event does not depend on
/// the number of peers.
#[derive(Debug, Default)]
struct Stale {
    /// Whether records were added, removed or changed.
    peers: bool,
    /// Prefixes that may have become withheld, or may no longer be.
    prefixes: BTreeSet<Prefix>,
    /// Whether that applies to all prefixes.
    all_prefixes: bool,
}

/// When the next audit is due, and what it reads.
#[derive(Debug, Default)]
struct Schedule {
    due: Option<BootTime>,
    /// When the next audit without a cause is due.
    periodic: Option<BootTime>,
    /// Whether the host has to be read again before the overlay's own objects.
    facts: bool,
    /// When the last audit began.
    last: Option<BootTime>,
    /// No audit begins earlier, not even after a hint, because an observation failed.
    not_before: Option<BootTime>,
    /// Whether the first audit is done: differences that are found later are drift.
    done_once: bool,
    /// Whether the state that the first audit found was compared with the peers of the store.
    judged: bool,
    /// Whether writes are expected because the wanted state changed as a whole.
    expected: bool,
    /// Whether the audit has to precede the next lease round, because it deletes objects that are in the way of changed
    /// peers.
    comes_first: bool,
}

#[derive(Debug)]
enum Round {
    Idle,
    Facts,
    Looking { started: BootTime },
    Auditing { audit: Audit, seen: Box<State> },
    Leasing { ops: Arc<Vec<Op>> },
}

/// An audit whose writes are under way.
#[derive(Debug)]
struct Audit {
    started: BootTime,
    /// Whether its writes repair objects that had been as wanted.
    drift: bool,
    /// Objects of peers that changed during the observation: writes to them are never drift.
    moved: BTreeSet<Object>,
    ops: Arc<Vec<Op>>,
    conflicts: Vec<Conflict>,
}

impl Machine {
    pub(crate) fn new(
        settings: Arc<Settings>,
        backend: Arc<dyn Backend>,
        local: LocalNode,
        status: Status,
        now: BootTime,
        jitter: Jitter,
    ) -> Self {
        let local = Arc::new(local);
        let mut machine = Self {
            scope: inputs::scope(&settings, &*backend, &local),
            admission: inputs::admission(Arc::clone(&backend), &settings, &local),
            accepted: 0,
            prefixes: 0,
            renewal: Renewal::new(Arc::clone(&local.lease), settings.on_loss, settings.known_by(), now, jitter.clone()),
            guard: Guard::default(),
            refused: Refused::default(),
            divergence: Divergence::default(),
            changes: BTreeMap::new(),
            synced: false,
            relist: Relist::new(jitter.clone()),
            round: Round::Idle,
            former: Vec::new(),
            settling: None,
            selection: Selection::InUse,
            mac_changed: None,
            audit: Schedule { due: Some(now), ..Schedule::default() },
            backoff: Backoff::new(jitter.clone()),
            reconfiguration: Reconfiguration::new(jitter.clone()),
            jitter,
            health: StoreHealth::default(),
            status,
            status_changed: true,
            stale: Stale::default(),
            fatal: None,
            events: vec![Event::LeaseAcquired(Arc::clone(&local.lease))],
            settings,
            backend,
            local,
        };
        machine.judge_host(now);
        let NodeContext { uplink, .. } = &machine.local.context;
        let lease = Arc::clone(&machine.local.lease);
        let uplink = match inputs::uplink_trouble(&machine.local.context) {
            None => UplinkState::Up(uplink.clone()),
            Some(error) => {
                machine.events.push(Event::UplinkLost(error.clone()));
                machine.status.uplink.lost(Some(uplink.clone()), now, error)
            }
        };
        let network = Arc::clone(&machine.local.context.config);
        let unknown = machine.local.context.host.left_out;
        let mtu = inputs::pod_mtu(&*machine.backend, &machine.local.context);
        machine.show(|status| {
            (status.phase, status.starting) = (Phase::LeaseHeld, None);
            status.network = Some(network);
            (status.lease, status.lease_refused) = (Some(lease), None);
            (status.uplink, status.mtu) = (uplink, Some(mtu));
            status.unknown_host_objects = unknown;
        });
        machine
    }

    /// Has the host read again before anything is written, because it may have changed.
    pub(crate) fn doubt_host(&mut self) {
        self.audit.facts = true;
    }

    pub(crate) fn local(&self) -> &Arc<LocalNode> {
        &self.local
    }

    pub(crate) fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Returns the scope with the names of the host's links, for texts.
    fn named_scope(&self) -> Scope {
        Scope { names: LinkNames::of(Arc::clone(&self.local.context.host)), ..self.scope.clone() }
    }

    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.admission
    }

    pub(crate) fn divergence(&self) -> &Divergence {
        &self.divergence
    }

    pub(crate) fn status(&self) -> &Status {
        &self.status
    }

    /// Returns the status if it has changed since the last call.
    pub(crate) fn take_status(&mut self) -> Option<&Status> {
        std::mem::take(&mut self.status_changed).then_some(&self.status)
    }

    /// Returns the events since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// The lease as last seen in the store, if this node still holds it.
    pub(crate) fn held_lease(&self) -> Option<&Arc<Lease>> {
        Some(self.renewal.lease()).filter(|_| self.renewal.is_held())
    }

    /// Whether the lease was lost and the policy is to stop.
    pub(crate) fn must_stop(&self) -> bool {
        !self.renewal.is_held() && self.settings.on_loss == LossPolicy::Stop
    }

    /// Returns an error of the kernel that no retry can fix, once.
    pub(crate) fn take_fatal(&mut self) -> Option<KernelError> {
        self.fatal.take()
    }

    /// When to pass in [`Input::Timer`] if nothing else happens.
    pub(crate) fn deadline(&self) -> Option<BootTime> {
        let due = [self.audit.due, self.audit.periodic, self.settles()].into_iter().flatten().min();
        let audit = due.filter(|_| self.synced && matches!(self.round, Round::Idle));
        let guard = self.guard.deadline(&self.health.watch());
        let relist = self.relist.due(self.admission.has_room_again());
        let config = self.reconfiguration.deadline();
        [audit, guard, self.mac_change_due(), self.renewal.deadline(), relist, config].into_iter().flatten().min()
    }

    /// Handles an input.
    pub(crate) fn handle(&mut self, now: BootTime, input: Input) {
        match input {
            Input::Store(Ok(event)) => self.store_event(now, event),
            Input::Store(Err(error)) => self.store_trouble(Source::Watch, now, chain(&error)),
            Input::Hint(hint) => self.hint(now, hint),
            Input::Facts(facts) => self.facts(now, facts),
            Input::Seen(seen) => self.seen(now, seen),
            Input::Applied(report) => self.applied(now, report),
            Input::Lease(answer) => self.lease_answer(now, answer),
            Input::Config(answer) => self.config_answer(now, answer),
            Input::EnvFile(file) => self.show_env_file(file),
            Input::Uplink(select) => self.select_uplink(now, select),
            Input::Timer => {}
        }
        self.expire_lease(now);
        let over = self.guard.expire(now, &self.health.watch());
        match over {
            None => {}
            Some(Over::Flapping) => self.audit_at(now, Cause::Hint),
            Some(Over::Replacement) => self.audit_at(now, Cause::Expected),
            Some(Over::Mass) => {
                self.audit_at(now, Cause::Expected);
                self.stale.all_prefixes = true;
                self.show_withheld(now);
            }
        }
        self.change_shared_mac(now);
        self.renewal.identified_by(self.address());
        self.show_flapping();
        self.show_contended();
    }

    /// Returns the store call that is due.
    pub(crate) fn store_call(&mut self, now: BootTime) -> Option<StoreCall> {
        // The host may have been suspended since the last input.
        self.expire_lease(now);
        self.renewal.identified_by(self.address());
        let call = self.renewal.call(now);
        self.show_contended();
        call
    }

    /// Returns the kernel call that is due. Its answer must be passed in before this is called again.
    pub(crate) fn kernel_call(&mut self, now: BootTime) -> Option<KernelCall> {
        self.show_admitted(now);
        if !self.synced || !matches!(self.round, Round::Idle) {
            return self.writes();
        }
        if self.may_clear_former_networks() {
            self.include_former_networks();
            self.scope_changed(now);
        }
        let lease_round = !self.changes.is_empty() && self.can_trust_memory() && !self.audit.comes_first;
        if !self.changes.is_empty() && !lease_round {
            // The devices of the peers may be missing, or a route may be in the way: only an observation can show that.
            self.audit_at(self.audit.last.map_or(now, |last| last.after(Duration::from_secs(1))), Cause::Expected);
        }
        if self.settles().is_some_and(|due| due <= now) {
            self.audit.facts = true;
            self.audit_at(now, Cause::Hint);
        }
        if self.audit.periodic.is_some_and(|due| due <= now) {
            (self.audit.periodic, self.audit.facts) = (None, true);
            self.audit_at(now, Cause::Hint);
        }
        if self.audit.due.is_some_and(|due| due <= now) {
            (self.audit.due, self.audit.last, self.audit.periodic) = (None, Some(now), None);
            if std::mem::take(&mut self.audit.facts) {
                self.take_selection();
                self.round = Round::Facts;
                return Some(KernelCall::Facts(self.settings.uplink.reaches()));
            }
            self.audit.comes_first = false;
            self.round = Round::Looking { started: now };
            return Some(KernelCall::Observe(self.scope.clone()));
        }
        if lease_round { self.lease_round(now) } else { None }
    }

    /// Whether changed peers can be written without an observation.
    fn can_trust_memory(&self) -> bool {
        self.divergence.known && self.divergence.devices_settled(&self.scope.overlay)
    }

    /// Whether the store has listed all records. Before that the set of peers is unknown.
    pub(crate) fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether the store has to list everything again now, because records were dropped and there is room for them.
    pub(crate) fn take_relist(&mut self, now: BootTime) -> bool {
        self.relist.take(now, self.admission.has_room_again())
    }

    /// Returns what an audit of `seen` would do now. Changes nothing.
    pub(crate) fn preview(&self, mut seen: State, now: BootTime) -> Preview {
        let mut guard = self.guard.clone();
        let (plan, _) = self.compare(now, &mut seen, &mut guard);
        let is_unreached = |prefix: &Prefix, route: &Route| self.is_unreached(prefix, route);
        guard.unreached.note(&plan, now, &is_unreached, |_| true);
        let Restrained { plan, held } = guard.restrain(plan, now, &is_unreached);
        let held = held.into_iter().map(|op| Held { because: guard.why_held(&op, now, &is_unreached), op }).collect();
        Preview { plan, held, scope: self.named_scope() }
    }

    /// Returns the plan that removes all of the overlay's objects in `seen`.
    pub(crate) fn removal(&self, seen: &State) -> Plan {
        self.plan(State::default(), seen)
    }

    fn hint(&mut self, now: BootTime, hint: Hint) {
        match hint {
            Hint::Changed => {}
            Hint::FactsChanged | Hint::Lost | Hint::SubscriptionBroken => self.audit.facts = true,
        }
        self.show_subscription(match hint {
            Hint::Changed | Hint::FactsChanged | Hint::Lost => SubscriptionState::Active,
            Hint::SubscriptionBroken => SubscriptionState::Broken,
        });
        let due = self.audit.last.map_or(now, |last| last.after(SPACING)).max(now);
        self.audit_at(due, Cause::Hint);
    }
}

/// Why an audit is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// Something may have changed: differences are drift.
    Hint,
    /// The wanted state changed: writes are not drift.
    Expected,
}

fn prefixes_of(lease: Option<&Lease>) -> impl Iterator<Item = Prefix> + use<> {
    let subnets: Dual<Prefix> = lease.map(|lease| lease.subnets).unwrap_or_default();
    [subnets.v4, subnets.v6].into_iter().flatten()
}
