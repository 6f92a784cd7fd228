//! flannel's CNI plug-in (docs/compatibility.md, "CNI plug-in"): attaches a pod to this node's subnet.
//!
//! It is a meta plug-in: it derives the configuration of another plug-in (by default `bridge`) from the network's configuration
//! and `subnet.env`, which the agent writes, and runs that plug-in. The derived configuration is stored under the container's ID,
//! byte for byte as Go flannel's plug-in stores it, so that either plug-in can remove what the other one added.
//!
//! Differences from Go flannel's plug-in:
//!
//! * ADD waits for the agent (`waitForAgent`, in seconds; default 15, at most 110) instead of failing at once. After that it
//!   returns error 11, "try again later".
//! * CHECK, STATUS and GC follow version 1.1 of the CNI specification.
//! * The stored configuration is kept until the other plug-in's DEL has succeeded, so that a failed DEL can be repeated.
//! * Calls for one container run one after the other.
//!
//! `flannel install` copies the plug-in and writes its configuration once `subnet.env` exists: see [`install`].

mod command;
mod conf;
mod delegate;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod go_json;
pub mod install;
mod invoke;
mod program;
mod request;
mod state;
mod subnet_env;

pub use program::main;
