//! The agent's status as a document: JSON for programs, a table for people.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use flannel_backend_udp::path::{self, Traffic};
use flannel_backend_udp::{CarriedDevice, Observer};
use flannel_core::admit::Reason;
use flannel_core::clock::BootTime;
use flannel_core::overlay::{Contact, Contended, Phase, Status, SubscriptionState, UplinkState, Wait, WithheldBecause};
use flannel_core::text::Plain;
use flannel_subnet_cached::CachedSubnets;
use serde::{Deserialize, Serialize};

use flannel_core::firewall_keeper::RulesState;

/// Entries of each list that are shown; the counts are whole.
const LISTED: usize = Status::MAX_QUARANTINED;

/// Characters of a text in those lists that are shown. With [`LISTED`] it bounds the document to a few MiB.
const MOST_TEXT: usize = 256;

/// What `/status` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Document {
    pub(crate) version: String,
    pub(crate) overlay: String,
    pub(crate) phase: String,
    pub(crate) ready: bool,
    /// What readiness waits for, in words with the remedy; empty when ready.
    pub(crate) waits_for: Vec<String>,
    /// What is done without, in words; a node that is ready may be degraded.
    pub(crate) degraded: Option<String>,
    pub(crate) store: Store,
    pub(crate) lease: Option<Lease>,
    /// Who else is at the record, in words.
    pub(crate) contended: Option<String>,
    pub(crate) uplink: Option<Uplink>,
    /// Why there is no uplink, or none that can be used.
    pub(crate) uplink_error: Option<String>,
    pub(crate) uplink_lost_for_seconds: Option<u64>,
    pub(crate) mtu: Option<u32>,
    /// Whether the kernel's notifications are heard.
    pub(crate) notifications_heard: bool,
    pub(crate) subnet_file: String,
    /// Why the firewall's rules are not as wanted.
    pub(crate) firewall: Option<String>,
    pub(crate) peers: Peers,
    /// Whether the store holds another configuration than the agent goes by: it has to be restarted.
    pub(crate) reconfigured: bool,
    /// Why other nodes do not take this one for a peer.
    pub(crate) own_trouble: Option<String>,
    pub(crate) quarantined: Vec<Named>,
    pub(crate) skipped: Vec<Named>,
    pub(crate) conflicts: Vec<Conflict>,
    /// How many there are, listed or not.
    pub(crate) conflict_count: usize,
    pub(crate) flapping: Vec<String>,
    /// Writes that the kernel refused: for which peer or object, and its words with the remedy.
    pub(crate) refused: Vec<Named>,
    pub(crate) withheld: Vec<Named>,
    /// Prefixes that bad records name and that are not withheld, because there are too many.
    pub(crate) unprotected: usize,
    /// Links, addresses and routes of the host that are not known, because there are too many.
    pub(crate) unknown_host_objects: usize,
    /// Former networks that may still hold routes of ours.
    pub(crate) former: Vec<String>,
    pub(crate) undone: usize,
    pub(crate) audits: u64,
    pub(crate) lease_rounds: u64,
    pub(crate) drift_repaired: u64,
    /// Devices whose packets this process carries.
    pub(crate) carried: Vec<Carried>,
    pub(crate) last_error: Option<String>,
    pub(crate) log_lines_dropped: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Store {
    pub(crate) name: String,
    /// `never`, `live` or `lost`.
    pub(crate) contact: String,
    pub(crate) lost_for_seconds: Option<u64>,
    pub(crate) error: Option<String>,
    /// Whether lease and peers are those of the state file, because the store has not answered since the start.
    pub(crate) stale: bool,
    pub(crate) state_file: Option<String>,
    /// Why the state file could not be written.
    pub(crate) state_file_error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) key: String,
    pub(crate) subnets: Vec<String>,
    pub(crate) public: Vec<String>,
    pub(crate) backend_type: String,
    pub(crate) expires_in_seconds: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Uplink {
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) mtu: u32,
    pub(crate) addresses: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Peers {
    pub(crate) accepted: usize,
    pub(crate) skipped: usize,
    pub(crate) quarantined: usize,
    pub(crate) dropped: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Conflict {
    pub(crate) found: String,
    pub(crate) remedy: String,
}

/// A device whose packets this process carries. Numbers count from when it was opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Carried {
    pub(crate) device: String,
    /// Subnets of peers that it forwards to.
    pub(crate) forwards: usize,
    pub(crate) sent: Volume,
    pub(crate) received: Volume,
    /// Packets sent one by one because the path to the peer carries less than the device takes.
    pub(crate) unbatched: u64,
    /// ICMP answers to packets for which there is no peer.
    pub(crate) answered: u64,
    /// Packets dropped, by reason; reasons without any are left out.
    pub(crate) dropped: BTreeMap<String, u64>,
    /// What makes it slower than it could be, and why.
    pub(crate) limitations: Vec<Named>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Volume {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Carried {
    fn of(device: &CarriedDevice) -> Self {
        let counters = &device.counters;
        let volume = |traffic: &Traffic| Volume { packets: traffic.packets, bytes: traffic.bytes };
        let by_reason = path::Reason::ALL.map(|reason| (reason.name().to_owned(), counters.dropped(reason)));
        let dropped = by_reason.into_iter().chain([(path::Counters::OVERFLOWED.to_owned(), counters.overflowed)]);
        let limitations = device.limitations.iter();
        Self {
            device: device.name.to_string(),
            forwards: device.forwards,
            sent: volume(&counters.sent),
            received: volume(&counters.received),
            unbatched: counters.unbatched,
            answered: counters.answered,
            dropped: dropped.filter(|(_, count)| *count > 0).collect(),
            limitations: limitations.map(|it| Named { name: it.what.clone(), reason: it.cause.clone() }).collect(),
        }
    }
}

/// What the status does not know of the program around the agent.
pub(crate) struct Surroundings {
    pub(crate) overlay: String,
    pub(crate) store: String,
    pub(crate) subnet_file: String,
    pub(crate) kept: Option<Arc<CachedSubnets>>,
    pub(crate) carried: Observer,
}

impl Surroundings {
    /// Whether the state file stands in for the store.
    pub(crate) fn is_stale(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.stands_in())
    }
}

/// Ready: the overlay is, and the firewall's rules are in place.
pub(crate) fn is_ready(status: &Status, rules: &RulesState) -> bool {
    status.is_ready() && rules.is_ready()
}

impl Document {
    pub(crate) fn new(
        status: &Status,
        rules: &RulesState,
        around: &Surroundings,
        now: BootTime,
        log_lines_dropped: u64,
    ) -> Self {
        let lease = status.lease.as_ref().map(|lease| Lease {
            key: lease.key.to_string(),
            subnets: lease.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect(),
            public: lease.attrs.public_ip.iter().map(|(_, addr)| addr.to_string()).collect(),
            backend_type: lease.attrs.backend_type.to_string(),
            expires_in_seconds: lease.expires.map(|expires| expires.since(now).as_secs()),
        });
        let uplink = status.uplink.up().map(|uplink| Uplink {
            name: uplink.name.to_string(),
            index: uplink.index,
            mtu: uplink.mtu.0,
            addresses: uplink.addrs.iter().map(|(_, addr)| addr.to_string()).collect(),
        });
        let (uplink_error, lost) = match &status.uplink {
            UplinkState::Lost { since, error, .. } => (Some(error.clone()), Some(now.since(*since).as_secs())),
            _ => (None, None),
        };
        let named = |name: String, reason: String| Named { name: cut(name), reason: cut(reason) };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            overlay: around.overlay.clone(),
            phase: phase(status.phase).to_owned(),
            ready: is_ready(status, rules),
            waits_for: waits_for(status, rules, |wait| format!("{wait}: {}", wait.remedy())),
            degraded: status.degraded().map(|degraded| degraded.to_string()),
            store: store(status, around, now),
            lease,
            contended: status.contended.map(|contended| contention(&contended, now)),
            uplink,
            uplink_error,
            uplink_lost_for_seconds: lost,
            mtu: status.mtu.map(|mtu| mtu.0),
            notifications_heard: status.notifications == SubscriptionState::Active,
            subnet_file: around.subnet_file.clone(),
            firewall: rules.error().map(str::to_owned),
            peers: Peers {
                accepted: status.peers.accepted,
                skipped: status.peers.skipped,
                quarantined: status.peers.quarantined,
                dropped: status.peers.dropped,
            },
            reconfigured: status.reconfigured.is_some(),
            own_trouble: status.own_trouble.as_ref().map(with_remedy),
            quarantined: status
                .quarantined
                .iter()
                .take(LISTED)
                .map(|(key, reason)| named(key.to_string(), with_remedy(reason)))
                .collect(),
            skipped: status
                .skipped
                .iter()
                .take(LISTED)
                .map(|((key, family), skip)| named(format!("{key} ({family})"), skip.to_string()))
                .collect(),
            conflicts: status
                .conflicts
                .iter()
                .take(LISTED)
                .map(|conflict| Conflict { found: cut(conflict.found.clone()), remedy: cut(conflict.remedy.clone()) })
                .collect(),
            conflict_count: status.conflict_count,
            flapping: status.flapping.iter().take(LISTED).map(ToString::to_string).collect(),
            refused: status
                .refused
                .iter()
                .take(LISTED)
                .map(|(object, refusal)| {
                    let name = refusal.peer.as_ref().map_or_else(|| object.to_string(), ToString::to_string);
                    named(name, format!("{}: {}", refusal.error, refusal.remedy()))
                })
                .collect(),
            withheld: status
                .withheld
                .iter()
                .take(LISTED)
                .map(|(prefix, because)| named(prefix.to_string(), withheld(*because, now)))
                .collect(),
            unprotected: status.unprotected,
            unknown_host_objects: status.unknown_host_objects,
            former: status.former.iter().map(ToString::to_string).collect(),
            undone: status.undone,
            audits: status.audits,
            lease_rounds: status.lease_rounds,
            drift_repaired: status.drift_repaired,
            carried: around.carried.devices().iter().map(Carried::of).collect(),
            last_error: status.last_error.clone(),
            log_lines_dropped,
        }
    }
}

/// The first [`MOST_TEXT`] characters.
fn cut(text: String) -> String {
    match text.char_indices().nth(MOST_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn with_remedy(reason: &Reason) -> String {
    format!("{reason}: {}", reason.remedy())
}

/// One line, as systemd shows it.
pub(crate) fn summary(status: &Status, rules: &RulesState) -> String {
    let peers = status.peers;
    let store = match &status.store {
        Contact::Lost { .. } => ", lease store away",
        _ => "",
    };
    let bad = if peers.quarantined > 0 { format!(", {} quarantined", peers.quarantined) } else { String::new() };
    let own = match &status.own_trouble {
        Some(reason) => format!(", no peer to others ({reason})"),
        None => String::new(),
    };
    if let Some(end) = &status.ended {
        return format!("stopped: {end}");
    }
    match waits_for(status, rules, Wait::to_string).first() {
        None => format!("ready: {} peers{bad}{own}{store}", peers.accepted),
        Some(reason) => format!("{}: waiting for {reason}{own}{store}", phase(status.phase)),
    }
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::LeaseHeld => "lease held",
        Phase::DeviceReady => "device ready",
        Phase::Ready => "ready",
        Phase::Stopped => "stopped",
        _ => "unknown",
    }
}

fn waits_for(status: &Status, rules: &RulesState, text: impl Fn(&Wait) -> String) -> Vec<String> {
    let mut reasons: Vec<_> = status.waits_for().iter().map(text).collect();
    match rules {
        RulesState::InPlace | RulesState::WithoutForward(_) => {}
        RulesState::Pending if status.phase != Phase::Ready => {}
        RulesState::Pending => reasons.push("the firewall's rules".to_owned()),
        RulesState::Failed(error) => reasons.push(format!("the firewall's rules ({error})")),
    }
    reasons
}

fn contention(contended: &Contended, now: BootTime) -> String {
    let next = match contended.next {
        Some(next) => format!("; next in {} s", next.since(now).as_secs()),
        None => String::new(),
    };
    format!(
        "another program changes this node's record, which was written again {} times{next}: run one agent per node",
        contended.times
    )
}

fn store(status: &Status, around: &Surroundings, now: BootTime) -> Store {
    let (contact, since, error) = match &status.store {
        Contact::Never => ("never", None, None),
        Contact::Live => ("live", None, None),
        Contact::Lost { since, error } => ("lost", Some(now.since(*since).as_secs()), Some(error.clone())),
        _ => ("unknown", None, None),
    };
    Store {
        name: around.store.clone(),
        contact: contact.to_owned(),
        lost_for_seconds: since,
        error,
        stale: around.is_stale(),
        state_file: around.kept.as_ref().map(|kept| kept.path().display().to_string()),
        state_file_error: around.kept.as_ref().and_then(|kept| kept.trouble()),
    }
}

fn withheld(because: WithheldBecause, now: BootTime) -> String {
    match because {
        WithheldBecause::MassRemoval(until) => {
            format!("most peers went at once; deleted in {} s unless they come back", until.since(now).as_secs())
        }
        other => other.to_string(),
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: &str| writeln!(f, "{name:<12} {}", Plain(value));
        let ready = if self.ready { "ready" } else { "NOT ready" };
        row("overlay", &format!("{} ({ready}, phase {:?})", self.overlay, self.phase))?;
        for reason in &self.waits_for {
            row("waits for", reason)?;
        }
        if let Some(degraded) = &self.degraded {
            row("degraded", degraded)?;
        }
        let mut store = format!("{} ({})", self.store.name, self.store.contact);
        if let (Some(seconds), Some(error)) = (self.store.lost_for_seconds, &self.store.error) {
            // Writing to a String cannot fail.
            let _ = write!(store, " for {seconds} s: {error}");
        }
        row("store", &store)?;
        match (&self.store.state_file, &self.store.state_file_error) {
            (Some(file), _) if self.store.stale => {
                row("STALE", &format!("lease and peers are those of {file} until the store is back"))?;
            }
            (Some(_), Some(error)) => row("state file", error)?,
            (Some(file), None) => row("state file", file)?,
            (None, _) => {}
        }
        if let Some(lease) = &self.lease {
            let until = lease.expires_in_seconds.map(|seconds| format!(", {seconds} s left")).unwrap_or_default();
            let (subnets, public) = (lease.subnets.join(", "), lease.public.join(", "));
            row("lease", &format!("{subnets} at {public}, key {}{until}", lease.key))?;
        }
        if let Some(contended) = &self.contended {
            row("contended", contended)?;
        }
        if let Some(uplink) = &self.uplink {
            row("uplink", &format!("{} ({}), mtu {}", uplink.name, uplink.addresses.join(", "), uplink.mtu))?;
        }
        if let (Some(error), Some(seconds)) = (&self.uplink_error, self.uplink_lost_for_seconds) {
            row("uplink", &format!("lost for {seconds} s: {error}"))?;
        }
        if let Some(mtu) = self.mtu {
            row("pod mtu", &mtu.to_string())?;
        }
        if !self.notifications_heard {
            row("kernel", "notifications are not heard: changes are seen by audits only")?;
        }
        row("subnet file", &self.subnet_file)?;
        if let Some(error) = &self.firewall {
            row("firewall", error)?;
        }
        if self.reconfigured {
            row("network", "its configuration in the store has changed: restart this agent to go by it")?;
        }
        if let Some(reason) = &self.own_trouble {
            row("own record", &format!("not taken for a peer: {reason}"))?;
        }
        let Peers { accepted, skipped, quarantined, dropped } = self.peers;
        row("peers", &format!("{accepted} accepted, {skipped} of them skipped, {quarantined} records quarantined"))?;
        if dropped > 0 {
            let fix = "delete the records that no node wrote";
            row("dropped", &format!("{dropped} records, the youngest or with keys that are too long: {fix}"))?;
        }
        if self.unprotected > 0 {
            let fix = "mend or delete the quarantined records";
            let what = "prefixes that bad records name are not protected from deletion, because there are too many";
            row("unprotected", &format!("{} {what}: {fix}", self.unprotected))?;
        }
        if self.unknown_host_objects > 0 {
            let fix = "delete those that nobody uses";
            let what = "links, addresses or routes of this host were not read, because there are too many";
            row("host", &format!("{} {what}: {fix}", self.unknown_host_objects))?;
        }
        let (audits, rounds, drift) = (self.audits, self.lease_rounds, self.drift_repaired);
        row("rounds", &format!("{audits} audits, {rounds} lease rounds, {drift} repairs, {} undone", self.undone))?;
        for Carried { device, forwards, sent, received, unbatched, dropped, limitations, .. } in &self.carried {
            let (out, into, lost) = (sent.packets, received.packets, dropped.values().sum::<u64>());
            row(device, &format!("{forwards} subnets, {out} packets sent, {into} received, {lost} dropped"))?;
            if *unbatched > 0 {
                row("unbatched", &format!("{unbatched} packets were sent one by one or in fragments"))?;
            }
            for (reason, count) in dropped {
                row("dropped", &format!("{count} packets: {reason}"))?;
            }
            for Named { name, reason } in limitations {
                row("limited", &format!("{name}: {reason}"))?;
            }
        }
        let lists = [
            ("quarantined", &self.quarantined),
            ("skipped", &self.skipped),
            ("refused", &self.refused),
            ("withheld", &self.withheld),
        ];
        for (title, list) in lists {
            for Named { name, reason } in list {
                row(title, &format!("{name}: {reason}"))?;
            }
        }
        for network in &self.former {
            row("former", &format!("{network}: routes of ours may be left there; removed once the store speaks"))?;
        }
        for Conflict { found, remedy } in &self.conflicts {
            row("conflict", &format!("{found}: {remedy}"))?;
        }
        if self.conflict_count > self.conflicts.len() {
            row("conflict", &format!("{} in all; only the first are listed", self.conflict_count))?;
        }
        for object in &self.flapping {
            row("flapping", &format!("{object}: somebody else keeps changing it"))?;
        }
        if let Some(error) = &self.last_error {
            row("last error", error)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
