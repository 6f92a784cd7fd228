//! Links.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader, LinkInfo, LinkLayerType,
    LinkMessage,
};
use nix::libc::{RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK};

use super::{Batch, Unreadable, addr_of, each_attribute, text_of, u32_of};
use crate::kernel::{Link, LinkId, LinkKind, LinkName, SeenLink, Tun, Vxlan};
use crate::net::{MacAddr, Vni};

/// Requests all links.
pub(crate) fn dump(batch: &mut Batch) {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    batch.push(RTM_GETLINK, NLM_F_DUMP, &message);
}

/// Requests one link.
pub(crate) fn get_by_name(batch: &mut Batch, name: &LinkName) {
    let mut message = LinkMessage::default();
    message.attributes =
        vec![LinkAttribute::IfName(name.as_str().to_owned()), LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    batch.push(RTM_GETLINK, 0, &message);
}

/// Creates a VXLAN device, down, with flannel's attributes and the mark; fails if it exists (docs/compatibility.md,
/// "Messages"; docs/kernel-facts.md, "Group and alias of a new link").
pub(crate) fn create_vxlan(batch: &mut Batch, link: &Link, vxlan: &Vxlan, lower: Option<u32>) {
    let mut data = vec![InfoVxlan::Id(vxlan.vni.value())];
    data.extend(lower.map(InfoVxlan::Link));
    data.extend(vxlan.local.map(|local| match local {
        IpAddr::V4(local) => InfoVxlan::Local(local),
        IpAddr::V6(local) => InfoVxlan::Local6(local),
    }));
    data.extend(vxlan.remote.map(remote));
    data.extend([
        InfoVxlan::Ttl(0),
        InfoVxlan::Tos(0),
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Proxy(false),
        InfoVxlan::Rsc(false),
        InfoVxlan::L2Miss(vxlan.misses),
        InfoVxlan::L3Miss(vxlan.misses),
        InfoVxlan::UDPZeroCsumTX(false),
        InfoVxlan::UDPZeroCsumRX(false),
    ]);
    data.extend(vxlan.gbp.then_some(InfoVxlan::Gbp));
    data.extend(vxlan.port.map(InfoVxlan::Port));
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(link.name.as_str().to_owned()),
        LinkAttribute::Mtu(link.mtu),
        LinkAttribute::TxQueueLen(0),
        LinkAttribute::Group(link.group),
    ];
    message.attributes.extend(link.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    message
        .attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]));
    batch.push(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &message);
}

/// Requests a device of this kind with an invalid VNI: every kernel refuses it, and the reason shows what is supported.
pub(crate) fn probe(batch: &mut Batch, kind: InfoKind) {
    const NO_VNI: u32 = u32::MAX;
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(kind),
        LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Id(NO_VNI)])),
    ])];
    batch.push(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &message);
}

/// Changes of a link; `None` keeps a value.
#[derive(Debug, Default)]
pub(crate) struct Change<'a> {
    pub(crate) name: Option<&'a LinkName>,
    pub(crate) mac: Option<MacAddr>,
    pub(crate) mtu: Option<u32>,
    pub(crate) group: Option<u32>,
    /// An empty text removes the alias.
    pub(crate) alias: Option<&'a str>,
    pub(crate) up: Option<bool>,
}

/// Changes a link. The kernel applies the attributes before the flags, so a name is set while the link is still down.
pub(crate) fn change(batch: &mut Batch, index: u32, change: &Change<'_>) {
    let mut message = LinkMessage::default();
    message.header.index = index;
    if let Some(up) = change.up {
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    }
    let attributes = &mut message.attributes;
    attributes.extend(change.name.map(|name| LinkAttribute::IfName(name.as_str().to_owned())));
    attributes.extend(change.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    attributes.extend(change.mtu.map(LinkAttribute::Mtu));
    attributes.extend(change.group.map(LinkAttribute::Group));
    attributes.extend(change.alias.map(|alias| LinkAttribute::IfAlias(alias.to_owned())));
    batch.push(RTM_NEWLINK, 0, &message);
}

/// Changes the modifiable settings of a VXLAN device. Returns whether there is anything to change.
pub(crate) fn change_vxlan(batch: &mut Batch, index: u32, from: &Vxlan, to: &Vxlan) -> bool {
    let mut data = Vec::new();
    if from.learning != to.learning {
        data.push(InfoVxlan::Learning(to.learning));
    }
    if from.remote != to.remote {
        // The unspecified address removes it.
        let none = from.remote.map(|was| match was {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        });
        data.extend(to.remote.or(none).map(remote));
    }
    if data.is_empty() {
        return false;
    }
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes =
        vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))])];
    batch.push(RTM_NEWLINK, 0, &message);
    true
}

fn remote(addr: IpAddr) -> InfoVxlan {
    match addr {
        IpAddr::V4(addr) => InfoVxlan::Group(addr),
        IpAddr::V6(addr) => InfoVxlan::Group6(addr),
    }
}

/// Deletes a link.
pub(crate) fn delete(batch: &mut Batch, index: u32) {
    let mut message = LinkMessage::default();
    message.header.index = index;
    batch.push(RTM_DELLINK, 0, &message);
}

// include/uapi/linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_GROUP: u16 = 27;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
// include/uapi/linux/if_tun.h
const IFF_TUN: u8 = 1;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_GROUP: u16 = 2;
const IFLA_VXLAN_LINK: u16 = 3;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_L2MISS: u16 = 13;
const IFLA_VXLAN_L3MISS: u16 = 14;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_GROUP6: u16 = 16;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_GBP: u16 = 23;
const BODY_LEN: usize = 16;

/// Decodes `RTM_NEWLINK` or `RTM_DELLINK`; `None` for a bridge's messages about its ports.
pub(crate) fn decode(payload: &[u8]) -> Result<Option<SeenLink>, Unreadable> {
    const WHAT: &str = "link message";
    let header = LinkHeader::parse(payload).map_err(|_| Unreadable::new(WHAT))?;
    if header.interface_family != AddressFamily::Unspec {
        return Ok(None);
    }
    let (mut name, mut mac, mut mtu, mut group, mut alias) = (None, None, 0, 0, None);
    let mut kind = LinkKind::Other("".into());
    let ethernet = header.link_layer_type == LinkLayerType::Ether;
    each_attribute(payload.get(BODY_LEN..).unwrap_or(&[]), WHAT, |attribute, value| {
        match attribute {
            IFLA_IFNAME => name = Some(link_name(value)?),
            IFLA_ADDRESS if ethernet => mac = value.try_into().ok().map(MacAddr),
            IFLA_MTU => mtu = u32_of(value)?,
            IFLA_GROUP => group = u32_of(value)?,
            IFLA_IFALIAS => alias = Some(text_of(value)).filter(|text| !text.is_empty()).map(Box::from),
            IFLA_LINKINFO => kind = link_kind(value)?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(Some(SeenLink {
        index: header.index,
        link: Link {
            name: name.ok_or(Unreadable::new(WHAT))?,
            kind,
            mac,
            mtu,
            up: header.flags.contains(LinkFlags::Up),
            group,
            alias,
        },
        carrier: header.flags.contains(LinkFlags::LowerUp),
    }))
}

/// Decodes a name. A foreign device may have a name that [`LinkName`] rejects, which must not make the whole dump
/// unreadable.
fn link_name(value: &[u8]) -> Result<LinkName, Unreadable> {
    let text = text_of(value);
    LinkName::new(&text)
        .or_else(|_| {
            let plain = |c: char| if c.is_ascii_graphic() && c != '/' && c != ':' { c } else { '?' };
            LinkName::new(&text.chars().map(plain).collect::<String>())
        })
        .map_err(|_| Unreadable::new("link name"))
}

fn link_kind(info: &[u8]) -> Result<LinkKind, Unreadable> {
    const WHAT: &str = "link kind";
    let mut name: Box<str> = "".into();
    each_attribute(info, WHAT, |kind, value| {
        if kind == IFLA_INFO_KIND {
            name = text_of(value).into();
        }
        Ok(())
    })?;
    let mut known = None;
    each_attribute(info, WHAT, |kind, value| {
        match (kind, &*name) {
            (IFLA_INFO_DATA, "vxlan") => known = Some(LinkKind::Vxlan(decode_vxlan(value)?)),
            (IFLA_INFO_DATA, Tun::KIND) => known = decode_tun(value)?.map(LinkKind::Tun),
            _ => {}
        }
        Ok(())
    })?;
    Ok(known.unwrap_or(LinkKind::Other(name)))
}

/// Returns `None` for a TAP device, which has the same kind.
fn decode_tun(data: &[u8]) -> Result<Option<Tun>, Unreadable> {
    let (mut kind, mut multi_queue) = (None, false);
    each_attribute(data, "TUN attributes", |attribute, value| {
        match attribute {
            IFLA_TUN_TYPE => kind = value.first().copied(),
            IFLA_TUN_MULTI_QUEUE => multi_queue = value.first().is_some_and(|byte| *byte != 0),
            _ => {}
        }
        Ok(())
    })?;
    Ok((kind == Some(IFF_TUN)).then_some(Tun { multi_queue, tunnel: None }))
}

fn decode_vxlan(data: &[u8]) -> Result<Vxlan, Unreadable> {
    const WHAT: &str = "VXLAN attributes";
    let mut vni = None;
    let (mut port, mut local, mut lower, mut remote) = (None, None, None, None);
    let (mut learning, mut gbp, mut misses) = (false, false, false);
    let is_on = |value: &[u8]| value.first().is_some_and(|byte| *byte != 0);
    let address = |value: &[u8]| addr_of(value).map(|addr| Some(addr).filter(|addr| !addr.is_unspecified()));
    each_attribute(data, WHAT, |kind, value| {
        match kind {
            IFLA_VXLAN_ID => vni = Vni::new(u32_of(value)?),
            IFLA_VXLAN_LINK => lower = Some(u32_of(value)?).filter(|index| *index != 0),
            IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => local = address(value)?,
            IFLA_VXLAN_GROUP | IFLA_VXLAN_GROUP6 => remote = address(value)?,
            IFLA_VXLAN_LEARNING => learning = is_on(value),
            IFLA_VXLAN_L2MISS | IFLA_VXLAN_L3MISS => misses |= is_on(value),
            IFLA_VXLAN_PORT => port = value.try_into().ok().map(u16::from_be_bytes),
            IFLA_VXLAN_GBP => gbp = true,
            _ => {}
        }
        Ok(())
    })?;
    // A device that takes its VNI from each packet (`external`) shows 0.
    let vni = vni.ok_or(Unreadable::new(WHAT))?;
    Ok(Vxlan { vni, port, local, lower: lower.map(LinkId::Other), learning, gbp, remote, misses })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::codec::messages;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_vxlan_device_reads_back(
            vni in 0u32..1 << 24, port in proptest::option::of(1u16..), local: IpAddr, lower in 1u32.., mac: [u8; 6],
            mtu: u32, learning: bool, gbp: bool, remote: Option<IpAddr>, misses: bool,
        ) {
            let vxlan = Vxlan {
                vni: Vni::new(vni).unwrap(),
                port,
                local: Some(local).filter(|addr| !addr.is_unspecified()),
                lower: Some(LinkId::Other(lower)),
                learning,
                gbp,
                remote: remote.filter(|addr| !addr.is_unspecified()),
                misses,
            };
            let link = Link {
                name: LinkName::new("flannel.1").unwrap(),
                kind: LinkKind::Vxlan(vxlan.clone()),
                mac: Some(MacAddr(mac)),
                mtu,
                up: false,
                group: 0x666b_1234,
                alias: None,
            };
            let mut batch = Batch::default();
            create_vxlan(&mut batch, &link, &vxlan, Some(lower));
            let message = messages(batch.bytes()).next().unwrap().unwrap();
            // A request leaves the device type unset; the kernel's messages have Ethernet.
            let mut payload = message.payload.to_vec();
            payload[2..4].copy_from_slice(&1u16.to_ne_bytes());
            prop_assert_eq!(decode(&payload).unwrap().unwrap().link, link);
        }
    }
}
