//! Converts plans to requests.

use crate::kernel::{
    ApplyReport, Forward, KernelError, Link, LinkId, LinkKind, LinkName, Op, OpText, Refusals, Scope, Tun,
};
use std::collections::BTreeMap;

use nix::errno::Errno;

use super::codec::route::{NewRoute, Spread};
use super::codec::{Batch, Verdict, address, link, neighbour, route};
use super::monitor::{Echo, Monitor};
use super::plane::Plane;
use super::probe::without_driver;
use super::wire::{Wire, refusal};
use crate::net::{Family, Prefix};

/// Above this number of IPv4 routes, new ones are also spread over scopes: at about twenty thousand, insertion becomes
/// quadratic again (docs/kernel-facts.md, "Route scopes"). Existing routes are not changed.
const FEW_ROUTES: usize = 16_384;

/// Writes a plan. `indices` maps IDs to interface indexes; other devices are looked up by name.
pub(crate) struct Applier<'a> {
    pub(crate) wire: &'a mut Wire,
    pub(crate) batch: &'a mut Batch,
    pub(crate) monitor: Option<&'a mut Monitor>,
    pub(crate) plane: &'a mut Plane,
    pub(crate) indices: &'a mut BTreeMap<LinkId, u32>,
    /// The number of IPv4 routes in the territory, as last observed and written since.
    pub(crate) routes: &'a mut usize,
    pub(crate) scope: &'a Scope,
}

/// The changes of a device's forwards, and their places in the plan.
#[derive(Default)]
struct Forwards {
    places: Vec<usize>,
    changes: Vec<(Prefix, Option<Forward>)>,
}

/// Kinds of operations that do not depend on one another. They may go out in one send, because the kernel processes the
/// rest of a send after a refusal (docs/kernel-facts.md, "Batches").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Link,
    PutAddress,
    PutFdb,
    PutNeighbour,
    Forward,
    PutRoute,
    DeleteRoute,
    DeleteNeighbour,
    DeleteFdb,
    DeleteAddress,
}

impl Stage {
    fn of(op: &Op) -> Self {
        match op {
            Op::DeleteLink { .. } | Op::CreateLink { .. } | Op::UpdateLink { .. } => Self::Link,
            Op::AddAddress(_) => Self::PutAddress,
            Op::PutFdb { .. } => Self::PutFdb,
            Op::PutNeighbour { .. } => Self::PutNeighbour,
            Op::PutForward { .. } | Op::DeleteForward { .. } => Self::Forward,
            Op::CreateRoute { .. } | Op::ReplaceRoute { .. } => Self::PutRoute,
            Op::DeleteRoute { .. } => Self::DeleteRoute,
            Op::DeleteNeighbour { .. } => Self::DeleteNeighbour,
            Op::DeleteFdb { .. } => Self::DeleteFdb,
            Op::DeleteAddress(_) => Self::DeleteAddress,
        }
    }

    fn doing(self) -> &'static str {
        match self {
            Self::Link => "writing links",
            Self::PutAddress => "adding addresses",
            Self::PutFdb => "writing forwarding entries",
            Self::PutNeighbour => "writing neighbours",
            Self::Forward => "writing forwards",
            Self::PutRoute => "writing routes",
            Self::DeleteRoute => "deleting routes",
            Self::DeleteNeighbour => "deleting neighbours",
            Self::DeleteFdb => "deleting forwarding entries",
            Self::DeleteAddress => "deleting addresses",
        }
    }
}

impl Applier<'_> {
    /// Writes the plan in order, until contact is lost or `abandoned` returns true because the caller has gone.
    pub(crate) fn run(&mut self, ops: &[Op], abandoned: impl Fn() -> bool) -> ApplyReport {
        let mut report = ApplyReport::default();
        let mut refusals = Refusals::default();
        let mut next = 0;
        self.count_routes(ops);
        if let Some(monitor) = self.monitor.as_deref_mut() {
            monitor.begin(self.wire.port(), &self.scope.overlay);
        }
        while next < ops.len() && !abandoned() {
            let stage = Stage::of(&ops[next]);
            let most = match stage {
                Stage::Link => 1,
                // The whole table is replaced, however many of its entries change.
                Stage::Forward => ops.len(),
                _ => Batch::MAX,
            };
            let places: Vec<usize> = (next..ops.len().min(next.saturating_add(most)))
                .take_while(|place| Stage::of(&ops[*place]) == stage)
                .collect();
            next += places.len();
            let outcome = match stage {
                Stage::Link => self.link_stage(ops, &places, &mut refusals, &mut report),
                Stage::Forward => self.forward_stage(ops, &places, &mut refusals, &mut report),
                _ => self.send_stage(stage, ops, &places, &mut refusals, &mut report),
            };
            if let Err(error) = outcome {
                report.lost = Some(error);
                return report;
            }
        }
        report
    }

    /// Counts the routes after the plan, so that all routes of a start are spread.
    fn count_routes(&mut self, ops: &[Op]) {
        let v4 = |prefix: &Prefix| usize::from(prefix.family() == Family::V4);
        let (mut come, mut go) = (0, 0);
        for op in ops {
            match op {
                Op::CreateRoute { prefix, .. } => come += v4(prefix),
                Op::DeleteRoute { prefix, .. } => go += v4(prefix),
                _ => {}
            }
        }
        *self.routes = (*self.routes + come).saturating_sub(go);
    }

    fn link_stage(
        &mut self,
        ops: &[Op],
        places: &[usize],
        refusals: &mut Refusals,
        report: &mut ApplyReport,
    ) -> Result<(), KernelError> {
        for &place in places {
            let op = &ops[place];
            if skips(op, place, refusals, report) {
                continue;
            }
            match survivable(self.write_link(op))? {
                Ok(()) => report.applied += 1,
                Err(error) => note_refused(vec![(place, error)], ops, refusals, report),
            }
        }
        Ok(())
    }

    /// Writes forwards, one call per device.
    fn forward_stage(
        &mut self,
        ops: &[Op],
        places: &[usize],
        refusals: &mut Refusals,
        report: &mut ApplyReport,
    ) -> Result<(), KernelError> {
        let mut of_links: BTreeMap<LinkId, Forwards> = BTreeMap::new();
        for &place in places {
            let op = &ops[place];
            let (key, forward) = match op {
                Op::PutForward { key, forward } => (key, Some(**forward)),
                Op::DeleteForward { key, .. } => (key, None),
                _ => continue,
            };
            if !skips(op, place, refusals, report) {
                let of_link = of_links.entry(key.link).or_default();
                of_link.places.push(place);
                of_link.changes.push((key.prefix, forward));
            }
        }
        let mut refused = Vec::new();
        for (link, Forwards { places, changes }) in of_links {
            let Some(first) = places.first() else { continue };
            let written = self.index(link, &ops[*first]).and_then(|index| self.plane.write(index, &changes));
            match survivable(written)? {
                Ok(()) => report.applied += places.len(),
                Err(error) => refused.extend(places.into_iter().map(|place| (place, error.clone()))),
            }
        }
        note_refused(refused, ops, refusals, report);
        Ok(())
    }

    /// Sends one batch and records the outcome.
    fn send_stage(
        &mut self,
        stage: Stage,
        ops: &[Op],
        places: &[usize],
        refusals: &mut Refusals,
        report: &mut ApplyReport,
    ) -> Result<(), KernelError> {
        self.batch.clear();
        let mut sent = Vec::with_capacity(places.len());
        let mut refused = Vec::new();
        for &place in places {
            let op = &ops[place];
            if skips(op, place, refusals, report) {
                continue;
            }
            match survivable(self.encode(op)) {
                Ok(Ok(())) => sent.push(place),
                Ok(Err(error)) => refused.push((place, error)),
                Err(error) => {
                    self.batch.clear();
                    return Err(error);
                }
            }
        }
        let verdicts = self.wire.write(self.batch, stage.doing());
        if let Ok(refused) = &verdicts {
            self.note_addresses(ops, &sent, refused);
        }
        if let Some(monitor) = self.monitor.as_deref_mut() {
            monitor.drain(self.wire.port());
        }
        for (nth, verdict) in verdicts? {
            let Some(&place) = sent.get(nth) else { continue };
            refused.push((place, refusal(self.text(&ops[place]), verdict)));
        }
        report.applied += places.len() - refused.len() - count_within(&report.skipped, places);
        note_refused(refused, ops, refusals, report);
        Ok(())
    }

    /// Notes written addresses in the monitor before their notifications are read.
    fn note_addresses(&mut self, ops: &[Op], sent: &[usize], refused: &[(usize, Verdict)]) {
        let Some(monitor) = self.monitor.as_deref_mut() else { return };
        for (nth, &place) in sent.iter().enumerate() {
            let (key, there) = match &ops[place] {
                Op::AddAddress(key) => (key, true),
                Op::DeleteAddress(key) => (key, false),
                _ => continue,
            };
            let index = self.indices.get(&key.link);
            if let (Some(index), false) = (index, refused.iter().any(|(place, _)| *place == nth)) {
                monitor.note_address(*index, key.addr, key.len, there);
            }
        }
    }

    /// Appends the message of an operation. Link operations are written at once instead.
    fn encode(&mut self, op: &Op) -> Result<(), KernelError> {
        let echo = match op {
            // Each takes several requests, so they are never part of a send.
            Op::DeleteLink { .. } | Op::CreateLink { .. } | Op::UpdateLink { .. } => return self.write_link(op),
            // Forwards have their own stage.
            Op::PutForward { .. } | Op::DeleteForward { .. } => return Ok(()),
            Op::AddAddress(key) => {
                let index = self.index(key.link, op)?;
                address::add(self.batch, index, key.addr, key.len);
                None
            }
            Op::DeleteAddress(key) => {
                let index = self.index(key.link, op)?;
                address::delete(self.batch, index, key.addr, key.len);
                None
            }
            Op::PutFdb { key, dst } => {
                let index = self.index(key.link, op)?;
                neighbour::put_fdb(self.batch, index, key.mac, *dst);
                Some(Echo::PutFdb { index, mac: key.mac, dst: *dst })
            }
            Op::DeleteFdb { key, dst } => {
                let index = self.index(key.link, op)?;
                neighbour::delete_fdb(self.batch, index, key.mac, *dst);
                Some(Echo::DeleteFdb { index, mac: key.mac, dst: *dst })
            }
            Op::PutNeighbour { key, mac, .. } => {
                let index = self.index(key.link, op)?;
                neighbour::put(self.batch, index, key.addr, *mac);
                None
            }
            Op::DeleteNeighbour { key, mac } => {
                let index = self.index(key.link, op)?;
                neighbour::delete(self.batch, index, key.addr, *mac);
                Some(Echo::DeleteNeighbour { index, addr: key.addr })
            }
            Op::CreateRoute { prefix, route } => {
                let index = self.optional_index(route.link, op)?;
                route::create(self.batch, &NewRoute { prefix: *prefix, route, index, spread: self.spread() });
                None
            }
            Op::ReplaceRoute { prefix, change } => {
                let index = self.optional_index(change.1.link, op)?;
                let route = &change.1;
                route::replace(self.batch, &NewRoute { prefix: *prefix, route, index, spread: self.spread() });
                None
            }
            Op::DeleteRoute { prefix, route } => {
                let index = self.optional_index(route.link, op)?;
                route::delete(self.batch, *prefix, route, index);
                None
            }
        };
        if let (Some(monitor), Some(echo)) = (self.monitor.as_deref_mut(), echo) {
            monitor.expect(echo);
        }
        Ok(())
    }

    fn spread(&self) -> Spread {
        if *self.routes > FEW_ROUTES { Spread::Scopes } else { Spread::Protocols }
    }

    fn write_link(&mut self, op: &Op) -> Result<(), KernelError> {
        // Earlier actions of other programs must not be mistaken for effects of this write.
        if let Some(monitor) = self.monitor.as_deref_mut() {
            monitor.drain(self.wire.port());
        }
        let (index, expected, result) = match op {
            Op::CreateLink { id, link } => {
                let result = self.create_link(op, *id, link);
                (self.indices.get(id).copied(), Some(Link::clone(link)), result)
            }
            Op::UpdateLink { id, part, from, to } => {
                let index = self.index(*id, op)?;
                // Other parts of the link may have been refused before, and this one may be.
                let mut expected = self.monitor.as_deref().and_then(|monitor| monitor.link(index)).cloned();
                let result = self.update_link(op, index, from, to);
                if let (Some(expected), Ok(())) = (&mut expected, &result) {
                    part.copy(to, &mut expected.link);
                }
                (Some(index), expected.map(|seen| seen.link), result)
            }
            Op::DeleteLink { id, .. } => {
                let index = self.index(*id, op)?;
                link::delete(self.batch, index);
                let result = self.send(op);
                if result.is_ok() {
                    self.indices.remove(id);
                    self.plane.close(index);
                }
                (Some(index), None, result)
            }
            _ => return Ok(()),
        };
        if let (Some(monitor), Some(index)) = (self.monitor.as_deref_mut(), index) {
            monitor.settle_link(self.wire.port(), index, expected.as_ref());
        }
        result
    }

    fn create_link(&mut self, op: &Op, id: LinkId, wanted: &Link) -> Result<(), KernelError> {
        let index = match &wanted.kind {
            LinkKind::Vxlan(vxlan) => {
                let lower = self.optional_index(vxlan.lower, op)?;
                self.indices.remove(&id);
                link::create_vxlan(self.batch, wanted, vxlan, lower);
                self.send(op).map_err(without_driver)?;
                self.find(&wanted.name, op)?
            }
            LinkKind::Tun(Tun { tunnel: Some(tunnel), .. }) => {
                self.indices.remove(&id);
                let index = self.plane.open(&wanted.name, None, tunnel)?;
                return match self.finish_tun(op, index, wanted) {
                    Ok(()) => {
                        self.indices.insert(id, index);
                        Ok(())
                    }
                    Err(error) => {
                        // Without its mark the device would look foreign. Its creation and deletion are not reported.
                        self.plane.close(index);
                        if let Some(monitor) = self.monitor.as_deref_mut() {
                            monitor.settle_link(self.wire.port(), index, None);
                        }
                        Err(error)
                    }
                };
            }
            LinkKind::Tun(_) | LinkKind::External(_) | LinkKind::Other(_) => {
                return Err(KernelError::Unsupported {
                    what: self.text(op),
                    hint: "only VXLAN and TUN devices are created here; others are made by their own programs"
                        .to_owned(),
                });
            }
        };
        self.indices.insert(id, index);
        // Done before the device is up, so that it accepts no router advertisement (docs/compatibility.md, "Device").
        ignore_router_advertisements(&wanted.name);
        let change = link::Change {
            // Creation ignores an alias (docs/kernel-facts.md, "Group and alias of a new link").
            alias: wanted.alias.as_deref(),
            up: wanted.up.then_some(true),
            ..link::Change::default()
        };
        link::change(self.batch, index, &change);
        self.send(op)
    }

    /// Marks a TUN device, brings it up, and then makes it persist beyond this process.
    fn finish_tun(&mut self, op: &Op, index: u32, wanted: &Link) -> Result<(), KernelError> {
        ignore_router_advertisements(&wanted.name);
        let change = link::Change {
            mtu: Some(wanted.mtu),
            group: Some(wanted.group),
            alias: wanted.alias.as_deref(),
            up: wanted.up.then_some(true),
            ..link::Change::default()
        };
        link::change(self.batch, index, &change);
        self.send(op)?;
        self.plane.keep(index)
    }

    fn update_link(&mut self, op: &Op, index: u32, from: &Link, to: &Link) -> Result<(), KernelError> {
        let mut change = link::Change {
            name: (from.name != to.name).then_some(&to.name),
            mac: to.mac.filter(|mac| from.mac != Some(*mac)),
            mtu: (from.mtu != to.mtu).then_some(to.mtu),
            group: (from.group != to.group).then_some(to.group),
            alias: (from.alias != to.alias).then_some(to.alias.as_deref().unwrap_or("")),
            up: (from.up != to.up).then_some(to.up),
        };
        if let (LinkKind::Tun(was), LinkKind::Tun(Tun { tunnel: Some(tunnel), .. })) = (&from.kind, &to.kind)
            && was.tunnel.as_ref() != Some(tunnel)
        {
            self.plane.open(&to.name, Some(index), tunnel)?;
            return self.plane.keep(index);
        }
        if to.up && !from.up && to.kind.is_made_here() {
            ignore_router_advertisements(&from.name);
        }
        if let (LinkKind::Vxlan(was), LinkKind::Vxlan(vxlan)) = (&from.kind, &to.kind)
            && link::change_vxlan(self.batch, index, was, vxlan)
        {
            self.send(op)?;
        }
        link::change(self.batch, index, &change);
        let busy =
            |error: &KernelError| matches!(error, KernelError::Refused { errno, .. } if *errno == Errno::EBUSY as i32);
        match self.send(op) {
            // Kernels before 6.2 only rename devices that are down. That deletes routes and neighbours, so a hint is
            // needed.
            Err(error) if busy(&error) && change.name.is_some() && from.up => {
                if let Some(monitor) = self.monitor.as_deref_mut() {
                    monitor.changed();
                }
                let down = link::Change { up: Some(false), ..link::Change::default() };
                link::change(self.batch, index, &down);
                self.send(op)?;
                change.up = Some(to.up);
                link::change(self.batch, index, &change);
                self.send(op)
            }
            result => result,
        }
    }

    /// Sends the messages of one operation.
    fn send(&mut self, op: &Op) -> Result<(), KernelError> {
        let refused = self.wire.write(self.batch, Stage::of(op).doing())?;
        match refused.into_iter().next() {
            None => Ok(()),
            Some((_, verdict)) => Err(refusal(self.text(op), verdict)),
        }
    }

    fn optional_index(&mut self, id: Option<LinkId>, op: &Op) -> Result<Option<u32>, KernelError> {
        id.map(|id| self.index(id, op)).transpose()
    }

    fn index(&mut self, id: LinkId, op: &Op) -> Result<u32, KernelError> {
        let gone = |applier: &Self| applier.gone(op);
        match id {
            LinkId::Other(index) => Ok(index),
            LinkId::Uplink => self.scope.uplink.ok_or_else(|| gone(self)),
            LinkId::Own(slot) => {
                if let Some(index) = self.indices.get(&id) {
                    return Ok(*index);
                }
                let device = self.scope.devices.get(usize::from(slot)).ok_or_else(|| gone(self))?;
                let index = self.find(&device.name, op)?;
                self.indices.insert(id, index);
                Ok(index)
            }
        }
    }

    /// Looks up a device by name. Uses a separate batch, so the current one is unchanged.
    fn find(&mut self, name: &LinkName, op: &Op) -> Result<u32, KernelError> {
        let mut request = Batch::default();
        link::get_by_name(&mut request, name);
        let found = self.wire.fetch(&mut request, "looking a link up", |message| link::decode(message.payload))?;
        match found {
            Ok(Some(seen)) => Ok(seen.index),
            Ok(None) => Err(self.gone(op)),
            Err(verdict) => Err(refusal(self.text(op), verdict)),
        }
    }

    fn gone(&self, op: &Op) -> KernelError {
        let verdict = Verdict { errno: Errno::ENODEV as i32, text: String::new() };
        refusal(self.text(op), verdict)
    }

    fn text(&self, op: &Op) -> String {
        OpText { op, scope: self.scope }.to_string()
    }
}

/// Returns whether `op` depends on a refused operation, and records that it is skipped.
fn skips(op: &Op, place: usize, refusals: &mut Refusals, report: &mut ApplyReport) -> bool {
    let skips = refusals.block(op);
    if skips {
        refusals.refused(op);
        report.skipped.push(place);
    }
    skips
}

/// Records operations of one stage that the kernel refused.
fn note_refused(mut refused: Vec<(usize, KernelError)>, ops: &[Op], refusals: &mut Refusals, report: &mut ApplyReport) {
    refused.sort_by_key(|(place, _)| *place);
    refused.iter().for_each(|(place, _)| refusals.refused(&ops[*place]));
    report.refused.extend(refused);
}

/// Separates errors of one operation from errors that end the whole plan.
fn survivable(result: Result<(), KernelError>) -> Result<Result<(), KernelError>, KernelError> {
    match result {
        Err(error @ (KernelError::Timeout { .. } | KernelError::Lost { .. } | KernelError::Stopped)) => Err(error),
        result => Ok(result),
    }
}

fn count_within(skipped: &[usize], places: &[usize]) -> usize {
    let Some(first) = places.first() else { return 0 };
    skipped.iter().rev().take_while(|place| *place >= first).count()
}

/// Sets `accept_ra` to 0 in the calling thread's network namespace. Best effort, as in flannel: the file is missing if
/// IPv6 is disabled, and read-only in many containers.
fn ignore_router_advertisements(name: &LinkName) {
    let path = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", name.as_str());
    if let Err(error) = std::fs::write(path, "0") {
        tracing::debug!(device = %name, %error, "accept_ra stays as it is");
    }
}
