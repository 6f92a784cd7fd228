//! The driver of an agent: it waits for inputs, passes them to the decision core, and carries out the calls that the
//! core asks for.
//!
//! [`Overlay::builder`] takes the kernel, the lease store and the backends. [`Overlay::run`] runs the agent;
//! [`Overlay::spawn`] runs it on a task of its own. The agent installs nothing global, spawns no further task (files
//! are read and written on the runtime's blocking threads), and ends on request as the given [`Teardown`] says. An
//! overlay may be run again, and several overlays may run in one process.

mod builder;
mod driver;
mod env_file;
mod event_log;
mod former_networks;
mod handle;
mod host_files;
mod published;
mod removal;
mod run;
mod running;
mod start;
mod survey;
mod turn;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use former_networks::check_former_networks;

pub use crate::agent::{
    ConfigPolicy, Contact, Contended, Degraded, End, EnvFile, Event, Explanation, Held, HeldBecause, LossPolicy,
    LossReason, Masquerade, MissingUplink, PeerCounts, PeerList, PeerRow, Phase, Preview, Refusal, Standing, Status,
    SubnetEnvFile, SubscriptionState, Teardown, UplinkState, Verdict, Wait, WithheldBecause,
};
pub use builder::{BuildError, Builder};
pub use handle::{Ended, Events, Handle, HandleError};
pub use removal::Removed;
pub use run::{Overlay, OverlayError};
pub use running::Running;
