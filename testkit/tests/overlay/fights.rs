//! Somebody changes one thing again and again. Whatever does not stand on it heals meanwhile, and it does once they
//! stop.

use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use flannel_core::clock::{BootTime, Clock, SystemClock};
use flannel_core::lease::Lease;
use flannel_core::net::{Family, MacAddr};
use flannel_core::overlay::{HeldBecause, Phase};
use testkit::sabotage::Plane;
use testkit::{Error, Families, Fdb, Namespace, Neighbour, Route, cases, wait_until};

use crate::support::{Cluster, PATIENCE, objects};

/// How often it is changed.
const EVERY: Duration = Duration::from_millis(300);
/// The longest time for which the agent leaves alone what flaps.
const LONGEST: Duration = Duration::from_secs(30);
/// How many clusters share the fights.
const CLUSTERS: usize = 6;
const DEVICE: &str = "flannel.1";
const RENAMED: &str = "theirs0";

/// What is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fight {
    Name,
    Down,
    Mtu,
    Mac,
    Group,
    Alias,
    Learning,
    Remote,
    ArpOffOn,
    Address,
    OtherLength,
    FurtherAddress,
    Neighbour,
    NeighbourMac,
    NeighbourState,
    FurtherNeighbour,
    Fdb,
    FdbDestination,
    FurtherFdb,
    Route,
    RouteGateway,
    RouteDevice,
    RouteOnlink,
    RouteBlackhole,
    FurtherRoute,
}

impl Fight {
    const OVER_ROUTES: [Self; 6] = [
        Self::Route,
        Self::RouteGateway,
        Self::RouteDevice,
        Self::RouteOnlink,
        Self::RouteBlackhole,
        Self::FurtherRoute,
    ];
    const OVER_DEVICES: [Self; 19] = [
        Self::Name,
        Self::Down,
        Self::Mtu,
        Self::Mac,
        Self::Group,
        Self::Alias,
        Self::Learning,
        Self::Remote,
        Self::ArpOffOn,
        Self::Address,
        Self::OtherLength,
        Self::FurtherAddress,
        Self::Neighbour,
        Self::NeighbourMac,
        Self::NeighbourState,
        Self::FurtherNeighbour,
        Self::Fdb,
        Self::FdbDestination,
        Self::FurtherFdb,
    ];

    fn all(plane: Plane) -> Vec<Self> {
        match plane {
            Plane::Vxlan => [&Self::OVER_DEVICES[..], &Self::OVER_ROUTES].concat(),
            Plane::HostGw => Self::OVER_ROUTES.to_vec(),
            // A peer has nothing in the kernel, and devices are fought over alike.
            Plane::Udp => Vec::new(),
        }
    }

    /// Whether the kernel takes peers' objects along.
    fn takes_peers_along(self) -> bool {
        matches!(self, Self::Down | Self::Mac | Self::ArpOffOn | Self::Address)
    }
}

/// Where a fight goes on.
struct Field<'a> {
    ns: &'a Namespace,
    plane: Plane,
    /// The node's own lease.
    own: &'a Lease,
    /// The peer whose objects are changed, of which each fight has another.
    victim: &'a Lease,
}

impl Field<'_> {
    /// Changes it. Where it is changed already, or the kernel refuses, nothing happens.
    fn spoil(&self, fight: Fight) -> Result<(), Error> {
        let ns = self.ns;
        let subnet = self.victim.subnets.v4.unwrap();
        let (own, other) = (self.own.subnets.v4.unwrap().addr(), "10.244.240.0".parse().unwrap());
        let mac = MacAddr([0x02, 0xee, 0, 0, 0, 1]);
        let elsewhere = "10.89.250.1".parse().unwrap();
        match fight {
            Fight::Name => ns.set_link(DEVICE, &format!("name {RENAMED}")),
            Fight::Down => ns.set_down(DEVICE),
            Fight::Mtu => ns.set_mtu(DEVICE, 1300),
            Fight::Mac => ns.set_mac(DEVICE, mac),
            Fight::Group => ns.set_link(DEVICE, "group 7"),
            Fight::Alias => ns.set_alias(DEVICE, "theirs"),
            Fight::Learning => ns.set_link(DEVICE, "type vxlan learning"),
            Fight::Remote => ns.set_link(DEVICE, &format!("type vxlan remote {elsewhere}")),
            Fight::ArpOffOn => ns.set_link(DEVICE, "arp off").and_then(|()| ns.set_link(DEVICE, "arp on")),
            Fight::Address => ns.delete_address(DEVICE, own, 32),
            Fight::OtherLength => ns.add_address(DEVICE, own, 24),
            Fight::FurtherAddress => ns.add_address(DEVICE, other, 32),
            Fight::Neighbour => ns.delete_neighbour(&self.neighbour()?),
            Fight::NeighbourMac => ns.put_neighbours(&[Neighbour { mac: Some(mac), ..self.neighbour()? }]),
            Fight::NeighbourState => ns.put_neighbours(&[Neighbour { state: "stale".to_owned(), ..self.neighbour()? }]),
            Fight::FurtherNeighbour => ns.put_neighbours(&[Neighbour::permanent(DEVICE, other, mac)]),
            Fight::Fdb => ns.delete_fdb(&self.fdb()?),
            Fight::FdbDestination => ns.put_fdb(&[Fdb { dst: Some(elsewhere), ..self.fdb()? }]),
            Fight::FurtherFdb => ns.put_fdb(&[Fdb::permanent(DEVICE, mac, elsewhere)]),
            Fight::Route => ns.delete_route(&self.route()?),
            Fight::RouteGateway => {
                let via = if self.plane == Plane::Vxlan { other } else { elsewhere };
                ns.replace_route(&Route { via: Some(via), ..self.route()? })
            }
            Fight::RouteDevice => {
                let dev = if self.plane == Plane::Vxlan { testkit::UNDERLAY_LINK } else { "cni0" };
                ns.replace_route(&self.route()?.dev(dev).onlink())
            }
            Fight::RouteOnlink => {
                let route = self.route()?;
                // Away from what is wanted, never back to it.
                let changed = if self.plane == Plane::Vxlan {
                    // The kernel takes it without where it knows the way to the next hop.
                    let near = Route::to(flannel_core::net::Prefix::host(subnet.addr())).dev(DEVICE).metric(9);
                    ns.replace_route(&near.scope(Route::LINK))?;
                    Route { flags: Vec::new(), ..route }
                } else {
                    route.onlink()
                };
                ns.replace_route(&changed)
            }
            Fight::RouteBlackhole => {
                let route = self.route()?;
                ns.replace_route(&Route::to(route.to).protocol(route.protocol).kind("blackhole"))
            }
            Fight::FurtherRoute => {
                let to = "10.244.240.0/24".parse().unwrap();
                ns.add_route(&Route { to, ..self.route()? })
            }
        }
    }

    fn route(&self) -> Result<Route, Error> {
        let to = self.victim.subnets.v4.unwrap();
        let found = self.ns.routes(Family::V4)?.into_iter().find(|it| it.to == to && it.via.is_some());
        found.ok_or_else(|| Error::new(format!("no route to {to}")))
    }

    fn neighbour(&self) -> Result<Neighbour, Error> {
        let addr = self.victim.subnets.v4.unwrap().addr();
        let found = self.ns.neighbours()?.into_iter().find(|it| is_device(&it.dev) && it.addr == addr);
        found.ok_or_else(|| Error::new(format!("no neighbour {addr}")))
    }

    fn fdb(&self) -> Result<Fdb, Error> {
        let addr = self.victim.attrs.public_ip.v4;
        let found = self.ns.fdb()?.into_iter().find(|it| is_device(&it.dev) && it.dst == addr);
        found.ok_or_else(|| Error::new(format!("no forwarding entry to {addr:?}")))
    }

    /// Deletes all that is the victim's.
    fn delete(&self) -> Result<(), Error> {
        self.ns.delete_route(&self.route()?)?;
        if self.plane == Plane::Vxlan {
            self.ns.delete_neighbour(&self.neighbour()?)?;
            self.ns.delete_fdb(&self.fdb()?)?;
        }
        Ok(())
    }
}

cases! {
    fn whatever_is_fought_over_on_vxlan_keeps_nothing_else_from_healing() = fight_over_all(Plane::Vxlan);
    fn whatever_is_fought_over_on_host_gw_keeps_nothing_else_from_healing() = fight_over_all(Plane::HostGw);
}

fn fight_over_all(plane: Plane) {
    let fights: Vec<(u8, Fight)> = (1..).zip(Fight::all(plane)).collect();
    std::thread::scope(|scope| {
        let shares = fights.chunks(fights.len().div_ceil(CLUSTERS));
        let shares: Vec<_> = shares.map(|share| scope.spawn(move || fight_over(plane, share))).collect();
        for share in shares {
            share.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
}

fn fight_over(plane: Plane, fights: &[(u8, Fight)]) {
    let cluster = Cluster::start(2, plane, Families::V4);
    // Each fight has peers of its own: what one fight did too often is left alone for a while.
    let peers = fights.iter().map(|(n, _)| [60 + n, 100 + n].map(|n| cluster.paper_peer(n)));
    let peers: Vec<[Lease; 2]> = peers.collect();
    cluster.store.insert(peers.iter().flatten().cloned());
    cluster.settle();
    let clock = SystemClock::default();
    let (before, own) = (cluster.objects(0), cluster.lease(0));
    let field = |victim| Field { ns: cluster.ns(0), plane, own: &own, victim };
    for ((_, fight), [victim, bystander]) in fights.iter().zip(&peers) {
        let beside = field(bystander);
        let wanted: Vec<_> = before.0.iter().filter(|text| is_of(bystander, text)).collect();
        assert_eq!(wanted.len(), if plane == Plane::Vxlan { 3 } else { 1 }, "{before:?}");
        let (acts, (stop, stopped)) = (AtomicUsize::new(0), mpsc::channel::<()>());
        let show = |error: &dyn std::fmt::Display| format!("{plane:?} {fight:?}: {error}\n{}", cluster.show(0));
        std::thread::scope(|scope| {
            let (field, acts) = (field(victim), &acts);
            scope.spawn(move || {
                // Until the other end is dropped.
                while stopped.recv_timeout(EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                    acts.fetch_add(usize::from(field.spoil(*fight).is_ok()), Ordering::Relaxed);
                }
            });
            let _stop = stop;
            let wait = |what, reached: &mut dyn FnMut() -> bool| {
                // What flaps is tried at most every half minute: several such waits may have to pass on a busy machine.
                let waited = wait_until(what, 18 * PATIENCE, || Ok(reached()));
                waited.unwrap_or_else(|error| panic!("{}", show(&error)));
            };
            wait("an act", &mut || acts.load(Ordering::Relaxed) > 0);
            if fight.takes_peers_along() {
                return;
            }
            // Once at first, and once while what is fought over waits: then nothing else may wait with it.
            wait("damage", &mut || beside.delete().is_ok());
            wait("what the fight is not about", &mut || is_whole(&cluster, &wanted));
            // An attempt that comes too late asks for twice the time: damage of the test's own that came ten times in ten
            // seconds would be a fight too.
            let mut time = Duration::from_millis(500);
            wait("something else to heal before what flaps is tried again", &mut || {
                let Some(until) = left_alone(&cluster).filter(|until| until.since(clock.now()) >= time) else {
                    return false;
                };
                time = (2 * time).min(LONGEST / 2);
                beside.delete().is_ok() && {
                    wait("a look", &mut || is_whole(&cluster, &wanted) || left_alone(&cluster) != Some(until));
                    is_whole(&cluster, &wanted) && left_alone(&cluster) == Some(until)
                }
            });
        });
        wait_until("peace", 6 * PATIENCE, || Ok(cluster.objects(0) == before)).unwrap_or_else(|error| {
            let now = cluster.objects(0);
            let missing: Vec<_> = before.0.difference(&now.0).collect();
            let extra: Vec<_> = now.0.difference(&before.0).collect();
            panic!("{}\nmissing {missing:#?}\nunwanted {extra:#?}", show(&error));
        });
        let status = cluster.status(0);
        assert_eq!((status.phase, &status.conflicts[..]), (Phase::Ready, &[][..]), "{}", show(&""));
    }
    cluster.converged(0);
    cluster.assert_traffic(0, 1);
    cluster.assert_traffic(1, 0);
}

fn is_device(name: &str) -> bool {
    [DEVICE, RENAMED].contains(&name)
}

/// Whether a line is about a peer's route, neighbour or forwarding entry.
fn is_of(peer: &Lease, text: &str) -> bool {
    let (subnet, public) = (peer.subnets.v4.unwrap(), peer.attrs.public_ip.v4.unwrap());
    let starts = [format!("route {subnet} "), format!("neighbour {} ", subnet.addr())];
    starts.iter().any(|start| text.starts_with(start)) || text.contains(&format!(" dst {public} "))
}

/// Whether all of these lines are true of the kernel, whatever the device is called.
fn is_whole(cluster: &Cluster, wanted: &[&String]) -> bool {
    let devices = [DEVICE, RENAMED].map(str::to_owned);
    let now = objects(cluster.ns(0), &devices, &cluster.target().networks);
    let now: BTreeSet<_> = now.0.iter().map(|text| text.replace(RENAMED, DEVICE)).collect();
    wanted.iter().all(|text| now.contains(*text))
}

/// Until when something is left alone because somebody keeps changing it.
fn left_alone(cluster: &Cluster) -> Option<BootTime> {
    let held = cluster.preview(0).held;
    held.iter().find_map(|held| match held.because {
        HeldBecause::Flapping(until) => Some(until),
        _ => None,
    })
}
