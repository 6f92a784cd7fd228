//! Fakes and suites for tests, of third parties too.

pub mod arbitrary;
pub mod fake_kernel;
