//! The store against real etcds.

mod common;
mod contract;
