//! The suite passes a correct backend, and fails each faulty one with the rule that it breaks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::backend::{LocalNode, NodeContext, Peer, Skip};
use crate::kernel::{
    AddressKey, Device, FdbKey, Forward, ForwardKey, Link, LinkId, LinkKind, LinkName, NeighbourKey, PeerState, Route,
    State, Vxlan,
};
use crate::lease::{Json, LeaseAttrs, Scalar};
use crate::net::{Family, MacAddr, Mtu, Vni};

const NAMES: [(Family, &str); 2] = [(Family::V4, "wrong4"), (Family::V6, "wrong6")];

/// The fault of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    AnotherType,
    SaysThatItWritesNothing,
    ManyAddresses,
    UnreadableData,
    ForgetsThePreviousLease,
    TakenEthernetAddress,
    OneEthernetAddressForAll,
    DeviceOutsideTheScope,
    DeviceMarked,
    DeviceNamedAfterTheSubnet,
    AddressOnTheUplink,
    LinkLocalAddress,
    RouteOutsideTheNetwork,
    RouteThroughAMissingLink,
    RouteOfAnotherProtocol,
    RouteInAnUnnamedSlot,
    TwoRoutesInOneSlot,
    RouteWithoutNeighbour,
    NeighbourOnTheUplink,
    Counts,
    OneForwardingEntryForAll,
    OneNeighbourForAll,
    RouteOfTheWholeNetwork,
    EveryFamily,
    TrustsData,
    CutsData,
    LongReason,
    SmallMtu,
    PodsLargerThanDevices,
    ExternalAddressElsewhere,
    LooksAtTheExpiry,
    LooksAtItsOwnDevice,
    RouteThatTheKernelRefuses,
    ForwardThatNothingCarries,
}

use Fault::*;

/// A backend with a VXLAN device for each family, or an external one, and one fault.
struct Wrong {
    fault: Fault,
    calls: AtomicU32,
}

impl Wrong {
    fn mac(&self, context: &NodeContext, family: Family) -> MacAddr {
        let address = |attrs: &LeaseAttrs| self.hardware_address(attrs, family).ok().flatten();
        let previous = context.previous.as_ref().and_then(|lease| address(&lease.attrs));
        let previous = previous.filter(|_| self.fault != ForgetsThePreviousLease);
        let index = context.node.to_string().bytes().last().unwrap_or_default();
        let index = if self.fault == OneEthernetAddressForAll { 7 } else { index };
        let taken = |mac: &MacAddr| self.fault != TakenEthernetAddress && context.taken.contains(mac);
        let first = if self.fault == ForgetsThePreviousLease && context.previous.is_some() { 9 } else { 0 };
        let own = (first..=255).map(|nth| MacAddr([2, 0, place(family), nth, 0, index]));
        previous.into_iter().chain(own).find(|mac| !taken(mac)).unwrap()
    }

    fn device(&self, local: &LocalNode, family: Family) -> Option<(LinkId, Link)> {
        let context = &local.context;
        let slot = context.config.networks.families().position(|other| other == family)?;
        let kind = if self.fault == ExternalAddressElsewhere {
            LinkKind::External(format!("tun{slot}").into())
        } else {
            LinkKind::Vxlan(Vxlan {
                local: context.public.get(family).copied(),
                lower: Some(LinkId::Uplink),
                ..Vxlan::new(Vni::ONE)
            })
        };
        let mut name = NAMES[usize::from(place(family))].1.to_owned();
        if self.fault == DeviceNamedAfterTheSubnet {
            name = local.lease.subnets.iter().map(|(_, subnet)| subnet.addr().to_string()).collect();
            name = name.chars().filter(|c| *c != ':').take(15).collect();
        }
        let mtu = match self.fault {
            SmallMtu => context.uplink.mtu.0 - 70,
            LooksAtTheExpiry if local.lease.expires.is_some() => 1500,
            LooksAtItsOwnDevice if context.host.links.len() > 3 => 1500,
            _ => context.uplink.mtu.0.saturating_sub(70),
        };
        let mac = self.hardware_address(&local.lease.attrs, family).ok().flatten();
        let mac = Some(mac.unwrap_or_else(|| self.mac(context, family)));
        let group = u32::from(self.fault == DeviceMarked);
        let link = Link { name: LinkName::new(&name).unwrap(), kind, mac, mtu, up: true, group, alias: None };
        Some((LinkId::Own(slot as u8), link))
    }
}

fn place(family: Family) -> u8 {
    u8::from(family == Family::V6)
}

impl Backend for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }

    fn wire_type(&self) -> &'static str {
        "wrong"
    }

    fn writes(&self) -> bool {
        self.fault != SaysThatItWritesNothing
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, local: &LocalNode) -> Vec<Device> {
        let devices = local.context.config.networks.families().filter_map(|family| self.device(local, family));
        let devices = devices.filter(|(id, _)| self.fault != DeviceOutsideTheScope || *id != LinkId::Own(0));
        devices.map(|(_, link)| Device { name: link.name, kind: link.kind }).collect()
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        let mtu = Mtu(context.uplink.mtu.0.saturating_sub(70));
        (self.fault != PodsLargerThanDevices).then_some(mtu)
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        let data = |family, _: &_| match self.fault {
            UnreadableData => Json::object(&[("address", Scalar::Number(1))]),
            _ => Json::object(&[("mac", Scalar::Text(&self.mac(context, family).to_string()))]),
        };
        let mut public_ip = context.public;
        if self.fault == ManyAddresses {
            public_ip.v6 = Some("2001:db8::1".parse().unwrap());
            public_ip.v4 = Some("192.0.2.1".parse().unwrap());
        }
        let backend_type = if self.fault == AnotherType { "other" } else { "wrong" }.into();
        Ok(LeaseAttrs { public_ip, backend_type, backend_data: context.config.networks.map(data) })
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        let bad = |text: &str| Skip::BadData(text.to_owned());
        let data = attrs.backend_data.get(family).ok_or_else(|| bad("no data"))?;
        let value: serde_json::Value = serde_json::from_str(data.as_str()).map_err(|error| bad(&error.to_string()))?;
        if self.fault == LongReason && value["mac"].is_null() {
            return Err(bad(data.as_str()));
        }
        if self.fault == TrustsData {
            assert!(value.is_object(), "no object");
        }
        let text = value["mac"].as_str().ok_or_else(|| bad("no mac"))?;
        if self.fault == CutsData && text.len() > 2 {
            assert_ne!(&text[..2], "xx");
        }
        let mac: MacAddr = text.parse().map_err(|_| bad("no mac"))?;
        if mac.is_zero() || mac.is_multicast() { Err(bad("no mac of a device")) } else { Ok(Some(mac)) }
    }

    fn base(&self, local: &LocalNode) -> State {
        let mut state = State::default();
        for family in local.context.config.networks.families() {
            let Some((id, link)) = self.device(local, family) else { continue };
            state.links.insert(id, link);
            let Some(subnet) = local.lease.subnets.get(family) else { continue };
            let (link, addr) = match (self.fault, family) {
                (AddressOnTheUplink, _) => (LinkId::Uplink, subnet.addr()),
                (LinkLocalAddress, Family::V4) => (id, [169, 254, 0, 1].into()),
                (ExternalAddressElsewhere, Family::V4) => (id, [172, 16, 0, 1].into()),
                _ => (id, subnet.addr()),
            };
            state.addresses.insert(AddressKey { link, addr, len: family.bits() }, ());
        }
        state
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let nothing = || Skip::NoAddress(family);
        let device = self.device(local, family).map(|(id, _)| id);
        let link = device.or((self.fault == EveryFamily).then_some(LinkId::Own(0))).ok_or_else(nothing)?;
        let subnet = *peer.subnets.get(family).ok_or_else(nothing)?;
        let public = *peer.attrs.public_ip.get(family).ok_or_else(nothing)?;
        let mac = self.hardware_address(&peer.attrs, family)?.ok_or_else(nothing)?;
        let mut state = PeerState {
            fdb: Some((FdbKey { link, mac, nth: 0 }, public)),
            neighbour: Some((NeighbourKey { link, addr: subnet.addr() }, mac)),
            routes: vec![(subnet, Route::overlay(subnet, subnet.addr(), link))],
            ..PeerState::default()
        };
        let network = local.context.config.networks.get(family).map_or(subnet, |network| network.prefix);
        let through = |link| vec![(subnet, Route::overlay(subnet, subnet.addr(), link))];
        match self.fault {
            RouteOutsideTheNetwork => {
                let host = crate::net::Prefix::host(public);
                state.routes = vec![(host, Route::overlay(host, subnet.addr(), link))];
            }
            RouteOfTheWholeNetwork => state.routes = vec![(network, Route::overlay(network, subnet.addr(), link))],
            RouteThroughAMissingLink => state.routes = through(LinkId::Own(7)),
            RouteOfAnotherProtocol => state.routes[0].1.protocol = Route::BOOT,
            RouteInAnUnnamedSlot => state.routes[0].1 = state.routes[0].1.clone().in_slot(RouteSlot::new(100, 0)),
            TwoRoutesInOneSlot => state.routes.push(state.routes[0].clone()),
            RouteWithoutNeighbour => state.routes[0].1.gateway = Some(subnet.last()),
            RouteThatTheKernelRefuses => {
                state.neighbour = None;
                state.routes = vec![(subnet, Route::direct(subnet, subnet.last(), link))];
            }
            ForwardThatNothingCarries => {
                let forward = Forward::to((public, 8285).into());
                state = state.with_forward(ForwardKey { link, prefix: subnet }, forward);
            }
            NeighbourOnTheUplink => state.neighbour.as_mut().unwrap().0.link = LinkId::Uplink,
            OneForwardingEntryForAll => state.fdb.as_mut().unwrap().0.mac = MacAddr([0; 6]),
            OneNeighbourForAll => {
                state.neighbour.as_mut().unwrap().0.addr = network.last();
                state.routes[0].1.gateway = Some(network.last());
            }
            Counts if self.calls.fetch_add(1, Ordering::Relaxed) % 3 == 2 => state.neighbour = None,
            _ => {}
        }
        Ok(state)
    }
}

fn run(fault: Fault) -> Result<(), Box<dyn Any + Send>> {
    let harness = Made::new(r#"{"Type":"wrong"}"#, move |_| Ok(Wrong { fault, calls: AtomicU32::new(0) }));
    catch_unwind(AssertUnwindSafe(|| all(&harness)))
}

#[test]
fn a_backend_that_is_right_passes() {
    assert!(run(Nothing).is_ok());
}

#[test]
fn each_fault_is_named_by_the_rule_that_it_breaks() {
    let faults = [
        (AnotherType, "advertise: must publish wire_type() as its backend_type"),
        (SaysThatItWritesNothing, "writes: must be true, since Link(Own(0)) is wanted"),
        (ManyAddresses, "advertise: must publish an address of each family of the network and of no other"),
        (UnreadableData, "hardware_address: must read what the same backend published"),
        (ForgetsThePreviousLease, "advertise: must publish what the previous lease says"),
        (TakenEthernetAddress, "advertise: must not publish 02:00:00:00:00:31, which is taken"),
        (OneEthernetAddressForAll, "advertise: nodes 1 and 2 publish the same MAC address 02:00:00:00:00:07"),
        (DeviceOutsideTheScope, "base: wants wrong4, Own(0), which is not in the scope"),
        (DeviceMarked, "base: must leave group and alias of wrong4 to the agent"),
        (DeviceNamedAfterTheSubnet, "devices: with another subnet the devices are others"),
        (AddressOnTheUplink, "base: address 10.42.1.0/32 must be on a device that base() wants, not on Uplink"),
        (LinkLocalAddress, "base: address 169.254.0.1/32 is link-local"),
        (RouteOutsideTheNetwork, "peer: a route to 192.0.2.2/32 is outside the network"),
        (RouteThroughAMissingLink, "peer: the route to 10.42.2.0/24 leads through a link that there is none of"),
        (RouteOfAnotherProtocol, "peer: the route to 10.42.2.0/24 must have a protocol of ours, not 3"),
        (RouteInAnUnnamedSlot, "peer: the route to 10.42.2.0/24 is in a slot that is not named"),
        (TwoRoutesInOneSlot, "peer: two routes to 10.42.2.0/24 in one table with one metric"),
        (RouteWithoutNeighbour, "peer: the route's next hop Some(10.42.2.255) is not the neighbour 10.42.2.0"),
        (NeighbourOnTheUplink, "peer: neighbour 10.42.2.0 must be on a device that base() wants, not on Uplink"),
        (
            ForwardThatNothingCarries,
            "peer: forward of 10.42.2.0/24 to 192.0.2.2:8285 must be on a device that a data plane carries",
        ),
        (Counts, "peer: must depend on nothing but its arguments"),
        (
            OneForwardingEntryForAll,
            "peer: the neighbour's address 02:00:00:00:00:32 is not that of the forwarding entry",
        ),
        (OneNeighbourForAll, "peer: node-2 (IPv4) and node-3 (IPv4) want the same object Neighbour"),
        (RouteOfTheWholeNetwork, "peer: a route to 10.42.0.0/16 is not to the peer's subnet of IPv4"),
        (EveryFamily, "peer: must skip IPv6, which the network does not have"),
        (TrustsData, "hardware_address: must not panic: IPv4 of a peer that publishes"),
        (CutsData, "hardware_address: must not panic: IPv4 of a peer that publishes"),
        (LongReason, "bytes for IPv4 of a peer that publishes"),
        (SmallMtu, "devices: must not panic: with an MTU of 0"),
        (PodsLargerThanDevices, "mtu: 1500 for pods is more than the 1430 of wrong4"),
        (ExternalAddressElsewhere, "base: address 172.16.0.1/32 on an external device is outside the network"),
        (LooksAtTheExpiry, "base: must not depend on when the own lease ends"),
        (LooksAtItsOwnDevice, "plan: after a restart, this is still written: link set wrong4 mtu 1500"),
        (RouteThatTheKernelRefuses, "base, peer: kernel refused route add 10.42.2.0/24"),
    ];
    for (fault, rule) in faults {
        let Err(payload) = run(fault) else { panic!("{fault:?} is not found") };
        let said = payload.downcast_ref::<String>().map(String::as_str).unwrap_or("");
        assert!(said.starts_with(rule) || said.contains(rule), "{fault:?}: {rule:?} expected: {said}");
    }
}
