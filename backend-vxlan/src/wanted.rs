//! Kernel state: devices and addresses of the node, and what each peer needs.

use std::net::IpAddr;

use flannel_core::backend::{Local, Peer, Situation, Skip};
use flannel_core::kernel::{Device, Scope};
use flannel_core::net::{Family, MacAddr, Prefix};
use flannel_core::state::{
    AddressKey, FdbKey, Link, LinkId, LinkKind, NeighbourKey, PeerState, Route, State, Vxlan as VxlanLink,
};

use crate::{Vxlan, wire};

pub(crate) fn scope(vxlan: &Vxlan, local: &Local) -> Scope {
    let situation = &local.situation;
    let devices = vxlan.families.families().filter_map(|family| {
        let name = vxlan.config.device_name(family).ok()?;
        Some(Device { name, kind: kind(vxlan, situation, family) })
    });
    Scope {
        overlay: situation.overlay.clone(),
        networks: situation.networks(),
        devices: devices.collect(),
        uplink: Some(situation.uplink.index),
    }
}

pub(crate) fn base(vxlan: &Vxlan, local: &Local) -> State {
    let mut state = State::default();
    let situation = &local.situation;
    for family in vxlan.families.families() {
        // The name was checked with the configuration.
        let Ok(name) = vxlan.config.device_name(family) else { continue };
        let id = device(vxlan, family);
        let link = Link {
            name,
            kind: kind(vxlan, situation, family),
            // Once published, the published address wins: peers send to it.
            mac: Some(wire::mac_of(&local.lease.attrs, family).unwrap_or_else(|_| own_mac(vxlan, situation, family))),
            mtu: vxlan.device_mtu(situation, family).0,
            up: true,
            group: situation.overlay.mark(),
            alias: Some(situation.overlay.alias().into()),
        };
        state.links.insert(id, link);
        if let Some(subnet) = local.lease.subnets.get(family) {
            let key = AddressKey { link: id, addr: subnet.addr(), len: family.bits() };
            state.addresses.insert(key, ());
        }
    }
    state
}

pub(crate) fn peer(vxlan: &Vxlan, local: &Local, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
    let (Some(subnet), Some(public)) = (peer.subnets.get(family), peer.attrs.public_ip.get(family)) else {
        return Err(Skip::NoAddress(family));
    };
    let direct = vxlan.config.direct_routing.then(|| direct(local, *subnet, *public)).flatten();
    if let Some(route) = direct {
        return Ok(PeerState { route: Some((*subnet, route)), ..PeerState::default() });
    }
    let mac = wire::mac_of(&peer.attrs, family)?;
    let link = device(vxlan, family);
    // The next hop is the peer's subnet address itself: its own device holds it (contract 13.4).
    let hop = subnet.addr();
    Ok(PeerState {
        fdb: Some((FdbKey { link, mac, nth: 0 }, *public)),
        neighbour: Some((NeighbourKey { link, addr: hop }, mac)),
        route: Some((*subnet, Route::overlay(*subnet, hop, link))),
    })
}

/// The plain route to a peer that is on a link of ours.
fn direct(local: &Local, subnet: Prefix, public: IpAddr) -> Option<Route> {
    let situation = &local.situation;
    let index = situation.host.on_link(public)?;
    let link = if index == situation.uplink.index { LinkId::Uplink } else { LinkId::Other(index) };
    Some(Route::direct(subnet, public, link))
}

/// The Ethernet address to publish: the previous lease's, so that peers need not change; else that of a device which is
/// there and can be kept; else one made from what the node is. Not from the machine-id: cloned machines share it.
pub(crate) fn own_mac(vxlan: &Vxlan, situation: &Situation, family: Family) -> MacAddr {
    let usable = |mac: &MacAddr| !mac.is_zero() && !mac.is_multicast();
    let previous = situation.previous.as_ref().and_then(|lease| wire::mac_of(&lease.attrs, family).ok());
    let existing = || {
        let name = vxlan.config.device_name(family).ok()?;
        let link = situation.host.links.values().find(|link| link.name == name)?;
        let LinkKind::Vxlan(seen) = &link.kind else { return None };
        (seen.vni == vxlan.config.vni).then_some(link.mac).flatten()
    };
    previous.filter(usable).or_else(|| existing().filter(usable)).unwrap_or_else(|| made_mac(vxlan, situation, family))
}

/// FNV-1a (64 bit) over network, VNI, family and node: equal on every start, different on every node.
fn made_mac(vxlan: &Vxlan, situation: &Situation, family: Family) -> MacAddr {
    let network = situation.networks().get(family).map(ToString::to_string).unwrap_or_default();
    let text = format!("{network}|{}|{family}|{}", vxlan.config.vni, situation.node);
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let [_, _, mac @ ..] = hash.to_be_bytes();
    MacAddr(mac).locally_administered()
}

fn kind(vxlan: &Vxlan, situation: &Situation, family: Family) -> LinkKind {
    LinkKind::Vxlan(VxlanLink {
        vni: vxlan.config.vni,
        port: vxlan.config.port,
        local: situation.public.get(family).copied(),
        lower: Some(LinkId::Uplink),
        learning: vxlan.config.learning,
        gbp: vxlan.config.gbp,
    })
}

/// The device of a family: its place among those of the scope.
fn device(vxlan: &Vxlan, family: Family) -> LinkId {
    let place = vxlan.families.families().position(|other| other == family).unwrap_or_default();
    LinkId::Own(if place == 0 { 0 } else { 1 })
}
