//! What the benchmarks share: a place to run in, peers, stores, programs, and rows of figures.

pub mod agent;
pub mod bed;
pub mod cluster;
pub mod embedded;
pub mod peers;
pub mod report;

/// Whatever ended a benchmark: shown with its sources.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
