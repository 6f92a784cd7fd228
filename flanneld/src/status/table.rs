//! The status as a table for people: a row for each fact, with its remedy if there is one.

use std::fmt::{self, Display};

use flannel_backend_udp::CarriedDevice;
use flannel_backend_udp::path::{Counters, Reason as Dropped};
use flannel_core::admit::Reason;
use flannel_core::clock::BootTime;
use flannel_core::firewall_keeper::RulesState;
use flannel_core::net::Dual;
use flannel_core::overlay::{Contact, Contended, PeerCounts, Status, SubscriptionState, UplinkState, WithheldBecause};
use flannel_core::text::Plain;

use super::{Document, Store, reasons};
use crate::output::duration;

/// The most rows of each list. Counts in other rows include all entries.
const LISTED: usize = Status::MAX_LISTED;

impl Display for Document<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = Rows(f);
        self.node(&mut rows)?;
        self.peers(&mut rows)?;
        self.carried.iter().try_for_each(|device| carried(device, &mut rows))?;
        self.lists(&mut rows)
    }
}

/// Writes lines of a name and a value. External text is escaped, and never begins a line.
struct Rows<'a, 'f>(&'a mut fmt::Formatter<'f>);

impl Rows<'_, '_> {
    fn row(&mut self, name: impl Display, value: impl Display) -> fmt::Result {
        writeln!(self.0, "{name:<12} {}", Plain(value))
    }

    fn list<T: Display>(&mut self, name: &str, entries: impl Iterator<Item = T>) -> fmt::Result {
        entries.take(LISTED).try_for_each(|entry| self.row(name, entry))
    }
}

impl Document<'_> {
    fn node(&self, rows: &mut Rows<'_, '_>) -> fmt::Result {
        let Self { status, now, .. } = *self;
        rows.row("overlay", self.overlay)?;
        rows.row("state", if self.ready { "ready" } else { "not ready" })?;
        if let Some(end) = &status.ended {
            rows.row("ended", end)?;
        }
        for reason in reasons(status, self.firewall) {
            rows.row("waits for", reason)?;
        }
        if let Some(degraded) = status.degraded() {
            rows.row("degraded", degraded)?;
        }
        self.store(rows)?;
        if let Some(lease) = &status.lease {
            let until = lease.expires.map(|expires| format!(", expires in {}", duration(expires.since(now))));
            rows.row("lease", format_args!("{}{}", listed(&lease.subnets), until.unwrap_or_default()))?;
            rows.row("address", listed(&lease.attrs.public_ip))?;
            rows.row("key", &lease.key)?;
        }
        if let (Some(_), Some(reason)) = (&status.lease, &status.lease_refused) {
            rows.row("lease", format_args!("not renewed by the store: {reason}"))?;
        }
        if let Some(contended) = &status.contended {
            rows.row("contended", contention(contended, now))?;
        }
        match &status.uplink {
            UplinkState::Up(uplink) => {
                let addrs = listed(&uplink.addrs);
                rows.row("uplink", format_args!("{} ({addrs}), MTU {}", uplink.name, uplink.mtu.0))?;
            }
            UplinkState::Lost { since, error, .. } => {
                rows.row("uplink", format_args!("lost for {}: {error}", duration(now.since(*since))))?;
            }
            _ => {}
        }
        if let Some(mtu) = status.mtu {
            rows.row("pod MTU", mtu.0)?;
        }
        if status.notifications != SubscriptionState::Active {
            rows.row("kernel", "notifications are lost: changes are found by audits only")?;
        }
        rows.row("subnet file", self.subnet_file)?;
        match self.firewall {
            RulesState::Pending => rows.row("firewall", "rules not written yet")?,
            RulesState::InPlace => rows.row("firewall", "rules in place")?,
            RulesState::Failed(error) => rows.row("firewall", error)?,
            RulesState::WithoutForward(error) => rows.row("firewall", format_args!("no forward rules: {error}"))?,
        }
        if status.reconfigured.is_some() {
            rows.row("network", "the configuration in the store has changed: restart this agent to use it")?;
        }
        if let Some(error) = &status.config_rejected {
            rows.row(
                "network",
                format_args!("the configuration in the store cannot be used; the former one stays: {error}"),
            )?;
        }
        if let Some(reason) = &status.own_trouble {
            rows.row("own record", format_args!("not accepted by other nodes: {}", WithRemedy(reason)))?;
        }
        Ok(())
    }

    fn store(&self, rows: &mut Rows<'_, '_>) -> fmt::Result {
        let Store { name, stale, state_file, state_file_error } = &self.store;
        match &self.status.store {
            Contact::Never => rows.row("store", format_args!("{name}, no answer yet")),
            Contact::Live => rows.row("store", format_args!("{name}, reachable")),
            Contact::Lost { since, error } => {
                let since = duration(self.now.since(*since));
                rows.row("store", format_args!("{name}, unavailable for {since}: {error}"))
            }
            _ => rows.row("store", name),
        }?;
        match (state_file, state_file_error) {
            (Some(file), _) if *stale => {
                rows.row("STALE", format_args!("lease and peers are those of {file} until the store is available"))
            }
            (Some(_), Some(error)) => rows.row("state file", error),
            (Some(file), None) => rows.row("state file", file),
            (None, _) => Ok(()),
        }
    }

    fn peers(&self, rows: &mut Rows<'_, '_>) -> fmt::Result {
        let status = self.status;
        let PeerCounts { accepted, skipped, quarantined, dropped, .. } = status.peers;
        let counts = format_args!("{accepted} accepted, {skipped} of them skipped; {quarantined} records quarantined");
        rows.row("peers", counts)?;
        if dropped > 0 {
            let fix = "delete the records that no node wrote";
            let what = "records are ignored, because there are too many or their keys are too long";
            rows.row("dropped", format_args!("{dropped} {what}: {fix}"))?;
        }
        if status.unprotected > 0 {
            let fix = "correct or delete the quarantined records";
            let what = "prefixes that invalid records name are not protected from deletion, because there are too many";
            rows.row("unprotected", format_args!("{} {what}: {fix}", status.unprotected))?;
        }
        if status.unknown_host_objects > 0 {
            let fix = "delete unused ones";
            let what = "links, addresses or routes of this host were not read, because there are too many";
            rows.row("host", format_args!("{} {what}: {fix}", status.unknown_host_objects))?;
        }
        let Status { audits, lease_rounds, drift_repaired, failed_writes, .. } = status;
        let rounds = format_args!(
            "{audits} audits, {lease_rounds} lease rounds, {drift_repaired} repairs, {failed_writes} failed writes"
        );
        rows.row("rounds", rounds)
    }

    fn lists(&self, rows: &mut Rows<'_, '_>) -> fmt::Result {
        let (status, now) = (self.status, self.now);
        let quarantined = status.quarantined.iter();
        rows.list("quarantined", quarantined.map(|(key, reason)| format!("{key}: {}", WithRemedy(reason))))?;
        rows.list("skipped", status.skipped.iter().map(|((key, family), skip)| format!("{key} ({family}): {skip}")))?;
        let refused = status.refused.iter().map(|(object, refusal)| {
            let name = refusal.peer.as_ref().map_or_else(|| object.to_string(), ToString::to_string);
            format!("{name}: {}: {}", refusal.error, refusal.remedy())
        });
        rows.list("refused", refused)?;
        let withheld = status.withheld.iter();
        rows.list("withheld", withheld.map(|(prefix, because)| format!("{prefix}: {}", waits(*because, now))))?;
        let former = "may contain routes of this overlay; they are removed once the store has answered";
        rows.list("former", status.former.iter().map(|network| format!("{network}: {former}")))?;
        let conflicts = status.conflicts.iter();
        rows.list("conflict", conflicts.map(|conflict| format!("{}: {}", conflict.found, conflict.remedy)))?;
        if status.conflict_count > status.conflicts.len().min(LISTED) {
            rows.row("conflict", format_args!("{} in total; only the first are listed", status.conflict_count))?;
        }
        let flapping = status.flapping.iter();
        rows.list("flapping", flapping.map(|object| format!("{object}: another program keeps changing it")))?;
        status.last_error.iter().try_for_each(|error| rows.row("last error", error))
    }
}

fn carried(device: &CarriedDevice, rows: &mut Rows<'_, '_>) -> fmt::Result {
    let CarriedDevice { name, forwards, counters, limitations, .. } = device;
    let (out, into) = (counters.sent.packets, counters.received.packets);
    let lost = counters.all_dropped() + counters.overflowed;
    rows.row(name, format_args!("{forwards} subnets, {out} packets sent, {into} received, {lost} dropped"))?;
    if counters.unbatched > 0 {
        rows.row("unbatched", format_args!("{} packets were sent one by one or in fragments", counters.unbatched))?;
    }
    for reason in Dropped::ALL {
        let count = counters.dropped(reason);
        if count > 0 {
            rows.row("packets", format_args!("{count} dropped ({}): {reason}", reason.name()))?;
        }
    }
    if counters.overflowed > 0 {
        let (count, name) = (counters.overflowed, Counters::OVERFLOWED);
        rows.row(
            "packets",
            format_args!("{count} dropped ({name}) by the kernel: no room, a wrong checksum or a filter"),
        )?;
    }
    limitations.iter().try_for_each(|it| rows.row("limited", format_args!("{}: {}", it.what, it.cause)))
}

struct WithRemedy<'a>(&'a Reason);

impl Display for WithRemedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0, self.0.remedy())
    }
}

fn listed<T: Display>(values: &Dual<T>) -> String {
    values.iter().map(|(_, value)| value.to_string()).collect::<Vec<_>>().join(", ")
}

fn contention(contended: &Contended, now: BootTime) -> String {
    let next = match contended.next {
        Some(next) => format!("; next in {}", duration(next.since(now))),
        None => String::new(),
    };
    format!(
        "another agent writes this node's record, which was written again {} times{next}: run one agent per node",
        contended.times
    )
}

fn waits(because: WithheldBecause, now: BootTime) -> String {
    match because {
        WithheldBecause::MassRemoval(until) => {
            format!("most peers disappeared at once; deleted in {} unless they return", duration(until.since(now)))
        }
        other => other.to_string(),
    }
}
