//! The conditions that hold at every step.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::clock::Clock;
use flannel_core::lease::Lease;
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::overlay::Status;
use flannel_core::testing::fake_kernel::Snapshot;
use futures_util::FutureExt;
use tokio::task::unconstrained;

use crate::host::{Agent, Host};
use crate::network::device;
use crate::world::World;

/// The time after the last event and the last act by which a kernel must match its ready agent. A change of addresses
/// waits for 3 s, an audit for 200 ms.
const CALM: Duration = Duration::from_secs(5);

impl World {
    pub(crate) fn check_step(&mut self) {
        let trouble = self
            .shared
            .take_trouble()
            .or_else(|| self.stories())
            .or_else(|| self.overlaps())
            .or_else(|| self.changed_records())
            .or_else(|| self.kernels())
            .or_else(|| self.moved());
        if let Some(trouble) = trouble {
            panic!("{}: {trouble}", self.when);
        }
    }

    /// I2, I3 and I16, as far as the agents report.
    fn stories(&mut self) -> Option<String> {
        self.hosts.iter_mut().find_map(|host| {
            let now = host.clock.now();
            let Agent { running, story, .. } = host.agent.as_mut()?;
            let mut trouble = None;
            // All of them: within its budget, tokio would hold some back.
            while let Some(event) = unconstrained(running.events.next()).now_or_never().flatten() {
                host.stirred = now;
                let told = story.tell(event, now);
                trouble = trouble.or(told);
            }
            let trouble = trouble.or_else(|| story.check(&running.handle.status()));
            trouble.map(|trouble| format!("host {}: {trouble}", host.number))
        })
    }

    /// I1: no two nodes hold overlapping subnets. A node that has just slept may not have detected yet that its lease
    /// has expired.
    fn overlaps(&self) -> Option<String> {
        let held = |host: &Host| {
            let lease = host.lease()?;
            let over = lease.expires.is_some_and(|expires| expires <= host.clock.now());
            (!(over && host.clock.is_drowsy())).then_some((host.number, lease.subnets))
        };
        let held: Vec<(usize, Dual<Prefix>)> = self.hosts.iter().filter_map(held).collect();
        for (nth, (host, subnets)) in held.iter().enumerate() {
            for (family, subnet) in subnets.iter() {
                let overlaps =
                    |(_, theirs): &&(usize, Dual<Prefix>)| theirs.get(family).is_some_and(|it| it.overlaps(subnet));
                if let Some((other, theirs)) = held[..nth].iter().find(overlaps) {
                    return Some(format!("host {host} holds {subnet} and host {other} holds {theirs:?}"));
                }
            }
        }
        None
    }

    /// I2, for records of Go flannel's nodes.
    fn changed_records(&self) -> Option<String> {
        if self.go.is_empty() {
            return None;
        }
        let records = self.store.records();
        self.go.iter().find_map(|(key, lease)| {
            let found = records.iter().find(|record| record.key == *key).and_then(|record| record.lease.as_ref().ok());
            // If one of the agents took it, its expiry would change.
            let same = found.is_some_and(|found| Lease::clone(found).fenced(lease.fence.clone()) == *lease);
            (!same).then(|| format!("the record of Go node {key} is {found:?}"))
        })
    }

    /// I6, I16 and I18, for the kernels that have changed, or whose agents have.
    fn kernels(&mut self) -> Option<String> {
        let widest = self.setting.networks();
        self.hosts.iter_mut().find_map(|host| {
            let (status, now) = (host.status(), host.clock.now());
            let lease = status.as_ref().and_then(|status| status.lease.clone());
            let calm = !host.clock.is_asleep() && now.since(host.stirred) >= CALM;
            let is = (host.kernel.changes(), lease, calm && host.is_ready());
            if host.checked.as_ref() == Some(&is) {
                return None;
            }
            let snapshot = host.kernel.snapshot();
            host.look_for_harm(&snapshot);
            let trouble = host
                .harm()
                .or_else(|| stray_routes(host, &snapshot, &widest, is.1.as_deref()))
                .or_else(|| status.filter(|_| is.2).and_then(|status| not_ready(&snapshot, &status)));
            host.checked = Some(is);
            trouble.map(|trouble| format!("host {}: {trouble}", host.number))
        })
    }

    /// A host that still has the address in use uses no other, whatever addresses are added, unless a node of Go
    /// flannel has published that address meanwhile. The published address follows as soon as the store accepts it.
    fn moved(&mut self) -> Option<String> {
        let go = &self.go;
        let is_go =
            |addr: &IpAddr| go.values().any(|lease| lease.attrs.public_ip.iter().any(|(_, public)| public == addr));
        for host in &mut self.hosts {
            let status = host.status();
            if let Some(lease) = status.as_ref().and_then(|status| status.lease.clone()) {
                host.published = lease.attrs.public_ip;
            } else if !host.families.iter().any(|family| host.kernel.link_index(device(*family)).is_some()) {
                // Nothing on the host shows what it used and published.
                (host.published, host.used) = (Dual::default(), Dual::default());
            }
            // An agent that starts while the host lacks the address uses another one, which nothing shows before there
            // is a lease.
            let lacking: Vec<Family> = host.used.iter().filter(|(_, addr)| !host.has(**addr)).map(|it| it.0).collect();
            for family in lacking {
                *host.used.slot(family) = None;
            }
            let Some(used) = status.and_then(|status| status.uplink.up().map(|uplink| uplink.addrs)) else {
                continue;
            };
            let before = std::mem::replace(&mut host.used, used);
            for (family, addr) in used.iter() {
                match before.get(family).filter(|before| *before != addr) {
                    Some(before) if !is_go(before) && host.has(*before) => {
                        return Some(format!("host {} has {before} and uses {addr}", host.number));
                    }
                    _ => {}
                }
            }
        }
        None
    }
}

/// I18: the overlay's routes lie in the network, do not overlap each other, and do not overlap the own subnet.
fn stray_routes(host: &Host, snapshot: &Snapshot, networks: &Dual<Prefix>, lease: Option<&Lease>) -> Option<String> {
    networks.iter().find_map(|(family, network)| {
        let own = lease.and_then(|lease| lease.subnets.get(family).copied());
        let routes = peer_routes(snapshot, family);
        let stray = routes.iter().enumerate().find(|(nth, route)| {
            !network.covers(route)
                || **route == *network
                || routes[..*nth].iter().any(|other| other.overlaps(route))
                // A lease that was just acquired is not in the kernel yet.
                || (host.is_ready() && own.is_some_and(|own| own.overlaps(route)))
        });
        stray.map(|(_, route)| format!("there is a route to {route}, own {own:?}: {routes:?}"))
    })
}

/// I16, in the kernel: an undisturbed host that is ready has its devices and a route to each peer.
fn not_ready(snapshot: &Snapshot, status: &Arc<Status>) -> Option<String> {
    let lease = status.lease.as_ref()?;
    for (family, subnet) in lease.subnets.iter() {
        // While the store is unavailable, the address in use is not published yet.
        let used = status.uplink.up().and_then(|uplink| uplink.addrs.get(family));
        let public = used.or_else(|| lease.attrs.public_ip.get(family))?;
        if vtep_mac(snapshot, family, *public).is_none() {
            return Some(format!("is ready without a device at {public}: {status:#?}\n{snapshot}"));
        }
        let line = format!("addr {} dev {}", Prefix::host(subnet.addr()), device(family));
        if snapshot.matching(&line).is_empty() {
            return Some(format!("is ready without {line}"));
        }
        let routes = peer_routes(snapshot, family).len();
        let counts = status.peers;
        if routes != counts.accepted - counts.skipped && status.withheld.is_empty() {
            return Some(format!("is ready with {routes} routes of {family}: {status:#?}\n{snapshot}"));
        }
    }
    None
}

/// Returns the destinations of the overlay's routes through the device of a family.
pub(crate) fn peer_routes(snapshot: &Snapshot, family: Family) -> Vec<Prefix> {
    let routes = snapshot.matching(&format!(" dev {} ", device(family)));
    let prefix = |line: &&str| line.strip_prefix("route ")?.split(' ').next()?.parse().ok();
    routes.iter().filter_map(prefix).collect()
}

/// Returns the MAC address of the device of a family, if the device is up and sends from `public`.
pub(crate) fn vtep_mac(snapshot: &Snapshot, family: Family, public: IpAddr) -> Option<String> {
    let (device, local) = (format!(": {} up ", device(family)), format!(" local {public} "));
    let lines = snapshot.matching(&device);
    let line = lines.into_iter().find(|line| line.starts_with("link ") && line.contains(&local))?;
    Some(line.split(" address ").nth(1)?.split(' ').next()?.to_owned())
}
