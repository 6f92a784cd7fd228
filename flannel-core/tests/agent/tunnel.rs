//! A small backend of the shape that matters: a device a family, and for each peer a forwarding entry, a neighbour and
//! a route.

use std::net::IpAddr;

use flannel_core::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::kernel::{
    AddressKey, Device, FdbKey, Link, LinkId, LinkKind, LinkName, NeighbourKey, PeerState, Route, RouteSlot, State,
    Vxlan,
};
use flannel_core::lease::{Json, LeaseAttrs, Scalar};
use flannel_core::net::{Family, MacAddr, Mtu, Vni};

pub(crate) const DEVICES: [&str; 2] = ["tun4.1", "tun6.1"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tunnel;

/// What a node of this name publishes for a family.
pub(crate) fn mac_of(node: &str, family: Family) -> MacAddr {
    let hash = node.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [a, b, c, d] = hash.to_be_bytes();
    MacAddr([2, slot(family), a, b, c, d])
}

pub(crate) fn data(mac: MacAddr) -> Json {
    Json::object(&[("mac", Scalar::Text(&mac.to_string()))])
}

fn slot(family: Family) -> u8 {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

fn mac(attrs: &LeaseAttrs, family: Family) -> Result<MacAddr, Skip> {
    let bad = || Skip::BadData("no mac".to_owned());
    let data = attrs.backend_data.get(family).ok_or_else(bad)?;
    let value: serde_json::Value = serde_json::from_str(data.as_str()).map_err(|_| bad())?;
    value["mac"].as_str().and_then(|text| text.parse().ok()).ok_or_else(bad)
}

fn device(local: &LocalNode, family: Family) -> (LinkId, Link) {
    let context = &local.context;
    let place = context.config.networks.families().position(|other| other == family).unwrap();
    let mut vxlan = Vxlan::new(Vni::ONE);
    (vxlan.port, vxlan.local) = (Some(8472), context.public.get(family).copied());
    vxlan.lower = Some(LinkId::Uplink);
    let name = LinkName::new(DEVICES[usize::from(slot(family))]).unwrap();
    let mut link = Link::new(name, LinkKind::Vxlan(vxlan), context.uplink.mtu.0.saturating_sub(70));
    link.mac = mac(&local.lease.attrs, family).ok();
    (LinkId::Own(place as u8), link)
}

impl Backend for Tunnel {
    fn name(&self) -> &'static str {
        "tunnel"
    }

    fn wire_type(&self) -> &'static str {
        "tunnel"
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    fn devices(&self, local: &LocalNode) -> Vec<Device> {
        let links = local.context.config.networks.families().map(|family| device(local, family).1);
        links.map(|link| Device::of(&link)).collect()
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        Some(Mtu(context.uplink.mtu.0.saturating_sub(70)))
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        let free = |family| {
            let names =
                (0..).map(|nth| if nth == 0 { context.node.to_string() } else { format!("{}/{nth}", context.node) });
            let mut macs = names.map(|name| mac_of(&name, family));
            macs.find(|mac| !context.taken.contains(mac)).unwrap()
        };
        let backend_data = context.config.networks.map(|family, _| data(free(family)));
        Ok(LeaseAttrs::new(context.public).with_backend("tunnel", backend_data))
    }

    fn hardware_address(&self, attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
        mac(attrs, family).map(Some)
    }

    fn base(&self, local: &LocalNode) -> State {
        let mut state = State::default();
        for family in local.context.config.networks.families() {
            let (id, link) = device(local, family);
            state.links.insert(id, link);
            if let Some(subnet) = local.lease.subnets.get(family) {
                state.addresses.insert(AddressKey { link: id, addr: subnet.addr(), len: family.bits() }, ());
            }
        }
        state
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let nothing = || Skip::NoAddress(family);
        local.context.config.networks.get(family).ok_or_else(nothing)?;
        let (link, _) = device(local, family);
        let subnet = *peer.subnets.get(family).ok_or_else(nothing)?;
        let public: IpAddr = *peer.attrs.public_ip.get(family).ok_or_else(nothing)?;
        let mac = mac(&peer.attrs, family)?;
        let gateway = subnet.addr();
        Ok(PeerState::default()
            .with_fdb(FdbKey { link, mac, nth: 0 }, public)
            .with_neighbour(NeighbourKey { link, addr: gateway }, mac)
            .with_route(subnet, Route::overlay(subnet, gateway, link)))
    }
}
