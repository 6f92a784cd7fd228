//! flannel's CNI plug-in (docs/compatibility.md, "CNI plug-in"): attaches a pod to this node's subnet.
//!
//! It is a meta plug-in. Out of the network's configuration and `subnet.env`, which the agent writes, it makes the
//! configuration of another plug-in, `bridge` unless the configuration names one, and runs that. What it made is stored under
//! the container's ID, byte for byte as Go flannel's plug-in stores it, so that each of the two removes what the other
//! added.
//!
//! What differs from Go flannel's plug-in:
//!
//! * ADD waits for the agent (`waitForAgent`, in seconds; default 15, at most 110) in place of failing at once. After that the
//!   error has the code 11, "try again later".
//! * CHECK, STATUS and GC do what version 1.1 of the CNI specification says.
//! * The stored configuration stays until the other plug-in's DEL has succeeded, so that a DEL which failed can be repeated.
//! * ADD and DEL of one container wait for each other.
//!
//! `flannel install` copies the plug-in to its place and writes the configuration once `subnet.env` is there: see
//! [`install`].

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
