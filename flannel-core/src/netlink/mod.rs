//! The Linux kernel, over netlink.
//!
//! One thread per [`NetlinkKernel`] owns blocking sockets in one network namespace: sends wait for the kernel's RTNL
//! lock, which must never block a runtime's worker. The types of the netlink crates do not appear in the public API.

mod apply;
mod claim;
mod codec;
mod facts;
mod monitor;
mod observe;
mod pending_hints;
mod plane;
mod probe;
#[cfg(test)]
mod test_namespace;
mod thread;
mod wire;

use crate::kernel::{
    ApplyReport, Claim, DataPlane, Device, Hint, HostFacts, Kernel, KernelError, Op, OverlayName, Residence, Scope,
    State,
};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::codec::check::check_datagram;
use self::pending_hints::PendingHints;
use self::thread::{Command, Thread};
use crate::net::{Dual, Prefix};

/// The kernel of one network namespace. Several overlays of one process may share it: each gets hints about the writes
/// of the others.
///
/// It starts one thread. Dropping this value ends the thread and waits for the current request, at most a few seconds.
/// Writing needs `CAP_NET_ADMIN` in the user namespace that owns the network namespace; an unprivileged user has it
/// inside `unshare -Urn`. There, and in containers, the kernel refuses large receive buffers: [`Hint::Lost`] then
/// occurs sooner, and nothing else changes.
///
/// # Deadlines
/// A request that is not answered within 5 s fails with [`KernelError::Timeout`], and the socket is reopened. The time
/// that a send waits for RTNL inside the kernel cannot be limited and is not counted; drop the future to stop waiting.
///
/// # Cancel safety
/// Dropping a future ends a plan after the current send. Later requests are not affected.
pub struct NetlinkKernel {
    thread: Thread,
}

impl NetlinkKernel {
    /// Opens the kernel of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`KernelError::Lost`] when the thread cannot be started. Retry with back-off.
    pub fn new() -> Result<Self, KernelError> {
        Ok(Self { thread: Thread::start(None)? })
    }

    /// Opens the kernel of the given network namespace (an open `/run/netns/…` or `/proc/…/ns/net`). Only this value's
    /// thread enters it.
    ///
    /// # Errors
    /// [`KernelError::Denied`] without `CAP_SYS_ADMIN`, [`KernelError::Refused`] when `namespace` is not a network
    /// namespace: both are final. [`KernelError::Lost`] when the thread cannot be started: retry with back-off.
    pub fn in_namespace(namespace: OwnedFd) -> Result<Self, KernelError> {
        Ok(Self { thread: Thread::start(Some(namespace))? })
    }

    /// Attaches a data plane, which carries the packets of the TUN devices wanted through this value. The data plane
    /// may have its own threads and ends them when this value is dropped. There is one data plane: attaching another
    /// replaces it.
    ///
    /// # Errors
    /// [`KernelError::Stopped`] once the thread has ended. Final.
    pub fn with_data_plane(self, plane: impl DataPlane) -> Result<Self, KernelError> {
        self.thread.attach(Box::new(plane))?;
        Ok(self)
    }
}

impl fmt::Debug for NetlinkKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NetlinkKernel")
    }
}

#[async_trait]
impl Kernel for NetlinkKernel {
    async fn claim(
        &self,
        overlay: &OverlayName,
        networks: &Dual<Prefix>,
        residence: Residence,
    ) -> Result<Claim, KernelError> {
        let (overlay, networks) = (overlay.clone(), *networks);
        self.thread.call(|reply| Command::Claim { overlay, networks, residence, reply }).await
    }

    async fn probe(&self, devices: &[Device]) -> Result<(), KernelError> {
        let devices = devices.to_vec();
        self.thread.call(|reply| Command::Probe { devices, reply }).await
    }

    async fn host_facts(&self, reach: &[IpAddr]) -> Result<HostFacts, KernelError> {
        let reach = reach.to_vec();
        self.thread.call(|reply| Command::HostFacts { reach, reply }).await
    }

    async fn observe(&self, scope: &Scope) -> Result<State, KernelError> {
        let scope = scope.clone();
        self.thread.call(|reply| Command::Observe { scope, reply }).await
    }

    async fn apply(&self, scope: &Scope, ops: Arc<Vec<Op>>) -> ApplyReport {
        let scope = scope.clone();
        match self.thread.call(|reply| Command::Apply { scope, ops, reply }).await {
            Ok(report) => report,
            Err(error) => ApplyReport { lost: Some(error), ..ApplyReport::default() },
        }
    }

    fn hints(&self, scope: &Scope) -> BoxStream<'static, Hint> {
        let pending = Arc::new(PendingHints::default());
        self.thread.subscribe(scope.clone(), Arc::clone(&pending));
        pending.hints().boxed()
    }
}
