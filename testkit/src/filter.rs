//! A lab for packet filters: the source address that the receiver of a datagram sees shows what the filter did.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flannel_core::firewall::Rules;
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family, Mtu, Prefix};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{Context, Error, Families, Namespace, Node, Pod, PodNet, Route, UNDERLAY_LINK, Underlay, wait_until};

/// Two nodes with a pod each. They reach each other's pods by routes through the underlay, as with host-gw. The filter
/// under test is on the first node.
#[derive(Debug)]
pub struct FilterLab {
    underlay: Underlay,
    pods: Vec<Pod>,
    families: Families,
}

impl FilterLab {
    /// Creates the lab.
    ///
    /// # Errors
    /// As [`Underlay::new`].
    pub fn new(families: Families) -> Result<Self, Error> {
        let underlay = Underlay::new(2, families)?;
        let nodes = underlay.nodes();
        let mut pods = Vec::new();
        for (nth, node) in (1..).zip(nodes) {
            pods.push(node.attach_pod(&PodNet { subnets: subnets(families, nth)?, mtu: Mtu(1500) })?);
        }
        for (family, addr) in nodes[0].addrs.iter() {
            let other = nodes[1].addr(family)?;
            let hop = |from: &Namespace, dev: &str, nth, via| {
                let Some(to) = *subnets(families, nth)?.slot(family) else { return Ok(()) };
                from.add_route(&Route::to(to).via(via).dev(dev))
            };
            hop(&nodes[0].ns, UNDERLAY_LINK, 2, other)?;
            hop(&nodes[1].ns, UNDERLAY_LINK, 1, *addr)?;
            hop(underlay.switch(), "br0", 1, *addr)?;
            nodes[0].ns.add_address("lo", second_address(family), family.bits())?;
        }
        Ok(Self { underlay, pods, families })
    }

    /// Returns the node whose filter is tested.
    pub fn node(&self) -> &Node {
        &self.underlay.nodes()[0]
    }

    /// Returns the first node's pod.
    pub fn pod(&self) -> &Pod {
        &self.pods[0]
    }

    /// Returns the other node.
    pub fn peer(&self) -> &Node {
        &self.underlay.nodes()[1]
    }

    /// Returns the other node's pod.
    pub fn peer_pod(&self) -> &Pod {
        &self.pods[1]
    }

    /// Returns the namespace outside of the cluster.
    pub fn outside(&self) -> &Namespace {
        self.underlay.switch()
    }

    /// Returns the rules of the first node, with forward rules only.
    ///
    /// # Errors
    /// Never, in practice.
    pub fn rules(&self, overlay: OverlayName) -> Result<Rules, Error> {
        let network = |family, _: &_| match family {
            Family::V4 => "10.244.0.0/16".parse::<Prefix>(),
            Family::V6 => "fd00:244::/48".parse(),
        };
        let subnets = subnets(self.families, 1)?;
        let mut networks = Dual::default();
        for (family, subnet) in subnets.iter() {
            *networks.slot(family) = Some(network(family, subnet).map_err(|error| Error::new(error.to_string()))?);
        }
        Ok(Rules::new(overlay, &networks, &subnets))
    }
}

/// Returns the address outside of the cluster.
pub fn outside_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 89, 0, 1]),
        Family::V6 => IpAddr::from([0xfd00, 0x89, 0, 0, 0, 0, 0, 1]),
    }
}

/// Returns another address of the first node, which a masquerade on the way out replaces.
pub fn second_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([192, 0, 2, 1]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    }
}

fn subnets(families: Families, nth: u8) -> Result<Dual<Prefix>, Error> {
    let mut subnets = Dual::default();
    for family in Family::BOTH.into_iter().filter(|family| families.has(*family)) {
        let text = match family {
            Family::V4 => format!("10.244.{nth}.0/24"),
            Family::V6 => format!("fd00:244:0:{nth}::/64"),
        };
        *subnets.slot(family) = Some(text.parse().map_err(|_| Error::new(text))?);
    }
    Ok(subnets)
}

/// A datagram to be sent.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    /// The sending namespace.
    pub from: &'a Namespace,
    /// The requested source address; `None` for the kernel's choice.
    pub source: Option<IpAddr>,
    /// The packet's mark; 0 for none.
    pub mark: u32,
    /// The receiving namespace.
    pub to: &'a Namespace,
    /// The destination address.
    pub addr: IpAddr,
    /// The destination port; 0 for any.
    pub port: u16,
}

impl<'a> Datagram<'a> {
    /// Creates a datagram with default settings.
    pub fn new(from: &'a Namespace, to: &'a Namespace, addr: IpAddr) -> Self {
        Self { from, source: None, mark: 0, to, addr, port: 0 }
    }

    /// Sends the datagram. Returns the source address that the receiver sees, or `None` if it does not arrive within
    /// `patience`.
    ///
    /// # Errors
    /// If a socket cannot be opened. A refusal to send is not an error: the datagram does not arrive then.
    pub fn sender_seen(self, patience: Duration) -> Result<Option<IpAddr>, Error> {
        let what = || format!("datagram from {} to {}", self.from.name(), self.addr);
        let inbox = bind(self.to, (self.addr, self.port))?.context(what)?;
        inbox.set_read_timeout(Some(patience)).context(what)?;
        let target = inbox.local_addr().context(what)?;
        let any = self.source.unwrap_or_else(|| unspecified(self.addr));
        let outbox = self.from.run(|| UdpSocket::bind((any, 0)))?.context(what)?;
        if self.mark != 0 {
            setsockopt(&outbox, sockopt::Mark, &self.mark).context(what)?;
        }
        if outbox.send_to(b"datagram", target).is_err() {
            return Ok(None);
        }
        loop {
            match inbox.recv_from(&mut [0; 16]) {
                Ok((_, sender)) => return Ok(Some(sender.ip())),
                // When a tool ends that another thread started, its signal interrupts a wait with a timeout
                // (signal(7)).
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(error) => return Err(Error::io(what(), error)),
            }
        }
    }
}

/// Binds a socket to an address that may have been in use a moment ago: a program that is being started holds a copy of
/// the old socket until it runs.
fn bind(ns: &Namespace, addr: (IpAddr, u16)) -> Result<io::Result<UdpSocket>, Error> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match ns.run(|| UdpSocket::bind(addr))? {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(1));
            }
            outcome => return Ok(outcome),
        }
    }
}

fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    }
}

/// Datagrams, each from its own socket, so that each is a new connection to the filter.
pub struct Newcomers {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<Result<io::Result<()>, Error>>,
    receiver: JoinHandle<Result<io::Result<BTreeMap<IpAddr, u64>>, Error>>,
}

impl Newcomers {
    /// Starts one datagram per millisecond from `from` to `addr`, which is in `to`.
    ///
    /// # Errors
    /// If a socket cannot be opened or bound there.
    pub fn start(from: &Namespace, to: &Namespace, addr: IpAddr) -> Result<Self, Error> {
        const STEP: Duration = Duration::from_millis(1);
        let what = || format!("datagrams from {} to {addr}", from.name());
        let inbox = to.run(|| UdpSocket::bind((addr, 0)))?.context(what)?;
        inbox.set_read_timeout(Some(Duration::from_millis(300))).context(what)?;
        crate::probe::roomy(&inbox).context(what)?;
        let target = inbox.local_addr().context(what)?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sender = {
            let (stop, sent) = (stop.clone(), sent.clone());
            from.spawn(move || {
                let start = Instant::now();
                let mut nth = 0;
                while !stop.load(Ordering::Relaxed) {
                    UdpSocket::bind((unspecified(addr), 0))?.send_to(b"datagram", target)?;
                    nth += 1;
                    sent.store(nth.into(), Ordering::Relaxed);
                    thread::sleep((STEP * nth).saturating_sub(start.elapsed()));
                }
                Ok(())
            })?
        };
        let receiver = {
            let stop = stop.clone();
            to.spawn(move || {
                let mut seen = BTreeMap::new();
                loop {
                    match inbox.recv_from(&mut [0; 16]) {
                        Ok((_, sender)) => *seen.entry(sender.ip()).or_default() += 1,
                        Err(error) => match error.kind() {
                            ErrorKind::Interrupted => {}
                            ErrorKind::WouldBlock | ErrorKind::TimedOut if stop.load(Ordering::Relaxed) => {
                                return Ok(seen);
                            }
                            ErrorKind::WouldBlock | ErrorKind::TimedOut => {}
                            _ => return Err(error),
                        },
                    }
                }
            })?
        };
        Ok(Self { stop, sent, sender, receiver })
    }

    /// Waits until this many more have been sent.
    ///
    /// # Errors
    /// If that does not happen.
    pub fn await_more(&self, count: u64) -> Result<(), Error> {
        let until = self.sent.load(Ordering::Relaxed) + count;
        let done = || Ok(self.sent.load(Ordering::Relaxed) >= until);
        wait_until("datagrams", Duration::from_secs(30), done).map(|_| ())
    }

    /// Ends the stream. Returns how many were sent, and how many arrived from each source address.
    ///
    /// # Errors
    /// If one of its threads failed.
    pub fn stop(self) -> Result<(u64, BTreeMap<IpAddr, u64>), Error> {
        self.stop.store(true, Ordering::Relaxed);
        let died = |_| Error::new("a thread of the newcomers probe died");
        self.sender.join().map_err(died)??.context(|| "sending datagrams".to_owned())?;
        let seen = self.receiver.join().map_err(died)??.context(|| "receiving datagrams".to_owned())?;
        Ok((self.sent.load(Ordering::Relaxed), seen))
    }
}
