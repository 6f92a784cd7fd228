//! The two kinds of round: audits, which observe the kernel, and lease rounds, which rely on remembered state.

use crate::kernel::{ApplyReport, KernelError, LinkId, Object, Op, Route, RouteKey, State, owns_route};
use crate::plan::{self, Conflict, Plan};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::agent::guard::{Guard, Restrained};
use crate::agent::refused::{Entry, Kind, Whose, kept_out};
use crate::agent::status::{Contact, Event, Phase};
use crate::agent::wanted;
use crate::clock::BootTime;
use crate::lease::LeaseKey;
use crate::net::Prefix;
use crate::text::chain;

use super::{Audit, Cause, KernelCall, Machine, Round, SPACING, prefixes_of};

impl Machine {
    pub(super) fn audit_at(&mut self, due: BootTime, cause: Cause) {
        let due = self.audit.not_before.map_or(due, |not_before| not_before.max(due));
        self.audit.due = Some(self.audit.due.map_or(due, |other| other.min(due)));
        self.audit.expected |= cause == Cause::Expected;
    }

    pub(super) fn plan(&self, wanted: State, seen: &State) -> Plan {
        plan::plan_owned(wanted, seen, &self.named_scope(), &|prefix| self.claim(prefix))
    }

    pub(super) fn claim(&self, prefix: &Prefix) -> Option<std::net::IpAddr> {
        self.admission.peer_by_subnet(prefix)?.attrs.public_ip.get(prefix.family()).copied()
    }

    /// Removes from a plan the writes that must not happen now. The plan covers the prefixes for which `concerns` is
    /// true.
    fn restrain(&mut self, plan: Plan, now: BootTime, concerns: impl Fn(&Prefix) -> bool) -> Restrained {
        let mut guard = std::mem::take(&mut self.guard);
        let is_unreached = |prefix: &Prefix, route: &Route| self.is_unreached(prefix, route);
        let changed = guard.unreached.note(&plan, now, &is_unreached, concerns);
        let restrained = guard.restrain(plan, now, &is_unreached);
        self.guard = guard;
        self.stale.prefixes.extend(changed);
        restrained
    }

    /// Whether `route` leads to the peer of its prefix over a connected route that is missing, although the host still
    /// has an address in that prefix. A network manager that takes over a link deletes that route and adds it again.
    pub(super) fn is_unreached(&self, prefix: &Prefix, route: &Route) -> bool {
        let host = &self.local.context.host;
        let claimed = route.gateway.filter(|gateway| self.claim(prefix) == Some(*gateway));
        claimed.is_some_and(|gateway| host.on_link(gateway).is_none() && host.is_connected(gateway))
    }

    pub(super) fn seen(&mut self, now: BootTime, seen: Result<State, KernelError>) {
        let started = match std::mem::replace(&mut self.round, Round::Idle) {
            Round::Looking { started } => started,
            other => {
                self.round = other;
                return;
            }
        };
        let mut seen = match seen {
            Ok(seen) => seen,
            Err(error) => {
                self.divergence.known = false;
                return self.kernel_trouble(now, error);
            }
        };
        // The wanted state is complete and includes all changes so far. Changes since the observation began are not
        // drift, and later changes belong to the next audit.
        let drift = self.audit.done_once && !self.audit.expected;
        self.audit.expected = false;
        self.judge_removals(now);
        let moved = self.take_moved();
        self.show_limitations(&seen);
        let mut guard = std::mem::take(&mut self.guard);
        let (plan, skips) = self.compare(now, &mut seen, &mut guard);
        self.guard = guard;
        self.leave_cleared_networks(now, &plan);
        self.stale.all_prefixes |= !self.audit.judged;
        let Restrained { plan, held } = self.restrain(plan, now, |_| true);
        self.divergence.clear();
        for object in held.iter().map(Op::object).chain(plan.conflicts.iter().map(|c| c.object.clone())) {
            self.divergence.note(object, &seen);
        }
        // The audit's results refer to the current peers: publish both together.
        self.show_peers();
        self.show_skips(skips);
        self.show_withheld(now);
        let Plan { ops, conflicts } = plan;
        let audit = Audit { started, drift, moved, ops: Arc::new(ops), conflicts };
        if audit.ops.is_empty() {
            return self.audited(now, audit, &ApplyReport::default());
        }
        self.round = Round::Auditing { audit, seen: Box::new(seen) };
    }

    /// Returns the plan, and the peers that are skipped. Objects as wanted are removed from `seen`. The first audit
    /// compares what it found with the peers of the store.
    pub(super) fn compare(&self, now: BootTime, seen: &mut State, guard: &mut Guard) -> (Plan, wanted::Skips) {
        let before = if self.audit.judged { 0 } else { self.present_prefixes(seen).count() };
        let (wanted, skips) = wanted::whole(&*self.backend, &self.local, &self.scope, self.admission.peers(), seen);
        if !self.audit.judged {
            self.judge_start(guard, now, before, &wanted, seen);
        }
        (self.plan(wanted, seen), skips)
    }

    /// The prefixes in the present network that have a route or a forward of this overlay.
    fn present_prefixes(&self, seen: &State) -> impl Iterator<Item = Prefix> {
        let owns = |(key, route): &(&RouteKey, &Route)| {
            self.scope.is_in_network(&key.prefix)
                && owns_route(&key.prefix, route, &self.scope, &seen.links, &|prefix| self.claim(prefix))
        };
        let mut last = None;
        let prefixes = seen.routes.iter().filter(owns).map(|(key, _)| key.prefix);
        let routed = prefixes.filter(move |prefix| last.replace(*prefix) != Some(*prefix));
        routed.chain(seen.forwards.keys().map(|key| key.prefix))
    }

    /// Returns the objects of peers that changed, and clears the changes, which the audit includes.
    fn take_moved(&mut self) -> BTreeSet<Object> {
        let mut objects = BTreeSet::new();
        for change in std::mem::take(&mut self.changes).into_values() {
            if let Some(old) = change.old {
                wanted::add_former(&*self.backend, &self.local, &old, &mut State::default(), &mut objects);
            }
            if let Some(new) = change.new {
                wanted::add(&*self.backend, &self.local, &new, &mut State::default(), &mut objects);
            }
        }
        objects
    }

    /// Applies the guard at the start. `before` prefixes have objects of this overlay, of which those in `rest` are not
    /// as wanted.
    ///
    /// While the store is away, the peers are those of its last list: a node that is missing there may have joined
    /// since.
    fn judge_start(&self, guard: &mut Guard, now: BootTime, before: usize, wanted: &State, rest: &State) {
        let is_gone = |prefix: &Prefix| wanted.routes_to(*prefix).next().is_none();
        let gone: BTreeSet<Prefix> = self.present_prefixes(rest).filter(is_gone).collect();
        if matches!(self.health.watch(), Contact::Lost { .. }) {
            guard.protected.await_store(gone);
        } else {
            guard.protected.judge_reset(now, before, gone);
            if !guard.protected.mass_waits() {
                return;
            }
            let own = Some(&*self.local.lease);
            for prefix in self.admission.peers().map(|peer| &**peer).chain(own).flat_map(|it| prefixes_of(Some(it))) {
                guard.protected.in_use(&prefix);
            }
        }
    }

    /// The writes of the round under way, if it has reached that step.
    pub(super) fn writes(&self) -> Option<KernelCall> {
        match &self.round {
            Round::Auditing { audit: Audit { ops, .. }, .. } | Round::Leasing { ops } => {
                Some(KernelCall::Apply(self.named_scope(), Arc::clone(ops)))
            }
            Round::Idle | Round::Facts | Round::Looking { .. } => None,
        }
    }

    pub(super) fn applied(&mut self, now: BootTime, report: ApplyReport) {
        match std::mem::replace(&mut self.round, Round::Idle) {
            Round::Auditing { audit, seen } => {
                let failed = report.refused.iter().map(|(place, _)| place).chain(&report.skipped);
                let failed = failed.filter_map(|place| audit.ops.get(*place));
                let is_create = |op: &&Op| matches!(op, Op::CreateLink { .. });
                let unknown = audit.ops.iter().filter(|op| report.lost.is_some() && is_create(op));
                let absent = State::default();
                for op in failed.chain(unknown) {
                    // A device that was not created is absent, even if the one that it replaces was seen.
                    self.divergence.note(op.object(), if is_create(&op) { &absent } else { &seen });
                }
                drop(seen);
                let errors = report.refused.iter().map(|(_, error)| error).chain(&report.lost);
                self.fatal = errors.into_iter().find(|error| self.is_hopeless(error)).cloned();
                self.audited(now, audit, &report);
            }
            Round::Leasing { ops } => self.leased(now, &ops, &report),
            other => self.round = other,
        }
    }

    pub(super) fn audited(&mut self, now: BootTime, audit: Audit, report: &ApplyReport) {
        let Audit { started, drift, moved, ops, conflicts } = audit;
        // Writes whose outcome was lost are not drift in the next audit either.
        self.audit.expected |= (!drift || !moved.is_empty()) && report.lost.is_some();
        self.divergence.known = report.lost.is_none();
        let kept_out: Vec<Conflict> =
            report.refused.iter().filter_map(|(place, error)| kept_out(ops.get(*place)?, error)).collect();
        let Failed { writes: failed_writes, reaches_peers } = self.take_refused(now, &ops, report);
        self.show_conflicts(conflicts.iter().chain(&kept_out));
        let mut repaired = 0;
        if drift && report.applied > 0 && report.lost.is_none() {
            let has_failed = |place: &usize| {
                report.refused.binary_search_by_key(place, |(place, _)| *place).is_ok()
                    || report.skipped.binary_search(place).is_ok()
            };
            let written = ops.iter().enumerate().filter(|(place, _)| !has_failed(place)).map(|(_, op)| op);
            let written: Vec<_> = written.filter(|op| !moved.contains(&op.object())).collect();
            repaired = written.len();
            let shaken: BTreeSet<LinkId> = ops.iter().filter(|op| touches_device(op)).filter_map(Op::link).collect();
            let changed = written.into_iter().filter(|op| is_own_change(op, &shaken));
            let flapping = self.guard.flapping.wrote(now, changed);
            self.events.extend(flapping.into_iter().map(Event::Flapping));
            if repaired > 0 {
                self.events.push(Event::DriftRepaired { writes: repaired, took: now.since(started) });
            }
        }
        // Another audit follows a change of a device, after which the kernel drops and adjusts other objects, and
        // deletions in a former network, which only an audit can find empty. It reads the host too, which was last read
        // before the device was marked.
        let look_again = ops.iter().any(touches_device) || (!self.scope.former.is_empty() && report.applied > 0);
        let done = failed_writes == 0 && report.lost.is_none();
        if done {
            self.backoff.reset();
            self.audit.periodic = Some(now.after(self.jitter.around(self.settings.audit_every)));
            if look_again {
                self.audit.facts = true;
                self.audit_at(now.after(SPACING), Cause::Hint);
            }
            if let Some(due) = self.refused.due() {
                self.audit.facts = true;
                self.audit_at(due, Cause::Hint);
            }
        } else {
            let wait = self.backoff.wait();
            // The refused writes may depend on state of the host that has changed.
            self.audit.facts = true;
            self.audit_at(now.after(wait), Cause::Hint);
        }
        let error = first_error(report).filter(|_| !done);
        self.audit.done_once |= report.lost.is_none();
        self.audit.judged |= report.lost.is_none();
        let phase = match (self.divergence.devices_settled(&self.scope.overlay), reaches_peers) {
            (true, true) => Phase::Ready,
            (true, false) => Phase::DeviceReady,
            (false, _) => Phase::LeaseHeld,
        };
        self.show_round(phase, error, failed_writes);
        self.show(|status| {
            status.audits += 1;
            status.drift_repaired += repaired as u64;
        });
        self.show_flapping();
        if let Some(ops) = Arc::into_inner(ops) {
            release(ops);
        }
    }

    /// Records the refused writes of an audit.
    fn take_refused(&mut self, now: BootTime, ops: &[Op], report: &ApplyReport) -> Failed {
        if report.lost.is_some() {
            return Failed { writes: report.refused.len() + report.skipped.len(), reaches_peers: false };
        }
        let refused = report.refused.iter().filter_map(|(place, error)| Some((ops.get(*place)?, error)));
        let objects = refused.clone().filter(|(op, _)| !op.is_delete()).map(|(op, _)| op.object()).collect();
        let (mut peers, in_place) = self.peers_of(&objects);
        // An object without a kind is part of a device, which all peers need. Of the other kinds, another peer's object
        // may be in place.
        let is_missing = |object: &Object| match Kind::of(object) {
            Some(kind) => peers.contains_key(object) && !in_place.contains(&kind),
            None => true,
        };
        let reaches_peers = !objects.iter().any(is_missing);
        let entries = refused.map(|(op, error)| {
            let object = op.object();
            let whose = match (&object, peers.remove(&object)) {
                (_, Some(peer)) => Whose::Peer(peer),
                (Object::Route(prefix), None) if !self.scope.is_in_network(prefix) => Whose::Former,
                (_, None) => Whose::Node,
            };
            Entry { whose, object, error }
        });
        let nodes = self.refused.replace(now, entries.collect(), &in_place);
        self.show_refused();
        // Skipped writes depend on refused ones.
        Failed { writes: if nodes == 0 { 0 } else { nodes + report.skipped.len() }, reaches_peers }
    }

    /// The peers that want these objects, and the kinds of which some peer's object is as wanted.
    fn peers_of(&self, objects: &BTreeSet<Object>) -> (BTreeMap<Object, LeaseKey>, BTreeSet<Kind>) {
        let (mut found, mut in_place) = (BTreeMap::new(), BTreeSet::new());
        if objects.is_empty() {
            return (found, in_place);
        }
        for peer in self.admission.peers() {
            let mut wanted = BTreeSet::new();
            wanted::add(&*self.backend, &self.local, peer, &mut State::default(), &mut wanted);
            in_place.extend(wanted.iter().filter(|object| !self.divergence.is_unsettled(object)).filter_map(Kind::of));
            found.extend(wanted.intersection(objects).map(|object| (object.clone(), peer.key.clone())));
        }
        (found, in_place)
    }

    pub(super) fn lease_round(&mut self, now: BootTime) -> Option<KernelCall> {
        let changes = std::mem::take(&mut self.changes);
        let (mut wanted, mut former, mut objects) = (State::default(), State::default(), BTreeSet::new());
        let mut skipped = BTreeMap::new();
        for (key, change) in &changes {
            if let Some(old) = &change.old {
                wanted::add_former(&*self.backend, &self.local, old, &mut former, &mut objects);
            }
            if let Some(new) = &change.new {
                skipped.extend(wanted::add(&*self.backend, &self.local, new, &mut wanted, &mut objects));
            }
            debug_assert!(change.old.is_some() || change.new.is_some(), "{key}");
        }
        let mut seen = State::default();
        for object in &objects {
            self.divergence.recall(object, &former, &mut seen);
        }
        let plan = self.plan(wanted, &seen);
        let concerns = |prefix: &Prefix| objects.contains(&Object::Route(*prefix));
        let Restrained { plan, held } = self.restrain(plan, now, concerns);
        for object in &objects {
            self.divergence.settle(object);
        }
        for object in held.iter().map(Op::object).chain(plan.conflicts.iter().map(|c| c.object.clone())) {
            self.divergence.note(object, &seen);
        }
        self.show_changed_skips(changes.keys(), skipped);
        if plan.is_empty() {
            self.show(|status| status.lease_rounds += 1);
            return None;
        }
        self.round = Round::Leasing { ops: Arc::new(plan.ops) };
        self.writes()
    }

    pub(super) fn leased(&mut self, now: BootTime, ops: &[Op], report: &ApplyReport) {
        self.show(|status| status.lease_rounds += 1);
        if report.is_complete() {
            return;
        }
        // The remembered state was wrong, or the kernel has a problem: an audit is needed.
        self.divergence.known = false;
        let due = self.audit.last.map_or(now, |last| last.after(SPACING)).max(now);
        self.audit_at(due, Cause::Hint);
        let error = first_error(report);
        tracing::debug!(ops = ops.len(), error, "lease round incomplete");
        // That audit determines the phase: a single object that already existed does not end readiness.
        if let Some(error) = &report.lost {
            self.show_error(chain(error));
        }
    }

    pub(super) fn kernel_trouble(&mut self, now: BootTime, error: KernelError) {
        let text = chain(&error);
        if self.is_hopeless(&error) {
            self.fatal = Some(error);
        }
        let again = now.after(self.backoff.wait());
        // A hint that came during the observation does not shorten the wait.
        (self.audit.not_before, self.audit.due) = (Some(again), None);
        self.audit_at(again, Cause::Hint);
        self.show_error(text);
    }

    /// Whether no retry helps. After a complete audit, only the end of the kernel's thread is final.
    pub(super) fn is_hopeless(&self, error: &KernelError) -> bool {
        match error {
            KernelError::Stopped => true,
            KernelError::Denied { .. } | KernelError::Unsupported { .. } => !self.audit.done_once,
            KernelError::Refused { .. }
            | KernelError::Timeout { .. }
            | KernelError::Lost { .. }
            | KernelError::Conflict { .. } => false,
        }
    }
}

/// The failed writes of an audit.
struct Failed {
    /// The number of writes, except those caused by a peer's record.
    writes: usize,
    /// Whether the devices are complete and, for each kind of refused object, some peer's object is in place: then some
    /// peers can be reached.
    reaches_peers: bool,
}

/// Frees the memory of a large plan without a lasting effect. When a large block is freed, glibc from then on keeps up
/// to twice its size in reserve (mallopt(3), the dynamic mmap threshold): 3 MiB per arena, after the 30 000 writes of a
/// start. A block that shrinks first has no such effect.
fn release(mut ops: Vec<Op>) {
    ops.clear();
    ops.shrink_to(1);
}

/// Whether `op` writes a device or an address on one.
fn touches_device(op: &Op) -> bool {
    match op.object() {
        Object::Link(_) | Object::LinkPart(..) | Object::Address(_) => true,
        Object::Fdb(_) | Object::Neighbour(_) | Object::Forward(_) | Object::Route(_) => false,
    }
}

/// Whether `op` repairs a change that was made to its own object. The kernel drops neighbours and routes when their
/// device or its address changes (docs/kernel-facts.md, "What survives what"): repeated changes of the device must not
/// count for them. A neighbour that was right is written again only for its FDB entry.
fn is_own_change(op: &Op, shaken: &BTreeSet<LinkId>) -> bool {
    let right = matches!(op, Op::PutNeighbour { mac, was, .. } if *was == Some(*mac));
    touches_device(op) || !(right || op.link().is_some_and(|link| shaken.contains(&link)))
}

pub(super) fn first_error(report: &ApplyReport) -> Option<String> {
    let refused = report.refused.first().map(|(_, error)| error);
    report.lost.as_ref().or(refused).map(|error| chain(error))
}
