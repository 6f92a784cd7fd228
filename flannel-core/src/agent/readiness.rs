//! Whether an overlay is ready, what it waits for, and how it is degraded.

use std::fmt;

use crate::agent::status::{Contact, EnvFile, Phase, Status};
use crate::backend::Uplink;
use crate::clock::BootTime;
use crate::text::Plain;

/// The interface that carries the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum UplinkState {
    /// No uplink has been chosen yet: it is decided together with the lease.
    #[default]
    Unknown,
    /// The uplink is up, has a carrier, and has the addresses in use.
    Up(Uplink),
    /// There is no uplink, or it is down, has no carrier, or has lost its address. Programmed objects stay.
    Lost {
        /// The uplink last used in this run, if any: programmed objects still use it.
        last: Option<Uplink>,
        /// When it was lost.
        since: BootTime,
        /// The reason as text, with the remedy.
        error: String,
    },
}

impl UplinkState {
    /// Returns the uplink while it can be used.
    pub fn up(&self) -> Option<&Uplink> {
        match self {
            Self::Up(uplink) => Some(uplink),
            Self::Unknown | Self::Lost { .. } => None,
        }
    }

    /// Returns the uplink in use, or the last one.
    pub fn last(&self) -> Option<&Uplink> {
        match self {
            Self::Up(uplink) => Some(uplink),
            Self::Lost { last, .. } => last.as_ref(),
            Self::Unknown => None,
        }
    }

    /// The next state once `last` cannot be used.
    pub(crate) fn lost(&self, last: Option<Uplink>, now: BootTime, error: String) -> Self {
        let since = if let Self::Lost { since, .. } = self { *since } else { now };
        Self::Lost { last, since, error }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// The embedder stopped it, and it ended in order.
    Stopped,
    /// It ended with an error, as text with its causes: [`Overlay::run`](crate::overlay::Overlay::run) returns it as a
    /// value.
    Failed(String),
    /// It panicked, with this message: a bug of this crate, a backend or a store.
    Panicked(String),
    /// Its future was dropped, as when a task is aborted or a [`Running`](crate::overlay::Running) is dropped.
    Dropped,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped on request"),
            Self::Failed(error) => write!(f, "{}", Plain(error)),
            Self::Panicked(message) => write!(f, "it panicked: {}", Plain(message)),
            Self::Dropped => f.write_str("its future was dropped"),
        }
    }
}

/// What an overlay waits for, with the last error if there was one. The `Display` output contains both.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// A run: none is going on.
    Run,
    /// An answer of the lease store.
    Store {
        /// Its last error.
        error: Option<String>,
    },
    /// An answer of the kernel.
    Kernel {
        /// Its last error.
        error: Option<String>,
    },
    /// An interface that can be used.
    Uplink {
        /// Why the present interfaces cannot be used.
        error: Option<String>,
    },
    /// A lease: the store answers, but does not grant one.
    Lease {
        /// The reason.
        error: Option<String>,
    },
    /// The lease store's first list of peers.
    Peers {
        /// The last error of the store.
        error: Option<String>,
    },
    /// The overlay's devices.
    Device {
        /// The last error of the kernel.
        error: Option<String>,
    },
    /// Writes that are required to reach any peer of some address family, or that complete a device.
    Writes {
        /// The number of failed writes.
        failed_writes: usize,
        /// The last error of the kernel.
        error: Option<String>,
    },
    /// `subnet.env`: a start reads it, because it names the subnet of pods on this host, and without a written one no pod
    /// can be attached.
    SubnetEnv {
        /// Why it could not be read or written yet.
        error: Option<String>,
    },
}

impl Wait {
    /// Returns what to do if the wait persists.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Run => "start the agent; how it ended before says whether something has to be corrected first",
            Self::Store { .. } | Self::Peers { .. } => {
                "check that the lease store runs, is reachable, and grants this node access"
            }
            Self::Kernel { .. } => "check that this process may configure the network (CAP_NET_ADMIN)",
            Self::Uplink { .. } => "bring the interface up, or select another one",
            Self::Lease { .. } => {
                "provide what the lease store reports as missing: a free subnet, or this node's registration"
            }
            Self::Device { .. } | Self::Writes { .. } => "resolve the conflicts and refusals that the status lists",
            Self::SubnetEnv { .. } => "make its directory writable, and check its file system",
        }
    }

    /// Returns the last error.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Run => None,
            Self::Store { error }
            | Self::Kernel { error }
            | Self::Uplink { error }
            | Self::Lease { error }
            | Self::Peers { error }
            | Self::Device { error }
            | Self::Writes { error, .. }
            | Self::SubnetEnv { error } => error.as_deref(),
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run => f.write_str("the agent to be started")?,
            Self::Store { .. } => f.write_str("the lease store")?,
            Self::Kernel { .. } => f.write_str("the kernel")?,
            Self::Uplink { .. } => f.write_str("an uplink")?,
            Self::Lease { .. } => f.write_str("a lease")?,
            Self::Peers { .. } => f.write_str("the lease store's first list of peers")?,
            Self::Device { .. } => f.write_str("the devices")?,
            Self::Writes { failed_writes, .. } => write!(f, "{failed_writes} writes to the kernel")?,
            Self::SubnetEnv { .. } => f.write_str("subnet.env")?,
        }
        match self.error() {
            Some(error) => write!(f, " ({})", Plain(error)),
            None => Ok(()),
        }
    }
}

/// How an overlay is degraded, by reason: numbers of peers, records, objects or writes. One object may count for
/// several reasons.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Degraded {
    /// Records that are not accepted as peers: [`Status::quarantined`].
    pub quarantined: usize,
    /// Records that were dropped: [`PeerCounts::dropped`](crate::overlay::PeerCounts::dropped).
    pub dropped: usize,
    /// Peers that the backend skips in some family: [`Status::skipped`].
    pub skipped: usize,
    /// Foreign objects in the way: [`Status::conflicts`].
    pub conflicts: usize,
    /// Objects that another program keeps changing: [`Status::flapping`].
    pub flapping: usize,
    /// 1 while another agent writes this node's record: [`Status::contended`].
    pub contended: usize,
    /// 1 while the lease is held, but the store refuses to renew it: [`Status::lease_refused`].
    pub lease_refused: usize,
    /// Writes that the kernel refused: [`Status::refused`].
    pub refused: usize,
    /// Failed writes that are not caused by a peer's record: [`Status::failed_writes`].
    pub failed_writes: usize,
}

impl Degraded {
    /// Returns the sum of all counts.
    pub fn total(&self) -> usize {
        let Self {
            quarantined,
            dropped,
            skipped,
            conflicts,
            flapping,
            contended,
            lease_refused,
            refused,
            failed_writes,
        } = *self;
        quarantined + dropped + skipped + conflicts + flapping + contended + lease_refused + refused + failed_writes
    }
}

impl fmt::Display for Degraded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.contended, "other agent writes this node's lease", "other agents write this node's lease"),
            (self.lease_refused, "refused renewal of the lease", "refused renewals of the lease"),
            (self.skipped, "peer skipped", "peers skipped"),
            (self.quarantined, "invalid record", "invalid records"),
            (self.dropped, "record dropped", "records dropped"),
            (self.conflicts, "conflicting object", "conflicting objects"),
            (self.flapping, "object changed by another program", "objects changed by another program"),
            (self.refused, "write refused", "writes refused"),
            (self.failed_writes, "failed write", "failed writes"),
        ];
        for (nth, (count, one, many)) in counts.into_iter().filter(|(count, ..)| *count > 0).enumerate() {
            write!(f, "{}{count} {}", if nth == 0 { "" } else { ", " }, if count == 1 { one } else { many })?;
        }
        Ok(())
    }
}

impl Status {
    /// Returns whether this node's data plane can carry traffic and pods can be attached: a run is going on, it holds a
    /// lease, the uplink is up and has a carrier, the devices are as wanted, the peers that the store listed are
    /// programmed, and `subnet.env` is written if one is wanted.
    ///
    /// Peers that could not be programmed do not count, unless no peer of an address family could be;
    /// [`degraded`](Self::degraded) counts them. Contact with the store does not count: while the store is away, the
    /// data plane stays as it is.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready && self.waits_for().is_empty()
    }

    /// Returns what the overlay waits for before it [is ready](Self::is_ready), in order. Empty if nothing is missing.
    pub fn waits_for(&self) -> Vec<Wait> {
        if let Some(wait) = &self.starting {
            return vec![wait.clone()];
        }
        let contact = || match &self.store {
            Contact::Lost { error, .. } => Some(error.clone()),
            Contact::Never | Contact::Live => None,
        };
        let trouble = || self.last_error.clone();
        let mut waits = Vec::new();
        if self.lease.is_none() {
            waits.push(Wait::Lease { error: contact().or_else(|| self.lease_refused.clone()) });
        }
        if !self.listed {
            waits.push(Wait::Peers { error: contact() });
        }
        match &self.uplink {
            UplinkState::Up(_) => {}
            UplinkState::Unknown => waits.push(Wait::Uplink { error: None }),
            UplinkState::Lost { error, .. } => waits.push(Wait::Uplink { error: Some(error.clone()) }),
        }
        match self.phase {
            Phase::LeaseHeld if self.listed => waits.push(Wait::Device { error: trouble() }),
            Phase::DeviceReady => waits.push(Wait::Writes { failed_writes: self.failed_writes, error: trouble() }),
            Phase::Starting | Phase::LeaseHeld | Phase::Ready | Phase::Stopped => {}
        }
        match &self.subnet_env {
            EnvFile::Pending { error } if self.phase.has_reached(Phase::DeviceReady) => {
                waits.push(Wait::SubnetEnv { error: error.clone() });
            }
            EnvFile::Pending { .. } | EnvFile::Settled => {}
        }
        waits
    }

    /// Returns how the overlay is degraded, by reason; `None` if everything is as wanted. A node that is ready may be
    /// degraded.
    pub fn degraded(&self) -> Option<Degraded> {
        let degraded = Degraded {
            quarantined: self.peers.quarantined,
            dropped: self.peers.dropped,
            skipped: self.peers.skipped,
            conflicts: self.conflict_count,
            flapping: self.flapping.len(),
            contended: self.contended.is_some().into(),
            lease_refused: (self.lease.is_some() && self.lease_refused.is_some()).into(),
            refused: self.refused.len(),
            failed_writes: self.failed_writes,
        };
        (degraded != Degraded::default()).then_some(degraded)
    }
}
