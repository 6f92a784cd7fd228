//! The store against real etcds.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;
mod contract;
mod crowd;
mod leases;
mod proxy;
mod slow;
mod tls;
mod watching;
