//! A node of a test: a kernel of its own, a share in a store, and the agent on it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use flannel_core::backend::Backend;
use flannel_core::clock::TokioClock;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::kernel::Kernel;
use flannel_core::lease::{Lease, LeaseAttrs, LeaseKey};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::{Builder, Overlay};
use flannel_core::subnet::{NodeIdentity, SubnetManager, ThisNode};
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};
use flannel_core::testing::{FakeKernel, MemorySubnets};
pub(crate) use testkit::Agent;

use crate::tunnel::{Tunnel, data, mac_of};

/// The longest wait, in simulated time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) fn config() -> NetworkConfig {
    parse(r#"{"Network":"10.42.0.0/16","Backend":{"Type":"tunnel"}}"#)
}

pub(crate) fn dual_config() -> NetworkConfig {
    parse(r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/48","Backend":{"Type":"tunnel"}}"#)
}

/// A network with the subnets 10.42.9.0/24 to 10.42.`last`.0/24.
pub(crate) fn pool(last: u8) -> NetworkConfig {
    let text =
        r#"{"Network":"10.42.0.0/16","SubnetMin":"10.42.9.0","SubnetMax":"10.42.LAST.0","Backend":{"Type":"tunnel"}}"#;
    parse(&text.replace("LAST", &last.to_string()))
}

pub(crate) fn parse(text: &str) -> NetworkConfig {
    NetworkConfig::parse(text.as_bytes(), Allocation::Pool).unwrap()
}

pub(crate) fn public(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, n).into(),
        Family::V6 => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, n.into()).into(),
    }
}

pub(crate) fn subnet(n: u8) -> Prefix {
    Prefix::new(Ipv4Addr::new(10, 42, n, 0).into(), 24).unwrap()
}

/// The IPv4 lease of a node that is nobody's agent.
pub(crate) fn peer(n: u8) -> Lease {
    let name = format!("peer-{n}");
    let attrs = LeaseAttrs::new(Dual { v4: Some(public(Family::V4, n)), v6: None });
    let attrs = attrs.with_backend("tunnel", Dual { v4: Some(data(mac_of(&name, Family::V4))), v6: None });
    Lease::new(LeaseKey::new(&name), Dual { v4: Some(subnet(n)), v6: None }, attrs)
}

/// The same of a node with both families.
pub(crate) fn dual_peer(n: u8) -> Lease {
    let mut lease = peer(n);
    lease.subnets.v6 = Some(format!("fd00:42:0:{n:x}::/64").parse().unwrap());
    lease.attrs.public_ip.v6 = Some(public(Family::V6, n));
    lease.attrs.backend_data.v6 = Some(data(mac_of(lease.key.as_str(), Family::V6)));
    lease
}

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) kernel: FakeKernel,
    pub(crate) store: MemorySubnets,
    pub(crate) clock: Arc<TokioClock>,
}

impl Node {
    /// Node `n` of a network: its host is at 192.0.2.n and fd99::n, with default routes.
    pub(crate) fn new(n: u8, store: &MemorySubnets, clock: &Arc<TokioClock>) -> Self {
        crate::log::Log::install();
        let kernel = FakeKernel::new();
        let eth0 = kernel.add_uplink("eth0", format!("192.0.2.{n}/24").parse().unwrap()).unwrap();
        kernel.add_address("eth0", format!("fd99::{n:x}/64").parse().unwrap()).unwrap();
        add_defaults(&kernel, eth0);
        let name = format!("node-{n}");
        let store = store.for_node(ThisNode::named(NodeIdentity::new(&name).unwrap()));
        Self { name, kernel, store, clock: Arc::clone(clock) }
    }

    /// Node 200 in a network of its own, whose leases last for ever.
    pub(crate) fn alone() -> Self {
        let clock = Arc::new(TokioClock::new());
        Self::new(200, &MemorySubnets::with_ttl(config(), None, Arc::clone(&clock) as _), &clock)
    }

    /// The same node with peers of these numbers, and an agent that is ready.
    pub(crate) async fn ready_beside(peers: impl IntoIterator<Item = u8>) -> (Self, Agent) {
        let node = Self::alone();
        node.join(peers);
        let agent = node.run_ready().await;
        (node, agent)
    }

    /// Node 200 in a network of its own, whose leases last so long.
    pub(crate) fn with_ttl(ttl: Duration) -> Self {
        let clock = Arc::new(TokioClock::new());
        Self::new(200, &MemorySubnets::with_ttl(config(), Some(ttl), Arc::clone(&clock) as _), &clock)
    }

    /// The same node, known to the store by its address.
    pub(crate) fn known_by_address(self) -> Self {
        let name = self.name.replace("node-", "192.0.2.");
        Self { name, store: self.store.for_node(ThisNode::by_address()), ..self }
    }

    pub(crate) fn identity(&self) -> NodeIdentity {
        NodeIdentity::new(&self.name).unwrap()
    }

    pub(crate) fn key(&self) -> LeaseKey {
        LeaseKey::new(&self.name)
    }

    pub(crate) fn builder(&self) -> Builder {
        self.builder_with(Tunnel)
    }

    pub(crate) fn builder_with(&self, backend: impl Backend + Copy) -> Builder {
        Overlay::builder().backend("tunnel", move |_| Ok(backend)).clock(Arc::clone(&self.clock) as _)
    }

    pub(crate) fn run(&self) -> Agent {
        self.run_as(self.builder())
    }

    /// Starts an agent and waits until it is ready.
    pub(crate) async fn run_ready(&self) -> Agent {
        self.run().once_ready().await
    }

    pub(crate) fn run_as(&self, builder: Builder) -> Agent {
        self.run_as_over(builder, &self.store)
    }

    /// The same over another store.
    pub(crate) fn run_over(&self, store: &(impl SubnetManager + Clone)) -> Agent {
        self.run_as_over(self.builder(), store)
    }

    pub(crate) fn run_as_over(&self, builder: Builder, store: &(impl SubnetManager + Clone)) -> Agent {
        self.run_on(builder, Arc::new(self.kernel.clone()), Arc::new(store.clone()))
    }

    pub(crate) fn run_on(&self, builder: Builder, kernel: Arc<dyn Kernel>, store: Arc<dyn SubnetManager>) -> Agent {
        Agent::start(builder.build(store, kernel).unwrap(), PATIENCE)
    }

    /// An agent that does not run.
    pub(crate) fn overlay(&self) -> Overlay {
        self.builder().build(Arc::new(self.store.clone()), Arc::new(self.kernel.clone())).unwrap()
    }

    /// The record of this node in the store.
    pub(crate) fn record(&self) -> Option<Lease> {
        let record = self.store.records().into_iter().find(|record| record.key == self.key())?;
        record.lease.ok().map(Arc::unwrap_or_clone)
    }

    pub(crate) fn has_route(&self, prefix: Prefix) -> bool {
        !self.kernel.snapshot().matching(&format!("route {prefix} via")).is_empty()
    }

    /// Puts in the peers of these numbers.
    pub(crate) fn join(&self, numbers: impl IntoIterator<Item = u8>) {
        self.store.insert(numbers.into_iter().map(peer));
    }

    pub(crate) fn leave(&self, numbers: impl IntoIterator<Item = u8>) {
        numbers.into_iter().for_each(|n| assert!(self.store.delete(&peer(n).key)));
    }
}

/// Default routes as a host has them.
pub(crate) fn add_defaults(kernel: &FakeKernel, link: u32) {
    for (prefix, gateway) in [("0.0.0.0/0", "192.0.2.254"), ("::/0", "fd99::ff")] {
        let route = FakeRoute::via(prefix.parse().unwrap(), gateway.parse().unwrap(), link);
        // It may be there already: a test puts back what an act took.
        let _ = kernel.add_route(route, Placement::Exclusive);
    }
}

pub(crate) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        pass(0.05).await;
    }
}
