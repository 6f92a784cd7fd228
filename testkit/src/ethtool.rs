//! Features of network devices, as `ethtool -K` sets them, through the kernel's generic netlink family.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::error::Context;
use crate::{Error, Namespace};

/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const ACKNOWLEDGED: u16 = 1 | 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `GENL_ID_CTRL`, the family that lists all families.
const CONTROL: u16 = 16;
/// The length of the netlink and the generic netlink header, in bytes.
const HEADERS: usize = 20;

impl Namespace {
    /// Turns features of a device on or off, by their names in the kernel (`ETH_SS_FEATURES`), such as
    /// `tx-tcp-segmentation`.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn set_features(&self, device: &str, features: &[(&str, bool)]) -> Result<(), Error> {
        self.run(|| set(device, features))?.context(|| format!("setting features of {device}"))
    }
}

fn set(device: &str, features: &[(&str, bool)]) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric)?;
    // CTRL_CMD_GETFAMILY with CTRL_ATTR_FAMILY_NAME.
    let family = ask(&netlink, CONTROL, 3, &attribute(2, b"ethtool\0"))?;
    // CTRL_ATTR_FAMILY_ID.
    let id = find(&family, 1).and_then(|id| id.first_chunk().copied()).map(u16::from_ne_bytes);
    let id = id.ok_or(Errno::EOPNOTSUPP)?;
    let bits = features.iter().flat_map(|(name, on)| {
        let name = attribute(2, &[name.as_bytes(), b"\0"].concat());
        let value = if *on { attribute(3, &[]) } else { Vec::new() };
        attribute(1 | NESTED, &[name, value].concat())
    });
    let bits = attribute(3 | NESTED, &bits.collect::<Vec<_>>());
    let header = attribute(1 | NESTED, &attribute(2, &[device.as_bytes(), b"\0"].concat()));
    // ETHTOOL_MSG_FEATURES_SET with ETHTOOL_A_FEATURES_HEADER and ETHTOOL_A_FEATURES_WANTED.
    ask(&netlink, id, 12, &[header, attribute(3 | NESTED, &bits)].concat()).map(drop)
}

/// Sends a request, and returns the attributes of the answer, if there is one.
fn ask(netlink: &OwnedFd, family: u16, command: u8, attributes: &[u8]) -> nix::Result<Vec<u8>> {
    let len = u32::try_from(HEADERS + attributes.len()).unwrap_or(u32::MAX);
    let mut message = [&len.to_ne_bytes()[..], &family.to_ne_bytes(), &ACKNOWLEDGED.to_ne_bytes()].concat();
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let len = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..len).unwrap_or_default();
        while let [a, b, c, d, e, f, ..] = *rest {
            let (len, kind) = (u32::from_ne_bytes([a, b, c, d]) as usize, u16::from_ne_bytes([e, f]));
            if kind == ERROR {
                let code = rest.get(16..).and_then(|rest| rest.first_chunk().copied()).map_or(0, i32::from_ne_bytes);
                return if code == 0 { Ok(answer) } else { Err(Errno::from_raw(-code)) };
            }
            answer.extend(rest.get(HEADERS..len).unwrap_or_default());
            rest = rest.get(len.max(HEADERS).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut attribute = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *attributes {
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        if kind == wanted {
            return attributes.get(4..len);
        }
        attributes = attributes.get(len.max(4).next_multiple_of(4)..)?;
    }
    None
}
