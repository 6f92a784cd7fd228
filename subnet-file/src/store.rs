//! The directory operations of a [`SubnetManager`](flannel_core::subnet::SubnetManager). All functions here block.

use std::ffi::OsStr;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};

use flannel_core::allocation::{Taken, all_compatible};
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Fence, Lease, LeaseKey};
use flannel_core::net::{Dual, Prefix};
use flannel_core::subnet::{NodeIdentity, SubnetError, Want};

use crate::dir::{Dir, Locked, file_name, node_of};
use crate::error::fault;
use crate::reader::Loaded;
use crate::wire::{Entry, WallTime};
use crate::{Options, Ttl};

/// A directory and its options.
pub(crate) struct Store {
    pub(crate) dir: Dir,
    pub(crate) options: Options,
}

impl Store {
    pub(crate) fn open(root: PathBuf, options: Options) -> Result<Self, SubnetError> {
        Ok(Self { dir: Dir::open(root)?, options })
    }

    pub(crate) fn config(&self) -> Result<NetworkConfig, SubnetError> {
        let path = self.dir.config_path();
        let Some(text) = self.dir.config()? else {
            return Err(SubnetError::Unconfigured {
                at: path.display().to_string(),
                reason: "no network configuration; write flannel's JSON document there, such as \
                         {\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}} (in a program: \
                         FileSubnets::put_config)"
                    .to_owned(),
            });
        };
        parse_config(&path, &text)
    }

    pub(crate) fn put_config(&self, json: &str) -> Result<(), SubnetError> {
        parse_config(&self.dir.config_path(), json.as_bytes())?;
        self.lock()?.write_config(json)
    }

    pub(crate) fn previous(&self, node: &NodeIdentity) -> Result<Option<Lease>, SubnetError> {
        let config = self.config()?;
        let name = file_name(node)?;
        let now = WallTime::now();
        // A bad record of this node counts as none: acquire overwrites it.
        let Some(Ok(entry)) = self.dir.load_own(OsStr::new(&name))? else { return Ok(None) };
        let usable = !entry.is_expired(now) && all_compatible(&config, &entry.subnets);
        Ok(usable.then(|| self.lease(LeaseKey::new(&name), entry)))
    }

    pub(crate) fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        let name = file_name(node)?;
        let key = LeaseKey::new(&name);
        let locked = self.lock()?;
        let config = self.config()?;
        let now = WallTime::now();
        // A bad record counts as none.
        let own = self.dir.load_own(OsStr::new(&name))?.and_then(Result::ok);
        let mut records = Records::beside(own, &key, &config, now);
        let add = |(key, read): (LeaseKey, io::Result<Loaded>)| match read {
            Ok(loaded) => records.add(&key, loaded, |expired| locked.clear(expired)),
            Err(error) => records.unread = Some((key, error)),
        };
        self.dir.each(|key, read| Some((key, read)), add)?;
        let (subnets, created) = match records.standing() {
            Some(own) => (own.subnets, own.created),
            None => {
                if let Some((key, error)) = records.unread {
                    // Its node may hold any subnet.
                    return Err(fault("reading a lease", &self.dir.lease_path(&key), error));
                }
                let subnets = records.subnets(&want.preferred)?;
                (subnets, locked.next_generation(records.newest)?)
            }
        };
        let entry = Entry { attrs: want.attrs, subnets, created, expires: self.expiry(now) };
        self.write(&locked, key, entry)
    }

    pub(crate) fn renew(&self, lease: Lease) -> Result<Lease, SubnetError> {
        let locked = self.lock()?;
        let now = WallTime::now();
        let found = self.held(&lease)?.ok_or_else(|| SubnetError::Lost(format!("no record {}", lease.key)))?;
        match found {
            Ok(entry) if entry.is_expired(now) => Err(SubnetError::Lost(format!("{} has expired", lease.key))),
            Ok(entry) if is_of(&entry, &lease) => {
                let entry = Entry { attrs: lease.attrs, expires: self.expiry(now), ..entry };
                self.write(&locked, lease.key, entry)
            }
            Ok(_) => Err(SubnetError::Lost(format!("{} is a newer lease", lease.key))),
            Err(bad) => Err(SubnetError::Lost(format!("{} is damaged: {}", lease.key, bad.reason))),
        }
    }

    pub(crate) fn release(&self, lease: &Lease) -> Result<(), SubnetError> {
        let locked = self.lock()?;
        match self.held(lease)? {
            Some(Ok(entry)) if is_of(&entry, lease) => locked.remove_lease(lease.key.as_str()),
            _ => Ok(()),
        }
    }

    /// Returns the lease of a record.
    pub(crate) fn lease(&self, key: LeaseKey, entry: Entry) -> Lease {
        // Both clocks are read here: time spent waiting for a lock or a disk must not extend the lease.
        let expires = entry.expires.map(|at| self.options.clock.now().after(at.since(WallTime::now())));
        let fence = Fence::new(&entry.created.to_string());
        Lease::new(key, entry.subnets, entry.attrs).expiring(expires).fenced(fence)
    }

    fn lock(&self) -> Result<Locked<'_>, SubnetError> {
        self.dir.lock(self.options.lock_wait)
    }

    /// Reads the record under a lease's key.
    fn held(&self, lease: &Lease) -> Result<Option<Loaded>, SubnetError> {
        let name = OsStr::new(lease.key.as_str());
        // The key comes from the caller: it must not lead out of the directory.
        if node_of(name).is_none() {
            return Ok(None);
        }
        self.dir.load_own(name)
    }

    fn write(&self, locked: &Locked<'_>, key: LeaseKey, entry: Entry) -> Result<Lease, SubnetError> {
        let text = entry.to_json();
        if let Err(bad) = Entry::from_json(text.as_bytes()) {
            let reason = format!("would not be readable: {}; publish other attributes", bad.reason);
            return Err(SubnetError::Invalid { at: key.to_string(), reason });
        }
        locked.write_lease(key.as_str(), &text)?;
        Ok(self.lease(key, entry))
    }

    fn expiry(&self, now: WallTime) -> Option<WallTime> {
        match self.options.ttl {
            Ttl::Never => None,
            Ttl::After(time) => Some(now.after(time.duration())),
        }
    }
}

pub(crate) fn parse_config(path: &Path, text: &[u8]) -> Result<NetworkConfig, SubnetError> {
    NetworkConfig::parse(text, Allocation::Pool).map_err(|error| SubnetError::Invalid {
        at: format!("{} {}", path.display(), error.path),
        reason: format!("{}; {}", error.problem, error.remedy),
    })
}

/// Whether a record is still the one that a lease was read from. Renewals by its holder keep it so: a renewal whose
/// answer was lost may be repeated.
fn is_of(entry: &Entry, lease: &Lease) -> bool {
    let same_fence = lease.fence == Fence::new(&entry.created.to_string());
    same_fence && entry.subnets == lease.subnets
}

/// The data that one node's decision needs, independent of the number of other records.
struct Records<'a> {
    node: &'a LeaseKey,
    config: &'a NetworkConfig,
    now: WallTime,
    /// The node's own record, even if expired.
    own: Option<Entry>,
    /// Whether an older record of another node overlaps the own one and fits the network. A record that does not fit is
    /// ignored whatever its age: peers prefer the own one.
    beaten: bool,
    /// The subnets of the network that other nodes hold. A node that has a subnet keeps it even if there are too many.
    taken: Taken,
    /// The largest generation of all records.
    newest: u64,
    /// A record that cannot be read, and why.
    unread: Option<(LeaseKey, io::Error)>,
}

impl<'a> Records<'a> {
    fn beside(own: Option<Entry>, node: &'a LeaseKey, config: &'a NetworkConfig, now: WallTime) -> Self {
        let newest = own.as_ref().map_or(0, |own| own.created);
        Self { node, config, now, own, beaten: false, taken: Taken::of(config), newest, unread: None }
    }

    /// Adds a record; an expired record of another node is passed to `clear`.
    fn add(&mut self, key: &LeaseKey, loaded: Loaded, clear: impl FnOnce(&LeaseKey)) {
        if key == self.node {
            return;
        }
        match loaded {
            Err(bad) => self.taken.add(&bad.subnets, ()),
            Ok(entry) => {
                self.newest = self.newest.max(entry.created);
                if entry.is_expired(self.now) {
                    return clear(key);
                }
                self.beaten |= self.is_rival(key, &entry);
                self.taken.add(&entry.subnets, ());
            }
        }
    }

    fn is_rival(&self, key: &LeaseKey, entry: &Entry) -> bool {
        let Some(own) = &self.own else { return false };
        let is_older = (entry.created, key) < (own.created, self.node);
        let mine = |subnet: &Prefix| own.subnets.iter().any(|(_, own)| own.overlaps(subnet));
        is_older && entry.subnets.iter().any(|(_, subnet)| mine(subnet)) && all_compatible(self.config, &entry.subnets)
    }

    /// Returns the node's own record if it is valid: live, fitting the network, and not in conflict with an older one.
    fn standing(&self) -> Option<&Entry> {
        let stands = |own: &&Entry| !own.is_expired(self.now) && all_compatible(self.config, &own.subnets);
        self.own.as_ref().filter(stands).filter(|_| !self.beaten)
    }

    /// Returns new subnets. In each family: the node's former subnet, else the preferred one, else any, if free.
    fn subnets(&self, preferred: &Dual<Prefix>) -> Result<Dual<Prefix>, SubnetError> {
        let wished: Vec<_> = self.own.iter().map(|own| &own.subnets).chain([preferred]).collect();
        Ok(self.taken.choose(&wished, &mut || RandomState::new().build_hasher().finish())?)
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::allocation::MAX_TAKEN;

    use super::*;

    #[test]
    fn beyond_so_many_subnets_of_others_a_node_keeps_its_own_and_gets_no_other() {
        let text = br#"{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fd00::/32","Backend":{"Type":"vxlan"}}"#;
        let config = NetworkConfig::parse(text, Allocation::Pool).unwrap();
        let entry = |low: u32, created: u64| {
            let addr = std::net::Ipv6Addr::new(0xfd00, 0, (low >> 16) as u16, low as u16, 0, 0, 0, 0);
            let subnets = Dual { v4: None, v6: Some(Prefix::new(addr.into(), 64).unwrap()) };
            Entry { attrs: Default::default(), subnets, created, expires: None }
        };
        let (key, other) = (LeaseKey::new("node.json"), LeaseKey::new("other.json"));
        let mut records = Records::beside(Some(entry(1 << 31, 7)), &key, &config, WallTime::now());
        let cleared = |_: &LeaseKey| panic!("nothing has expired");
        for n in 0..MAX_TAKEN as u32 {
            records.add(&other, Ok(entry(n, 1)), cleared);
        }
        assert!(records.subnets(&Dual::default()).is_ok());
        records.add(&other, Ok(entry(1 << 30, 1)), cleared);
        assert_eq!(records.standing().map(|own| own.created), Some(7));
        let full = records.subnets(&Dual::default());
        assert!(matches!(&full, Err(SubnetError::Exhausted(text)) if text.contains("more than 524288")), "{full:?}");
        // A record with the node's own subnet is a rival nevertheless.
        records.add(&other, Ok(entry(1 << 31, 6)), cleared);
        assert!(records.standing().is_none());
    }
}
