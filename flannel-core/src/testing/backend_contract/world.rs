//! The nodes of the checks: hosts on one link, each with a fake kernel and the backend under test.

use std::fmt;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::{Families, Harness};
use crate::backend::{Backend, LocalNode, NodeContext, Peer, Skip};
use crate::config::NetworkConfig;
use crate::kernel::{
    HostFacts, Kernel, KernelError, Link, LinkKind, LinkName, Object, PeerState, RouteSlot, Scope, State,
};
use crate::lease::{Lease, LeaseAttrs};
use crate::net::{Family, MacAddr, Mtu};
use crate::subnet::NodeIdentity;
use crate::testing::{FakeKernel, samples};

/// The other nodes of a check.
pub(super) const PEERS: std::ops::RangeInclusive<u8> = 2..=7;

const UPLINK: &str = "eth0";
/// Another link of node 1.
const SECOND: &str = "eth1";

/// How often a future of the fake kernel is polled: it never waits, but yields between its batches.
const POLLS: usize = 1000;

/// A network of some families, with the backend under test on every node.
pub(super) struct World<'a> {
    pub(super) harness: &'a dyn Harness,
    pub(super) config: NetworkConfig,
}

impl<'a> World<'a> {
    pub(super) fn new(harness: &'a dyn Harness, families: Families) -> Self {
        let families: Vec<_> = families.present().families().collect();
        Self { harness, config: samples::config(&families, harness.settings()) }
    }

    pub(super) fn families(&self) -> Vec<Family> {
        self.config.networks.families().collect()
    }

    pub(super) fn backend(&self, n: u8) -> Box<dyn Backend> {
        self.harness.backend(&self.config, n)
    }

    /// Creates a node with its lease, before anything is written.
    pub(super) fn node(&self, n: u8) -> Node {
        let kernel = host(n);
        let backend = self.backend(n);
        let mut context = self.context(n, &kernel);
        let attrs = advertised(&*backend, &context);
        let mut local = self.local(n, context.clone(), attrs);
        let externals = backend.devices(&local).into_iter().filter_map(|device| match device.kind {
            LinkKind::External(kind) => Some((device.name, kind)),
            LinkKind::Vxlan(_) | LinkKind::Tun(_) | LinkKind::Other(_) => None,
        });
        for (name, kind) in externals {
            let group = context.overlay.mark();
            let link = Link { name, kind: LinkKind::Other(kind), mac: None, mtu: 1500, up: true, group, alias: None };
            sure(kernel.add_link(link));
        }
        context.host = facts(&kernel);
        local.context = context;
        Node { kernel, backend, local, slots: self.harness.slots() }
    }

    pub(super) fn context(&self, n: u8, kernel: &FakeKernel) -> NodeContext {
        let mut context = samples::context(self.config.clone());
        let addrs = self.config.networks.map(|family, _| address(family, n));
        context.node = sure(NodeIdentity::new(&format!("node-{n}")));
        context.public = addrs;
        context.uplink.addrs = addrs;
        context.uplink.mtu = Mtu(1500);
        context.uplink.index = kernel.link_index(UPLINK).unwrap_or_default();
        context.host = facts(kernel);
        context
    }

    pub(super) fn local(&self, n: u8, context: NodeContext, attrs: LeaseAttrs) -> LocalNode {
        LocalNode { context, lease: Arc::new(Lease { attrs, ..samples::lease(n, &self.families(), "") }) }
    }

    /// Returns the lease that another node of this network has published.
    pub(super) fn peer(&self, n: u8) -> Peer {
        let node = self.node(n);
        Lease::clone(&node.local.lease)
    }

    pub(super) fn peers(&self) -> Vec<Peer> {
        PEERS.map(|n| self.peer(n)).collect()
    }
}

/// One node.
pub(super) struct Node {
    pub(super) kernel: FakeKernel,
    pub(super) backend: Box<dyn Backend>,
    pub(super) local: LocalNode,
    pub(super) slots: Vec<RouteSlot>,
}

impl Node {
    pub(super) fn scope(&self) -> Scope {
        self.local.scope(&*self.backend, &self.slots)
    }

    /// Returns the state of a peer in each family of the network.
    pub(super) fn states_of(&self, peer: &Peer) -> Vec<Result<PeerState, Skip>> {
        let families = self.local.context.config.networks.families();
        families.map(|family| self.backend.peer(&self.local, peer, family)).collect()
    }

    /// Returns the states of peers, one after the other.
    pub(super) fn states(&self, peers: &[Peer]) -> Vec<Result<PeerState, Skip>> {
        peers.iter().flat_map(|peer| self.states_of(peer)).collect()
    }

    /// Returns the whole wanted state, with the marks that the agent sets on devices.
    pub(super) fn wanted(&self, peers: &[Peer]) -> State {
        let mut wanted = self.backend.base(&self.local);
        for state in self.states(peers).iter().flatten() {
            wanted.add(state);
        }
        self.scope().mark(&mut wanted);
        wanted
    }
}

/// Returns what the backend publishes. It has to succeed on the hosts of the checks.
#[track_caller]
pub(super) fn advertised(backend: &dyn Backend, context: &NodeContext) -> LeaseAttrs {
    match backend.advertise(context) {
        Ok(attrs) => attrs,
        Err(error) => panic!("advertise: must be possible on a host with an address of each family: {error}"),
    }
}

/// Returns the address of a node: 2 to 4 are on the link of node 1, 5 and 6 on its second link, and others on neither.
fn address(family: Family, n: u8) -> IpAddr {
    match (n, family) {
        (1..=4, _) => samples::node_address(family, n),
        (5 | 6, Family::V4) => [198, 51, 100, n].into(),
        (5 | 6, Family::V6) => [0x2001, 0xdb8, 1, 0, 0, 0, 0, n.into()].into(),
        (_, Family::V4) => [203, 0, 113, n].into(),
        (_, Family::V6) => [0x2001, 0xdb8, 2, 0, 0, 0, 0, n.into()].into(),
    }
}

fn host(n: u8) -> FakeKernel {
    let kernel = FakeKernel::new();
    let mac = |link| MacAddr([0x52, 0x54, 0, 0, link, n]);
    for (name, mac) in [("lo", None), (UPLINK, Some(mac(0))), (SECOND, Some(mac(1)))] {
        let (name, kind) = (sure(LinkName::new(name)), LinkKind::Other("".into()));
        sure(kernel.add_link(Link { name, kind, mac, mtu: 1500, up: true, group: 0, alias: None }));
    }
    let mut texts = vec![(UPLINK, format!("{}/24", address(Family::V4, n)))];
    texts.push((UPLINK, format!("{}/64", address(Family::V6, n))));
    if n == 1 {
        texts.extend([(SECOND, "198.51.100.1/24".to_owned()), (SECOND, "2001:db8:1::1/64".to_owned())]);
    }
    for (link, text) in texts {
        sure(kernel.add_address(link, sure(text.parse())));
    }
    kernel
}

/// Returns the host facts that an agent would read.
pub(super) fn facts(kernel: &FakeKernel) -> Arc<HostFacts> {
    Arc::new(sure(now(kernel.host_facts(&[]))))
}

/// Returns the observed state in the scope.
pub(super) fn seen(kernel: &FakeKernel, scope: &Scope) -> State {
    sure::<_, KernelError>(now(kernel.observe(scope)))
}

/// Runs a future of the fake kernel, which never waits, inside or outside a runtime.
pub(super) fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(tokio::task::unconstrained(future));
    for _ in 0..POLLS {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
    panic!("the suite's own kernel does not answer")
}

/// Unwraps a value that the suite itself created.
#[track_caller]
pub(super) fn sure<T, E: fmt::Display>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the suite's own network: {error}"),
    }
}

/// Returns the objects of one peer.
pub(super) fn objects_of_peer(state: &PeerState) -> Vec<Object> {
    let mut whole = State::default();
    whole.add(state);
    objects(&whole)
}

/// Returns the objects of a state.
pub(super) fn objects(state: &State) -> Vec<Object> {
    let mut objects: Vec<_> = state.links.keys().map(|id| Object::Link(*id)).collect();
    objects.extend(state.addresses.keys().map(|key| Object::Address(*key)));
    objects.extend(state.fdb.keys().map(|key| Object::Fdb(*key)));
    objects.extend(state.neighbours.keys().map(|key| Object::Neighbour(*key)));
    objects.extend(state.forwards.keys().map(|key| Object::Forward(*key)));
    objects.extend(state.routes.keys().map(|key| Object::Route(key.prefix)));
    // The routes to one prefix are one object, and are adjacent.
    objects.dedup();
    objects
}
