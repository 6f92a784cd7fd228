//! Addresses.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressHeader, AddressMessage, AddressScope};
use nix::libc::{RTM_DELADDR, RTM_GETADDR, RTM_NEWADDR};

use super::{Batch, Unreadable, addr_of, each_attribute, u32_of};
use crate::kernel::HostAddress;
use crate::net::Family;

/// Requests one family's addresses, of one device or of all (`index` 0).
pub(crate) fn dump(batch: &mut Batch, family: Family, index: u32) {
    let mut message = AddressMessage::default();
    message.header.family = af(family);
    message.header.index = index;
    batch.push(RTM_GETADDR, NLM_F_DUMP, &message);
}

/// Adds an address; fails if it exists.
pub(crate) fn add(batch: &mut Batch, index: u32, addr: IpAddr, len: u8) {
    batch.push(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body(index, addr, len));
}

/// Deletes an address.
pub(crate) fn delete(batch: &mut Batch, index: u32, addr: IpAddr, len: u8) {
    batch.push(RTM_DELADDR, 0, &body(index, addr, len));
}

fn body(index: u32, addr: IpAddr, len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = af(Family::of(addr));
    message.header.prefix_len = len;
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(addr), AddressAttribute::Address(addr)];
    message
}

pub(crate) fn af(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

// include/uapi/linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_TEMPORARY: u32 = 0x01;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_PERMANENT: u32 = 0x80;
const BODY_LEN: usize = 8;

/// Decodes `RTM_NEWADDR` or `RTM_DELADDR`; `None` for a family that is not IP.
pub(crate) fn decode(payload: &[u8]) -> Result<Option<HostAddress>, Unreadable> {
    const WHAT: &str = "address message";
    let header = AddressHeader::parse(payload).map_err(|_| Unreadable::new(WHAT))?;
    let family = match header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return Ok(None),
    };
    let (mut local, mut address, mut flags) = (None, None, u32::from(header.flags.bits()));
    each_attribute(payload.get(BODY_LEN..).unwrap_or(&[]), WHAT, |kind, value| {
        match kind {
            IFA_LOCAL => local = Some(addr_of(value)?),
            IFA_ADDRESS => address = Some(addr_of(value)?),
            IFA_FLAGS => flags = u32_of(value)?,
            _ => {}
        }
        Ok(())
    })?;
    // On a point-to-point link IFA_ADDRESS is the peer.
    let addr = local.or(address).filter(|addr| Family::of(*addr) == family).ok_or(Unreadable::new(WHAT))?;
    if header.prefix_len > family.bits() {
        return Err(Unreadable::new(WHAT));
    }
    Ok(Some(HostAddress {
        link: header.index,
        addr,
        len: header.prefix_len,
        permanent: flags & IFA_F_PERMANENT != 0,
        // In IPv4 the same bit means "secondary".
        temporary: family == Family::V6 && flags & IFA_F_TEMPORARY != 0,
        deprecated: flags & (IFA_F_DEPRECATED | IFA_F_DADFAILED) != 0,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::codec::messages;
    use netlink_packet_route::address::AddressFlags;
    use proptest::prelude::*;

    #[test]
    fn an_address_that_another_host_has_is_not_to_be_used() {
        let is_unusable = |flags: u32| {
            let mut message = AddressMessage::default();
            message.header.family = AddressFamily::Inet6;
            message.header.prefix_len = 64;
            let addr = "2001:db8::1".parse().unwrap();
            message.attributes =
                vec![AddressAttribute::Address(addr), AddressAttribute::Flags(AddressFlags::from_bits_retain(flags))];
            let mut batch = Batch::default();
            batch.push(RTM_NEWADDR, 0, &message);
            let message = messages(batch.bytes()).next().unwrap().unwrap();
            decode(message.payload).unwrap().unwrap().deprecated
        };
        assert!(!is_unusable(IFA_F_PERMANENT));
        assert!(is_unusable(IFA_F_PERMANENT | IFA_F_DEPRECATED));
        assert!(is_unusable(IFA_F_PERMANENT | IFA_F_DADFAILED));
    }

    proptest! {
        #[test]
        fn an_address_reads_back(index: u32, addr: IpAddr, len in 0u8..=32) {
            let mut batch = Batch::default();
            add(&mut batch, index, addr, len);
            let message = messages(batch.bytes()).next().unwrap().unwrap();
            let read = decode(message.payload).unwrap().unwrap();
            prop_assert_eq!((read.link, read.addr, read.len), (index, addr, len));
        }
    }
}
