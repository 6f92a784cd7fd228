//! The kernel's objects as it sends them, for comparison byte for byte: iproute2 omits attributes.

use std::io;

use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlasIterator};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::{Context, Error, Namespace};

/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// An object as the kernel sent it.
pub(super) struct Sent {
    pub(super) message: RouteNetlinkMessage,
    /// Everything after the netlink header.
    body: Vec<u8>,
}

/// The stable parts of an object's message: its fixed part, and all attributes except the volatile ones.
pub(super) struct Stable {
    pub(super) fixed: usize,
    pub(super) volatile: &'static [u16],
}

impl Sent {
    /// Returns the stable bytes.
    pub(super) fn bytes(&self, stable: &Stable) -> Result<Vec<u8>, Error> {
        let (fixed, attributes) = self.body.split_at(stable.fixed.min(self.body.len()));
        let mut bytes = fixed.to_vec();
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute.map_err(|error| Error::new(format!("an attribute: {error}")))?;
            if !stable.volatile.contains(&attribute.kind()) {
                bytes.extend(attribute.kind().to_ne_bytes());
                bytes.extend((attribute.value().len() as u32).to_ne_bytes());
                bytes.extend(attribute.value());
            }
        }
        Ok(bytes)
    }
}

/// Returns all objects for a request of this kind.
pub(super) fn dump(ns: &Namespace, request: RouteNetlinkMessage) -> Result<Vec<Sent>, Error> {
    ns.run(|| exchange(request))?.context(|| format!("{}: dumping the kernel's objects", ns.name()))
}

fn exchange(request: RouteNetlinkMessage) -> io::Result<Vec<Sent>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let mut sent = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
            let len = message.header.length as usize;
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(sent),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => {
                    sent.push(Sent { message, body: rest.get(HEADER..len).unwrap_or_default().to_vec() });
                }
                _ => {}
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
