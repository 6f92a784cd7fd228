//! Neighbours and VXLAN FDB entries: one message type, distinguished by its family.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteType;
use nix::libc::{RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH};

use super::{Batch, Unreadable, addr_of, each_attribute};
use crate::net::{Family, MacAddr};

/// Requests the neighbours of one device in both families.
pub(crate) fn dump(batch: &mut Batch, index: u32) {
    dump_of(batch, AddressFamily::Unspec, index);
}

/// Requests the FDB entries of one device.
pub(crate) fn dump_fdb(batch: &mut Batch, index: u32) {
    dump_of(batch, AddressFamily::Bridge, index);
}

fn dump_of(batch: &mut Batch, family: AddressFamily, index: u32) {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    // With strict checking the attribute filters; neighbour dumps reject an index in the header.
    message.attributes = vec![NeighbourAttribute::IfIndex(index)];
    batch.push(RTM_GETNEIGH, NLM_F_DUMP, &message);
}

/// Creates or replaces a permanent neighbour.
pub(crate) fn put(batch: &mut Batch, index: u32, addr: IpAddr, mac: MacAddr) {
    batch.push(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &neighbour(index, addr, mac));
}

/// Deletes a neighbour.
pub(crate) fn delete(batch: &mut Batch, index: u32, addr: IpAddr, mac: MacAddr) {
    batch.push(RTM_DELNEIGH, 0, &neighbour(index, addr, mac));
}

/// Creates or replaces an FDB entry.
pub(crate) fn put_fdb(batch: &mut Batch, index: u32, mac: MacAddr, dst: IpAddr) {
    batch.push(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &fdb(index, mac, dst, NeighbourState::Permanent));
}

/// Deletes an FDB entry.
pub(crate) fn delete_fdb(batch: &mut Batch, index: u32, mac: MacAddr, dst: IpAddr) {
    batch.push(RTM_DELNEIGH, 0, &fdb(index, mac, dst, NeighbourState::None));
}

fn neighbour(index: u32, addr: IpAddr, mac: MacAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: super::address::af(Family::of(addr)),
        ifindex: index,
        state: NeighbourState::Permanent,
        flags: NeighbourFlags::empty(),
        kind: RouteType::Unicast,
    };
    message.attributes = attributes(addr, mac);
    message
}

fn fdb(index: u32, mac: MacAddr, dst: IpAddr, state: NeighbourState) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: AddressFamily::Bridge,
        ifindex: index,
        state,
        flags: NeighbourFlags::Own,
        kind: RouteType::Unspec,
    };
    message.attributes = attributes(dst, mac);
    message
}

fn attributes(addr: IpAddr, mac: MacAddr) -> Vec<NeighbourAttribute> {
    let addr = match addr {
        IpAddr::V4(addr) => NeighbourAddress::Inet(addr),
        IpAddr::V6(addr) => NeighbourAddress::Inet6(addr),
    };
    vec![NeighbourAttribute::Destination(addr), NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())]
}

/// The table of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// The ARP or NDP table.
    Neighbours,
    /// The FDB.
    Fdb,
}

/// A decoded entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) table: Table,
    /// Interface index.
    pub(crate) index: u32,
    /// Whether it is permanent. `bridge fdb` also sets `NUD_NOARP`, to the same effect.
    pub(crate) permanent: bool,
    flags: u8,
    /// The IP address of the neighbour, or the outer destination.
    pub(crate) addr: Option<IpAddr>,
    pub(crate) mac: Option<MacAddr>,
    /// Whether it is an FDB entry with its own port, VNI or device. Overlays never write one, so it counts as absent,
    /// and REPLACE corrects it.
    special: bool,
}

impl Entry {
    /// Returns the IP address and MAC address of a permanent neighbour.
    pub(crate) fn as_neighbour(&self) -> Option<(IpAddr, MacAddr)> {
        let plain = self.table == Table::Neighbours && self.permanent && self.flags & NTF_PROXY == 0;
        Some((self.addr?, self.mac?)).filter(|_| plain)
    }

    /// Returns the MAC address and outer destination of an FDB entry in the overlay's form: self, permanent, with a
    /// destination.
    pub(crate) fn as_fdb(&self) -> Option<(MacAddr, IpAddr)> {
        let plain = self.table == Table::Fdb && self.permanent && self.flags & NTF_SELF != 0 && !self.special;
        Some((self.mac?, self.addr?)).filter(|_| plain)
    }
}

// include/uapi/linux/neighbour.h
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_PORT: u16 = 6;
const NDA_VNI: u16 = 7;
const NDA_IFINDEX: u16 = 8;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NTF_PROXY: u8 = 0x08;
const BODY_LEN: usize = 12;

/// Decodes `RTM_NEWNEIGH` or `RTM_DELNEIGH`; `None` for a family that is neither IP nor bridge.
pub(crate) fn decode(payload: &[u8]) -> Result<Option<Entry>, Unreadable> {
    const WHAT: &str = "neighbour message";
    let header = NeighbourHeader::parse(payload).map_err(|_| Unreadable::new(WHAT))?;
    let (table, family) = match header.family {
        AddressFamily::Inet => (Table::Neighbours, Some(Family::V4)),
        AddressFamily::Inet6 => (Table::Neighbours, Some(Family::V6)),
        AddressFamily::Bridge => (Table::Fdb, None),
        _ => return Ok(None),
    };
    let mut entry = Entry {
        table,
        index: header.ifindex,
        permanent: u16::from(header.state) & NUD_PERMANENT != 0,
        flags: header.flags.bits(),
        addr: None,
        mac: None,
        special: false,
    };
    each_attribute(payload.get(BODY_LEN..).unwrap_or(&[]), WHAT, |kind, value| {
        match kind {
            NDA_DST => entry.addr = Some(addr_of(value)?),
            // Some devices have addresses that are not Ethernet addresses.
            NDA_LLADDR => entry.mac = value.try_into().ok().map(MacAddr),
            NDA_PORT | NDA_VNI | NDA_IFINDEX => entry.special = true,
            _ => {}
        }
        Ok(())
    })?;
    match (family, entry.addr) {
        (Some(family), Some(addr)) if Family::of(addr) != family => Err(Unreadable::new(WHAT)),
        _ => Ok(Some(entry)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::codec::messages;
    use proptest::prelude::*;

    fn read(batch: &Batch) -> (u16, Entry) {
        let message = messages(batch.bytes()).next().unwrap().unwrap();
        (message.kind, decode(message.payload).unwrap().unwrap())
    }

    proptest! {
        #[test]
        fn a_neighbour_and_a_forwarding_entry_read_back(index: u32, addr: IpAddr, mac: [u8; 6]) {
            let mac = MacAddr(mac);
            let mut batch = Batch::default();
            put(&mut batch, index, addr, mac);
            let (kind, entry) = read(&batch);
            prop_assert_eq!((kind, entry.index), (RTM_NEWNEIGH, index));
            prop_assert_eq!(entry.as_neighbour(), Some((addr, mac)));
            prop_assert_eq!(entry.as_fdb(), None);
            batch.clear();
            put_fdb(&mut batch, index, mac, addr);
            let (kind, entry) = read(&batch);
            prop_assert_eq!((kind, entry.index), (RTM_NEWNEIGH, index));
            prop_assert_eq!(entry.as_fdb(), Some((mac, addr)));
            prop_assert_eq!(entry.as_neighbour(), None);
        }
    }

    #[test]
    fn a_forwarding_entry_is_the_message_that_flannel_sends() {
        let mut batch = Batch::default();
        put_fdb(&mut batch, 5, MacAddr([2, 0, 0, 0, 0, 9]), "192.0.2.7".parse().unwrap());
        let golden = [
            48, 0, 0, 0, 28, 0, 0x01, 0x05, 0, 0, 0, 0, 0, 0, 0, 0, // NEWNEIGH, REQUEST|REPLACE|CREATE
            7, 0, 0, 0, 5, 0, 0, 0, 0x80, 0, 2, 0, // bridge, index, permanent, self, type 0
            8, 0, 1, 0, 192, 0, 2, 7, // NDA_DST
            10, 0, 2, 0, 2, 0, 0, 0, 0, 9, 0, 0, // NDA_LLADDR
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(batch.bytes(), golden);
        }
    }
}
