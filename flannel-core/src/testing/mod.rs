//! Fakes and test suites, also for use by other crates.

pub mod attributes;
pub mod backend_contract;
mod fake_firewall;
pub mod fake_kernel;
pub mod memory_subnets;
pub mod samples;
pub mod store_contract;
mod store_double;

pub use fake_firewall::FakeFirewall;
pub use fake_kernel::FakeKernel;
pub use memory_subnets::{Fault, MemorySubnets};
pub use store_double::{Call, StoreDouble};
