//! A backend written outside the workspace's crates, over a device that its own program makes.

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{
    AddressKey, Device, Link, LinkId, LinkKind, LinkName, Object, OverlayName, PeerState, Route, RouteSlot, State,
};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Dual, Family, MacAddr, Mtu, Prefix};
use flannel_core::overlay::{Builder, Phase};
use flannel_core::testing::backend_contract::{self, Made};
use testkit::Families;
use testkit::sabotage::Plane;

use crate::support::{Cluster, config_with, parse};

const NAME: &str = "ext0";
const DEVICE: LinkId = LinkId::Own(0);

/// Routes through a device of the kind `tun` that somebody else makes.
#[derive(Debug, Clone, Copy)]
struct External;

impl External {
    fn kind() -> LinkKind {
        LinkKind::External("tun".into())
    }

    fn name() -> LinkName {
        LinkName::new(NAME).unwrap()
    }
}

impl Backend for External {
    fn name(&self) -> &'static str {
        "external"
    }

    fn wire_type(&self) -> &'static str {
        "external"
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, _local: &LocalNode) -> Vec<Device> {
        vec![Device::new(Self::name(), Self::kind())]
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        Some(context.uplink.mtu)
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        Ok(LeaseAttrs::new(context.public).with_backend("external", Dual::default()))
    }

    fn hardware_address(&self, _: &LeaseAttrs, _: Family) -> Result<Option<MacAddr>, Skip> {
        Ok(None)
    }

    fn base(&self, local: &LocalNode) -> State {
        let mut state = State::default();
        state.links.insert(DEVICE, Link::new(Self::name(), Self::kind(), local.context.uplink.mtu.0));
        for (_, subnet) in local.lease.subnets.iter() {
            let own = Prefix::host(subnet.addr());
            state.addresses.insert(AddressKey { link: DEVICE, addr: own.addr(), len: own.len() }, ());
        }
        state
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let network = local.context.config.networks.get(family);
        let subnet = network.and(peer.subnets.get(family)).ok_or(Skip::NoAddress(family))?;
        Ok(PeerState::default().with_route(*subnet, Route::overlay(*subnet, subnet.addr(), DEVICE)))
    }
}

#[test]
fn the_backend_contract_holds() {
    backend_contract::all(&Made::new(r#"{"Type":"external"}"#, |_| Ok(External)));
}

#[test]
fn a_backend_of_ones_own_manages_what_is_on_a_device_that_its_program_makes() {
    let mut cluster = Cluster::without_agents(1, Plane::HostGw, Families::V4);
    cluster.store.set_config(parse(&config_with(Families::V4, r#"{"Type":"external"}"#)));
    let peers: Vec<_> = (1..=3).map(|n| cluster.paper_peer(n)).collect();
    cluster.store.insert(peers.iter().cloned().map(|mut lease| {
        lease.attrs.backend_type = "external".into();
        lease
    }));
    let with_it = |builder: Builder| builder.backend("external", |_| Ok(External));
    let agent = cluster.agent(0).with(with_it);
    cluster.agents.push(agent.start());
    let ip = |args: &str| cluster.ns(0).ip(args).unwrap();
    let on_it = || {
        let routes = ip(&format!("route show dev {NAME}"));
        routes.lines().filter(|line| line.starts_with("10.244.")).count()
            + ip(&format!("-br address show dev {NAME} to 10.244.0.0/16")).lines().count()
    };
    let is_missing = |conflicts: &[flannel_core::plan::Conflict], found: &str| matches!(conflicts, [conflict] if conflict.object == Object::Link(DEVICE) && conflict.found.contains(found));
    // Nobody has made it yet: the status says what to do, and nothing is written.
    let waits = cluster.until(0, "waiting", |status| is_missing(&status.conflicts, "no such device"));
    assert!(
        !waits.phase.has_reached(Phase::Ready) && waits.conflicts[0].remedy.contains("ip link set dev ext0 group"),
        "{waits:?}"
    );

    // One that nobody marked is somebody else's, whatever its name.
    let make = || {
        ip(&format!("tuntap add dev {NAME} mode tun"));
        ip(&format!("link set {NAME} up"));
    };
    make();
    cluster.until(0, "somebody else's", |status| is_missing(&status.conflicts, "tun"));
    assert_eq!(on_it(), 0);

    // What its program puts on it is the program's.
    ip(&format!("address add 172.31.7.1/30 dev {NAME}"));
    let is_its_own_there = || ip(&format!("-br address show dev {NAME}")).contains("172.31.7.1");
    let mark = OverlayName::default().mark();
    ip(&format!("link set dev {NAME} group {mark}"));
    let ready = cluster.ready(0);
    cluster.converged(0);
    assert!(ready.conflicts.is_empty(), "{ready:?}");
    assert_eq!((on_it(), is_its_own_there()), (4, true));

    // Made anew, it has everything again at once.
    ip(&format!("link delete {NAME}"));
    cluster.until(0, "waiting again", |status| is_missing(&status.conflicts, "no such device"));
    make();
    ip(&format!("link set dev {NAME} group {mark}"));
    cluster.until(0, "ready again", |status| status.phase == Phase::Ready && status.conflicts.is_empty());
    cluster.converged(0);
    assert_eq!(on_it(), 4);

    // With the overlay goes what was written, and the device stays with what is its program's.
    ip(&format!("address add 172.31.7.1/30 dev {NAME}"));
    ip(&format!("link set {NAME} mtu 1234"));
    cluster.remove(0).unwrap();
    assert_nothing_but_the_device(&cluster);

    // After a crash, too.
    let agent = cluster.agent(0).with(with_it).start();
    cluster.agents[0] = agent;
    cluster.ready(0);
    cluster.converged(0);
    cluster.crash(0);
    let overlay = cluster.agent(0).with(with_it).build();
    cluster.block_on(overlay.remove()).unwrap();
    assert_nothing_but_the_device(&cluster);
}

/// What its program made is there, and nothing of the overlay.
fn assert_nothing_but_the_device(cluster: &Cluster) {
    let ip = |args: &str| cluster.ns(0).ip(args).unwrap();
    assert!(!ip(&format!("route show dev {NAME}")).contains("10.244."));
    let after = ip(&format!("-d -o link show dev {NAME}"));
    assert!(after.contains("mtu 1234"), "{after}");
    assert!(ip(&format!("-br address show dev {NAME}")).contains("172.31.7.1"));
    assert_eq!(ip(&format!("-br address show dev {NAME} to 10.244.0.0/16")), "");
}
