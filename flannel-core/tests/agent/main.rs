//! The whole agent against the fake kernel and the store in memory, on a clock that stands still: reactions one by one
//! (scripted), and many nodes at random (simulated).
#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "helpers of tests")]

mod altered;
mod asleep;
mod away;
mod crowds;
mod direct;
mod ending;
mod env_file;
mod fights;
mod former;
mod gateway;
mod guards;
mod hostile;
mod log;
mod node;
mod preview;
mod readiness;
mod refusals;
mod renewal;
mod runs;
mod selecting;
mod sharing;
mod simulated;
mod slots;
mod slow;
mod start;
mod storms;
mod telling;
mod tunnel;
mod uplink;
mod watch;
