//! A network namespace for one test, and an overlay in it.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use flannel_core::kernel::{
    AddressKey, ApplyReport, Device, FdbKey, Kernel, Link, LinkId, LinkKind, LinkName, NeighbourKey, OverlayName,
    PeerState, Route, Scope, State, Vxlan,
};
use flannel_core::net::{Dual, Family, MacAddr, Prefix, Vni};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::plan::{Plan, plan};
use testkit::Namespace;

/// How long anything that must happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) const V4: Dual<()> = Dual { v4: Some(()), v6: None };
pub(crate) const V6: Dual<()> = Dual { v4: None, v6: Some(()) };
pub(crate) const DUAL: Dual<()> = Dual { v4: Some(()), v6: Some(()) };

/// Runs a test in a new network namespace, which has an uplink `up0` and is gone with it.
pub(crate) fn in_lab<F: Future<Output = ()>>(test: impl FnOnce(Lab) -> F + Send + 'static) {
    let ns = Namespace::with_uplink("lab", "up0", &["192.0.2.1/24", "2001:db8::1/64"]).unwrap();
    let inside = ns.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let lab = Lab { kernel: NetlinkKernel::new().unwrap() };
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), test(lab)).await.expect("in time") });
    });
    inside.unwrap();
}

/// Runs a test in a namespace with an overlay that is as wanted, with as many peers in each family.
pub(crate) fn in_overlay<F: Future<Output = ()>>(
    families: Dual<()>,
    peers: u32,
    test: impl FnOnce(Lab, Overlay) -> F + Send + 'static,
) {
    in_lab(async move |lab| {
        let overlay = Overlay::vxlan(families, peers);
        lab.converge(&overlay).await;
        test(lab, overlay).await;
    });
}

fn here() -> Namespace {
    Namespace::current("lab").unwrap()
}

/// Runs `ip` in the namespace of the calling thread.
pub(crate) fn ip(args: &str) -> String {
    here().ip(args).unwrap()
}

/// Runs `bridge` in the namespace of the calling thread.
pub(crate) fn bridge(args: &str) -> String {
    here().bridge(args).unwrap()
}

pub(crate) fn index_of(name: &str) -> u32 {
    here().index_of(name).unwrap()
}

pub(crate) struct Lab {
    pub(crate) kernel: NetlinkKernel,
}

impl Lab {
    /// Plans an audit from what is there.
    pub(crate) async fn plan(&self, overlay: &Overlay) -> Plan {
        let seen = self.kernel.observe(&overlay.scope).await.unwrap();
        plan(&overlay.wanted, &seen, &overlay.scope, &|_| None)
    }

    /// One audit.
    pub(crate) async fn audit(&self, overlay: &Overlay) -> ApplyReport {
        let plan = self.plan(overlay).await;
        self.kernel.apply(&overlay.scope, Arc::new(plan.ops)).await
    }

    /// One audit that must do all it wants.
    pub(crate) async fn converge(&self, overlay: &Overlay) {
        let report = self.audit(overlay).await;
        assert!(report.is_complete(), "{report:?}");
        self.assert_converged(overlay).await;
    }

    pub(crate) async fn assert_converged(&self, overlay: &Overlay) {
        let plan = self.plan(overlay).await;
        assert_eq!(plan, Plan::default());
    }
}

/// What is wanted, and where.
#[derive(Clone)]
pub(crate) struct Overlay {
    pub(crate) scope: Scope,
    pub(crate) wanted: State,
}

impl Overlay {
    /// A VXLAN overlay with as many peers in each family. Run it in the lab's thread.
    pub(crate) fn vxlan(families: Dual<()>, peers: u32) -> Self {
        let name = OverlayName::default();
        let networks = families.map(|family, ()| match family {
            Family::V4 => "10.0.0.0/8".parse().unwrap(),
            Family::V6 => "fd00::/32".parse().unwrap(),
        });
        let mut wanted = State::default();
        let mut devices = Vec::new();
        for (slot, family) in (0u8..).zip(families.families()) {
            let link = vxlan_device(&name, family);
            devices.push(Device::of(&link));
            let own = LinkId::Own(slot);
            wanted.links.insert(own, link);
            let prefix = subnet(family, 0);
            wanted.addresses.insert(AddressKey { link: own, addr: prefix.addr(), len: family.bits() }, ());
            for n in 1..=peers {
                wanted.add(&peer(family, own, n));
            }
        }
        let mut scope = Scope::new(name, networks);
        (scope.devices, scope.uplink) = (devices, Some(index_of("up0")));
        Self { scope, wanted }
    }

    /// The same with no peers.
    pub(crate) fn without_peers(&self) -> Self {
        let mut bare = self.clone();
        bare.wanted.fdb.clear();
        bare.wanted.neighbours.clear();
        bare.wanted.routes.clear();
        bare
    }
}

pub(crate) fn device_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel.1",
        Family::V6 => "flannel-v6.1",
    }
}

fn vxlan_device(overlay: &OverlayName, family: Family) -> Link {
    let (last, local, mtu): (u8, IpAddr, u32) = match family {
        Family::V4 => (4, "192.0.2.1".parse().unwrap(), 1450),
        Family::V6 => (6, "2001:db8::1".parse().unwrap(), 1430),
    };
    let mut vxlan = Vxlan::new(Vni::ONE);
    (vxlan.local, vxlan.lower) = (Some(local), Some(LinkId::Uplink));
    let mut link = Link::new(LinkName::new(device_name(family)).unwrap(), LinkKind::Vxlan(vxlan), mtu);
    link.mac = Some(MacAddr([2, 0, 0, 0, 0, last]));
    (link.group, link.alias) = (overlay.mark(), Some(overlay.alias().into()));
    link
}

/// The subnet of the n-th node.
pub(crate) fn subnet(family: Family, n: u32) -> Prefix {
    match family {
        Family::V4 => Prefix::new(Ipv4Addr::from(0x0a00_0000 + (n << 8)).into(), 24).unwrap(),
        Family::V6 => Prefix::new(Ipv6Addr::from((0xfd00_u128 << 112) + (u128::from(n) << 64)).into(), 64).unwrap(),
    }
}

/// The n-th peer.
pub(crate) fn peer(family: Family, device: LinkId, n: u32) -> PeerState {
    let prefix = subnet(family, n);
    let gateway = prefix.addr();
    let [_, a, b, c] = n.to_be_bytes();
    let mac = MacAddr([2, if family == Family::V4 { 4 } else { 6 }, 0, a, b, c]);
    let dst = match family {
        Family::V4 => Ipv4Addr::from(0xac10_0000 + n).into(),
        Family::V6 => Ipv6Addr::from((0x2001_0db8_u128 << 96) + 0x1_0000 + u128::from(n)).into(),
    };
    PeerState::default()
        .with_fdb(FdbKey { link: device, mac, nth: 0 }, dst)
        .with_neighbour(NeighbourKey { link: device, addr: gateway }, mac)
        .with_route(prefix, Route::overlay(prefix, gateway, device))
}
