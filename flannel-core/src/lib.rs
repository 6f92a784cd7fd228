//! The core of flannelkit, an overlay network compatible with flannel: leases, planning, and the agent that brings the kernel
//! to what is wanted.
//!
//! Programs that embed an overlay use the crate `flannelkit`, which has this one and its companions behind features. This
//! crate is for those who implement a part: a backend, a lease store, a kernel, a firewall.
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
//! A backend is a pure function from what is known to the kernel state that it wants. One reconciler compares that with what
//! is seen and writes the difference: after each change of a lease for the peers that changed, and in an audit for
//! everything. Leases, notifications and timers only decide when to look.
//!
//! # Modules
//!
//! | modules | what they have |
//! |---|---|
//! | [`overlay`] | the agent: builder, run, status, events, questions to a running agent |
//! | [`subnet`], [`backend`], [`kernel`], [`firewall`], [`clock`] | the seams: traits to implement, with the values that cross them |
//! | [`netlink`] | the Linux kernel behind the seam (feature `netlink`) |
//! | [`net`], [`lease`], [`config`], [`subnet_env`] | values, and the documents they are read from |
//! | [`admit`], [`allocation`], [`plan`], [`uplink`], [`backoff`] | decisions, without I/O: which records are peers, which subnet is free, what to write, which interface to use, when to retry |
//! | [`firewall_keeper`] | firewall rules that stay in place |
//! | [`files`], [`text`] | files written whole, and text from outside made fit to be shown |
//! | `serialize` | `serde::Serialize` for status, events and plans (feature `serde`) |
//! | `testing` | fakes and contract suites (feature `testing`) |
//!
//! # Errors
//!
//! Each seam has an error type of its own. Its documentation says which errors are final and which are worth a retry; texts
//! name what was being done and the remedy. Nothing here panics on what comes from outside, exits, spawns a task that its
//! caller does not know of, or keeps a global state.
//!
//! # Testing
//!
//! With feature `testing`, `FakeKernel`, `MemorySubnets` and `FakeFirewall` run a whole agent in memory, and
//! `testing::store_contract` and `testing::backend_contract` check an implementation of a seam. With feature `mock` each trait
//! has a [mockall](https://docs.rs/mockall) mock beside it, to script failures.

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
