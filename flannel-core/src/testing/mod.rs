//! Fakes and suites for tests, of third parties too.

pub mod arbitrary;
pub mod memory_subnets;
pub mod samples;
pub mod store_contract;

pub use memory_subnets::MemorySubnets;
