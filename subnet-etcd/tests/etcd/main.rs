//! The store against real etcds.

mod common;
mod contract;
mod leases;
mod proxy;
mod watching;
