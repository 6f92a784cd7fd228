//! Fakes and suites for tests, of third parties too.

pub mod arbitrary;
pub mod backend_contract;
pub mod fake_kernel;
pub mod memory_subnets;
pub mod store_contract;

pub use fake_kernel::FakeKernel;
pub use memory_subnets::{Fault, MemorySubnets};
