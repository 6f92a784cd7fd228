//! Tests of the client against the hub.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod bounds;
mod contract;
mod fleet;
mod overlays;
mod program;
