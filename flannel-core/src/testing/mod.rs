//! Fakes and suites for tests, of third parties too.
pub mod samples;
pub mod store_contract;
