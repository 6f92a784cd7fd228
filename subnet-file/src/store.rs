//! What the calls of a [`SubnetManager`](flannel_core::subnet::SubnetManager) do to the directory. Everything here blocks.

use std::ffi::OsStr;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};

use flannel_core::allocation::{all_compatible, choose, compatible};
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Fence, Lease, LeaseKey};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::subnet::{NodeIdentity, SubnetError, Want};

use crate::dir::{Dir, Loaded, Locked, file_name, node_of};
use crate::wire::{Entry, WallTime};
use crate::{Options, Ttl};

/// A directory and how to use it.
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
        // A record of ours that is bad is as good as none: acquire mends it.
        let Some(Ok(entry)) = self.dir.load(OsStr::new(&name))? else { return Ok(None) };
        let usable = !entry.is_expired(now) && all_compatible(&config, &entry.subnets);
        Ok(usable.then(|| self.lease(LeaseKey::new(&name), entry)))
    }

    pub(crate) fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        let name = file_name(node)?;
        let key = LeaseKey::new(&name);
        let locked = self.lock()?;
        let config = self.config()?;
        let now = WallTime::now();
        let records = Records::of(self.dir.list()?, &key, now);
        locked.clear(&records.expired);
        let (subnets, created) = match records.standing(&config, &key) {
            Some(own) => (own.subnets, own.created),
            None => {
                let subnets = records.subnets(&config, &want.preferred)?;
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

    /// The lease that a record is.
    pub(crate) fn lease(&self, key: LeaseKey, entry: Entry) -> Lease {
        // Both clocks are read here: what went by while a lock or a disk was waited for is not the holder's to use.
        let expires = entry.expires.map(|at| self.options.clock.now().after(at.since(WallTime::now())));
        let fence = Fence(Some(entry.created.to_string().into()));
        Lease { key, subnets: entry.subnets, attrs: entry.attrs, expires, fence }
    }

    fn lock(&self) -> Result<Locked<'_>, SubnetError> {
        self.dir.lock(self.options.lock_wait)
    }

    /// The record under a lease's key.
    fn held(&self, lease: &Lease) -> Result<Option<Loaded>, SubnetError> {
        let name = OsStr::new(lease.key.as_str());
        // The key is the caller's: it must not lead out of the directory.
        if node_of(name).is_none() {
            return Ok(None);
        }
        self.dir.load(name)
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

/// Whether a record is still the one a lease was read from. Its holder's renewals keep it so: a renewal whose answer
/// was lost may be repeated.
fn is_of(entry: &Entry, lease: &Lease) -> bool {
    let same_fence = lease.fence.0.as_deref() == Some(entry.created.to_string().as_str());
    same_fence && entry.subnets == lease.subnets
}

/// All records, as one node looks at them.
struct Records {
    /// The node's own, also expired.
    own: Option<(Entry, Life)>,
    /// Live ones of others, as far as they are good.
    others: Vec<(LeaseKey, Entry)>,
    /// What bad ones of others are known to hold.
    unsure: Vec<Prefix>,
    /// Of others.
    expired: Vec<LeaseKey>,
    /// The largest generation in them.
    newest: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Live,
    Expired,
}

impl Records {
    fn of(records: Vec<(LeaseKey, Loaded)>, node: &LeaseKey, now: WallTime) -> Self {
        let mut sorted = Self { own: None, others: Vec::new(), unsure: Vec::new(), expired: Vec::new(), newest: 0 };
        for (key, loaded) in records {
            let is_own = key == *node;
            match loaded {
                Err(_) if is_own => {}
                Err(bad) => sorted.unsure.extend(bad.subnets.iter().map(|(_, subnet)| *subnet)),
                Ok(entry) => {
                    sorted.newest = sorted.newest.max(entry.created);
                    let life = if entry.is_expired(now) { Life::Expired } else { Life::Live };
                    match life {
                        _ if is_own => sorted.own = Some((entry, life)),
                        Life::Live => sorted.others.push((key, entry)),
                        Life::Expired => sorted.expired.push(key),
                    }
                }
            }
        }
        sorted
    }

    /// The node's own record, if it stands: live, fitting the network, and not in conflict with an older one that fits
    /// too. Peers take ours rather than one that does not fit, however old that is.
    fn standing(&self, config: &NetworkConfig, node: &LeaseKey) -> Option<&Entry> {
        let (own, Life::Live) = self.own.as_ref()? else { return None };
        let is_older = |key: &LeaseKey, entry: &Entry| (entry.created, key) < (own.created, node);
        let overlaps = |entry: &Entry| {
            let mine = |subnet: &Prefix| own.subnets.iter().any(|(_, own)| own.overlaps(subnet));
            entry.subnets.iter().any(|(_, subnet)| mine(subnet))
        };
        let fits = |entry: &Entry| all_compatible(config, &entry.subnets);
        let beaten = self.others.iter().any(|(key, entry)| is_older(key, entry) && overlaps(entry) && fits(entry));
        (fits(own) && !beaten).then_some(own)
    }

    /// New subnets: in each family what the node had, else what it prefers, else any, if free.
    fn subnets(&self, config: &NetworkConfig, preferred: &Dual<Prefix>) -> Result<Dual<Prefix>, SubnetError> {
        let taken = || {
            let others =
                self.others.iter().flat_map(|(_, entry)| Family::BOTH.map(|family| entry.subnets.get(family).copied()));
            others.flatten().chain(self.unsure.iter().copied())
        };
        let mut subnets = Dual::default();
        for (family, network) in config.networks.iter() {
            let had = self.own.as_ref().and_then(|(own, _)| own.subnets.get(family));
            let wished = had.into_iter().chain(preferred.get(family));
            let free = |subnet: &&Prefix| compatible(network, subnet) && !taken().any(|other| other.overlaps(subnet));
            let subnet = match (wished.copied().find(|subnet| free(&subnet)), &network.pool) {
                (Some(subnet), _) => subnet,
                (None, Some(pool)) => {
                    let mut random = || RandomState::new().build_hasher().finish();
                    choose(pool, taken(), &mut random).map_err(|full| SubnetError::Exhausted(full.to_string()))?
                }
                (None, None) => {
                    let text = format!("an {family} network without a pool; use Kubernetes or give a SubnetLen");
                    return Err(SubnetError::Unsupported(text));
                }
            };
            *subnets.slot(family) = Some(subnet);
        }
        Ok(subnets)
    }
}
