//! A kernel in memory that models the refusals, losses and replacements of the real one.
//!
//! It implements the facts in `docs/kernel-facts.md`: device, address, neighbour, FDB and routing tables with the
//! kernel's keys, its error numbers, and which objects survive which action. Not modelled: TOS, policy rules, several
//! next hops in IPv4, secondary addresses, traffic.
//!
//! ```
//! # use flannel_core::testing::fake_kernel::FakeKernel;
//! # fn main() -> Result<(), flannel_core::kernel::KernelError> {
//! let kernel = FakeKernel::new();
//! let uplink = kernel.add_uplink("eth0", "192.168.0.1/24".parse().unwrap())?;
//! let before = kernel.snapshot();
//! // ... run an overlay on `kernel.clone()` ...
//! assert!(before.missing_from(&kernel.snapshot()).is_empty(), "{}", kernel.snapshot());
//! # let _ = uplink; Ok(())
//! # }
//! ```

use crate::kernel::{
    ApplyReport, Claim, Device, Hint, HostAddress, HostFacts, Kernel, KernelError, Link, LinkId, LinkKind, Op, OpText,
    OverlayName, Refusals, Residence, Route, RouteKind, Scope, State, Vxlan,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::{Notify, watch};

use crate::net::{Dual, MacAddr, Prefix};

use tables::{ENODEV, EOPNOTSUPP, Entry, MAIN, Notice, Slot, Tables};

mod acts;
mod read;
mod snapshot;
mod tables;
#[cfg(test)]
mod tests;

pub use acts::Address;
pub use snapshot::Snapshot;

/// A fake kernel: one network namespace. Clones share it.
#[derive(Clone)]
pub struct FakeKernel {
    inner: Arc<Mutex<Inner>>,
    stalled: Arc<watch::Sender<bool>>,
}

/// A route as any program can create it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeRoute {
    /// The destination.
    pub prefix: Prefix,
    /// The routing table; 254 is main.
    pub table: u32,
    /// The metric; 0 is the kernel's default (IPv6: 1024).
    pub metric: u32,
    /// The route's type. [`RouteKind::Foreign`] means any type that no overlay uses.
    pub kind: RouteKind,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The output interface, by index.
    pub link: Option<u32>,
    /// Whether the next hop is treated as on-link.
    pub onlink: bool,
    /// `rtm_protocol`.
    pub protocol: u8,
    /// The source address for packets of the host itself.
    pub source: Option<IpAddr>,
}

impl FakeRoute {
    /// Returns the route of `ip route add PREFIX via GATEWAY dev LINK`: main table, protocol `boot`.
    pub fn via(prefix: Prefix, gateway: IpAddr, link: u32) -> Self {
        Self {
            prefix,
            table: MAIN,
            metric: 0,
            kind: RouteKind::Unicast,
            gateway: Some(gateway),
            link: Some(link),
            onlink: false,
            protocol: Route::BOOT,
            source: None,
        }
    }
}

/// How a route is placed among others with its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// `ip route add`: `EEXIST` if there is a route with the key.
    Exclusive,
    /// `ip route replace`: replaces the first route, whichever program created it; `ENOENT` if there is none.
    Replace,
    /// `ip route append`. In IPv6 it becomes a further next hop of the first route.
    Append,
    /// `ip route prepend`.
    Prepend,
}

/// The lifetime of a neighbour or FDB entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nud {
    /// Set by an administrator (`NUD_PERMANENT`).
    Permanent,
    /// Learnt, failed or being resolved.
    Learnt,
}

struct Inner {
    tables: Tables,
    script: Script,
    monitor: Monitor,
    /// The link of each ID at the overlay's last observation, which the real kernel implementation remembers too.
    known: BTreeMap<OverlayName, BTreeMap<LinkId, u32>>,
    claims: Vec<(u64, OverlayName, Dual<Prefix>, Residence)>,
    last_claim: u64,
    writes: u64,
    reads: u64,
    changes: u64,
}

type Rule = Box<dyn FnMut(&Op) -> Option<i32> + Send>;

/// Scripted failures.
#[derive(Default)]
struct Script {
    offered: u64,
    nth: BTreeMap<u64, i32>,
    rule: Option<Rule>,
    lose_at: Option<u64>,
    observe: VecDeque<KernelError>,
    host_facts: VecDeque<KernelError>,
    probe: VecDeque<KernelError>,
}

impl Script {
    fn refusal(&mut self, op: &Op) -> Option<i32> {
        let nth = self.nth.remove(&self.offered);
        nth.or_else(|| self.rule.as_mut().and_then(|rule| rule(op)))
    }
}

#[derive(Default)]
struct Monitor {
    subscribers: BTreeMap<OverlayName, Subscriber>,
    capacity: Option<usize>,
}

struct Subscriber {
    scope: Scope,
    inbox: Arc<Inbox>,
}

#[derive(Default)]
struct Inbox {
    pending: Mutex<BTreeSet<u8>>,
    wake: Notify,
}

impl Inbox {
    fn put(&self, hint: Hint) {
        // The most urgent comes first.
        let rank = match hint {
            Hint::SubscriptionBroken => 0,
            Hint::Lost => 1,
            Hint::Changed => 2,
            Hint::FactsChanged => 3,
        };
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if hint == Hint::SubscriptionBroken {
            // Pending hints are older.
            pending.clear();
        }
        pending.insert(rank);
        drop(pending);
        self.wake.notify_one();
    }

    fn take(&self) -> Option<Hint> {
        let rank = self.pending.lock().unwrap_or_else(PoisonError::into_inner).pop_first()?;
        Some(match rank {
            0 => Hint::SubscriptionBroken,
            1 => Hint::Lost,
            2 => Hint::Changed,
            _ => Hint::FactsChanged,
        })
    }
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeKernel {
    /// Creates an empty namespace.
    pub fn new() -> Self {
        let inner = Inner {
            tables: Tables::default(),
            script: Script::default(),
            monitor: Monitor::default(),
            known: BTreeMap::new(),
            claims: Vec::new(),
            last_claim: 0,
            writes: 0,
            reads: 0,
            changes: 0,
        };
        Self { inner: Arc::new(Mutex::new(inner)), stalled: Arc::new(watch::Sender::new(false)) }
    }

    /// Returns how many operations [`Kernel::apply`] has carried out so far: an idle agent adds none.
    pub fn writes(&self) -> u64 {
        self.lock().writes
    }

    /// Returns how often [`Kernel::observe`] was answered so far.
    pub fn reads(&self) -> u64 {
        self.lock().reads
    }

    /// Returns the number of changes so far, by the agent and by others. While it stays the same, so does
    /// [`snapshot`](Self::snapshot).
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Returns the whole state, for display and comparison.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::of(&self.lock().tables)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn until_resumed(&self) {
        // Waiting cannot fail: the sender lives as long as this handle.
        let _ = self.stalled.subscribe().wait_for(|stalled| !stalled).await;
    }
}

// Scripted failures.
impl FakeKernel {
    /// Refuses the `nth` operation from now (0: the next one) with `errno`. Skipped operations do not count.
    pub fn refuse_nth(&self, nth: u64, errno: i32) {
        let script = &mut self.lock().script;
        script.nth.insert(script.offered + nth, errno);
    }

    /// Calls `rule` for each operation, and refuses the operation with the returned `errno`, until
    /// [`obey`](Self::obey).
    pub fn refuse_if(&self, rule: impl FnMut(&Op) -> Option<i32> + Send + 'static) {
        self.lock().script.rule = Some(Box::new(rule));
    }

    /// Ends all scripted failures.
    pub fn obey(&self) {
        let mut inner = self.lock();
        let offered = inner.script.offered;
        inner.script = Script { offered, ..Script::default() };
        drop(inner);
        self.resume();
    }

    /// Loses contact once, after `count` more operations: these are carried out, the rest of that plan is not.
    pub fn lose_contact_after(&self, count: u64) {
        let script = &mut self.lock().script;
        script.lose_at = Some(script.offered + count);
    }

    /// Makes the next [`Kernel::observe`] fail. Several calls add up.
    pub fn fail_next_observe(&self, error: KernelError) {
        self.lock().script.observe.push_back(error);
    }

    /// Makes the next [`Kernel::host_facts`] fail. Several calls add up.
    pub fn fail_next_host_facts(&self, error: KernelError) {
        self.lock().script.host_facts.push_back(error);
    }

    /// Makes the next [`Kernel::probe`] fail. Several calls add up.
    pub fn fail_next_probe(&self, error: KernelError) {
        self.lock().script.probe.push_back(error);
    }

    /// Makes every method wait before it does anything, until [`resume`](Self::resume).
    pub fn stall(&self) {
        self.stalled.send_replace(true);
    }

    /// Ends [`stall`](Self::stall).
    pub fn resume(&self) {
        self.stalled.send_replace(false);
    }

    /// Breaks every monitor socket: [`Hint::SubscriptionBroken`], until [`overrun_monitor`](Self::overrun_monitor).
    pub fn break_monitor(&self) {
        for subscriber in self.lock().monitor.subscribers.values() {
            // A failing socket loses notifications first.
            subscriber.inbox.put(Hint::Lost);
            subscriber.inbox.put(Hint::SubscriptionBroken);
        }
    }

    /// Overruns every monitor socket: [`Hint::Lost`].
    pub fn overrun_monitor(&self) {
        for subscriber in self.lock().monitor.subscribers.values() {
            subscriber.inbox.put(Hint::Lost);
        }
    }

    /// Limits one action to `count` notifications: above that the socket overruns (docs/kernel-facts.md, "Notification
    /// socket overrun").
    pub fn limit_monitor(&self, count: usize) {
        self.lock().monitor.capacity = Some(count);
    }
}

#[async_trait]
impl Kernel for FakeKernel {
    async fn claim(
        &self,
        overlay: &OverlayName,
        networks: &Dual<Prefix>,
        residence: Residence,
    ) -> Result<Claim, KernelError> {
        self.until_resumed().await;
        let mut inner = self.lock();
        let conflict = inner.claims.iter().find_map(|(_, name, others, theirs)| {
            if name == overlay {
                let is_second = *theirs == Residence::Present && residence == Residence::Present;
                return is_second.then(|| (name, "give this overlay another name, or stop the other one".to_owned()));
            }
            let overlap = networks.iter().find(|(family, own)| others.get(*family).is_some_and(|x| x.overlaps(own)));
            overlap.map(|(_, network)| (name, format!("{network} overlaps its network: choose a disjoint one")))
        });
        if let Some((other, hint)) = conflict {
            return Err(KernelError::Conflict { other: other.to_string(), hint });
        }
        inner.last_claim += 1;
        let id = inner.last_claim;
        inner.claims.push((id, overlay.clone(), *networks, residence));
        Ok(Claim::new(Held { id, inner: self.inner.clone() }))
    }

    async fn probe(&self, _: &[Device]) -> Result<(), KernelError> {
        self.until_resumed().await;
        self.lock().script.probe.pop_front().map_or(Ok(()), Err)
    }

    async fn host_facts(&self, reach: &[IpAddr]) -> Result<HostFacts, KernelError> {
        self.until_resumed().await;
        let mut inner = self.lock();
        match inner.script.host_facts.pop_front() {
            Some(error) => Err(error),
            None => Ok(inner.tables.host_facts(reach)),
        }
    }

    async fn observe(&self, scope: &Scope) -> Result<State, KernelError> {
        self.until_resumed().await;
        let mut inner = self.lock();
        if let Some(error) = inner.script.observe.pop_front() {
            return Err(error);
        }
        inner.reads += 1;
        let ids = inner.tables.identify(scope);
        let known = ids.iter().map(|(index, id)| (*id, *index)).collect();
        inner.known.insert(scope.overlay.clone(), known);
        Ok(inner.tables.observe(scope, &ids))
    }

    async fn apply(&self, scope: &Scope, ops: Arc<Vec<Op>>) -> ApplyReport {
        self.until_resumed().await;
        let mut report = ApplyReport::default();
        let mut refusals = Refusals::default();
        for (batch, ops) in ops.chunks(BATCH).enumerate() {
            if batch > 0 {
                // A caller may cancel between batches, as with the real kernel.
                tokio::task::yield_now().await;
            }
            self.lock().apply(scope, batch * BATCH, ops, &mut refusals, &mut report);
            if report.lost.is_some() {
                break;
            }
        }
        report
    }

    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint> {
        let mut inner = self.lock();
        let subscribers = &mut inner.monitor.subscribers;
        let inbox = match subscribers.get(&scope.overlay) {
            Some(earlier) => earlier.inbox.clone(),
            None => Arc::default(),
        };
        subscribers.insert(scope.overlay.clone(), Subscriber { scope: scope.clone(), inbox: inbox.clone() });
        stream::unfold(inbox, |inbox| async {
            loop {
                if let Some(hint) = inbox.take() {
                    return Some((hint, inbox));
                }
                inbox.wake.notified().await;
            }
        })
        .boxed()
    }
}

const BATCH: usize = 128;

struct Held {
    id: u64,
    inner: Arc<Mutex<Inner>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.claims.retain(|(id, ..)| *id != self.id);
    }
}

impl Inner {
    fn apply(&mut self, scope: &Scope, start: usize, ops: &[Op], refusals: &mut Refusals, report: &mut ApplyReport) {
        let before = self.ids(Some(&scope.overlay));
        for (place, op) in (start..).zip(ops) {
            if refusals.block(op) {
                refusals.refused(op);
                report.skipped.push(place);
                continue;
            }
            let doing = || OpText { op, scope }.to_string();
            if self.script.lose_at == Some(self.script.offered) {
                self.script.lose_at = None;
                report.lost = Some(KernelError::Lost { doing: doing(), reason: "scripted".to_owned() });
                break;
            }
            let scripted = self.script.refusal(op);
            self.script.offered += 1;
            let outcome = match scripted {
                Some(errno) => Err(errno),
                None => self.write(scope, op),
            };
            match outcome {
                Ok(()) => {
                    report.applied += 1;
                    self.writes += 1;
                    self.changes += 1;
                }
                Err(errno) => {
                    refusals.refused(op);
                    report.refused.push((place, refused(doing(), errno)));
                }
            }
        }
        self.tell(Some(&scope.overlay), &before);
    }

    fn write(&mut self, scope: &Scope, op: &Op) -> Result<(), i32> {
        let tables = &mut self.tables;
        let known = self.known.entry(scope.overlay.clone()).or_insert_with(|| {
            tables.identify(scope).into_iter().map(|(index, id)| (id, index)).collect::<BTreeMap<_, _>>()
        });
        let index = |id: &LinkId| match id {
            LinkId::Uplink => scope.uplink.ok_or(ENODEV),
            LinkId::Other(index) => Ok(*index),
            LinkId::Own(_) => known.get(id).copied().ok_or(ENODEV),
        };
        let entry = |route: &Route| -> Result<Entry, i32> {
            let Route { kind, gateway, link, onlink, protocol, .. } = *route;
            let source = route.source();
            let link = link.as_ref().map(index).transpose()?;
            Ok(Entry { kind, gateway, link, onlink, protocol, source, siblings: Vec::new() })
        };
        match op {
            Op::DeleteLink { id, .. } => {
                tables.delete_link(index(id)?)?;
                known.remove(id);
                Ok(())
            }
            Op::CreateLink { id, link } => {
                let mut link = Link::clone(link);
                match &mut link.kind {
                    LinkKind::Vxlan(Vxlan { lower: Some(lower), .. }) => *lower = LinkId::Other(index(lower)?),
                    LinkKind::Vxlan(_) | LinkKind::Tun(_) | LinkKind::Other(_) => {}
                    LinkKind::External(_) => return Err(EOPNOTSUPP),
                }
                let created = tables.add_link(link)?;
                known.insert(*id, created);
                Ok(())
            }
            Op::UpdateLink { id, from, to, .. } => tables.update_link(index(id)?, from, to),
            Op::AddAddress(key) => tables.add_address(HostAddress::new(index(&key.link)?, key.addr, key.len)),
            Op::PutFdb { key, dst } => tables.put_fdb(index(&key.link)?, key.mac, *dst, Nud::Permanent),
            Op::PutNeighbour { key, mac, .. } => {
                tables.put_neighbour(index(&key.link)?, key.addr, *mac, Nud::Permanent)
            }
            Op::PutForward { key, forward } => tables.put_forward(index(&key.link)?, key.prefix, **forward),
            Op::DeleteForward { key, .. } => tables.delete_forward(index(&key.link)?, key.prefix),
            Op::CreateRoute { prefix, route } => {
                tables.add_route(Slot::of(prefix, route), entry(route)?, Placement::Exclusive)
            }
            Op::ReplaceRoute { prefix, change } => {
                tables.add_route(Slot::of(prefix, &change.1), entry(&change.1)?, Placement::Replace)
            }
            Op::DeleteRoute { prefix, route } => tables.delete_route(Slot::of(prefix, route), &entry(route)?),
            Op::DeleteNeighbour { key, .. } => tables.delete_neighbour(index(&key.link)?, key.addr),
            Op::DeleteFdb { key, dst } => tables.delete_fdb(index(&key.link)?, key.mac, *dst),
            Op::DeleteAddress(key) => tables.delete_address(index(&key.link)?, key.addr, key.len),
        }
    }

    /// Returns the IDs of links for each subscriber, before a change.
    fn ids(&self, writer: Option<&OverlayName>) -> BTreeMap<OverlayName, BTreeMap<u32, LinkId>> {
        let others = self.monitor.subscribers.iter().filter(|(name, _)| Some(*name) != writer);
        others.map(|(name, subscriber)| (name.clone(), self.tables.identify(&subscriber.scope))).collect()
    }

    /// Converts notices to hints for all subscribers except the writer.
    fn tell(&mut self, writer: Option<&OverlayName>, before: &BTreeMap<OverlayName, BTreeMap<u32, LinkId>>) {
        let notices = std::mem::take(&mut self.tables.notices);
        for (name, subscriber) in &self.monitor.subscribers {
            if Some(name) == writer || notices.is_empty() {
                continue;
            }
            if self.monitor.capacity.is_some_and(|capacity| notices.len() > capacity) {
                subscriber.inbox.put(Hint::Lost);
                continue;
            }
            let mut ids = self.tables.identify(&subscriber.scope);
            ids.extend(before.get(name).into_iter().flatten());
            for hint in notices.iter().flat_map(|notice| hints_of(notice, &subscriber.scope, &ids)) {
                subscriber.inbox.put(hint);
            }
        }
    }
}

fn hints_of(notice: &Notice, scope: &Scope, ids: &BTreeMap<u32, LinkId>) -> Vec<Hint> {
    let own = |index: &u32| matches!(ids.get(index), Some(LinkId::Own(_)));
    let hints = |changed: bool, facts: bool| {
        let hints = [changed.then_some(Hint::Changed), facts.then_some(Hint::FactsChanged)];
        hints.into_iter().flatten().collect()
    };
    match notice {
        Notice::Link { index, is_fact } => {
            let is_uplink = ids.get(index) == Some(&LinkId::Uplink);
            hints(ids.contains_key(index), *is_fact || is_uplink)
        }
        Notice::Address { index, addr, is_there } => Hint::of_address(*addr, *is_there, own(index)).collect(),
        Notice::Neighbour(index) | Notice::Fdb(index) => hints(own(index), false),
        Notice::Route { slot, link, is_fact } => {
            let ours = scope.has_slot(slot.as_told(), slot.prefix.family()) && scope.covers(&slot.prefix);
            hints(ours, *is_fact && slot.table == MAIN && !link.is_some_and(|link| own(&link)))
        }
    }
}

fn refused(doing: String, errno: i32) -> KernelError {
    KernelError::Refused { doing, errno, message: String::new() }
}

/// Formats a MAC address, or its absence, as `ip` does.
fn mac_text(mac: Option<MacAddr>) -> String {
    mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string())
}
