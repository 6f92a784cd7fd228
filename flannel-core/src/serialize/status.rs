//! The agent's status.

use serde::{Serialize, Serializer};

use crate::admit::Reason;
use crate::agent::{
    Contact, Contended, Degraded, End, EnvFile, PeerCounts, Phase, Refusal, Status, SubscriptionState, UplinkState,
    Wait, WithheldBecause,
};
use crate::backend::{Skip, Uplink};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::firewall_keeper::RulesState;
use crate::kernel::{Limitation, LinkName, Object};
use crate::lease::{Lease, LeaseKey};
use crate::net::{Family, Mtu, Prefix};
use crate::plan::Conflict;

/// The serialized form of a status: its own field names, derived fields, and lists instead of maps.
#[derive(Serialize)]
struct Document<'a> {
    phase: &'a Phase,
    ready: bool,
    waits_for: Vec<Wait>,
    degraded: Option<Degraded>,
    ended: &'a Option<End>,
    network: Option<&'a NetworkConfig>,
    reconfigured: Option<&'a NetworkConfig>,
    config_rejected: &'a Option<String>,
    lease: Option<&'a Lease>,
    lease_refused: &'a Option<String>,
    contended: &'a Option<Contended>,
    uplink: &'a UplinkState,
    mtu: &'a Option<Mtu>,
    store: &'a Contact,
    notifications: &'a SubscriptionState,
    subnet_env: &'a EnvFile,
    peers: &'a PeerCounts,
    quarantined: Vec<Quarantined<'a>>,
    own_trouble: &'a Option<Reason>,
    skipped: Vec<Skipped<'a>>,
    skipped_count: usize,
    conflicts: &'a [Conflict],
    conflict_count: usize,
    flapping: &'a [Object],
    flapping_count: usize,
    limitations: Vec<Limited<'a>>,
    refused: Vec<Refused<'a>>,
    refused_count: usize,
    former: &'a [Prefix],
    withheld: Vec<Withheld<'a>>,
    withheld_count: usize,
    unprotected: usize,
    unknown_host_objects: usize,
    failed_writes: usize,
    audits: u64,
    lease_rounds: u64,
    drift_repaired: u64,
    last_error: &'a Option<String>,
}

#[derive(Serialize)]
struct Quarantined<'a> {
    key: &'a LeaseKey,
    reason: &'a Reason,
}

#[derive(Serialize)]
struct Skipped<'a> {
    key: &'a LeaseKey,
    family: &'a Family,
    reason: &'a Skip,
}

#[derive(Serialize)]
struct Limited<'a> {
    device: &'a LinkName,
    #[serde(flatten)]
    limitation: &'a Limitation,
}

#[derive(Serialize)]
struct Refused<'a> {
    object: &'a Object,
    #[serde(flatten)]
    refusal: &'a Refusal,
}

#[derive(Serialize)]
struct Withheld<'a> {
    prefix: &'a Prefix,
    #[serde(flatten)]
    because: &'a WithheldBecause,
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let quarantined = self.quarantined.iter().map(|(key, reason)| Quarantined { key, reason });
        let skipped = self.skipped.iter().map(|((key, family), reason)| Skipped { key, family, reason });
        let limitations = self.limitations.iter().map(|(device, limitation)| Limited { device, limitation });
        let refused = self.refused.iter().map(|(object, refusal)| Refused { object, refusal });
        let withheld = self.withheld.iter().map(|(prefix, because)| Withheld { prefix, because });
        let document = Document {
            phase: &self.phase,
            ready: self.is_ready(),
            waits_for: self.waits_for(),
            degraded: self.degraded(),
            ended: &self.ended,
            network: self.network.as_deref(),
            reconfigured: self.reconfigured.as_deref(),
            config_rejected: &self.config_rejected,
            lease: self.lease.as_deref(),
            lease_refused: &self.lease_refused,
            contended: &self.contended,
            uplink: &self.uplink,
            mtu: &self.mtu,
            store: &self.store,
            notifications: &self.notifications,
            subnet_env: &self.subnet_env,
            peers: &self.peers,
            quarantined: quarantined.collect(),
            own_trouble: &self.own_trouble,
            skipped: skipped.take(Status::MAX_LISTED).collect(),
            skipped_count: self.skipped.len(),
            conflicts: &self.conflicts,
            conflict_count: self.conflict_count,
            flapping: &self.flapping[..self.flapping.len().min(Status::MAX_LISTED)],
            flapping_count: self.flapping.len(),
            limitations: limitations.collect(),
            refused: refused.take(Status::MAX_LISTED).collect(),
            refused_count: self.refused.len(),
            former: &self.former,
            withheld: withheld.take(Status::MAX_LISTED).collect(),
            withheld_count: self.withheld.len(),
            unprotected: self.unprotected,
            unknown_host_objects: self.unknown_host_objects,
            failed_writes: self.failed_writes,
            audits: self.audits,
            lease_rounds: self.lease_rounds,
            drift_repaired: self.drift_repaired,
            last_error: &self.last_error,
        };
        document.serialize(serializer)
    }
}

impl Serialize for Phase {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Starting => "starting",
            Self::LeaseHeld => "lease_held",
            Self::DeviceReady => "device_ready",
            Self::Ready => "ready",
            Self::Stopped => "stopped",
        })
    }
}

/// A kind as one word, plus its fields.
#[derive(Serialize)]
struct Kind<T> {
    kind: &'static str,
    #[serde(flatten)]
    rest: T,
}

/// A kind without fields.
#[derive(Serialize)]
struct Alone {}

fn alone<S: Serializer>(kind: &'static str, serializer: S) -> Result<S::Ok, S::Error> {
    Kind { kind, rest: Alone {} }.serialize(serializer)
}

#[derive(Serialize)]
struct Failure<'a> {
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct Lost<'a> {
    since: &'a BootTime,
    error: &'a str,
}

impl Serialize for End {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let failure = |kind, error| Kind { kind, rest: Failure { error: Some(error) } };
        match self {
            Self::Stopped => alone("stopped", serializer),
            Self::Dropped => alone("dropped", serializer),
            Self::Failed(error) => failure("failed", error).serialize(serializer),
            Self::Panicked(message) => failure("panicked", message).serialize(serializer),
        }
    }
}

impl Serialize for Wait {
    /// Includes the text and the remedy.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Words<'a> {
            text: String,
            error: Option<&'a str>,
            remedy: &'static str,
        }
        let kind = match self {
            Self::Run => "run",
            Self::Store { .. } => "store",
            Self::Kernel { .. } => "kernel",
            Self::Uplink { .. } => "uplink",
            Self::Lease { .. } => "lease",
            Self::Peers { .. } => "peers",
            Self::Device { .. } => "device",
            Self::Writes { .. } => "writes",
            Self::SubnetEnv { .. } => "subnet_env",
        };
        let rest = Words { text: self.to_string(), error: self.error(), remedy: self.remedy() };
        Kind { kind, rest }.serialize(serializer)
    }
}

impl Serialize for UplinkState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Gone<'a> {
            last: &'a Option<Uplink>,
            #[serde(flatten)]
            lost: Lost<'a>,
        }
        match self {
            Self::Unknown => alone("unknown", serializer),
            Self::Up(uplink) => Kind { kind: "up", rest: uplink }.serialize(serializer),
            Self::Lost { last, since, error } => {
                Kind { kind: "lost", rest: Gone { last, lost: Lost { since, error } } }.serialize(serializer)
            }
        }
    }
}

impl Serialize for Contact {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Never => alone("never", serializer),
            Self::Live => alone("live", serializer),
            Self::Lost { since, error } => Kind { kind: "lost", rest: Lost { since, error } }.serialize(serializer),
        }
    }
}

impl Serialize for SubscriptionState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Active => "active",
            Self::Broken => "broken",
        })
    }
}

impl Serialize for EnvFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Settled => alone("settled", serializer),
            Self::Pending { error } => {
                Kind { kind: "pending", rest: Failure { error: error.as_deref() } }.serialize(serializer)
            }
        }
    }
}

impl Serialize for RulesState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let failure = |kind, error| Kind { kind, rest: Failure { error: Some(error) } };
        match self {
            Self::Pending => alone("pending", serializer),
            Self::InPlace => alone("in_place", serializer),
            Self::Failed(error) => failure("failed", error).serialize(serializer),
            Self::WithoutForward(error) => failure("without_forward", error).serialize(serializer),
        }
    }
}

impl Serialize for WithheldBecause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Words<'a> {
            text: String,
            until: Option<&'a BootTime>,
        }
        let (kind, until) = match self {
            Self::MassRemoval(until) => ("mass_removal", Some(until)),
            Self::Unconfirmed => ("unconfirmed", None),
            Self::BadRecord => ("bad_record", None),
            Self::Unreached => ("unreached", None),
        };
        Kind { kind, rest: Words { text: self.to_string(), until } }.serialize(serializer)
    }
}

impl Serialize for Refusal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Words<'a> {
            peer: &'a Option<LeaseKey>,
            error: &'a str,
            remedy: &'static str,
        }
        Words { peer: &self.peer, error: &self.error, remedy: self.remedy() }.serialize(serializer)
    }
}
