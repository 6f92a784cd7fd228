//! A cluster: nodes of a lab, an agent on each, one store in memory, and a pod behind each node.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel_backend_hostgw::HostGw;
use flannel_backend_udp::{Udp, UdpDataPlane};
use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::kernel::Route;
use flannel_core::lease::{Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use flannel_core::net::{Dual, Family, MacAddr, Mtu, Prefix};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{Builder, Overlay, OverlayError, Phase, Status, Teardown};
use flannel_core::subnet::{NodeIdentity, ThisNode};
use flannel_core::testing::MemorySubnets;
use testkit::probe::{self, Flow};
use testkit::sabotage::{self, Plane};
use testkit::{Agent, Families, Namespace, Node, Pod, PodNet, Underlay};
use tokio::runtime::Runtime;

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The rate of flows that must not lose anything, in packets a second.
pub(crate) const RATE: u32 = 1000;

/// The metric of the UDP backend's routes.
const UDP_METRIC: u32 = 8285;

/// The network's configuration.
pub(crate) fn config(plane: Plane, families: Families) -> String {
    config_with(families, &format!(r#"{{"Type":"{}"}}"#, kind(plane)))
}

/// The same with a `Backend` object of one's own.
pub(crate) fn config_with(families: Families, backend: &str) -> String {
    let v4 = match families.has(Family::V4) {
        true => r#""Network":"10.244.0.0/16","SubnetLen":24"#,
        false => r#""EnableIPv4":false"#,
    };
    let v6 = match families.has(Family::V6) {
        true => r#","EnableIPv6":true,"IPv6Network":"fd00:244::/48","IPv6SubnetLen":64"#,
        false => "",
    };
    format!(r#"{{{v4}{v6},"Backend":{backend}}}"#)
}

pub(crate) fn parse(config: &str) -> NetworkConfig {
    NetworkConfig::parse(config.as_bytes(), Allocation::Pool).expect("the test's configuration is valid")
}

pub(crate) fn kind(plane: Plane) -> &'static str {
    match plane {
        Plane::Vxlan => "vxlan",
        Plane::HostGw => "host-gw",
        Plane::Udp => "udp",
    }
}

pub(crate) fn families_of(families: Families) -> impl Iterator<Item = Family> {
    Family::BOTH.into_iter().filter(move |family| families.has(*family))
}

/// Nodes, their agents and their pods.
pub(crate) struct Cluster {
    pub(crate) plane: Plane,
    pub(crate) families: Families,
    pub(crate) store: MemorySubnets,
    pub(crate) agents: Vec<Agent>,
    pub(crate) pods: Vec<Pod>,
    pub(crate) underlay: Underlay,
    runtime: Runtime,
}

impl Cluster {
    /// As many nodes, with an agent that is ready and a pod on each.
    pub(crate) fn start(nodes: usize, plane: Plane, families: Families) -> Self {
        let mut cluster = Self::without_agents(nodes, plane, families);
        cluster.start_all();
        cluster
    }

    /// Starts an agent and a pod on each node.
    pub(crate) fn start_all(&mut self) {
        for nth in 0..self.underlay.nodes().len() {
            let agent = self.agent(nth).start();
            self.agents.push(agent);
        }
        for nth in 0..self.agents.len() {
            self.ready(nth);
            self.attach_pod(nth);
        }
        self.settle();
    }

    /// The nodes and the store alone.
    pub(crate) fn without_agents(nodes: usize, plane: Plane, families: Families) -> Self {
        let underlay = Underlay::new(nodes, families).expect("the lab needs root, or: unshare -Urn cargo test");
        let store = MemorySubnets::new(parse(&config(plane, families)));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { plane, families, store, agents: Vec::new(), pods: Vec::new(), underlay, runtime }
    }

    pub(crate) fn node(&self, nth: usize) -> &Node {
        &self.underlay.nodes()[nth]
    }

    pub(crate) fn ns(&self, nth: usize) -> &Namespace {
        &self.node(nth).ns
    }

    /// An agent to be started on a node.
    pub(crate) fn agent(&self, nth: usize) -> Launch<'_> {
        let node = NodeIdentity::new(&format!("node-{}", nth + 1)).unwrap();
        // Audits by the clock alone would hide a hint that is missing.
        let builder = Overlay::builder()
            .backend("vxlan", Vxlan::new)
            .backend("host-gw", |_| Ok(HostGw))
            .backend("udp", Udp::new)
            .audit_every(Duration::from_secs(600));
        Launch { cluster: self, nth, builder, store: self.store.for_node(ThisNode::named(node)) }
    }

    /// Starts another agent on a node in the place of one that has ended.
    pub(crate) fn restart(&mut self, nth: usize) {
        self.agents[nth] = self.agent(nth).start();
        self.ready(nth);
    }

    /// Waits until an agent is ready.
    pub(crate) fn ready(&self, nth: usize) -> Status {
        self.until(nth, "ready", |status| status.phase.has_reached(Phase::Ready))
    }

    /// Waits for a status of an agent.
    pub(crate) fn until(&self, nth: usize, what: &str, reached: impl Fn(&Status) -> bool) -> Status {
        self.wait(&self.agents[nth], what, reached)
    }

    pub(crate) fn wait(&self, agent: &Agent, what: &str, reached: impl Fn(&Status) -> bool) -> Status {
        self.block_on(agent.try_until(reached)).unwrap_or_else(|status| panic!("not {what}: {status}"))
    }

    pub(crate) fn status(&self, nth: usize) -> Status {
        self.agents[nth].status()
    }

    /// Waits until every agent has every other as a peer and nothing left to write.
    pub(crate) fn settle(&self) {
        let others = self.store.records().len() - 1;
        for nth in 0..self.agents.len() {
            let all = |status: &Status| status.peers.accepted + status.peers.quarantined == others;
            self.until(nth, "ready with all peers", |status| status.phase == Phase::Ready && all(status));
            self.converged(nth);
        }
    }

    /// Waits until the next audit of an agent would write nothing; how long that took.
    pub(crate) fn converged(&self, nth: usize) -> Duration {
        let started = Instant::now();
        loop {
            let preview = self.preview(nth);
            if preview.plan.ops.is_empty() {
                return started.elapsed();
            }
            if started.elapsed() > PATIENCE {
                panic!("node {nth} would still write:\n{preview}\n{:?}", self.status(nth));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The kernel is exactly as wanted, now.
    #[track_caller]
    pub(crate) fn assert_converged(&self, nth: usize) {
        let preview = self.preview(nth);
        assert!(preview.plan.ops.is_empty(), "node {nth} would write:\n{preview}");
    }

    pub(crate) fn preview(&self, nth: usize) -> flannel_core::overlay::Preview {
        self.block_on(self.agents[nth].handle.plan()).expect("a plan")
    }

    /// Ends an agent in order.
    pub(crate) fn stop(&self, nth: usize) -> Result<(), OverlayError> {
        self.block_on(self.agents[nth].cancelled())
    }

    /// Ends an agent in order, and has it remove what is its own.
    pub(crate) fn remove(&self, nth: usize) -> Result<(), OverlayError> {
        self.block_on(self.agents[nth].removed())
    }

    /// Ends an agent as a crash would: its future is dropped wherever it is.
    pub(crate) fn crash(&self, nth: usize) {
        assert!(self.block_on(self.agents[nth].killed()));
    }

    /// How an agent ended that was not told to.
    pub(crate) fn outcome(&self, agent: Agent) -> Result<(), OverlayError> {
        self.block_on(agent.ended())
    }

    /// Where the agents run: one worker for all of a cluster.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// The pod behind a node, as its lease and status say.
    pub(crate) fn attach_pod(&mut self, nth: usize) {
        let status = self.status(nth);
        let lease = status.lease.expect("a lease");
        let pod = self.node(nth).attach_pod(&PodNet { subnets: lease.subnets, mtu: status.mtu.expect("an MTU") });
        self.pods.insert(nth, pod.unwrap());
    }

    pub(crate) fn lease(&self, nth: usize) -> Arc<Lease> {
        self.status(nth).lease.expect("a lease")
    }

    /// Waits for traffic between two pods, in each family; the longest time it took.
    #[track_caller]
    pub(crate) fn assert_traffic(&self, from: usize, to: usize) -> Duration {
        let reply = |family| {
            probe::until_reply(&self.pods[from].ns, self.pods[to].addr(family).unwrap(), PATIENCE).unwrap_or_else(
                |error| {
                    panic!("{error}\n{}", self.show(from));
                },
            )
        };
        families_of(self.families).map(reply).max().unwrap_or_default()
    }

    /// What the kernel of a node says, for messages.
    pub(crate) fn show(&self, nth: usize) -> String {
        use testkit::Listing::{Addresses, Fdb, Neighbours, Routes};
        [Addresses, Routes(Family::V4), Routes(Family::V6), Neighbours, Fdb]
            .into_iter()
            .map(|listing| self.ns(nth).show(listing).unwrap_or_else(|error| error.to_string()))
            .chain([format!("{:#?}", self.status(nth))])
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// A stream from one pod to another that is under way.
    pub(crate) fn flow(&self, from: usize, to: usize) -> Flow {
        let family = families_of(self.families).next().unwrap();
        let flow = Flow::start(&self.pods[from].ns, &self.pods[to].ns, self.pods[to].addr(family).unwrap(), RATE);
        let flow = flow.unwrap();
        self.run_on(&flow);
        flow
    }

    /// Lets a stream go on for a while.
    pub(crate) fn run_on(&self, flow: &Flow) {
        let sent = flow.sent();
        testkit::wait_until("datagrams", PATIENCE, || Ok(flow.sent() >= sent + u64::from(RATE) / 5)).unwrap();
    }

    /// The devices of the overlay, and its networks, as a saboteur sees them.
    pub(crate) fn target(&self) -> sabotage::Overlay {
        sabotage::Overlay {
            devices: self.devices(),
            networks: parse(&config(self.plane, self.families)).networks.map(|_, it| it.prefix),
        }
    }

    pub(crate) fn devices(&self) -> Vec<String> {
        match self.plane {
            Plane::Vxlan => families_of(self.families).map(|family| device(family).to_owned()).collect(),
            Plane::HostGw => Vec::new(),
            Plane::Udp => vec!["flannel0".to_owned()],
        }
    }

    /// The peers' prefixes on a node.
    pub(crate) fn peer_prefixes(&self, nth: usize) -> Vec<Prefix> {
        let peers = self.block_on(self.agents[nth].handle.peers()).unwrap();
        peers.iter().flat_map(|peer| peer.subnets.iter().map(|(_, prefix)| *prefix).collect::<Vec<_>>()).collect()
    }

    /// What the overlay has in the kernel of a node, read without any code of the agent's. A device that was made anew
    /// differs in its index alone, which is not told.
    pub(crate) fn objects(&self, nth: usize) -> Objects {
        objects(self.ns(nth), &self.devices(), &self.target().networks)
    }

    /// A peer without a node, as its lease would be. `n` from 1.
    pub(crate) fn paper_peer(&self, n: u8) -> Lease {
        let families = self.target().networks.map(|_, _| ());
        let mac = MacAddr([0x02, 0xfe, 0, 0, 0, n]);
        let data = || Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac.to_string()))]);
        let text = |family| match family {
            Family::V4 => (format!("10.244.{n}.0/24"), format!("10.89.200.{n}")),
            Family::V6 => (format!("fd00:244:0:{n:x}::/64"), format!("fd00:89::c8:{n:x}")),
        };
        let data = match self.plane {
            Plane::Vxlan => families.map(|_, ()| data()),
            Plane::HostGw | Plane::Udp => Dual::default(),
        };
        let attrs = LeaseAttrs::new(families.map(|family, ()| text(family).1.parse().unwrap()));
        let subnets = families.map(|family, ()| text(family).0.parse().unwrap());
        let key = LeaseKey::new(&format!("paper-{n:03}"));
        let kind = if self.plane == Plane::Udp { "" } else { kind(self.plane) };
        Lease::new(key, subnets, attrs.with_backend(kind, data))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for agent in &self.agents {
            agent.stop(Teardown::Keep);
        }
    }
}

pub(crate) fn device(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel.1",
        Family::V6 => "flannel-v6.1",
    }
}

/// An agent to be started.
pub(crate) struct Launch<'a> {
    cluster: &'a Cluster,
    nth: usize,
    builder: Builder,
    store: MemorySubnets,
}

impl Launch<'_> {
    pub(crate) fn with(mut self, change: impl FnOnce(Builder) -> Builder) -> Self {
        self.builder = change(self.builder);
        self
    }

    pub(crate) fn store(mut self, store: &MemorySubnets) -> Self {
        self.store = store.clone();
        self
    }

    pub(crate) fn start(self) -> Agent {
        let cluster = self.cluster;
        let overlay = self.build();
        let _inside = cluster.runtime.enter();
        Agent::start(overlay, PATIENCE)
    }

    /// The overlay of an agent that does not run.
    pub(crate) fn build(self) -> Overlay {
        // One that is being forked may still hold the claim of the agent before.
        drop(testkit::hold_commands());
        let namespace: OwnedFd = self.cluster.ns(self.nth).as_fd().try_clone_to_owned().unwrap();
        let kernel = NetlinkKernel::in_namespace(namespace).unwrap();
        let kernel = Arc::new(kernel.with_data_plane(UdpDataPlane::new()).unwrap());
        self.builder.build(Arc::new(self.store), kernel).unwrap()
    }
}

/// An overlay's objects in one kernel, as text: devices and what is on them, and routes inside its networks that have
/// a protocol of ours.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Objects(pub(crate) BTreeSet<String>);

pub(crate) fn objects(ns: &Namespace, devices: &[String], networks: &Dual<Prefix>) -> Objects {
    let mut found = BTreeSet::new();
    for link in ns.links().unwrap().iter().filter(|link| devices.contains(&link.name)) {
        let up = link.is_up();
        found.insert(format!(
            "link {} mac {:?} mtu {} up {up} group {:#x} alias {:?} {:?}",
            link.name, link.mac, link.mtu, link.group, link.alias, link.vxlan
        ));
    }
    for address in ns.addresses().unwrap().iter().filter(|it| devices.contains(&it.dev) && !it.is_link_local()) {
        found.insert(format!("address {}/{} dev {}", address.addr, address.len, address.dev));
    }
    for entry in ns.neighbours().unwrap().iter().filter(|it| devices.contains(&it.dev) && it.is_permanent()) {
        found.insert(format!("neighbour {entry}"));
    }
    for entry in ns.fdb().unwrap().iter().filter(|it| devices.contains(&it.dev) && it.dst.is_some()) {
        found.insert(format!("fdb {entry}"));
    }
    let ours = Route::FIRST_PROTOCOL..Route::FIRST_PROTOCOL + Route::PROTOCOLS;
    for (family, network) in networks.iter() {
        for route in ns.routes(family).unwrap() {
            let metric = if family == Family::V4 { 0 } else { 1024 };
            let has_metric = [metric, UDP_METRIC].contains(&route.metric);
            let inside = route.table == testkit::Route::MAIN && has_metric && network.covers(&route.to);
            if inside && ours.contains(&route.protocol) {
                // A lower device without carrier is the underlay's affair.
                let flags = route.is_onlink();
                found.insert(format!(
                    "route {} via {:?} dev {:?} protocol {} onlink {flags}",
                    route.to, route.via, route.dev, route.protocol
                ));
            }
        }
    }
    Objects(found)
}

/// Ends a stream and asserts that every packet arrived.
#[track_caller]
pub(crate) fn assert_no_loss(flow: Flow) {
    let report = flow.stop().unwrap();
    assert_eq!((report.lost, report.refused), (0, 0), "{report:?}");
    assert!(report.received > 0, "{report:?}");
}

/// The MTU of pods on an underlay of 1500.
pub(crate) fn pod_mtu(plane: Plane, families: Families) -> Mtu {
    match (plane, families) {
        (Plane::HostGw, _) => Mtu(1500),
        (Plane::Udp, Families::V4) => Mtu(1472),
        (Plane::Udp, Families::V6 | Families::Dual) => Mtu(1452),
        (Plane::Vxlan, Families::V4) => Mtu(1450),
        (Plane::Vxlan, Families::V6 | Families::Dual) => Mtu(1430),
    }
}
