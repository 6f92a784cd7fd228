//! Every place where something can be wrong, and how it is made wrong.

use std::net::IpAddr;

use flannel_core::backend::{Backend, LocalNode};
use flannel_core::kernel::{AddressKey, FdbKey, LinkId, LinkPart, NeighbourKey, Object, Route, RouteKey, RouteKind};
use flannel_core::net::{Family, MacAddr, Mtu, Prefix};
use flannel_core::overlay::Builder;
use flannel_core::testing::fake_kernel::{FakeRoute, Nud, Placement};
use flannel_core::testing::{FakeKernel, attributes};

use crate::altered::Altered;
use crate::gateway::Gateway;
use crate::node::{Node, add_defaults, public, subnet};
use crate::tunnel::{DEVICES, Tunnel, mac_of};

/// The peer whose objects are fought over, and the one beside it.
pub(super) const VICTIM: u8 = 1;
pub(super) const BYSTANDER: u8 = 2;

/// A place where something can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spot {
    Device,
    Part(LinkPart),
    Address,
    ExtraAddress,
    Fdb,
    FdbDestination,
    ExtraFdb,
    Neighbour,
    NeighbourMac,
    ExtraNeighbour,
    Route(RoutePart),
    ExtraRoute,
    Blackhole,
}

/// What can be wrong with a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RoutePart {
    /// It is gone.
    Whole,
    Kind,
    Gateway,
    Device,
    Onlink,
    Protocol,
    Source,
}

impl RoutePart {
    const ALL: [Self; 7] =
        [Self::Whole, Self::Kind, Self::Gateway, Self::Device, Self::Onlink, Self::Protocol, Self::Source];
}

// Whoever adds an attribute finds here that it needs a spot.
const _: () = assert!(attributes::ROUTE.len() == 7 && attributes::LINK.len() == 7 && attributes::VXLAN.len() == 8);

/// Every way in which an object of this kind can be wrong.
fn spots(object: &Object) -> Vec<Spot> {
    match object {
        Object::Link(_) => vec![Spot::Device],
        Object::LinkPart(_, part) => vec![Spot::Part(*part)],
        Object::Address(_) => vec![Spot::Address, Spot::ExtraAddress],
        Object::Fdb(_) => vec![Spot::Fdb, Spot::FdbDestination, Spot::ExtraFdb],
        Object::Neighbour(_) => vec![Spot::Neighbour, Spot::NeighbourMac, Spot::ExtraNeighbour],
        // Only this process writes what its data plane holds.
        Object::Forward(_) => Vec::new(),
        Object::Route(_) => [&RoutePart::ALL.map(Spot::Route)[..], &[Spot::ExtraRoute, Spot::Blackhole]].concat(),
    }
}

/// How peers are reached, which decides what there is to fight over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    /// Through a device of the overlay.
    Tunnel,
    /// As gateways on the node's own link.
    Gateway,
}

impl Plane {
    pub(super) const BOTH: [Self; 2] = [Self::Tunnel, Self::Gateway];

    pub(super) fn spots(self) -> Vec<Spot> {
        match self {
            Self::Tunnel => every_spot(),
            Self::Gateway => spots(&Object::Route(subnet(1))),
        }
    }

    pub(super) fn builder(self, node: &Node) -> Builder {
        match self {
            Self::Tunnel => node.builder_with(with_blackhole(Tunnel)),
            Self::Gateway => node.builder_with(with_blackhole(Gateway::OrNothing)),
        }
    }
}

fn every_spot() -> Vec<Spot> {
    let link = LinkId::Own(0);
    // No data plane carries packets of a VXLAN device.
    let parts = LinkPart::ALL.into_iter().filter(|part| *part != LinkPart::Tunnel);
    let parts: Vec<_> = parts.map(|part| Object::LinkPart(link, part)).collect();
    let others = [
        Object::Link(link),
        Object::Address(AddressKey { link, addr: subnet(1).addr(), len: 32 }),
        Object::Fdb(FdbKey { link, mac: MacAddr([2; 6]), nth: 0 }),
        Object::Neighbour(NeighbourKey { link, addr: subnet(1).addr() }),
        Object::Route(subnet(1)),
    ];
    parts.iter().chain(&others).flat_map(spots).collect()
}

/// The kernel of a node in the midst of trouble.
#[derive(Clone)]
pub(super) struct Scene {
    pub(super) kernel: FakeKernel,
    /// The node's own subnet.
    pub(super) own: Prefix,
    pub(super) plane: Plane,
}

impl Scene {
    /// The name of the device that routes lead through now.
    fn device(&self) -> &'static str {
        match self.plane {
            Plane::Gateway => "eth0",
            Plane::Tunnel if self.kernel.link_index(RENAMED).is_some() => RENAMED,
            Plane::Tunnel => DEVICES[0],
        }
    }

    /// Another device through which the kernel takes routes to this gateway.
    fn other_device(&self, gateway: IpAddr) -> Option<u32> {
        if self.plane == Plane::Tunnel {
            return self.kernel.link_index("eth0");
        }
        // It may be there already.
        let _ = self.kernel.add_uplink(OTHER, "203.0.113.1/24".parse().unwrap());
        let link = self.kernel.link_index(OTHER)?;
        let link_wide = Prefix::masked(gateway, 24).unwrap();
        let route = FakeRoute { gateway: None, metric: 100, ..FakeRoute::via(link_wide, gateway, link) };
        let _ = self.kernel.add_route(route, Placement::Exclusive);
        Some(link)
    }

    /// The next hop to a peer.
    fn gateway(&self, number: u8) -> IpAddr {
        match self.plane {
            Plane::Tunnel => subnet(number).addr(),
            Plane::Gateway => public(Family::V4, number),
        }
    }

    /// The object that is written to mend a spot.
    pub(super) fn object(&self, spot: Spot, number: u8) -> Object {
        let link = LinkId::Own(0);
        match spot {
            Spot::Device => Object::Link(link),
            Spot::Part(part) => Object::LinkPart(link, part),
            Spot::Address => Object::Address(AddressKey { link, addr: self.own.addr(), len: 32 }),
            Spot::ExtraAddress => Object::Address(AddressKey { link, addr: extra(number).addr(), len: 32 }),
            Spot::Fdb | Spot::FdbDestination => Object::Fdb(FdbKey { link, mac: mac(number), nth: 0 }),
            Spot::ExtraFdb => Object::Fdb(FdbKey { link, mac: stale(number), nth: 0 }),
            Spot::Neighbour | Spot::NeighbourMac => {
                Object::Neighbour(NeighbourKey { link, addr: subnet(number).addr() })
            }
            Spot::ExtraNeighbour => Object::Neighbour(NeighbourKey { link, addr: alone(number) }),
            Spot::Route(_) => Object::Route(subnet(number)),
            Spot::ExtraRoute => Object::Route(extra(number)),
            Spot::Blackhole => Object::Route(self.own),
        }
    }

    /// Makes it wrong, for the `time`th time. An act that the kernel refuses is none.
    pub(super) fn spoil(&self, spot: Spot, number: u8, time: usize) {
        let (kernel, device) = (&self.kernel, self.device());
        let at = public(Family::V4, number);
        let _ = match spot {
            Spot::Device => kernel.delete_link(device),
            Spot::Part(LinkPart::Name) => kernel.rename_link(device, RENAMED),
            Spot::Part(LinkPart::Mtu) => kernel.set_mtu(device, Mtu(1300)),
            Spot::Part(LinkPart::Mac) => kernel.set_mac(device, MacAddr([2, 1, 1, 1, 1, 1])),
            Spot::Part(LinkPart::Mark) => {
                let (mark, alias) = (0x666b_a808, Some("flannelkit:flannel"));
                let marks = [(0, alias), (5, alias), (mark, None), (mark, Some("mine")), (0, None)];
                let (group, alias) = marks[time % marks.len()];
                kernel.mark_link(device, group, alias)
            }
            Spot::Part(LinkPart::Learning) => kernel.set_learning(device, true),
            Spot::Part(LinkPart::Remote) => kernel.set_remote(device, Some(public(Family::V4, 88))),
            Spot::Part(LinkPart::State) if self.is_right(spot, number) => kernel.link_down(device),
            Spot::Part(LinkPart::State | LinkPart::Tunnel) => Ok(()),
            Spot::Address => kernel.remove_address(device, format!("{}/32", self.own.addr()).parse().unwrap()),
            Spot::ExtraAddress => kernel.add_address(device, format!("{}/32", extra(number).addr()).parse().unwrap()),
            Spot::Fdb => kernel.delete_fdb(device, mac(number), at),
            Spot::FdbDestination => kernel.put_fdb(device, mac(number), public(Family::V4, 77), Nud::Permanent),
            Spot::ExtraFdb => kernel.put_fdb(device, stale(number), at, Nud::Permanent),
            Spot::Neighbour => kernel.delete_neighbour(device, subnet(number).addr()),
            Spot::NeighbourMac => {
                kernel.put_neighbour(device, subnet(number).addr(), MacAddr([2, 9, 9, 9, 9, 9]), Nud::Permanent)
            }
            Spot::ExtraNeighbour => kernel.put_neighbour(device, alone(number), mac(number), Nud::Permanent),
            Spot::Route(RoutePart::Whole) if number != VICTIM => {
                // The bystander's goes with all others.
                self.flush_routes();
                Ok(())
            }
            Spot::Route(part) => self.spoil_route(part, number),
            Spot::ExtraRoute => {
                let via = Some(self.gateway(100 + number));
                let stale = FakeRoute { prefix: extra(number), gateway: via, protocol: 210, ..self.route(number) };
                kernel.add_route(stale, Placement::Exclusive)
            }
            Spot::Blackhole => kernel.delete_route(&self.blackhole()),
        };
    }

    fn spoil_route(&self, part: RoutePart, number: u8) -> Result<(), flannel_core::kernel::KernelError> {
        let (kernel, gateway) = (&self.kernel, self.gateway(number));
        let link = kernel.link_index(self.device()).unwrap_or(0);
        let ours = FakeRoute { protocol: 210, ..self.route(number) };
        let route = match part {
            RoutePart::Whole => return kernel.delete_route(&self.route(number)),
            RoutePart::Kind => FakeRoute { kind: RouteKind::Blackhole, gateway: None, link: None, ..ours },
            RoutePart::Gateway => FakeRoute { gateway: Some(self.gateway(100 + number)), ..ours },
            RoutePart::Device => FakeRoute { link: self.other_device(gateway), ..ours },
            RoutePart::Onlink if self.plane == Plane::Gateway => FakeRoute { onlink: true, ..ours },
            RoutePart::Onlink => {
                let near = FakeRoute { protocol: 4, ..FakeRoute::via(Prefix::host(gateway), gateway, link) };
                let _ = kernel.add_route(FakeRoute { gateway: None, ..near }, Placement::Exclusive);
                FakeRoute { onlink: false, ..ours }
            }
            RoutePart::Protocol => FakeRoute { protocol: 4, ..ours },
            RoutePart::Source => FakeRoute { source: Some("192.0.2.200".parse().unwrap()), ..ours },
        };
        kernel.add_route(route, Placement::Replace)
    }

    /// Flushes the main table. Whoever does so has to give the host its own routes back.
    fn flush_routes(&self) {
        self.kernel.flush_routes(Family::V4);
        self.kernel.link_up("eth0").unwrap();
        let _ = self.kernel.link_up(OTHER);
        add_defaults(&self.kernel, self.kernel.link_index("eth0").unwrap());
    }

    pub(super) fn route(&self, number: u8) -> FakeRoute {
        let link = self.kernel.link_index(self.device()).unwrap_or(0);
        let route = FakeRoute::via(subnet(number), self.gateway(number), link);
        let onlink = self.plane == Plane::Tunnel;
        FakeRoute { onlink, protocol: Route::protocol_for(&subnet(number)), ..route }
    }

    fn blackhole(&self) -> FakeRoute {
        let protocol = Route::protocol_for(&self.own);
        let route = FakeRoute::via(self.own, self.own.addr(), 0);
        FakeRoute { kind: RouteKind::Blackhole, gateway: None, link: None, protocol, ..route }
    }

    pub(super) fn is_right(&self, spot: Spot, number: u8) -> bool {
        let (snapshot, device) = (self.kernel.snapshot(), self.device());
        let has = |text: &str| !snapshot.matching(text).is_empty();
        let link = |part: &str| snapshot.matching(&format!(": {device} ")).iter().any(|line| line.contains(part));
        match spot {
            Spot::Device => link(""),
            Spot::Part(LinkPart::Name) => device == DEVICES[0] && link(""),
            Spot::Part(LinkPart::Mtu) => link(" mtu 1430 "),
            Spot::Part(LinkPart::Mac) => link(&format!(" address {} ", mac_of("node-200", Family::V4))),
            Spot::Part(LinkPart::Mark) => link(" group 0x666ba808 alias flannelkit:flannel"),
            Spot::Part(LinkPart::Learning) => link(" nolearning"),
            Spot::Part(LinkPart::Remote) => !link(" remote "),
            Spot::Part(LinkPart::Tunnel) => !link(" type tun "),
            Spot::Part(LinkPart::State) => link(" up "),
            Spot::Address => has(&format!("addr {}/32 dev {device}", self.own.addr())),
            Spot::ExtraAddress => !has(&format!("addr {}/", extra(number).addr())),
            Spot::Fdb | Spot::FdbDestination => {
                has(&format!("fdb {} dev {device} dst {} self PERM", mac(number), public(Family::V4, number)))
            }
            Spot::ExtraFdb => !has(&format!("fdb {}", stale(number))),
            Spot::Neighbour | Spot::NeighbourMac => {
                has(&format!("neigh {} dev {device} lladdr {} PERM", subnet(number).addr(), mac(number)))
            }
            Spot::ExtraNeighbour => !has(&format!("neigh {} ", alone(number))),
            Spot::Route(_) => {
                let lines = snapshot.matching(&format!("{} ", subnet(number)));
                let route = format!("route {} via {} dev {device} proto 2", subnet(number), self.gateway(number));
                let onlink = self.plane == Plane::Tunnel;
                lines.len() == 1 && lines[0].starts_with(&route) && lines[0].ends_with(" onlink") == onlink
            }
            Spot::ExtraRoute => !has(&format!("route {} ", extra(number))),
            Spot::Blackhole => has(&format!("route blackhole {} ", self.own)),
        }
    }
}

const RENAMED: &str = "x0";
const OTHER: &str = "eth1";

fn mac(number: u8) -> MacAddr {
    mac_of(&format!("peer-{number}"), Family::V4)
}

/// A MAC address that is nobody's.
fn stale(number: u8) -> MacAddr {
    MacAddr([2, 8, 8, 8, 8, number])
}

/// A subnet that is nobody's.
fn extra(number: u8) -> Prefix {
    subnet(100 + number)
}

/// A neighbour that no route needs.
fn alone(number: u8) -> IpAddr {
    subnet(150 + number).addr()
}

/// A backend with a blackhole for the own subnet.
fn with_blackhole<B: Backend>(backend: B) -> Altered<B> {
    let base = |backend: &B, local: &LocalNode| {
        let mut state = backend.base(local);
        for (_, prefix) in local.lease.subnets.iter() {
            let route = Route::blackhole(*prefix);
            state.routes.insert(RouteKey { prefix: *prefix, nth: 0 }, route);
        }
        state
    };
    Altered { base, ..Altered::of(backend) }
}
