//! The store on a real API server.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod check;
mod common;
mod contract;
mod own_node;
mod plug_in;
mod watching;
