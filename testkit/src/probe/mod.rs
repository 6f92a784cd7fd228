//! Traffic between namespaces through sockets, without other programs.

mod flow;
mod mirror;
mod ping;
mod throughput;

pub(crate) use flow::roomy;
pub use flow::{Flow, FlowReport};
pub use mirror::{Mirror, seen_at};
pub use ping::{ping, pings, until_reply};
pub use throughput::{Throughput, throughput};
