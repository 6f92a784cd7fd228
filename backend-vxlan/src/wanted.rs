//! The wanted kernel state.

use std::net::IpAddr;

use flannel_core::backend::{BackendError, LocalNode, NodeContext, Peer, Skip};
use flannel_core::config::ConfigError;
use flannel_core::kernel::{
    AddressKey, Device, FdbKey, HostLink, Link, LinkId, LinkKind, NeighbourKey, PeerState, Route, State, Vxlan,
};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::{Dual, Family, MacAddr, Mtu};

use crate::config::{Config, device_name};
use crate::wire;

/// The bytes that VXLAN adds to a packet: outer IP, UDP, VXLAN and inner Ethernet headers.
const fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// The smallest MTU that a family works with: the size that every IPv4 host must accept (RFC 791), and the IPv6 minimum
/// (RFC 8200). With a smaller MTU the kernel disables IPv6 on the device.
const fn least_mtu(family: Family) -> u32 {
    match family {
        Family::V4 => 576,
        Family::V6 => 1280,
    }
}

/// Returns the lease attributes that a node publishes.
pub(crate) fn advertise(config: &Config, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
    check_mtu(config, context)?;
    let mut attrs = LeaseAttrs::default().with_backend(crate::Vxlan::TYPE, Dual::default());
    for family in context.config.networks.families() {
        let addr = context.public.get(family).copied().ok_or_else(|| BackendError::Host {
            what: format!("there is no public {family} address"),
            remedy: format!("give {} one, or turn {family} off in the network config", context.uplink.name),
        })?;
        *attrs.public_ip.slot(family) = Some(addr);
        *attrs.backend_data.slot(family) = Some(wire::encode(config.vni, choose_mac(config, context, family)));
    }
    Ok(attrs)
}

fn check_mtu(config: &Config, context: &NodeContext) -> Result<(), BackendError> {
    let underlay = underlay_mtu(config, context);
    for family in context.config.networks.families() {
        let least = least_mtu(family) + overhead(family);
        if underlay >= least {
            continue;
        }
        let what = format!("an underlay MTU of {underlay} is too low for {family}, which needs {least}");
        return Err(match config.mtu {
            Some(mtu) if mtu.0 == underlay => {
                let path = context.config.backend.settings.path_of("MTU");
                ConfigError::new(path, what, format!("write {least} or more, or leave the key out")).into()
            }
            _ => BackendError::Host {
                what,
                remedy: format!("raise the MTU of {} or select another interface", context.uplink.name),
            },
        });
    }
    Ok(())
}

/// Returns the underlay MTU that the devices are sized for. The kernel accepts no more than the lower device's MTU
/// (docs/kernel-facts.md, "MTU of a VXLAN device").
fn underlay_mtu(config: &Config, context: &NodeContext) -> u32 {
    config.underlay_mtu(context.uplink.mtu).0.min(context.uplink.mtu.0)
}

/// Returns the MTU for pods: the smallest MTU of all devices. flannel ignores IPv6 here (docs/compatibility.md,
/// "Device").
pub(crate) fn pod_mtu(config: &Config, context: &NodeContext) -> Mtu {
    let most = context.config.networks.families().map(overhead).max().unwrap_or(0);
    Mtu(underlay_mtu(config, context).saturating_sub(most))
}

/// Returns the MAC address to publish. First choice is the previous lease's, so that peers need no change; then that of
/// an existing device that can be reused unchanged, so that its entries stay; then a derived one, the same at each
/// start.
fn choose_mac(config: &Config, context: &NodeContext, family: Family) -> MacAddr {
    let free = |mac: &MacAddr| !context.taken.contains(mac);
    let previous = context.previous.as_ref().and_then(|lease| wire::decode(&lease.attrs, family).ok());
    previous
        .filter(usable)
        .filter(free)
        .or_else(|| existing_mac(config, context, family).filter(usable).filter(free))
        .unwrap_or_else(|| derived_mac(config, context, family))
}

/// Whether a device can have this MAC address.
fn usable(mac: &MacAddr) -> bool {
    !mac.is_zero() && !mac.is_multicast()
}

/// Returns the MAC address of an existing device that was made for the published address, its local address. The MAC
/// address of another one belongs to the record under the former address, and other nodes prefer that record because it
/// is older. Behind a NAT no device shows which address was published: a new record has the derived MAC address.
fn existing_mac(config: &Config, context: &NodeContext, family: Family) -> Option<MacAddr> {
    let name = device_name(family, config.vni)?;
    let public = context.public.get(family).copied();
    let compatible = |link: &&HostLink| {
        let LinkKind::Vxlan(vxlan) = &link.kind else { return false };
        let ours = link.name == name || context.overlay.owns(link.group, link.alias.as_deref());
        ours && vxlan.vni == config.vni
            && vxlan.gbp == config.gbp
            && !vxlan.misses
            && vxlan.family().is_none_or(|found| found == family)
            && vxlan.local.is_none_or(|local| Some(local) == public)
            && (config.port.is_none() || vxlan.port.is_none() || config.port == vxlan.port)
    };
    let found = context.host.links.values().filter(compatible).min_by_key(|link| link.name != name)?;
    found.mac
}

/// Returns the first of this node's derived MAC addresses that no older record uses.
fn derived_mac(config: &Config, context: &NodeContext, family: Family) -> MacAddr {
    let network = context.config.networks.get(family).map(|network| network.prefix.to_string()).unwrap_or_default();
    let text = format!("{}\n{network}\n{family}\n{}", config.vni, context.node);
    let mac = |nth: usize| hashed_mac(&if nth == 0 { text.clone() } else { format!("{text}\n{nth}") });
    // One more candidate than there are taken addresses: one is free unless two candidates hash to the same address.
    let nth = (0..context.taken.len()).find(|nth| !context.taken.contains(&mac(*nth)));
    mac(nth.unwrap_or(context.taken.len()))
}

/// Returns the low 48 bits of the FNV-1a hash (64 bit) of `text`, mixed by MurmurHash3's finaliser, as a locally
/// administered address. Stable across versions: a node that lost its state publishes the same address again. The text
/// contains the VNI, network, family and node identity, and not the machine id, which cloned machines share.
fn hashed_mac(text: &str) -> MacAddr {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    let [_, _, mac @ ..] = (hash ^ (hash >> 33)).to_be_bytes();
    MacAddr(mac).locally_administered()
}

/// Returns the address that a device sends from: the published one, or the uplink's if the host does not have the
/// published one, as behind a NAT. The kernel sends nothing from an address that the host does not have.
fn local_address(context: &NodeContext, family: Family) -> Option<IpAddr> {
    let public = context.public.get(family).copied();
    let own = public.filter(|public| context.host.addresses.iter().any(|address| address.addr == *public));
    own.or(context.uplink.addrs.get(family).copied())
}

/// The VXLAN device of one family.
struct Vtep {
    family: Family,
    id: LinkId,
    link: Link,
}

/// Returns the devices in the order of their ids. The published MAC address takes precedence over [`choose_mac`].
fn vteps(config: &Config, context: &NodeContext, attrs: &LeaseAttrs) -> Vec<Vtep> {
    let named =
        context.config.networks.families().filter_map(|family| Some((family, device_name(family, config.vni)?)));
    let vtep = |(slot, (family, name))| {
        let published = wire::decode(attrs, family).ok().filter(usable);
        let mut vxlan = Vxlan::new(config.vni);
        (vxlan.port, vxlan.learning, vxlan.gbp) = (config.port, config.learning, config.gbp);
        (vxlan.local, vxlan.lower) = (local_address(context, family), Some(LinkId::Uplink));
        let mtu = underlay_mtu(config, context).saturating_sub(overhead(family));
        let mut link = Link::new(name, LinkKind::Vxlan(vxlan), mtu);
        link.mac = Some(published.unwrap_or_else(|| choose_mac(config, context, family)));
        Vtep { family, id: LinkId::Own(slot), link }
    };
    (0..).zip(named).map(vtep).collect()
}

/// Returns the id of a family's device.
fn device(local: &LocalNode, family: Family) -> Option<LinkId> {
    let place = local.context.config.networks.families().position(|enabled| enabled == family)?;
    u8::try_from(place).ok().map(LinkId::Own)
}

pub(crate) fn devices(config: &Config, local: &LocalNode) -> Vec<Device> {
    vteps(config, &local.context, &local.lease.attrs).iter().map(|vtep| Device::of(&vtep.link)).collect()
}

/// Returns the devices, each with the first address of its subnet.
pub(crate) fn base(config: &Config, local: &LocalNode) -> State {
    let mut state = State::default();
    for vtep in vteps(config, &local.context, &local.lease.attrs) {
        state.links.insert(vtep.id, vtep.link);
        if let Some(subnet) = local.lease.subnets.get(vtep.family) {
            let key = AddressKey { link: vtep.id, addr: subnet.addr(), len: vtep.family.bits() };
            state.addresses.insert(key, ());
        }
    }
    state
}

/// Returns the kernel state that one peer needs in one family.
pub(crate) fn peer(config: &Config, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
    let nothing = || Skip::NoAddress(family);
    let link = device(local, family).ok_or_else(nothing)?;
    let subnet = *peer.subnets.get(family).ok_or_else(nothing)?;
    let public = *peer.attrs.public_ip.get(family).ok_or_else(nothing)?;
    let mac = wire::decode(&peer.attrs, family)?;
    if config.direct_routing
        && let Some(index) = local.context.host.on_link(public)
    {
        let uplink = index == local.context.uplink.index;
        let link = if uplink { LinkId::Uplink } else { LinkId::Other(index) };
        return Ok(PeerState::default().with_route(subnet, Route::direct(subnet, public, link)));
    }
    Ok(PeerState::default()
        .with_fdb(FdbKey { link, mac, nth: 0 }, public)
        .with_neighbour(NeighbourKey { link, addr: subnet.addr() }, mac)
        .with_route(subnet, Route::overlay(subnet, subnet.addr(), link)))
}
