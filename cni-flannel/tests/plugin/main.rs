//! The built plug-in, as a container runtime runs it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod conformance;
mod go;
mod install;
mod lab;
mod pods;
