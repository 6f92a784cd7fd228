//! Features of network devices, over generic netlink: `ethtool -K`, which is not everywhere.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const ACKNOWLEDGED: u16 = 1 | 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `GENL_ID_CTRL`, the family that knows all families.
const CONTROL: u16 = 16;

/// Turns features of a device in the calling thread's namespace on or off, by their names in the kernel.
pub(crate) fn set_features(device: &str, features: &[(&str, bool)]) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric).unwrap();
    // CTRL_CMD_GETFAMILY with CTRL_ATTR_FAMILY_NAME.
    let family = ask(&netlink, CONTROL, 3, &attribute(2, b"ethtool\0"));
    // CTRL_ATTR_FAMILY_ID.
    let id = find(&family, 1).map(|id| u16::from_ne_bytes([id[0], id[1]])).expect("CONFIG_ETHTOOL_NETLINK");
    let bits = features.iter().flat_map(|(name, on)| {
        let name = attribute(2, &[name.as_bytes(), b"\0"].concat());
        let value = if *on { attribute(3, &[]) } else { Vec::new() };
        attribute(1 | NESTED, &[name, value].concat())
    });
    let bits = attribute(3 | NESTED, &bits.collect::<Vec<_>>());
    let header = attribute(1 | NESTED, &attribute(2, &[device.as_bytes(), b"\0"].concat()));
    // ETHTOOL_MSG_FEATURES_SET with ETHTOOL_A_FEATURES_HEADER and ETHTOOL_A_FEATURES_WANTED.
    ask(&netlink, id, 12, &[header, attribute(3 | NESTED, &bits)].concat());
}

/// Sends a request, and gives the attributes of the answer, if there is one.
fn ask(netlink: &OwnedFd, family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    message.extend((20 + attributes.len() as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(ACKNOWLEDGED.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    send(netlink.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
    let mut answer = Vec::new();
    loop {
        let mut buffer = vec![0; 1 << 16];
        let len = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        let mut rest = &buffer[..len];
        while rest.len() >= 16 {
            let len = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            if kind == ERROR {
                let code = i32::from_ne_bytes(rest[16..20].try_into().unwrap());
                assert_eq!(code, 0, "ethtool: {}", std::io::Error::from_raw_os_error(-code));
                return answer;
            }
            answer.extend(rest.get(20..len).unwrap_or(&[]));
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut attribute = (4 + value.len() as u16).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<Vec<u8>> {
    while let [a, b, c, d, ..] = *attributes {
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        if kind == wanted {
            return attributes.get(4..len).map(<[u8]>::to_vec);
        }
        attributes = attributes.get(len.max(4).next_multiple_of(4)..)?;
    }
    None
}
