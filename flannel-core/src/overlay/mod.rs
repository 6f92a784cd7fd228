//! The agent: holds a lease, follows the store, and keeps the kernel as wanted.
//!
//! [`Overlay::builder`] takes the seams; [`Overlay::run`] is the agent. It installs nothing global, spawns no task (files
//! are read and written on the runtime's blocking threads) and ends when its token says so. Several overlays may run in
//! one process.

mod backoff;
mod builder;
mod challenge;
mod contact;
mod contest;
mod env;
mod explain;
mod guard;
mod handle;
mod journal;
mod machine;
mod memory;
mod places;
mod published;
mod refused;
mod removal;
mod run;
mod shell;
mod start;
mod status;
mod survey;
mod tenure;
mod view;
mod wanted;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use places::check_places;

pub use builder::{BuildError, Builder};
pub use explain::{Explanation, Verdict};
pub use handle::{Ended, Events, Handle, HandleError, Held, HeldBecause, Preview};
pub use removal::Removed;
pub use run::{Overlay, OverlayError};
pub use status::{
    Challenged, Contact, EnvFile, Event, Hearing, LossReason, PeerCounts, Phase, Refusal, Status, WithheldBecause,
};

use crate::kernel::OverlayName;
use crate::net::Dual;
use crate::subnet::NodeIdentity;
pub(crate) use crate::text::chain;
use crate::uplink::Select;

/// What to do when the lease is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LossPolicy {
    /// Take a lease again, the same subnet if it is still free; the data plane stays up meanwhile.
    #[default]
    Reacquire,
    /// Keep the data plane as it is and do nothing; the embedder decides.
    Keep,
    /// End [`Overlay::run`] with [`OverlayError::LeaseLost`].
    Stop,
}

/// What the end of the agent does to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Teardown {
    /// Leaves everything up: traffic goes on, and the next run takes over.
    #[default]
    Keep,
    /// Removes everything of ours, releases the lease and deletes `subnet.env`.
    Remove,
}

/// What to do when there is no uplink at start: the agent may be up before the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MissingUplink {
    /// End [`Overlay::run`] with [`OverlayError::Uplink`].
    #[default]
    Fail,
    /// Look again, at most 5 s apart, and show in the status what is wrong. A selection that no host can fit is still
    /// an error.
    Wait,
}

/// Who the node is to the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// By name: the Kubernetes and the file store.
    Named(NodeIdentity),
    /// By its public address (IPv4 if there is one): etcd.
    PublicIp,
}

/// Where `subnet.env` is written, and what it says of masquerading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnvFile {
    /// The file. Its directory is made if needed.
    pub path: PathBuf,
    /// Who masquerades what leaves the network (`FLANNEL_IPMASQ`).
    pub masquerade: Masquerade,
}

/// Who masquerades what leaves the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masquerade {
    /// The agent's side: `FLANNEL_IPMASQ=true`, so that the CNI plug-in does not.
    Agent,
    /// Not the agent: `FLANNEL_IPMASQ=false`.
    Plugin,
}

/// What does not change while an agent runs.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) name: OverlayName,
    pub(crate) identity: Identity,
    pub(crate) uplink: Select,
    pub(crate) missing_uplink: MissingUplink,
    pub(crate) public: Dual<IpAddr>,
    pub(crate) store_addresses: Vec<IpAddr>,
    pub(crate) on_loss: LossPolicy,
    pub(crate) teardown: Teardown,
    pub(crate) audit_every: Duration,
    pub(crate) subnet_env: Option<SubnetEnvFile>,
}
