//! The hub's state, and the rules for changing it. Does no I/O and reads no clock.

use std::collections::BTreeMap;
use std::time::Duration;

use flannelkit::config::{Allocation, NetworkConfig};
use flannelkit::lease::LeaseAttrs;
use flannelkit::net::{Dual, Prefix};
use flannelkit::spi::allocation::all_compatible;
use flannelkit::spi::clock::BootTime;
use flannelkit::spi::subnet::NodeIdentity;

use crate::wire::{Claim, Entry, Write};

/// The maximum number of leases: each node has a connection to the hub, and the default limit is 1024 open files.
pub(crate) const MAX_LEASES: usize = 400;
/// The maximum duration of a lease: a year.
const MAX_TTL: Duration = Duration::from_secs(365 * 86_400);

const NO_CONFIG: Refusal = Refusal::Missing("no network configuration; write it with PUT /v1/config");
const NO_LEASE: Refusal = Refusal::Missing("this node has no lease");

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The request is invalid.
    Bad(String),
    /// The lease or configuration does not exist.
    Missing(&'static str),
    /// The request conflicts with another write. Read again.
    Conflict(String),
    /// The limit of leases or watches is reached.
    Full,
}

/// The leases and the network configuration.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    config: Option<(String, NetworkConfig)>,
    held: BTreeMap<String, Held>,
    /// The revision of the last write.
    revision: u64,
}

#[derive(Debug)]
struct Held {
    created: u64,
    revision: u64,
    expires: BootTime,
    subnets: Dual<Prefix>,
    claim: Claim,
}

impl Leases {
    /// Returns the network configuration, exactly as written.
    pub(crate) fn config(&self) -> Result<&str, Refusal> {
        let text = self.config.as_ref().map(|(text, _)| text.as_str());
        text.ok_or(NO_CONFIG)
    }

    /// Replaces the network configuration. Leases that no longer fit stay until their nodes replace them.
    pub(crate) fn put_config(&mut self, text: String) -> Result<(), Refusal> {
        let config = NetworkConfig::parse(text.as_bytes(), Allocation::Pool);
        self.config = Some((text, config.map_err(|error| Refusal::Bad(error.to_string()))?));
        Ok(())
    }

    /// Returns the lease of a node.
    pub(crate) fn entry(&self, node: &str, now: BootTime) -> Result<Entry, Refusal> {
        let held = self.held.get(node).ok_or(NO_LEASE)?;
        Ok(held.entry(node, now))
    }

    /// Returns every lease.
    pub(crate) fn entries(&self, now: BootTime) -> Vec<Entry> {
        self.held.iter().map(|(node, held)| held.entry(node, now)).collect()
    }

    /// Writes a lease if its revision matches and no other node has an overlapping subnet.
    pub(crate) fn put(&mut self, node: &str, write: Write, now: BootTime) -> Result<Entry, Refusal> {
        NodeIdentity::new(node).map_err(|error| Refusal::Bad(error.to_string()))?;
        let Write { revision, ttl_ms, claim } = write;
        let ttl = Duration::from_millis(ttl_ms);
        if ttl.is_zero() || ttl > MAX_TTL {
            return Err(Refusal::Bad(format!("ttl_ms is {ttl_ms}, but must be 1 to {}", MAX_TTL.as_millis())));
        }
        if claim.attrs.get().len() > LeaseAttrs::MAX_BYTES {
            return Err(Refusal::Bad(format!("attrs exceed {} bytes", LeaseAttrs::MAX_BYTES)));
        }
        let subnets = claim.subnets().map_err(Refusal::Bad)?;
        let own = self.held.get(node);
        check_revision(own, revision)?;
        let created = match own {
            // A renewal is granted even if the network has changed since.
            Some(own) if own.subnets == subnets => own.created,
            _ => {
                self.check_free(node, &subnets)?;
                self.revision + 1
            }
        };
        if own.is_none() && self.held.len() >= MAX_LEASES {
            return Err(Refusal::Full);
        }
        self.revision += 1;
        let held = Held { created, revision: self.revision, expires: now.after(ttl), subnets, claim };
        let entry = held.entry(node, now);
        self.held.insert(node.to_owned(), held);
        Ok(entry)
    }

    /// Deletes a lease if it has this revision, or any if `None`.
    pub(crate) fn delete(&mut self, node: &str, revision: Option<u64>) -> Result<(), Refusal> {
        let own = self.held.get(node).ok_or(NO_LEASE)?;
        if let Some(revision) = revision {
            check_revision(Some(own), revision)?;
        }
        self.held.remove(node);
        Ok(())
    }

    /// Deletes the expired leases, and returns their nodes.
    pub(crate) fn expire(&mut self, now: BootTime) -> Vec<String> {
        let ended = self.held.iter().filter(|(_, held)| held.expires <= now);
        let ended: Vec<_> = ended.map(|(node, _)| node.clone()).collect();
        ended.iter().for_each(|node| drop(self.held.remove(node)));
        ended
    }

    /// Returns when the next lease expires.
    pub(crate) fn next_end(&self) -> Option<BootTime> {
        self.held.values().map(|held| held.expires).min()
    }

    /// Checks that the subnets fit the configuration, so that no node can claim the whole network, and that they
    /// overlap no other node's.
    fn check_free(&self, node: &str, subnets: &Dual<Prefix>) -> Result<(), Refusal> {
        let (_, config) = self.config.as_ref().ok_or(NO_CONFIG)?;
        if !all_compatible(config, subnets) {
            return Err(Refusal::Conflict("the network configuration does not allow these subnets".to_owned()));
        }
        let overlaps = |held: &Held| {
            subnets.iter().any(|(family, subnet)| held.subnets.get(family).is_some_and(|other| other.overlaps(subnet)))
        };
        match self.held.iter().find(|(other, held)| *other != node && overlaps(held)) {
            Some((other, _)) => Err(Refusal::Conflict(format!("node {other} has an overlapping subnet"))),
            None => Ok(()),
        }
    }
}

impl Held {
    fn entry(&self, node: &str, now: BootTime) -> Entry {
        let left = u64::try_from(self.expires.since(now).as_millis()).unwrap_or(u64::MAX);
        let Self { created, revision, claim, .. } = self;
        Entry { node: node.to_owned(), created: *created, revision: *revision, left_ms: left, claim: claim.clone() }
    }
}

fn check_revision(own: Option<&Held>, seen: u64) -> Result<(), Refusal> {
    let is = own.map_or(0, |own| own.revision);
    if is == seen { Ok(()) } else { Err(Refusal::Conflict(format!("the lease is at revision {is}, not {seen}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORK: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

    fn leases() -> Leases {
        let mut leases = Leases::default();
        leases.put_config(NETWORK.to_owned()).unwrap();
        leases
    }

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    fn write(revision: u64, subnet: &str) -> Write {
        let json = format!(r#"{{"revision":{revision},"ttl_ms":60000,"claim":{{"subnet":"{subnet}","attrs":{{}}}}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn a_write_with_a_stale_revision_is_refused() {
        let mut leases = leases();
        let first = leases.put("a", write(0, "10.5.1.0/24"), at(0)).unwrap();
        let second = leases.put("a", write(first.revision, "10.5.1.0/24"), at(1)).unwrap();
        assert_eq!(second.created, first.created, "a renewal keeps the lease");
        for seen in [0, first.revision, 99] {
            assert!(matches!(leases.put("a", write(seen, "10.5.1.0/24"), at(2)), Err(Refusal::Conflict(_))), "{seen}");
            assert!(matches!(leases.delete("a", Some(seen)), Err(Refusal::Conflict(_))), "{seen}");
        }
        let moved = leases.put("a", write(second.revision, "10.5.2.0/24"), at(3)).unwrap();
        assert!(moved.created > second.revision);
        assert_eq!(leases.delete("a", Some(moved.revision)), Ok(()));
        assert!(matches!(leases.delete("a", None), Err(Refusal::Missing(_))));
    }

    #[test]
    fn overlapping_foreign_and_invalid_subnets_are_refused() {
        let mut leases = leases();
        leases.put("a", write(0, "10.5.1.0/24"), at(0)).unwrap();
        for taken in ["10.5.1.0/24", "10.0.0.0/8", "10.5.0.0/16", "10.5.1.128/25", "10.6.1.0/24"] {
            assert!(matches!(leases.put("b", write(0, taken), at(0)), Err(Refusal::Conflict(_))), "{taken}");
        }
        for bad in ["10.5.2.1/24", "fd00::/64", "x", ""] {
            assert!(matches!(leases.put("b", write(0, bad), at(0)), Err(Refusal::Bad(_))), "{bad}");
        }
        for bad in ["", "a/b", ".", "..", "a b", &"a".repeat(300)] {
            assert!(matches!(leases.put(bad, write(0, "10.5.2.0/24"), at(0)), Err(Refusal::Bad(_))), "{bad}");
        }
        assert_eq!(leases.entries(at(0)).len(), 1);
    }

    #[test]
    fn a_lease_expires_unless_it_is_renewed() {
        let mut leases = leases();
        let first = leases.put("a", write(0, "10.5.1.0/24"), at(0)).unwrap();
        leases.put("b", write(0, "10.5.2.0/24"), at(10)).unwrap();
        leases.put("a", write(first.revision, "10.5.1.0/24"), at(30)).unwrap();
        assert_eq!((leases.expire(at(69)), leases.next_end()), (vec![], Some(at(70))));
        assert_eq!(leases.expire(at(70)), ["b"]);
        assert!(matches!(leases.entry("b", at(70)), Err(Refusal::Missing(_))));
        assert_eq!(leases.entry("a", at(70)).unwrap().left_ms, 20_000);
        for ttl_ms in [0, u64::MAX] {
            let write = Write { ttl_ms, ..write(0, "10.5.2.0/24") };
            assert!(matches!(leases.put("b", write, at(70)), Err(Refusal::Bad(_))));
        }
    }

    #[test]
    fn leases_are_limited_and_can_be_renewed_at_the_limit() {
        let mut leases = Leases::default();
        leases.put_config(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#.to_owned()).unwrap();
        let subnet = |n: usize| format!("10.{}.{}.0/24", 1 + n / 256, n % 256);
        for n in 0..MAX_LEASES {
            leases.put(&format!("node-{n}"), write(0, &subnet(n)), at(0)).unwrap();
        }
        assert_eq!(leases.put("late", write(0, &subnet(MAX_LEASES)), at(0)).unwrap_err(), Refusal::Full);
        assert!(leases.put("node-0", write(1, &subnet(0)), at(0)).is_ok());
    }
}
