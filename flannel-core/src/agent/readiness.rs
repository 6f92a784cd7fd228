//! Whether an overlay is ready: what it waits for, and what it does without.

use std::fmt;

use crate::agent::status::{Contact, EnvFile, Phase, Status};
use crate::backend::Uplink;
use crate::clock::BootTime;
use crate::text::Plain;

/// The interface that carries the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum UplinkState {
    /// None was decided for yet: that is done with the lease.
    #[default]
    Unknown,
    /// It is up and has a carrier and the addresses in use.
    Up(Uplink),
    /// There is none, or it is down, has no carrier, or has lost its address. What is programmed stays.
    Lost {
        /// The one in use in this run, as far as there was any: what is programmed goes by it.
        last: Option<Uplink>,
        /// Since when.
        since: BootTime,
        /// Why, in words with the remedy.
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

    /// Returns the uplink in use, or the last one that was.
    pub fn last(&self) -> Option<&Uplink> {
        match self {
            Self::Up(uplink) => Some(uplink),
            Self::Lost { last, .. } => last.as_ref(),
            Self::Unknown => None,
        }
    }

    /// What follows once `last` cannot be used.
    pub(crate) fn lost(&self, last: Option<Uplink>, now: BootTime, error: String) -> Self {
        let since = if let Self::Lost { since, .. } = self { *since } else { now };
        Self::Lost { last, since, error }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// It was told to, and ended in order.
    Stopped,
    /// By an error, in words with its causes: [`Overlay::run`](crate::overlay::Overlay::run) returns it as a value.
    Failed(String),
    /// By a panic, with its message: a bug of this crate, a backend or a store.
    Panicked(String),
    /// Its future was dropped, as when a task is aborted or a [`Running`](crate::overlay::Running) is dropped.
    Dropped,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("it was told to"),
            Self::Failed(error) => write!(f, "{}", Plain(error)),
            Self::Panicked(message) => write!(f, "it panicked: {}", Plain(message)),
            Self::Dropped => f.write_str("its future was dropped"),
        }
    }
}

/// What an overlay waits for, with the last error where there was one. Its `Display` names both.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// To be run: no run is going on.
    Run,
    /// An answer of the lease store.
    Store {
        /// What it said last.
        error: Option<String>,
    },
    /// An answer of the kernel.
    Kernel {
        /// What it said last.
        error: Option<String>,
    },
    /// An interface that can be used.
    Uplink {
        /// What is wrong with those there are.
        error: Option<String>,
    },
    /// A lease: the store answers, but does not give one.
    Lease {
        /// Why not.
        error: Option<String>,
    },
    /// The lease store's first list of peers.
    Peers {
        /// What the store said last.
        error: Option<String>,
    },
    /// The overlay's devices.
    Device {
        /// What the kernel said last.
        error: Option<String>,
    },
    /// Writes without which no peer of some address family can be reached, or parts of a device.
    Writes {
        /// How many.
        undone: usize,
        /// What the kernel said last.
        error: Option<String>,
    },
    /// `subnet.env` to be written: without, no pod can be attached.
    SubnetEnv {
        /// Why the last try failed.
        error: Option<String>,
    },
}

impl Wait {
    /// Returns what to do if it lasts.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Run => "run the overlay; how the last run ended says whether something has to be mended first",
            Self::Store { .. } | Self::Peers { .. } => {
                "see that the lease store runs, can be reached and lets this node in"
            }
            Self::Kernel { .. } => "see that the kernel answers, and that this process may configure its network",
            Self::Uplink { .. } => "bring the interface up, or select another one",
            Self::Lease { .. } => "see to what the store says it lacks: a free subnet, or this node's registration",
            Self::Device { .. } | Self::Writes { .. } => {
                "see that the kernel takes the devices and routes: the conflicts and refusals in the status name them"
            }
            Self::SubnetEnv { .. } => "see that its directory can be written",
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
            Self::Run => f.write_str("a run")?,
            Self::Store { .. } => f.write_str("the lease store")?,
            Self::Kernel { .. } => f.write_str("the kernel")?,
            Self::Uplink { .. } => f.write_str("an uplink")?,
            Self::Lease { .. } => f.write_str("a lease")?,
            Self::Peers { .. } => f.write_str("the lease store's first list of peers")?,
            Self::Device { .. } => f.write_str("the devices")?,
            Self::Writes { undone, .. } => write!(f, "{undone} writes to the kernel")?,
            Self::SubnetEnv { .. } => f.write_str("subnet.env to be written")?,
        }
        match self.error() {
            Some(error) => write!(f, " ({})", Plain(error)),
            None => Ok(()),
        }
    }
}

/// What an overlay does without, by reason: numbers of peers, records, objects or writes. One object may count for more
/// than one reason.
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Degraded {
    /// Records that are no peers: [`Status::quarantined`].
    pub quarantined: usize,
    /// Records that were dropped: [`PeerCounts::dropped`](crate::overlay::PeerCounts::dropped).
    pub dropped: usize,
    /// Peers that the backend gives nothing in some family: [`Status::skipped`].
    pub skipped: usize,
    /// Foreign objects in the way: [`Status::conflicts`].
    pub conflicts: usize,
    /// Objects that somebody else keeps changing: [`Status::flapping`].
    pub flapping: usize,
    /// Writes that the kernel refused: [`Status::refused`].
    pub refused: usize,
    /// Writes that are left for another reason than a peer's record: [`Status::undone`].
    pub undone: usize,
}

impl Degraded {
    /// Returns the sum of all counts.
    pub fn total(&self) -> usize {
        let Self { quarantined, dropped, skipped, conflicts, flapping, refused, undone } = *self;
        quarantined + dropped + skipped + conflicts + flapping + refused + undone
    }
}

impl fmt::Display for Degraded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.quarantined, "quarantined"),
            (self.dropped, "dropped"),
            (self.skipped, "skipped"),
            (self.conflicts, "in conflict"),
            (self.flapping, "flapping"),
            (self.refused, "refused"),
            (self.undone, "undone"),
        ];
        for (nth, (count, what)) in counts.into_iter().filter(|(count, _)| *count > 0).enumerate() {
            write!(f, "{}{count} {what}", if nth == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl Status {
    /// Returns whether this node's data plane can carry traffic, and pods can be attached: a run is going on, it holds a
    /// lease, the uplink is up and has a carrier, the devices are as wanted, the peers that the store listed are
    /// programmed, and `subnet.env` is written where one is wanted. Peers that could not be programmed do not count, unless
    /// no peer of an address family could: [`degraded`](Self::degraded) has them. Nor does the store: while it is away, the
    /// data plane stays as it is.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready && self.waits_for().is_empty()
    }

    /// Returns what has to come about before it [is ready](Self::is_ready), first things first. Nothing: it is ready.
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
            waits.push(Wait::Lease { error: contact() });
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
            Phase::DeviceReady => waits.push(Wait::Writes { undone: self.undone, error: trouble() }),
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

    /// Returns what it does without, and for which reasons; `None` where everything is as wanted. A node that is ready may
    /// be degraded.
    pub fn degraded(&self) -> Option<Degraded> {
        let degraded = Degraded {
            quarantined: self.peers.quarantined,
            dropped: self.peers.dropped,
            skipped: self.peers.skipped,
            conflicts: self.conflict_count,
            flapping: self.flapping.len(),
            refused: self.refused.len(),
            undone: self.undone,
        };
        (degraded != Degraded::default()).then_some(degraded)
    }
}
