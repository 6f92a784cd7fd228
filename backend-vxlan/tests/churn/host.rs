//! A host of the simulation, and the agent on it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use flannel_backend_vxlan::Vxlan;
use flannel_core::clock::TokioClock;
use flannel_core::lease::Lease;
use flannel_core::overlay::{Events, Handle, Identity, MissingUplink, Overlay, OverlayError, Status};
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};
use flannel_core::testing::{FakeKernel, MemorySubnets};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Where the default route leads.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);

pub(crate) fn address(number: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, number).into()
}

/// A virtual address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Virtual {
    pub(crate) number: u8,
    pub(crate) len: u8,
}

fn address_of(one: &Virtual) -> IpAddr {
    address(one.number)
}

pub(crate) struct Host {
    pub(crate) number: usize,
    pub(crate) kernel: FakeKernel,
    /// The last byte of its own address.
    pub(crate) own: u8,
    /// Whether its address comes from DHCP.
    pub(crate) leased: bool,
    pub(crate) virtuals: Vec<Virtual>,
    /// What it published when last looked at.
    pub(crate) published: Option<IpAddr>,
    pub(crate) agent: Option<Agent>,
    pub(crate) starts: u64,
}

pub(crate) struct Agent {
    pub(crate) handle: Handle,
    pub(crate) events: Events,
    cancel: CancellationToken,
    task: JoinHandle<Result<(), OverlayError>>,
}

impl Host {
    pub(crate) fn new(number: usize, own: u8, leased: bool) -> Self {
        let (kernel, virtuals) = (FakeKernel::new(), Vec::new());
        let mut host = Self { number, kernel, own, leased, virtuals, published: None, agent: None, starts: 0 };
        host.boot();
        host
    }

    /// A kernel with nothing but what the host's configuration makes.
    pub(crate) fn boot(&mut self) {
        self.kernel = FakeKernel::new();
        self.plug();
    }

    /// The interface with its addresses and the default route.
    pub(crate) fn plug(&self) {
        // Added as a link alone: the address is put in below, with or without a lifetime.
        self.kernel.add_uplink("eth0", "203.0.113.1/30".parse().unwrap()).unwrap();
        self.kernel.remove_address("eth0", "203.0.113.1/30".parse().unwrap()).unwrap();
        self.add_own();
        for one in &self.virtuals {
            self.add_virtual(*one);
        }
        self.add_default();
    }

    pub(crate) fn add_own(&self) {
        let address = format!("192.0.2.{}/24", self.own).parse().unwrap();
        if self.leased {
            self.kernel.lease_address("eth0", address).unwrap();
        } else {
            self.kernel.add_address("eth0", address).unwrap();
        }
        if !self.has_memory() {
            // Without a lease or a device from before nothing tells an own address from a virtual one but their order.
            for one in self.virtuals.iter().filter(|one| self.has(address_of(one))) {
                self.remove_virtual(*one);
                self.add_virtual(*one);
            }
        }
    }

    /// Whether anything tells which address the node used.
    pub(crate) fn has_memory(&self) -> bool {
        self.lease().is_some() || self.kernel.link_index("flannel.1").is_some()
    }

    pub(crate) fn remove_own(&self) {
        self.kernel.remove_address("eth0", format!("192.0.2.{}/24", self.own).parse().unwrap()).unwrap();
    }

    pub(crate) fn add_virtual(&self, one: Virtual) {
        self.kernel.add_address("eth0", format!("192.0.2.{}/{}", one.number, one.len).parse().unwrap()).unwrap();
    }

    pub(crate) fn remove_virtual(&self, one: Virtual) {
        self.kernel.remove_address("eth0", format!("192.0.2.{}/{}", one.number, one.len).parse().unwrap()).unwrap();
    }

    pub(crate) fn add_default(&self) {
        let link = self.kernel.link_index("eth0").unwrap();
        // It may still be there.
        let _ = self.kernel.add_route(self.default_through(link), Placement::Exclusive);
    }

    pub(crate) fn remove_default(&self) {
        let link = self.kernel.link_index("eth0").unwrap();
        // It may be gone already, with an address.
        let _ = self.kernel.delete_route(&self.default_through(link));
    }

    fn default_through(&self, link: u32) -> FakeRoute {
        FakeRoute::via("0.0.0.0/0".parse().unwrap(), GATEWAY.into(), link)
    }

    /// Whether the host has the address now.
    pub(crate) fn has(&self, addr: IpAddr) -> bool {
        let snapshot = self.kernel.snapshot();
        let text = format!("addr {addr}/");
        snapshot.lines().iter().any(|line| line.starts_with(&text) && line.ends_with("dev eth0"))
    }

    pub(crate) fn start(&mut self, store: &MemorySubnets, clock: &Arc<TokioClock>, seed: u64) {
        self.starts += 1;
        let overlay = Overlay::builder(Identity::PublicIp)
            .backend("vxlan", Vxlan::new)
            .missing_uplink(MissingUplink::Wait)
            .jitter_seed(seed << 16 | (self.number as u64) << 8 | self.starts)
            .clock(Arc::clone(clock) as _)
            .build(Arc::new(store.clone()), Arc::new(self.kernel.clone()))
            .unwrap();
        let handle = overlay.handle();
        let (events, cancel) = (handle.events(), CancellationToken::new());
        let task = tokio::spawn(overlay.run(cancel.clone()));
        self.agent = Some(Agent { handle, events, cancel, task });
    }

    pub(crate) fn status(&self) -> Option<Arc<Status>> {
        Some(self.agent.as_ref()?.handle.status())
    }

    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        self.status()?.lease.clone()
    }
}

impl Agent {
    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// As a crash would.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}
