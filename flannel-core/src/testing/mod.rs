//! Fakes and suites for tests, of third parties too.

pub mod fake_kernel;
