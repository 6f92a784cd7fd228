//! The conditions that hold once it is quiet.

use flannel_core::net::Family;
use flannel_core::overlay::Phase;

use crate::checks::{peer_routes, vtep_mac};
use crate::host::Host;
use crate::network::device;
use crate::world::World;

impl World {
    pub(crate) async fn check_rest(&mut self) {
        self.check_step();
        for host in &self.hosts {
            let status = host.status().unwrap();
            assert_eq!((status.phase, status.failed_writes), (Phase::Ready, 0), "host {}: {status:#?}", host.number);
            assert_eq!(status.own_trouble, None, "host {}", host.number);
            // The configuration that was read at the start applies, even if the pool has changed since.
            assert_eq!(*host.agent.as_ref().unwrap().networks.lock().unwrap(), self.setting.networks());
            let peers = host.agent.as_ref().unwrap().running.handle.peers().await.unwrap();
            assert_eq!(peers.len(), status.peers.accepted, "host {}: {status:#?}", host.number);
        }
        for from in &self.hosts {
            for to in self.hosts.iter().filter(|to| to.number != from.number) {
                for family in &self.setting.families {
                    if let Some(gap) = gap(from, to, *family) {
                        let (status, records) = (from.status(), self.store.records());
                        let (here, there) = (from.kernel.snapshot(), to.kernel.snapshot());
                        let (from, to) = (from.number, to.number);
                        panic!(
                            "at rest: host {from} does not reach host {to}: {gap}\n{here}\n{there}\n{status:#?}\n{records:#?}"
                        );
                    }
                }
            }
            self.check_go(from);
        }
    }

    fn check_go(&self, from: &Host) {
        let snapshot = from.kernel.snapshot();
        for (key, lease) in &self.go {
            // Its address may belong to this host by now.
            if lease.attrs.public_ip.iter().any(|(_, public)| from.has(*public)) {
                continue;
            }
            for (family, subnet) in lease.subnets.iter() {
                let there = peer_routes(&snapshot, family).contains(subnet);
                assert!(there, "at rest: host {} has no route to Go node {key}\n{snapshot}", from.number);
            }
        }
    }
}

/// Returns what is missing on the path of a packet from one host to a pod of another.
fn gap(from: &Host, to: &Host, family: Family) -> Option<String> {
    let (own, lease) = (from.lease()?, to.lease()?);
    let (subnet, public) = (lease.subnets.get(family)?, lease.attrs.public_ip.get(family)?);
    let (here, there) = (from.kernel.snapshot(), to.kernel.snapshot());
    if !to.has(*public) {
        return Some(format!("{public} is published and not an address of the host"));
    }
    let Some(mac) = vtep_mac(&there, family, *public) else { return Some("the device is another's".to_owned()) };
    if vtep_mac(&here, family, *own.attrs.public_ip.get(family)?).is_none() {
        return Some("the own device is another's".to_owned());
    }
    let (gateway, device) = (subnet.addr(), device(family));
    [
        format!("route {subnet} via {gateway} dev {device}"),
        format!("neigh {gateway} dev {device} lladdr {mac} PERMANENT"),
        format!("fdb {mac} dev {device} dst {public} self"),
    ]
    .into_iter()
    .find(|line| here.matching(line).is_empty())
    .map(|line| format!("there is no {line}"))
}
