//! The core of flannelkit, an overlay network compatible with flannel: leases, planning, and the agent that brings the
//! kernel to the wanted state.
//!
//! Programs that embed an overlay use the crate `flannelkit`, which re-exports this crate and its companions behind
//! features. Use this crate directly to implement a part: a backend, a lease store, a kernel or a firewall.
//!
//! # How it works
//!
//! ```text
//!  SubnetManager::watch ─► admission ─► peers ─┐                                 ┌─► Status, Events
//!  Kernel::host_facts ───► uplink ─────────────┼─► Backend ─► wanted ─┐          │
//!  own lease ──────────────────────────────────┘   (pure)             ├─ plan ─► guards ─► Kernel::apply
//!  Kernel::hints, timer ─► Kernel::observe ──────────────────► seen ──┘  (pure)
//! ```
//!
//! A backend is a pure function from node, lease, peers and host to the wanted kernel state. One reconciler compares it
//! with the observed state and writes the difference: after each lease change for the changed peers, and in each audit
//! for everything. Lease events, kernel notifications and timers only decide when to look.
//!
//! # Modules
//!
//! | modules | contents |
//! |---|---|
//! | [`overlay`] | the agent: builder, run, status, events, queries to a running agent |
//! | [`subnet`], [`backend`], [`kernel`], [`firewall`], [`clock`] | the extension points: traits to implement, and the types they use |
//! | [`netlink`] | the implementation of the kernel trait for Linux (feature `netlink`) |
//! | [`net`], [`lease`], [`config`], [`subnet_env`] | value types, and the documents they are parsed from |
//! | [`admit`], [`allocation`], [`plan`], [`uplink`], [`backoff`] | decisions, without I/O: which records are peers, which subnet is free, what to write, which interface to use, when to retry |
//! | [`firewall_keeper`] | keeps firewall rules in place |
//! | [`files`], [`text`] | atomic file writes, and escaping of external text for display |
//! | `serialize` | `serde::Serialize` for status, events and plans (feature `serde`) |
//! | `testing` | fakes and contract suites (feature `testing`) |
//!
//! # Errors
//!
//! Each trait has its own error type. Its documentation says which errors are final and which are worth a retry; error
//! messages name the failed operation and the remedy. Nothing here panics on external input, exits the process, spawns
//! a task without the caller's knowledge, or keeps global state.
//!
//! Where comments name a file in `docs/`, it is one of the
//! [repository](https://github.com/flannelkit/flannelkit/tree/main/docs).
//!
//! # Testing
//!
//! With feature `testing`, `FakeKernel`, `MemorySubnets` and `FakeFirewall` run a whole agent in memory, and
//! `testing::store_contract` and `testing::backend_contract` check an implementation of a trait. With feature `mock`
//! the traits `SubnetManager`, `Backend`, `Kernel`, `Clock` and `Firewall` have [mockall](https://docs.rs/mockall) mocks beside
//! them, to script failures.

pub mod admit;
mod agent;
pub mod allocation;
pub mod backend;
pub mod backoff;
pub mod clock;
pub mod config;
pub mod files;
pub mod firewall;
pub mod firewall_keeper;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod kernel;
pub mod lease;
pub mod net;
#[cfg(all(target_os = "linux", feature = "netlink"))]
pub mod netlink;
pub mod overlay;
pub mod plan;
#[cfg(feature = "serde")]
pub mod serialize;
pub mod subnet;
pub mod subnet_env;
#[cfg(feature = "testing")]
pub mod testing;
pub mod text;
pub mod uplink;
