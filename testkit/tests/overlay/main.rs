//! The whole agent on the real kernel: nodes of the lab, a store in memory, and whoever else is at work there.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "helpers of tests")]

mod bytes;
mod changes;
mod external;
mod fights;
mod foreign;
mod healing;
mod host;
mod peers;
mod support;
mod takeover;
mod traffic;
mod udp;
