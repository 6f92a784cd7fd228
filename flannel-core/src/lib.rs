//! The heart of an overlay network compatible with flannel: leases, planning and the reconciler.

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
