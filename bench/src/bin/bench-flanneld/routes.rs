//! When peers' routes came to be, told by the kernel: looking would be too slow, and in the way.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};

use bench::Error;

/// `RTMGRP_IPV4_ROUTE` of rtnetlink(7).
const ROUTES: u32 = 0x40;
/// Room for the notifications of all peers at once.
const ROOM: usize = 256 << 20;

/// Since when there is a route to each subnet, in the namespace of whoever made this.
pub(crate) struct Routes {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Default)]
struct Seen {
    since: BTreeMap<Ipv4Addr, Instant>,
    failed: Option<Errno>,
    is_over: bool,
}

impl Routes {
    /// Listens from now on; peers' subnets have this length.
    pub(crate) fn listen(length: u8) -> Result<Self, Error> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(0, 100_000))?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, ROUTES))?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || follow(&socket, length, &theirs));
        Ok(Self { shared })
    }

    /// Waits until there are `count` routes; since when.
    pub(crate) fn until(&self, count: usize, patience: Duration) -> Result<Instant, Error> {
        self.wait(patience, |seen| {
            let all = seen.since.len() >= count;
            all.then(|| seen.since.values().max().copied()).flatten()
        })
    }

    /// Waits for the route to one subnet; since when.
    pub(crate) fn until_to(&self, subnet: Ipv4Addr, patience: Duration) -> Result<Instant, Error> {
        self.wait(patience, |seen| seen.since.get(&subnet).copied())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.shared.lock().since.len()
    }

    fn wait<T>(&self, patience: Duration, reached: impl Fn(&Seen) -> Option<T>) -> Result<T, Error> {
        let end = Instant::now() + patience;
        let mut seen = self.shared.lock();
        loop {
            if let Some(errno) = seen.failed {
                return Err(format!("the kernel's notifications were lost: {errno}").into());
            }
            if let Some(reached) = reached(&seen) {
                return Ok(reached);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("{} routes after {patience:?}", seen.since.len()).into());
            }
            seen = self.shared.changed.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn follow(socket: &OwnedFd, length: u8, shared: &Shared) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let received = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty());
        let now = Instant::now();
        let mut seen = shared.lock();
        match received {
            Ok(bytes) => take(&buffer[..bytes], length, now, &mut seen),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => seen.failed = Some(errno),
        }
        let is_over = seen.is_over || seen.failed.is_some();
        drop(seen);
        shared.changed.notify_all();
        if is_over {
            return;
        }
    }
}

fn take(mut bytes: &[u8], length: u8, now: Instant, seen: &mut Seen) {
    while let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
        let size = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                if let Some(subnet) = subnet(&route, length) {
                    seen.since.entry(subnet).or_insert(now);
                }
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route)) => {
                if let Some(subnet) = subnet(&route, length) {
                    seen.since.remove(&subnet);
                }
            }
            _ => {}
        }
        let Some(rest) = bytes.get(size..).filter(|rest| !rest.is_empty()) else { return };
        bytes = rest;
    }
}

fn subnet(route: &rtnetlink::packet_route::route::RouteMessage, length: u8) -> Option<Ipv4Addr> {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(addr)) => Some(*addr),
        _ => None,
    });
    destination.filter(|_| route.header.destination_prefix_length == length)
}
