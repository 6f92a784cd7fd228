//! What has to hold.

use flannel_core::lease::Lease;
use flannel_core::net::Prefix;
use flannel_core::overlay::{Event, LossReason, Phase};
use futures_util::FutureExt;

use crate::host::Host;
use crate::world::World;

const DEVICE: &str = "flannel.1";

impl World {
    /// What holds at any time.
    pub(crate) fn check_step(&mut self, step: usize) {
        let trouble = [self.overlaps(), self.lost_leases(), self.changed_records(), self.stray_routes(), self.moved()];
        if let Some(trouble) = trouble.into_iter().flatten().next() {
            let log = self.log[self.log.len().saturating_sub(40)..].join("\n");
            panic!("step {step}: {trouble}\nafter\n{log}\n{}", self.outline());
        }
    }

    /// Who publishes and has what.
    fn outline(&self) -> String {
        let lease = |lease: &Lease| {
            let mac = lease.attrs.backend_data.v4.as_ref().map(|json| json.as_str().to_owned());
            format!("{} at {} {}", lease.key, lease.attrs.public_ip.v4.unwrap(), mac.unwrap_or_default())
        };
        let records = self.store.records().into_iter().filter_map(|record| record.lease.ok());
        let mut lines: Vec<String> = records.map(|it| format!("record {}", lease(&it))).collect();
        lines.extend(self.go.values().map(|it| format!("Go node {}", lease(it))));
        for host in &self.hosts {
            let status = host.status();
            let phase = status.as_ref().map(|status| status.phase);
            let held = status.as_ref().and_then(|status| status.lease.as_deref().map(lease));
            let error = status.and_then(|status| status.last_error.clone());
            let (own, number) = (host.own, host.number);
            lines.push(format!("host {number}: {own}, {:?}, {phase:?}, {held:?}, {error:?}", host.virtuals));
        }
        lines.join("\n")
    }

    /// I1: no two nodes hold what overlaps.
    fn overlaps(&self) -> Option<String> {
        let held: Vec<_> =
            self.hosts.iter().filter_map(|host| Some((host.number, host.lease()?.subnets.v4?))).collect();
        for (nth, (host, subnet)) in held.iter().enumerate() {
            if let Some((other, theirs)) = held[..nth].iter().find(|(_, theirs)| theirs.overlaps(subnet)) {
                return Some(format!("host {host} holds {subnet} and host {other} holds {theirs}"));
            }
        }
        None
    }

    /// I2: nobody deletes or rewrites a record that a node holds. Nothing else here takes a lease away.
    fn lost_leases(&mut self) -> Option<String> {
        for host in &mut self.hosts {
            let Some(agent) = &mut host.agent else { continue };
            while let Some(event) = agent.events.next().now_or_never().flatten() {
                match event {
                    Event::LeaseLost(reason) if reason != LossReason::Expired => {
                        return Some(format!("host {} lost its lease: {reason}", host.number));
                    }
                    _ => {}
                }
            }
        }
        None
    }

    /// I2, for records of nodes whose agent is not ours.
    fn changed_records(&self) -> Option<String> {
        let records = self.store.records();
        self.go.iter().find_map(|(key, lease)| {
            let found = records.iter().find(|record| record.key == *key).and_then(|record| record.lease.as_ref().ok());
            // A node of ours that took it would have it expire.
            let same = found.is_some_and(|found| Lease { fence: lease.fence.clone(), ..(**found).clone() } == *lease);
            (!same).then(|| format!("the record of Go node {key} is {found:?}"))
        })
    }

    /// I18: routes of ours lie in the network, apart from each other and from the own subnet.
    fn stray_routes(&self) -> Option<String> {
        let network: Prefix = "10.42.0.0/16".parse().unwrap();
        self.hosts.iter().find_map(|host| {
            let own = host.lease().and_then(|lease| lease.subnets.v4);
            let routes = host.peer_routes();
            let stray = routes.iter().enumerate().find(|(nth, route)| {
                !network.covers(route)
                    || **route == network
                    || routes[..*nth].iter().any(|other| other.overlaps(route))
                    // A lease that was taken this moment is not in the kernel yet.
                    || (host.is_ready() && own.is_some_and(|own| own.overlaps(route)))
            });
            stray.map(|(_, route)| format!("host {} has a route to {route}, own {own:?}: {routes:?}", host.number))
        })
    }

    /// A host that still has the address it published publishes no other, whatever addresses came beside it.
    fn moved(&mut self) -> Option<String> {
        for host in &mut self.hosts {
            let Some(public) = host.lease().and_then(|lease| lease.attrs.public_ip.v4) else {
                if host.kernel.link_index(DEVICE).is_none() {
                    // Nothing on the host tells what it published.
                    host.published = None;
                }
                continue;
            };
            match host.published.replace(public).filter(|before| *before != public) {
                Some(before) if host.has(before) => {
                    return Some(format!("host {} has {before} and publishes {public}", host.number));
                }
                _ => {}
            }
        }
        None
    }

    /// What holds once it is quiet.
    pub(crate) fn check_quiet(&mut self) {
        self.check_step(usize::MAX);
        let log = self.log[self.log.len().saturating_sub(40)..].join("\n");
        for host in &self.hosts {
            let status = host.status().unwrap();
            assert_eq!((status.phase, status.undone), (Phase::Ready, 0), "host {}: {status:#?}\n{log}", host.number);
            assert_eq!(status.own_trouble, None, "host {}\n{log}", host.number);
        }
        for from in &self.hosts {
            for to in self.hosts.iter().filter(|to| to.number != from.number) {
                if let Some(gap) = gap(from, to) {
                    let (status, records) = (from.status(), self.store.records());
                    panic!(
                        "host {} does not reach host {}: {gap}\n{}\n{}\n{status:#?}\n{records:#?}\n{log}",
                        from.number,
                        to.number,
                        from.kernel.snapshot(),
                        to.kernel.snapshot()
                    );
                }
            }
            for (key, lease) in &self.go {
                let subnet = lease.subnets.v4.unwrap();
                let public = lease.attrs.public_ip.v4.unwrap();
                // Its address may be this very host's by now.
                let there = from.peer_routes().contains(&subnet);
                assert!(there || from.has(public), "host {} has no route to Go node {key}\n{log}", from.number);
            }
        }
    }
}

/// What is missing on the way of a packet from one host to a pod of another.
fn gap(from: &Host, to: &Host) -> Option<String> {
    let lease = to.lease()?;
    let (subnet, public) = (lease.subnets.v4?, lease.attrs.public_ip.v4?);
    let (here, there) = (from.kernel.snapshot(), to.kernel.snapshot());
    if !to.has(public) {
        return Some(format!("{public} is published and not an address of the host"));
    }
    let device = |host: &Host, lines: Vec<&str>| {
        let public = host.lease()?.attrs.public_ip.v4?;
        let local = format!(" local {public} ");
        let line = lines.into_iter().find(|line| line.starts_with("link ") && line.contains(&local))?;
        let mac = line.split(" address ").nth(1)?.split(' ').next()?;
        Some(mac.to_owned())
    };
    let Some(mac) = device(to, there.matching(DEVICE)) else { return Some("the device is another's".to_owned()) };
    if device(from, here.matching(DEVICE)).is_none() {
        return Some("the own device is another's".to_owned());
    }
    let gateway = subnet.addr();
    [
        format!("route {subnet} via {gateway} dev {DEVICE}"),
        format!("neigh {gateway} dev {DEVICE} lladdr {mac} PERMANENT"),
        format!("fdb {mac} dev {DEVICE} dst {public} self"),
    ]
    .into_iter()
    .find(|line| here.matching(line).is_empty())
    .map(|line| format!("there is no {line}"))
}

impl Host {
    /// Where routes of ours lead through the overlay's device.
    pub(crate) fn peer_routes(&self) -> Vec<Prefix> {
        let snapshot = self.kernel.snapshot();
        let routes = snapshot.matching(&format!(" dev {DEVICE} "));
        let prefix = |line: &&str| line.strip_prefix("route ")?.split(' ').next()?.parse().ok();
        routes.iter().filter_map(prefix).collect()
    }

    fn is_ready(&self) -> bool {
        self.status().is_some_and(|status| status.phase == Phase::Ready)
    }
}
