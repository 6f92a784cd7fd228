//! What an overlay says of itself: a status to read, events to follow.

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

/// How far an overlay has come. Not ordered, since an agent that has ended has come further than none:
/// [`has_reached`](Self::has_reached) compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// No lease yet.
    Starting,
    /// The lease is held and published.
    LeaseHeld,
    /// The devices are there, but the kernel refused a part of one or all that is of one kind for peers, so that no peer of
    /// some address family can be reached, or contact with it was lost: see [`Status::undone`] and [`Status::last_error`].
    DeviceReady,
    /// Lease held, devices and peers programmed; what is not is in the status: see [`Status::degraded`]. Whether traffic can
    /// be carried depends on the uplink as well: see [`Status::is_ready`].
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
    /// Returns whether an overlay in this phase has come as far as `phase`. One that has ended has reached
    /// [`Stopped`](Self::Stopped) alone.
    pub fn has_reached(self, phase: Self) -> bool {
        self == phase || self.rank().zip(phase.rank()).is_some_and(|(this, other)| this >= other)
    }

    /// Its place on the way to readiness.
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

/// Contact with the lease store. Never part of readiness: the data plane stays as it is while the store is away.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contact {
    /// Nothing was heard yet.
    Never,
    /// The store answers: both the watch of the leases and the calls about the own one, as far as they have spoken.
    Live,
    /// The watch or the calls fail. The two are tracked independently: a live watch does not mean that renewals work.
    Lost {
        /// Since when.
        since: BootTime,
        /// Why, in words; of both where both fail.
        error: String,
    },
}

/// The state of the subscription to the kernel's notifications.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SubscriptionState {
    /// What somebody changes is seen at once.
    #[default]
    Active,
    /// It is opened again with back-off: until then what somebody changes is seen by the next audit only.
    Broken,
}

/// Somebody else changes or deletes our record, again and again: most likely another agent under this node's name. Run
/// one agent a name. Forgotten once the lease has stood for 30 s.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Contended {
    /// How often in a row the lease was taken, or its record written, again.
    pub times: u32,
    /// When that is done next: at once the first time, then 1, 2, 4 s and so on up to 16 s apart, each ± 10 %. `None`
    /// while the lease stands, or while the policy is not to take it again.
    pub next: Option<BootTime>,
}

/// How many peers there are, by what became of them.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PeerCounts {
    /// Records accepted as peers.
    pub accepted: usize,
    /// Of those, skipped by the backend in some family: see [`Status::skipped`].
    pub skipped: usize,
    /// Records not accepted: see [`Status::quarantined`].
    pub quarantined: usize,
    /// Records dropped since the store last listed everything, because it holds more than
    /// [`MAX_RECORDS`](crate::lease::MAX_RECORDS) or their keys are longer than
    /// [`LeaseKey::MAX_BYTES`](crate::lease::LeaseKey::MAX_BYTES). One that is written again counts again.
    pub dropped: usize,
}

/// What has become of `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EnvFile {
    /// It says what is true, or none is to be written.
    #[default]
    Settled,
    /// It is to be written once the devices are there, or once more after a failure.
    Pending {
        /// Why the last try failed, in words with the remedy; `None` before the first.
        error: Option<String>,
    },
}

/// Why the deletion or replacement of what is there waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WithheldBecause {
    /// The store said that most peers are gone at once; a second look is taken at this time, or, while the store is
    /// away, once it is back.
    #[error("most peers went at once: deleted unless they come back within a minute")]
    MassRemoval(BootTime),
    /// The agent started from a snapshot of a store that is away, which does not know the prefix; the store decides.
    #[error("the snapshot of a store that is away does not know it: the store decides once it is back")]
    Unconfirmed,
    /// A record that does not parse names the prefix.
    #[error("a record that does not parse names it: mend or delete the record")]
    BadRecord,
    /// Its route leads to a peer that is in a prefix of one of the host's addresses, and the connected route to that
    /// prefix is missing. The kernel goes on using the route, but would not take it again. It is not deleted before the
    /// connected route is back; another route, through the tunnel, replaces it after 10 s without.
    #[error("the connected route to its gateway is missing, without which its route could not be added again: add it")]
    Unreached,
}

/// A write that the kernel refused. It is tried again by every audit, and audits for its sake alone are ever rarer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The peer that it was for; `None` where it was for the node itself, or for nobody any more.
    pub peer: Option<LeaseKey>,
    /// What was refused, in the kernel's words.
    pub error: String,
}

impl Refusal {
    /// What to do.
    pub fn remedy(&self) -> &'static str {
        match self.peer {
            Some(_) => {
                "correct what that node publishes, or delete its record; if no peer's is taken, see to this node's kernel"
            }
            None => "give the kernel what it asks for (memory, privileges); it is tried again until then",
        }
    }
}

/// The agent's state, published whenever it changes. Cheap to clone: what may be large is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// How far it has come.
    pub phase: Phase,
    /// What a start is at, or that there is no run; `None` from a run's first lease to its end. See
    /// [`waits_for`](Self::waits_for), which says what is waited for at any time.
    pub starting: Option<Wait>,
    /// How the run ended; `None` while it goes on, and before the first one.
    pub ended: Option<End>,
    /// The network's configuration that the agent goes by, once it has a lease.
    pub network: Option<Arc<NetworkConfig>>,
    /// Another configuration that the store has now; `None` while it has the same, as far as is known. Start the agent again
    /// to go by it: until then what is in the kernel stays, and no lease is taken of other networks or another backend.
    pub reconfigured: Option<Arc<NetworkConfig>>,
    /// The lease held. None before it is taken, and after it was lost or given back.
    pub lease: Option<Arc<Lease>>,
    /// How another program contends for this node's record; `None` while none does.
    pub contended: Option<Contended>,
    /// The uplink, or what is wrong with it.
    pub uplink: UplinkState,
    /// The MTU for pods.
    pub mtu: Option<Mtu>,
    /// Contact with the store.
    pub store: Contact,
    /// Whether the store has said in this run which peers there are.
    pub listed: bool,
    /// The subscription to the kernel's notifications.
    pub notifications: SubscriptionState,
    /// What has become of `subnet.env`. Pods cannot be attached before it is written.
    pub subnet_env: EnvFile,
    /// Counts of peers.
    pub peers: PeerCounts,
    /// Records that are no peers, with the reason: the first [`MAX_QUARANTINED`](Self::MAX_QUARANTINED) in the order of
    /// keys. [`PeerCounts::quarantined`] counts all.
    pub quarantined: Arc<BTreeMap<LeaseKey, Reason>>,
    /// Why other nodes do not take our own record for a peer, as far as that can be known here.
    pub own_trouble: Option<Reason>,
    /// Peers the backend gives nothing, with the reason.
    pub skipped: Arc<BTreeMap<(LeaseKey, Family), Skip>>,
    /// Foreign objects in our way: the first [`MAX_CONFLICTS`](Self::MAX_CONFLICTS).
    pub conflicts: Arc<Vec<Conflict>>,
    /// How many there are.
    pub conflict_count: usize,
    /// Objects that somebody else keeps changing.
    pub flapping: Arc<Vec<Object>>,
    /// What makes the data planes of our devices slower than they could be. Packets are carried all the same.
    pub limitations: Arc<Vec<(LinkName, Limitation)>>,
    /// Writes that the kernel refused in the last audit, at most 1024 of them.
    pub refused: Arc<BTreeMap<Object, Refusal>>,
    /// Former networks of this node that may still hold routes of ours: they are looked at once the present one is in
    /// place and the store speaks.
    pub former: Arc<Vec<Prefix>>,
    /// Prefixes whose deletion waits, or the replacement of their route.
    pub withheld: Arc<BTreeMap<Prefix, WithheldBecause>>,
    /// Prefixes that bad records name and that are not withheld all the same, because there are more than
    /// [`Admission::MAX_WITHHELD`](crate::admit::Admission::MAX_WITHHELD): what is there of ours is deleted as if nobody named
    /// it. Counted since the store last listed everything. Mend or delete the bad records.
    pub unprotected: usize,
    /// Links, addresses and routes of the host that are not known, because it has more than
    /// [`HostFacts`](crate::kernel::HostFacts) has room for: an uplink among them is not found, and a default route or a
    /// prefix in use among them is not heeded. Delete what nobody uses.
    pub unknown_host_objects: usize,
    /// Writes that the last round could not do, but for those of [`Status::refused`] that a peer's record is the cause
    /// of: the kernel rejects the value, and has taken an object of the same kind (route, neighbour or forwarding entry,
    /// of the same family) for another peer. Where it has taken none, the cause may be this node, so all count; that is
    /// also so for the refused object of the only peer.
    pub undone: usize,
    /// Audits done.
    pub audits: u64,
    /// Lease rounds done.
    pub lease_rounds: u64,
    /// Writes that audits had to do on objects that had been right before.
    pub drift_repaired: u64,
    /// The last trouble, in words; `None` once a round went well.
    pub last_error: Option<String>,
}

impl Status {
    /// The most records in [`quarantined`](Self::quarantined).
    pub const MAX_QUARANTINED: usize = 1000;
    /// The most objects in [`conflicts`](Self::conflicts).
    pub const MAX_CONFLICTS: usize = Plan::MOST_TOLD;
    /// The most entries of one list in a status that is serialized (feature `serde`). Each list that may be longer has a
    /// count of all beside it.
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
            lease: None,
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
            undone: 0,
            audits: 0,
            lease_rounds: 0,
            drift_repaired: 0,
            last_error: None,
        }
    }
}

/// Why a lease is not ours any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LossReason {
    /// Its record is gone from the store. Only where nodes are known by their address: else it is written again.
    #[error("its record was deleted")]
    Deleted,
    /// Its record is another node's. Only where nodes are known by their address.
    #[error("its record is another node's")]
    Taken,
    /// It ran out before the store could be reached.
    #[error("it ran out before the store could be reached")]
    Expired,
    /// The store said so, in words.
    #[error("{}", Plain(.0))]
    Refused(String),
}

/// Something that happened. Values only: embedders never parse logs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A lease was taken, or taken again with another subnet.
    LeaseAcquired(Arc<Lease>),
    /// The lease was extended.
    LeaseRenewed(Arc<Lease>),
    /// The lease is not ours any more; what follows is the policy's choice.
    LeaseLost(LossReason),
    /// The store holds another configuration than the agent goes by: see [`Status::reconfigured`].
    ConfigChanged(Arc<NetworkConfig>),
    /// The store gave a whole snapshot.
    Snapshot(PeerCounts),
    /// A peer appeared.
    PeerAdded(Arc<Lease>),
    /// A peer's record changed.
    PeerChanged(Arc<Lease>),
    /// A peer went away.
    PeerRemoved(Arc<Lease>),
    /// A record is not accepted as a peer.
    PeerQuarantined(LeaseKey, Reason),
    /// Other nodes do not take our own record for a peer, for this reason: see [`Status::own_trouble`]. `None`: they do
    /// again.
    OwnTrouble(Option<Reason>),
    /// Records are dropped, for there are too many or their keys are too long: see [`PeerCounts::dropped`].
    RecordsDropped(usize),
    /// An audit found objects of ours missing or changed and wrote them.
    DriftRepaired {
        /// How many writes.
        writes: usize,
        /// From the start of the audit to the last acknowledgement.
        took: Duration,
    },
    /// A foreign object stands in our way.
    ConflictFound(Conflict),
    /// Somebody else keeps changing an object.
    Flapping(Object),
    /// A data plane was found to be slower than it could be: see [`Status::limitations`].
    Limited(LinkName, Limitation),
    /// That has ended.
    LimitationGone(LinkName, Limitation),
    /// The kernel refuses to write something.
    Refused(Object, Refusal),
    /// Most peers went at once: deletions wait for a second look, so many prefixes. Told once while they wait, and again
    /// when twice as many do.
    DeletionsWithheld(usize),
    /// The store does not answer.
    StoreLost(String),
    /// The store answers again.
    StoreBack,
    /// The kernel did not do what it should.
    KernelTrouble(String),
    /// The kernel's notifications do not arrive: until they do, audits alone see what somebody changes.
    NotificationsLost,
    /// The kernel's notifications arrive again.
    NotificationsBack,
    /// The uplink changed.
    UplinkChanged(Uplink),
    /// The uplink, its address or its carrier is gone; what is programmed stays.
    UplinkLost(String),
    /// There is an uplink with its address and a carrier again, the same or another.
    UplinkBack(Uplink),
    /// What other nodes should be told of this one cannot be said as the host is now; the last word stays published.
    AdvertiseFailed(String),
    /// So many events were lost to this reader, which was too slow: the status says what they led to.
    Missed(u64),
    /// The phase has come to [`Phase::Ready`].
    Ready,
    /// The run has ended. What the next run of the same overlay tells comes after it.
    Stopped(End),
}

impl Event {
    /// Its kind in one word, as logs and metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LeaseAcquired(_) => "lease_acquired",
            Self::LeaseRenewed(_) => "lease_renewed",
            Self::LeaseLost(_) => "lease_lost",
            Self::ConfigChanged(_) => "config_changed",
            Self::Snapshot(_) => "snapshot",
            Self::PeerAdded(_) => "peer_added",
            Self::PeerChanged(_) => "peer_changed",
            Self::PeerRemoved(_) => "peer_removed",
            Self::PeerQuarantined(..) => "peer_quarantined",
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
            Self::UplinkChanged(_) => "uplink_changed",
            Self::UplinkLost(_) => "uplink_lost",
            Self::NotificationsLost => "notifications_lost",
            Self::NotificationsBack => "notifications_back",
            Self::UplinkBack(_) => "uplink_back",
            Self::AdvertiseFailed(_) => "advertise_failed",
            Self::Missed(_) => "missed",
            Self::Ready => "ready",
            Self::Stopped(_) => "stopped",
        }
    }
}
