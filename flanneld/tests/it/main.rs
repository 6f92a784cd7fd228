//! The real binary on the real kernel: network namespaces, the embedded store, signals.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod bad_input;
mod changes;
mod chart;
mod cleanup;
mod cni;
mod commands;
mod crash;
mod crowd;
mod doctor;
mod etcd;
mod filter;
mod go_flannel;
mod harness;
mod identity;
mod kube;
mod kube_faults;
mod kubernetes;
mod life;
mod local_users;
mod manifest;
mod monitoring;
mod moved;
mod planted;
mod reconfigured;
mod records;
mod scarce;
mod secure;
mod store;
