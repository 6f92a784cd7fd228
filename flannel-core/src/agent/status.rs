//! The status and the events of an overlay.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::admit::Reason;
use crate::agent::readiness::{End, UplinkState, Wait};
use crate::backend::{Skip, Uplink};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::kernel::{Limitation, LinkName, Object};
use crate::lease::{Lease, LeaseKey};
use crate::net::{Family, Mtu, Prefix};
use crate::plan::{Conflict, Plan};
use crate::text::Plain;

/// How far an overlay has come. Not ordered, because [`Stopped`](Self::Stopped) has no place in the order:
/// [`has_reached`](Self::has_reached) compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// No lease yet.
    Starting,
    /// The lease is held and published.
    LeaseHeld,
    /// The devices exist, but no peer of some address family can be reached, because the kernel refused a part of a
    /// device or all objects of one kind, or contact with the kernel was lost: see [`Status::failed_writes`] and
    /// [`Status::last_error`].
    DeviceReady,
    /// The lease is held, and devices and peers are programmed, with the exceptions in [`Status::degraded`]. Whether
    /// traffic can be carried depends on the uplink as well: see [`Status::is_ready`].
    Ready,
    /// The agent has ended: see [`Status::ended`].
    Stopped,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::LeaseHeld => "lease held",
            Self::DeviceReady => "device ready",
            Self::Ready => "ready",
            Self::Stopped => "stopped",
        })
    }
}

impl Phase {
    /// Returns whether an overlay in this phase has come as far as `phase`. An overlay that has ended has reached only
    /// [`Stopped`](Self::Stopped).
    pub fn has_reached(self, phase: Self) -> bool {
        self == phase || self.rank().zip(phase.rank()).is_some_and(|(this, other)| this >= other)
    }

    /// Its position on the way to readiness.
    fn rank(self) -> Option<u8> {
        match self {
            Self::Starting => Some(0),
            Self::LeaseHeld => Some(1),
            Self::DeviceReady => Some(2),
            Self::Ready => Some(3),
            Self::Stopped => None,
        }
    }
}

/// Contact with the lease store. It does not affect readiness: the data plane stays as it is while the store is away.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contact {
    /// The store has not answered yet.
    Never,
    /// The store answers: neither the watch nor the calls about this node's lease fail. An answer that grants no lease
    /// ([`Status::lease_refused`]) is not a failure.
    Live,
    /// The watch or the calls fail. The two are tracked independently: a live watch does not mean that renewals work.
    Lost {
        /// When the first of the current errors occurred.
        since: BootTime,
        /// The error as text; both errors if both fail.
        error: String,
    },
}

/// The state of the subscription to the kernel's notifications.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SubscriptionState {
    /// Changes by other programs are seen at once.
    #[default]
    Active,
    /// The subscription is being opened again with back-off. Until then, changes by other programs are seen only by the
    /// next audit.
    Broken,
}

/// Another program writes this node's record, or keeps deleting it: most likely another agent with the same node name
/// or the same public address. Run only one agent for each. Cleared once the lease has been undisturbed for 30 s.
///
/// A record that is deleted once, or lost with the store's data, does not count. A Go flannel with the same public
/// address writes the record when it starts and when it renews its lease, and does not answer: it shows for 30 s then.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Contended {
    /// How many times in a row the lease was acquired, or its record written, again.
    pub times: u32,
    /// When that happens next: at once the first time, then after 1, 2, 4 s and so on up to 16 s, each ± 10 %. `None`
    /// while the lease is undisturbed, or if the policy is not to acquire it again.
    pub next: Option<BootTime>,
}

/// The number of peers and other records.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PeerCounts {
    /// Records accepted as peers.
    pub accepted: usize,
    /// Accepted peers that the backend skips in some family: see [`Status::skipped`].
    pub skipped: usize,
    /// Records not accepted: see [`Status::quarantined`].
    pub quarantined: usize,
    /// Records dropped since the store last listed everything, because it has more than
    /// [`MAX_RECORDS`](crate::lease::MAX_RECORDS) or their keys are longer than
    /// [`LeaseKey::MAX_BYTES`](crate::lease::LeaseKey::MAX_BYTES). A record that is written again counts again.
    pub dropped: usize,
}

/// The state of `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EnvFile {
    /// The file is up to date, or none is configured.
    #[default]
    Settled,
    /// The file will be written once the devices exist, or again after a failure.
    Pending {
        /// Why the last write failed, as text with the remedy; `None` before the first one.
        error: Option<String>,
    },
}

/// Why the deletion or replacement of existing objects waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WithheldBecause {
    /// Most peers left at once. Their objects are deleted at this time unless the peers return; while the store is
    /// away, the deletion waits until it is back.
    #[error("most peers disappeared at once: deleted after 60 s unless they return")]
    MassRemoval(BootTime),
    /// The agent started from a snapshot of a store that is away, and the snapshot lacks the prefix. The deletion waits
    /// until the store is back.
    #[error("not in the state file: kept until the lease store is reachable")]
    Unconfirmed,
    /// A record that is not accepted as a peer names the prefix.
    #[error("a record that is not accepted as a peer names it: correct or delete the record")]
    BadRecord,
    /// Its route leads to a peer in a prefix of one of the host's addresses, and the connected route to that prefix is
    /// missing. The kernel keeps using the route, but would not accept it again. It is not deleted before the connected
    /// route is back; a route through the tunnel replaces it after 10 s without the connected route.
    #[error("the connected route to its gateway is missing: add it, or its route could not be added again")]
    Unreached,
}

/// A write that the kernel refused. Every audit retries it; audits that are due only for it have growing intervals.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The peer that it was for; `None` if it was for this node, or for a peer that has left.
    pub peer: Option<LeaseKey>,
    /// The refused operation and the kernel's error, as text.
    pub error: String,
}

impl Refusal {
    /// Returns what to do.
    pub fn remedy(&self) -> &'static str {
        match self.peer {
            Some(_) => {
                "correct what that node publishes, or delete its record; if all peers are refused, look for the cause here"
            }
            None => "fix the cause that the kernel gives (memory, privileges); the write is retried",
        }
    }
}

/// The agent's state, published whenever it changes. Cheap to clone: large parts are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// How far the overlay has come.
    pub phase: Phase,
    /// What a start waits for, or [`Wait::Run`] if there is no run; `None` from a run's first lease to its end.
    /// [`waits_for`](Self::waits_for) returns what the overlay waits for at any time.
    pub starting: Option<Wait>,
    /// How the run ended; `None` while it goes on, and before the first one.
    pub ended: Option<End>,
    /// The network configuration in force, once there is a lease.
    pub network: Option<Arc<NetworkConfig>>,
    /// The configuration in the store, if it differs from the one in force; `None` if it does not, as far as is known.
    /// Restart the agent to use it: until then kernel objects stay, and no lease of other networks or another backend
    /// is acquired.
    pub reconfigured: Option<Arc<NetworkConfig>>,
    /// Why the configuration in the store cannot be used, as text, if it changed to one that is missing, not valid or
    /// not for a backend of this agent. The one in force stays; a restart would not start. `None` otherwise.
    pub config_rejected: Option<String>,
    /// The held lease. `None` before it is acquired, and after it was lost or released.
    pub lease: Option<Arc<Lease>>,
    /// Why the store last refused to grant or renew this node's lease, as text: the pool is full, the configuration or
    /// this node's subnets are missing, or the configuration changed. `None` once a lease is granted or renewed.
    /// Independent of contact with the store ([`store`](Self::store)).
    pub lease_refused: Option<String>,
    /// The contention for this node's record by another program; `None` if there is none.
    pub contended: Option<Contended>,
    /// The uplink, or why it cannot be used.
    pub uplink: UplinkState,
    /// The MTU for pods.
    pub mtu: Option<Mtu>,
    /// Contact with the store.
    pub store: Contact,
    /// Whether the store has listed the peers in this run.
    pub listed: bool,
    /// The subscription to the kernel's notifications.
    pub notifications: SubscriptionState,
    /// The state of `subnet.env`. Pods cannot be attached before it is written.
    pub subnet_env: EnvFile,
    /// Counts of peers.
    pub peers: PeerCounts,
    /// Records that are not accepted as peers, with the reason: the first [`MAX_QUARANTINED`](Self::MAX_QUARANTINED) in
    /// the order of keys. [`PeerCounts::quarantined`] counts all.
    pub quarantined: Arc<BTreeMap<LeaseKey, Reason>>,
    /// Why other nodes do not accept this node's record as a peer, as far as this node can determine it.
    pub own_trouble: Option<Reason>,
    /// Peers that the backend skips, with the reason.
    pub skipped: Arc<BTreeMap<(LeaseKey, Family), Skip>>,
    /// Foreign objects that are in the way: the first [`MAX_CONFLICTS`](Self::MAX_CONFLICTS).
    pub conflicts: Arc<Vec<Conflict>>,
    /// The number of all conflicts.
    pub conflict_count: usize,
    /// Objects that another program keeps changing.
    pub flapping: Arc<Vec<Object>>,
    /// What makes the data planes of the overlay's devices slower than they could be. Packets are still carried.
    pub limitations: Arc<Vec<(LinkName, Limitation)>>,
    /// Writes that the kernel refused in the last audit, at most 1024 of them.
    pub refused: Arc<BTreeMap<Object, Refusal>>,
    /// Former networks of this node that may still have routes of the overlay. They are cleared once the present
    /// network is in place and the store itself answers.
    pub former: Arc<Vec<Prefix>>,
    /// Prefixes whose objects are not deleted for now, or whose route is not replaced.
    pub withheld: Arc<BTreeMap<Prefix, WithheldBecause>>,
    /// Prefixes that bad records name but that are not withheld, because there are more than
    /// [`Admission::MAX_WITHHELD`](crate::admit::Admission::MAX_WITHHELD): the overlay's objects there are deleted as
    /// if no record named the prefix. Counted since the store last listed everything. Correct or delete the bad
    /// records.
    pub unprotected: usize,
    /// The number of links, addresses and routes of the host that were left out, because it has more than
    /// [`HostFacts`](crate::kernel::HostFacts) has room for: an uplink among them is not found, and a default route or
    /// a prefix in use among them is ignored. Delete unused ones.
    pub unknown_host_objects: usize,
    /// Writes that the last audit could not do, except those of [`Status::refused`] that a peer's record is the cause
    /// of: the kernel rejects the value, and has accepted an object of the same kind (route, neighbour or FDB entry, of
    /// the same family) for another peer. If it has accepted none, the cause may be this node, so all count, including
    /// the refused object of an only peer.
    pub failed_writes: usize,
    /// The number of completed audits.
    pub audits: u64,
    /// The number of completed lease rounds.
    pub lease_rounds: u64,
    /// The number of writes with which audits repaired objects that had been as wanted.
    pub drift_repaired: u64,
    /// The last error, as text; `None` after a round without one.
    pub last_error: Option<String>,
}

impl Status {
    /// The maximum number of records in [`quarantined`](Self::quarantined).
    pub const MAX_QUARANTINED: usize = 1000;
    /// The maximum number of objects in [`conflicts`](Self::conflicts).
    pub const MAX_CONFLICTS: usize = Plan::MOST_TOLD;
    /// The maximum number of entries of one list in a serialized status (feature `serde`). Each list that may be longer
    /// has a count of all entries beside it.
    pub const MAX_LISTED: usize = 1000;
}

impl Default for Status {
    fn default() -> Self {
        Self {
            phase: Phase::Starting,
            starting: Some(Wait::Run),
            ended: None,
            network: None,
            reconfigured: None,
            config_rejected: None,
            lease: None,
            lease_refused: None,
            contended: None,
            uplink: UplinkState::default(),
            mtu: None,
            store: Contact::Never,
            listed: false,
            notifications: SubscriptionState::default(),
            subnet_env: EnvFile::default(),
            peers: PeerCounts::default(),
            quarantined: Arc::default(),
            own_trouble: None,
            skipped: Arc::default(),
            conflicts: Arc::default(),
            conflict_count: 0,
            flapping: Arc::default(),
            limitations: Arc::default(),
            refused: Arc::default(),
            former: Arc::default(),
            withheld: Arc::default(),
            unprotected: 0,
            unknown_host_objects: 0,
            failed_writes: 0,
            audits: 0,
            lease_rounds: 0,
            drift_repaired: 0,
            last_error: None,
        }
    }
}

/// Why this node lost its lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LossReason {
    /// Its record was deleted from the store. Only if the store identifies nodes by address; otherwise the record is
    /// written again.
    #[error("its record was deleted")]
    Deleted,
    /// Its record now belongs to another node. Only if the store identifies nodes by address.
    #[error("another node wrote its record: duplicate node name or address?")]
    Taken,
    /// It expired before the store could be reached.
    #[error("it expired before the lease store could be reached")]
    Expired,
    /// The store refused it, its record is damaged or names other subnets, or another node has its subnets. The reason
    /// as text.
    #[error("{}", Plain(.0))]
    Refused(String),
}

/// A change that the agent reports, as a value: embedders need not parse logs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A lease was acquired: the first one, one after a loss, or one with another key or other subnets.
    LeaseAcquired(Arc<Lease>),
    /// The lease was extended or published again.
    LeaseRenewed(Arc<Lease>),
    /// The lease was lost. The [`LossPolicy`](crate::overlay::LossPolicy) decides what follows.
    LeaseLost(LossReason),
    /// The store answered, but did not grant or renew this node's lease: see [`Status::lease_refused`]. Reported once
    /// for each reason. [`LeaseAcquired`](Self::LeaseAcquired) or [`LeaseRenewed`](Self::LeaseRenewed) follows once it
    /// does.
    LeaseRefused(String),
    /// Another program writes this node's record: see [`Status::contended`].
    LeaseContended(Contended),
    /// No other program has written this node's record for 30 s.
    LeaseUncontended,
    /// The configuration in the store differs from the one in force: see [`Status::reconfigured`].
    ConfigChanged(Arc<NetworkConfig>),
    /// The configuration in the store cannot be used: see [`Status::config_rejected`].
    ConfigRejected(String),
    /// The store listed all records.
    Snapshot(PeerCounts),
    /// A peer was added.
    PeerAdded(Arc<Lease>),
    /// A peer's record changed.
    PeerChanged(Arc<Lease>),
    /// A peer was removed.
    PeerRemoved(Arc<Lease>),
    /// A record is not accepted as a peer.
    PeerQuarantined(LeaseKey, Reason),
    /// The backend skips a peer in a family: see [`Status::skipped`]. Not emitted by a backend that programs no peers.
    PeerSkipped(LeaseKey, Family, Skip),
    /// Other nodes do not accept this node's record as a peer, for this reason: see [`Status::own_trouble`]. `None`:
    /// they accept it again.
    OwnTrouble(Option<Reason>),
    /// Records are dropped, because there are too many or their keys are too long: see [`PeerCounts::dropped`].
    RecordsDropped(usize),
    /// An audit found objects of the overlay missing or changed, and wrote them again.
    DriftRepaired {
        /// The number of writes.
        writes: usize,
        /// The time from the start of the audit to the last acknowledgement.
        took: Duration,
    },
    /// A foreign object is in the way.
    ConflictFound(Conflict),
    /// Another program keeps changing an object.
    Flapping(Object),
    /// A data plane is slower than it could be: see [`Status::limitations`].
    Limited(LinkName, Limitation),
    /// A limitation has ended.
    LimitationGone(LinkName, Limitation),
    /// The kernel refused a write.
    Refused(Object, Refusal),
    /// Most peers left at once: the deletions for this many prefixes wait. Reported once while they wait, and again
    /// when twice as many do.
    DeletionsWithheld(usize),
    /// The store does not answer, or denies access.
    StoreLost(String),
    /// The store answers again.
    StoreBack,
    /// A kernel operation failed.
    KernelTrouble(String),
    /// The kernel's notifications do not arrive: until they do, only audits see changes by other programs.
    NotificationsLost,
    /// The kernel's notifications arrive again.
    NotificationsBack,
    /// The uplink changed, or only the addresses that this node publishes; then the two uplinks are equal.
    UplinkChanged {
        /// The former uplink.
        before: Uplink,
        /// The present uplink.
        uplink: Uplink,
    },
    /// The uplink, its address or its carrier was lost. Programmed objects stay.
    UplinkLost(String),
    /// An uplink with its address and a carrier is available again, the same or another.
    UplinkBack(Uplink),
    /// The attributes of this node cannot be determined on the current host. The last published ones stay.
    AdvertiseFailed(String),
    /// This many events were lost to this reader because it was too slow. The status shows their effects.
    Missed(u64),
    /// The overlay reached [`Phase::Ready`].
    Ready,
    /// The run has ended. Events of the next run of the same overlay follow.
    Stopped(End),
}

/// Defines [`Event::KINDS`] and [`Event::kind`] from one list. The `match` keeps it complete.
macro_rules! kinds {
    ($($variant:pat => $kind:literal,)*) => {
        impl Event {
            /// Every kind of event, as [`kind`](Self::kind) returns it.
            pub const KINDS: &[&str] = &[$($kind),*];

            /// Returns its kind in one word, as used in logs and metrics.
            pub fn kind(&self) -> &'static str {
                match self {
                    $($variant => $kind,)*
                }
            }
        }
    };
}

kinds! {
    Self::LeaseAcquired(_) => "lease_acquired",
    Self::LeaseRenewed(_) => "lease_renewed",
    Self::LeaseLost(_) => "lease_lost",
    Self::LeaseRefused(_) => "lease_refused",
    Self::LeaseContended(_) => "lease_contended",
    Self::LeaseUncontended => "lease_uncontended",
    Self::ConfigChanged(_) => "config_changed",
    Self::ConfigRejected(_) => "config_rejected",
    Self::Snapshot(_) => "snapshot",
    Self::PeerAdded(_) => "peer_added",
    Self::PeerChanged(_) => "peer_changed",
    Self::PeerRemoved(_) => "peer_removed",
    Self::PeerQuarantined(..) => "peer_quarantined",
    Self::PeerSkipped(..) => "peer_skipped",
    Self::OwnTrouble(_) => "own_trouble",
    Self::RecordsDropped(_) => "records_dropped",
    Self::DriftRepaired { .. } => "drift_repaired",
    Self::ConflictFound(_) => "conflict_found",
    Self::Flapping(_) => "flapping",
    Self::Limited(..) => "limited",
    Self::LimitationGone(..) => "limitation_gone",
    Self::Refused(..) => "refused",
    Self::DeletionsWithheld(_) => "deletions_withheld",
    Self::StoreLost(_) => "store_lost",
    Self::StoreBack => "store_back",
    Self::KernelTrouble(_) => "kernel_trouble",
    Self::UplinkChanged { .. } => "uplink_changed",
    Self::UplinkLost(_) => "uplink_lost",
    Self::NotificationsLost => "notifications_lost",
    Self::NotificationsBack => "notifications_back",
    Self::UplinkBack(_) => "uplink_back",
    Self::AdvertiseFailed(_) => "advertise_failed",
    Self::Missed(_) => "missed",
    Self::Ready => "ready",
    Self::Stopped(_) => "stopped",
}
