//! A host of the simulation, and the agent on it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use flannel_backend_vxlan::Vxlan;
use flannel_core::clock::{BootTime, Clock};
use flannel_core::kernel::KernelError;
use flannel_core::lease::Lease;
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::{ConfigPolicy, MissingUplink, Overlay, Phase, Status};
use flannel_core::testing::fake_kernel::{Address, FakeRoute, Placement, Snapshot};
use flannel_core::testing::{FakeKernel, MemorySubnets};
use futures_util::FutureExt;

use crate::clock::HostClock;
use crate::foreign::{put_foreign, strange_lines};
use crate::network::{address, device};
use crate::story::Story;
use crate::witness::{Shared, Witness};

/// The longest that an agent may take to end, in simulated time.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A virtual address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Virtual {
    pub(crate) family: Family,
    pub(crate) number: u8,
    pub(crate) len: u8,
}

pub(crate) struct Host {
    pub(crate) number: usize,
    pub(crate) kernel: FakeKernel,
    pub(crate) clock: Arc<HostClock>,
    pub(crate) families: Vec<Family>,
    /// The last byte of the host's own address of each family.
    pub(crate) own: Dual<u8>,
    /// Whether its addresses come from DHCP.
    pub(crate) leased: bool,
    pub(crate) virtuals: Vec<Virtual>,
    /// The published addresses, as last checked.
    pub(crate) published: Dual<IpAddr>,
    /// The addresses in use, as last checked.
    pub(crate) used: Dual<IpAddr>,
    pub(crate) agent: Option<Agent>,
    pub(crate) starts: u64,
    /// The foreign objects in the kernel after the last act.
    strange: Vec<String>,
    /// The kernel's number of changes at that time.
    looked: u64,
    acting: bool,
    /// What the agent did to foreign objects.
    harm: Option<String>,
    /// The time of the last act on the host, or of its agent's last event.
    pub(crate) stirred: BootTime,
    /// The kernel's state when last checked.
    pub(crate) checked: Option<(u64, Option<Arc<Lease>>, bool)>,
}

pub(crate) struct Agent {
    pub(crate) running: testkit::Agent,
    pub(crate) story: Story,
    /// The networks that it was started with.
    pub(crate) networks: Arc<Mutex<Dual<Prefix>>>,
}

impl Host {
    pub(crate) fn new(number: usize, families: Vec<Family>, own: u8, leased: bool, clock: HostClock) -> Self {
        let mut owns = Dual::default();
        for family in &families {
            *owns.slot(*family) = Some(own);
        }
        let mut host = Self {
            number,
            kernel: FakeKernel::new(),
            clock: Arc::new(clock),
            families,
            own: owns,
            leased,
            virtuals: Vec::new(),
            published: Dual::default(),
            used: Dual::default(),
            agent: None,
            starts: 0,
            strange: Vec::new(),
            looked: 0,
            acting: false,
            harm: None,
            stirred: BootTime::default(),
            checked: None,
        };
        host.boot();
        host
    }

    /// Changes the kernel as another program. An act that the kernel refuses has no effect.
    pub(crate) fn act(&mut self, act: impl FnOnce(&FakeKernel) -> Result<(), KernelError>) {
        self.together(|host| {
            let _ = act(&host.kernel);
        });
    }

    /// Performs several acts in a row. Foreign objects are compared before and after all of them.
    fn together(&mut self, acts: impl FnOnce(&mut Self)) {
        if self.acting {
            return acts(self);
        }
        if self.looked != self.kernel.changes() {
            self.look_for_harm(&self.kernel.snapshot());
        }
        self.acting = true;
        acts(self);
        self.acting = false;
        if self.looked != self.kernel.changes() {
            (self.strange, self.looked) = (strange_lines(&self.kernel.snapshot()), self.kernel.changes());
        }
        self.stirred = self.clock.now();
    }

    /// Compares the foreign objects with those after the last act.
    pub(crate) fn look_for_harm(&mut self, snapshot: &Snapshot) {
        let strange = strange_lines(snapshot);
        if strange != self.strange && self.harm.is_none() {
            let gone: Vec<_> = self.strange.iter().filter(|line| !strange.contains(line)).collect();
            let new: Vec<_> = strange.iter().filter(|line| !self.strange.contains(line)).collect();
            self.harm = Some(format!("changes what is not its own: {gone:#?} to {new:#?}"));
        }
        self.looked = self.kernel.changes();
    }

    pub(crate) fn harm(&self) -> Option<String> {
        self.harm.clone()
    }

    /// Starts a kernel with only the host's configuration and foreign objects.
    pub(crate) fn boot(&mut self) {
        self.together(|host| {
            host.kernel = FakeKernel::new();
            put_foreign(&host.kernel, &host.families);
            (host.checked, host.looked) = (None, 0);
            host.plug();
        });
    }

    /// Adds the interface with its addresses and the default routes.
    pub(crate) fn plug(&mut self) {
        self.together(|host| {
            // Added only as a link: addresses are added below, with or without a lifetime.
            let any: Address = "203.0.113.1/30".parse().unwrap();
            host.kernel.add_uplink("eth0", any).unwrap();
            host.kernel.remove_address("eth0", any).unwrap();
            host.put_addresses();
        });
    }

    /// Adds missing addresses and default routes.
    pub(crate) fn put_addresses(&mut self) {
        self.together(|host| {
            host.add_own(&host.families.clone());
            for one in host.virtuals.clone() {
                host.add_virtual(one);
            }
            host.add_default();
        });
    }

    fn own_address(&self, family: Family) -> Option<Address> {
        let number = *self.own.get(family)?;
        Some(with_len(family, number, if family == Family::V4 { 24 } else { 64 }))
    }

    pub(crate) fn add_own(&mut self, families: &[Family]) {
        for family in families {
            let (Some(address), leased) = (self.own_address(*family), self.leased) else { continue };
            self.act(|kernel| match leased {
                true => kernel.lease_address("eth0", address),
                false => kernel.add_address("eth0", address),
            });
        }
        if !self.has_memory() {
            // Without a lease or an earlier device, only the order distinguishes an own address from a virtual one.
            for one in self.virtuals.clone().into_iter().filter(|one| families.contains(&one.family)) {
                if self.has(address(one.family, one.number)) {
                    self.remove_virtual(one);
                    self.add_virtual(one);
                }
            }
        }
    }

    /// Changes its own addresses in the given families.
    pub(crate) fn change_own(&mut self, now: Dual<u8>) {
        let families: Vec<Family> = now.families().collect();
        self.together(|host| {
            host.remove_own(&families);
            for (family, number) in now.iter() {
                *host.own.slot(family) = Some(*number);
            }
            host.add_own(&families);
            host.add_default();
        });
    }

    /// Whether the host still shows which address the node used.
    pub(crate) fn has_memory(&self) -> bool {
        let device = || self.families.iter().all(|family| self.kernel.link_index(device(*family)).is_some());
        self.lease().is_some() || device()
    }

    pub(crate) fn remove_own(&mut self, families: &[Family]) {
        for family in families {
            let Some(address) = self.own_address(*family) else { continue };
            self.act(|kernel| kernel.remove_address("eth0", address));
        }
    }

    pub(crate) fn add_virtual(&mut self, one: Virtual) {
        self.act(|kernel| kernel.add_address("eth0", with_len(one.family, one.number, one.len)));
    }

    pub(crate) fn remove_virtual(&mut self, one: Virtual) {
        self.act(|kernel| kernel.remove_address("eth0", with_len(one.family, one.number, one.len)));
    }

    /// Adds missing default routes: one may have been deleted with an address.
    pub(crate) fn add_default(&mut self) {
        self.together(|host| {
            for route in host.defaults() {
                host.act(|kernel| kernel.add_route(route, Placement::Exclusive));
            }
        });
    }

    pub(crate) fn remove_default(&mut self) {
        self.together(|host| {
            for route in host.defaults() {
                host.act(|kernel| kernel.delete_route(&route));
            }
        });
    }

    fn defaults(&self) -> Vec<FakeRoute> {
        let link = self.kernel.link_index("eth0").unwrap();
        let to = |family: &Family| match family {
            Family::V4 => FakeRoute::via("0.0.0.0/0".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 254).into(), link),
            Family::V6 => FakeRoute::via("::/0".parse().unwrap(), "fe80::1".parse().unwrap(), link),
        };
        self.families.iter().map(to).collect()
    }

    /// Whether the host has the address now.
    pub(crate) fn has(&self, addr: IpAddr) -> bool {
        let snapshot = self.kernel.snapshot();
        let text = format!("addr {addr}/");
        snapshot.lines().iter().any(|line| line.starts_with(&text) && line.ends_with("dev eth0"))
    }

    pub(crate) fn start(&mut self, store: &MemorySubnets, shared: &Arc<Shared>, seed: u64) {
        self.starts += 1;
        self.stirred = self.clock.now();
        let networks = Arc::default();
        let witness = Arc::new(Witness {
            store: store.clone(),
            host: self.number,
            clock: Arc::clone(&self.clock),
            shared: Arc::clone(shared),
            handle: OnceLock::new(),
            networks: Arc::clone(&networks),
        });
        let overlay = Overlay::builder()
            .backend("vxlan", Vxlan::new)
            .missing_uplink(MissingUplink::Wait)
            // No supervisor would start it again.
            .on_reconfiguration(ConfigPolicy::Keep)
            .jitter_seed(seed << 16 | (self.number as u64) << 8 | self.starts)
            .clock(Arc::clone(&self.clock) as _)
            .build(Arc::clone(&witness) as _, Arc::new(self.kernel.clone()))
            .unwrap();
        let handle = overlay.handle();
        let _ = witness.handle.set(handle.clone());
        shared.runs(self.number, Some(handle));
        let clock = Arc::clone(&self.clock);
        let running = testkit::Agent::start_in(overlay, PATIENCE, |life| async move { clock.run(life).await }.boxed());
        self.agent = Some(Agent { running, story: Story::default(), networks });
    }

    /// Ends the agent: in order, or as in a crash.
    pub(crate) async fn end(&mut self, shared: &Shared, crash: bool) {
        let Some(agent) = self.agent.take() else { return };
        self.stirred = self.clock.now();
        if crash {
            agent.running.killed().await;
        } else {
            agent.running.cancelled().await.unwrap();
        }
        shared.runs(self.number, None);
    }

    pub(crate) fn sleep(&mut self) {
        self.clock.suspend();
    }

    pub(crate) fn wake(&mut self, rest: Duration) {
        self.clock.resume(rest);
        self.stirred = self.clock.now();
    }

    pub(crate) fn status(&self) -> Option<Arc<Status>> {
        Some(self.agent.as_ref()?.running.handle.status())
    }

    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        self.status()?.lease.clone()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.status().is_some_and(|status| status.phase == Phase::Ready)
    }
}

fn with_len(family: Family, number: u8, len: u8) -> Address {
    Address { addr: address(family, number), len }
}
