//! The operations of a [`SubnetManager`](flannel_core::subnet::SubnetManager).

use std::net::IpAddr;
use std::sync::Arc;

use etcd_client::{Compare, CompareOp, GetOptions, TxnOp};
use flannel_core::allocation::{Taken, all_compatible};
use flannel_core::clock::Clock;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{BadRecord, Lease, LeaseAttrs, LeaseKey, OldestRecords, Record};
use flannel_core::net::{Dual, Prefix};
use flannel_core::subnet::{NodeIdentity, SubnetError, Want};

use crate::config::Ttl;
use crate::config_watch::ConfigSeen;
use crate::connect::{Connector, Header};
use crate::error::Fault;
use crate::list::{Listing, after_prefix, gather, list};
use crate::shared_list::SharedList;
use crate::wire::{self, Version};
use crate::write::random;
use crate::write::{Granted, Outcome, Put, UnacknowledgedWrites, unchanged};

/// A key prefix in etcd and its settings.
#[derive(Clone)]
pub(crate) struct Store {
    pub(crate) connector: Arc<Connector>,
    pub(crate) config_key: Arc<str>,
    /// The prefix of the keys of all records, including the slash.
    pub(crate) base: Arc<str>,
    pub(crate) ttl: Ttl,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) unacknowledged: Arc<UnacknowledgedWrites>,
    pub(crate) config_seen: Arc<ConfigSeen>,
    pub(crate) shared_list: Arc<SharedList>,
}

/// How often an acquire reads everything again after others changed what it had read. In a race for new leases this
/// counts only changes of the configuration or of the node's own record; each loser learns what the winners took.
const ROUNDS: u32 = 8;

/// How many subnets an acquire tries to take in one round. Each lost race is another node's success.
const RACES: u32 = 256;

/// How often a renewal or release is retried with a newer version of the node's own record.
const ADOPTIONS: u32 = 4;

/// The most records of one node that are examined; further ones are treated as another node's.
const MAX_OWN: usize = 1024;

/// The most leases of one node that are returned: each needs a request for its expiry. Further ones are treated as
/// another node's.
const MAX_PREVIOUS: usize = 16;

const ACQUIRING: &str = "acquiring a lease";
const RENEWING: &str = "renewing a lease";
const RELEASING: &str = "releasing a lease";
const CONFIG: &str = "reading the network configuration";

impl Store {
    pub(crate) async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        let found = self.config().await?;
        self.config_seen.note(found.revision);
        Ok(found.config)
    }

    pub(crate) fn parse_config(&self, text: &[u8]) -> Result<NetworkConfig, SubnetError> {
        NetworkConfig::parse(text, Allocation::Pool).map_err(|error| SubnetError::Invalid {
            at: format!("etcd key {} {}", self.config_key, error.path),
            reason: format!("{}; {}", error.problem, error.remedy),
        })
    }

    pub(crate) async fn put_config(&self, json: &str) -> Result<(), SubnetError> {
        self.parse_config(json.as_bytes())?;
        let put = |mut client: etcd_client::Client| async move { client.put(&*self.config_key, json, None).await };
        let written = self.connector.write(put).await;
        written.map_err(|fault| fault.into_subnet_error("writing the network configuration"))?;
        Ok(())
    }

    pub(crate) async fn list(&self) -> Result<Vec<Record>, SubnetError> {
        let listing = list(&self.connector, &self.base).await;
        Ok(listing.map_err(|fault| fault.into_subnet_error("listing the leases"))?.records)
    }

    pub(crate) async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        const DOING: &str = "reading the previous leases";
        let owner = Owner::of(node)?;
        let ConfigRead { config, now, .. } = self.config().await?;
        let doing = |fault: Fault| fault.into_subnet_error(DOING);
        let add = |own: &mut Vec<Arc<Lease>>, record: &Record| {
            let lease = record.lease.as_ref().ok().filter(|lease| owner.holds(&lease.attrs));
            own.extend(lease.filter(|_| own.len() < MAX_OWN).cloned());
        };
        let (_, own) = self.fold(now, Vec::new, add).await.map_err(doing)?;
        let fits = |lease: &&Arc<Lease>| all_compatible(&config, &lease.subnets);
        let mut previous = Vec::new();
        for found in own.iter().filter(fits).take(MAX_PREVIOUS) {
            let mut lease = Lease::clone(found);
            let version = Version::from_fence(&lease.fence).unwrap_or(UNKNOWN);
            if !version.is_reservation() {
                let now = self.clock.now();
                let Some(seconds) = self.seconds_left(version.lease).await.map_err(doing)? else { continue };
                lease.expires = Some(now.after(std::time::Duration::from_secs(seconds)));
            }
            previous.push(lease);
        }
        Ok(previous)
    }

    pub(crate) async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        let owner = Owner::of(node)?;
        let value = checked_value(&want.attrs)?;
        if !owner.holds(&want.attrs) {
            let reason = format!("publishes another address than {node}, by which etcd knows this node; publish it");
            return Err(SubnetError::Invalid { at: "lease attributes".to_owned(), reason });
        }
        for _ in 0..ROUNDS {
            let mut seen = Seen::read(self, owner, &want, self.config().await?).await?;
            let mut own = std::mem::take(&mut seen.own);
            let kept = want.kept(&own, |lease| seen.fits(lease)).map(|place| own.remove(place));
            let (own, others): (Vec<_>, Vec<_>) = own.into_iter().partition(|lease| want.gives_up(lease));
            others.iter().for_each(|lease| seen.keep(lease));
            for lease in own {
                self.drop_own(&mut seen, lease).await?;
            }
            let taken = match kept {
                Some(lease) => self.overwrite(&lease, &want.attrs, &value).await?,
                None => self.take(&mut seen, &want, &value).await?,
            };
            if let Some(lease) = taken {
                return Ok(lease);
            }
            // A store restored from a backup may have the same header and other records.
            self.shared_list.forget();
        }
        let problem = "other nodes kept changing what was read";
        Err(Fault::cut(&self.base, problem).into_subnet_error(ACQUIRING))
    }

    pub(crate) async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        let value = checked_value(&lease.attrs)?;
        let lost = |why: &str| Err(SubnetError::Lost(format!("{} {why}", lease.key)));
        if wire::parse_key(lease.key.as_str()) != Ok(lease.subnets) {
            return lost("is not the key of its subnets");
        }
        // The server may keep the lease longer, but others may rely on its end.
        if lease.expires.is_some_and(|end| end <= self.clock.now()) {
            return lost("has expired");
        }
        let doing = |fault: Fault| fault.into_subnet_error(RENEWING);
        let held = self.held(lease);
        let mut version = held.first;
        for _ in 0..ADOPTIONS {
            let full = self.key(&lease.key);
            let put = Put {
                key: &lease.key,
                value: &value,
                when: unchanged(&full, version).into(),
                or_else: vec![TxnOp::get(full, None)],
                over: Some(version),
            };
            let outcome =
                if version.is_reservation() { self.put_reserved(put).await } else { self.put_leased(put).await };
            let read = match outcome.map_err(doing)? {
                Outcome::Written { version: written, expires } => {
                    // An earlier write, reported only now, may have attached it to the same etcd lease.
                    if version.lease != written.lease {
                        self.drop_lease(version.lease).await;
                    }
                    if held.first.lease != version.lease {
                        self.drop_lease(held.first.lease).await;
                    }
                    return Ok(lease.clone().expiring(expires).fenced(written.fence()));
                }
                Outcome::Refused { read, .. } => read,
            };
            let newer = read.first().ok_or("is gone");
            match newer.and_then(|kv| held.version(kv).ok_or("is another's, or a newer lease")) {
                // Written by this node's renewal whose answer was lost, or by Go flannel on this host.
                Ok(newer) => version = newer,
                Err(why) => {
                    self.drop_unacknowledged(&lease.key).await;
                    return lost(why);
                }
            }
        }
        Err(doing(Fault::cut(&self.base, "the record kept changing")))
    }

    pub(crate) async fn release(&self, lease: &Lease) -> Result<(), SubnetError> {
        if wire::parse_key(lease.key.as_str()).is_err() {
            return Ok(());
        }
        let held = self.held(lease);
        let mut version = held.first;
        for _ in 0..ADOPTIONS {
            // An operator reserved it for this node: the agent must not release it.
            if version.is_reservation() {
                return Ok(());
            }
            let found = self.delete(&lease.key, version).await;
            let found = found.map_err(|fault| fault.into_subnet_error(RELEASING))?;
            match found.as_ref().map(|kv| held.version(kv)) {
                Some(Some(newer)) => version = newer,
                None | Some(None) => {
                    self.drop_lease(version.lease).await;
                    self.drop_unacknowledged(&lease.key).await;
                    return Ok(());
                }
            }
        }
        Err(Fault::cut(&self.base, "the record kept changing").into_subnet_error(RELEASING))
    }

    /// Returns the full key of a record.
    pub(crate) fn key(&self, key: &LeaseKey) -> String {
        format!("{}{}", self.base, key.as_str())
    }

    /// Folds all records, however many there are. Reads them only if they may differ from those read before; `now` is
    /// the state of the store in its last answer.
    async fn fold<T>(
        &self,
        now: Header,
        start: impl Fn() -> T,
        add: impl Fn(&mut T, &Record),
    ) -> Result<(Header, T), Fault> {
        let mut sum = start();
        if self.shared_list.visit(now, |record| add(&mut sum, record)) {
            return Ok((now, sum));
        }
        if !self.shared_list.is_wanted() {
            return gather(&self.connector, &self.base, start, |sum, record| add(sum, &record)).await;
        }
        let start = || (0, OldestRecords::default(), start());
        let add = |(count, oldest, sum): &mut (usize, OldestRecords, T), record: Record| {
            add(sum, &record);
            oldest.push(record);
            *count += 1;
        };
        let (header, (count, oldest, sum)) = gather(&self.connector, &self.base, start, add).await?;
        let records = oldest.finish();
        if records.len() == count {
            self.shared_list.keep(Listing { header, records });
        }
        Ok((header, sum))
    }

    async fn config(&self) -> Result<ConfigRead, SubnetError> {
        let read = |mut client: etcd_client::Client| async move { client.get(&*self.config_key, None).await };
        let response = self.connector.read(read).await.map_err(|fault| fault.into_subnet_error(CONFIG))?;
        let Some(kv) = response.kvs().first() else {
            return Err(SubnetError::Unconfigured {
                at: format!("etcd key {}", self.config_key),
                reason: format!(
                    "no network configuration; write flannel's JSON document there, such as etcdctl put {} \
                     '{{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}' (in a program: \
                     EtcdSubnets::put_config)",
                    self.config_key
                ),
            });
        };
        let (config, now) = (self.parse_config(kv.value())?, Header::of(response.header()));
        Ok(ConfigRead { config, revision: kv.mod_revision(), now })
    }

    /// Deletes a lease of this node that is not kept: the network changed, or a lost answer left two leases.
    async fn drop_own(&self, seen: &mut Seen, lease: Arc<Lease>) -> Result<(), SubnetError> {
        let version = Version::from_fence(&lease.fence).unwrap_or(UNKNOWN);
        if version.is_reservation() {
            // It belongs to the operator, who has to change it; until then its subnet stays taken.
            seen.keep(&lease);
            return Ok(());
        }
        let deleted = self.delete(&lease.key, version).await;
        match deleted.map_err(|fault| fault.into_subnet_error(ACQUIRING))? {
            None => self.drop_lease(version.lease).await,
            Some(_) => seen.keep(&lease),
        }
        Ok(())
    }

    /// Writes this node's record with `attrs`, also if it has them: an agent on another host with the same address
    /// notices it. Returns `None` if the record changed meanwhile.
    async fn overwrite(&self, lease: &Lease, attrs: &LeaseAttrs, value: &str) -> Result<Option<Lease>, SubnetError> {
        let version = Version::from_fence(&lease.fence).unwrap_or(UNKNOWN);
        let when = unchanged(&self.key(&lease.key), version).into();
        let put = Put { key: &lease.key, value, when, or_else: Vec::new(), over: Some(version) };
        let outcome = if version.is_reservation() { self.put_reserved(put).await } else { self.put_leased(put).await };
        match outcome.map_err(|fault| fault.into_subnet_error(ACQUIRING))? {
            Outcome::Refused { .. } => {
                self.drop_unacknowledged(&lease.key).await;
                Ok(None)
            }
            Outcome::Written { version: written, expires } => {
                if version.lease != written.lease {
                    self.drop_lease(version.lease).await;
                }
                Ok(Some(lease.clone().publishing(attrs.clone()).expiring(expires).fenced(written.fence())))
            }
        }
    }

    /// Takes new subnets. Returns `None` if the configuration changed meanwhile.
    async fn take(&self, seen: &mut Seen, want: &Want, value: &str) -> Result<Option<Lease>, SubnetError> {
        seen.choose(&want.preferred)?;
        let granted = self.grant().await.map_err(|fault| fault.into_subnet_error(ACQUIRING))?;
        let result = self.take_with(granted, seen, want, value).await;
        if !matches!(result, Ok(Some(_))) {
            // This also deletes a record that was written without an acknowledgement.
            self.give_back(granted).await;
        }
        result
    }

    async fn take_with(
        &self,
        granted: Granted,
        seen: &mut Seen,
        want: &Want,
        value: &str,
    ) -> Result<Option<Lease>, SubnetError> {
        for _ in 0..RACES {
            let subnets = seen.choose(&want.preferred)?;
            let Some(text) = wire::key_text(&subnets) else {
                let reason = "its subnets are too small for flannel's keys; choose a smaller SubnetLen".to_owned();
                return Err(SubnetError::Invalid { at: format!("etcd key {}", self.config_key), reason });
            };
            let key = LeaseKey::new(&text);
            let newer = GetOptions::new()
                .with_range(after_prefix(&self.base))
                .with_min_create_revision(seen.revision.saturating_add(1));
            let put = Put {
                key: &key,
                value,
                when: self.still_free(seen, &subnets, &text),
                or_else: vec![TxnOp::get(&*self.config_key, None), TxnOp::get(&*self.base, Some(newer))],
                over: None,
            };
            let outcome = self.put_granted(&put, granted).await;
            let (header, read) = match outcome.map_err(|fault| fault.into_subnet_error(ACQUIRING))? {
                Outcome::Written { version, expires } => {
                    let lease = Lease::new(key, subnets, want.attrs.clone());
                    return Ok(Some(lease.expiring(expires).fenced(version.fence())));
                }
                Outcome::Refused { header, read } => (header, read),
            };
            let is_config = |kv: &&etcd_client::KeyValue| kv.key() == self.config_key.as_bytes();
            if read.iter().find(is_config).map(etcd_client::KeyValue::mod_revision) != Some(seen.config_revision) {
                return Ok(None);
            }
            for kv in read.iter().filter(|kv| !is_config(kv)) {
                seen.add(&wire::record(&self.base, kv).lease);
            }
            seen.revision = header.revision;
        }
        Ok(None)
    }

    /// Returns the conditions under which no other node took subnets overlapping `subnets` since the last read. As long
    /// as the configuration is the same, subnets of one family overlap only if they are equal.
    fn still_free(&self, seen: &Seen, subnets: &Dual<Prefix>, text: &str) -> Vec<Compare> {
        let config = Compare::mod_revision(&*self.config_key, CompareOp::Equal, seen.config_revision);
        let full = format!("{}{text}", self.base);
        let free = match (subnets.v4, subnets.v6) {
            // Also no dual-stack record with this IPv4 part: those keys follow directly, because '&' sorts before '\''.
            (Some(_), None) => {
                Compare::create_revision(full.clone(), CompareOp::Equal, 0).with_range(format!("{full}'"))
            }
            (None, _) => Compare::create_revision(full, CompareOp::Equal, 0),
            // Any key may contain one half of it.
            (Some(_), Some(_)) => {
                Compare::create_revision(&*self.base, CompareOp::Less, seen.revision.saturating_add(1))
                    .with_range(after_prefix(&self.base))
            }
        };
        vec![config, free]
    }

    /// Returns what identifies records of this lease, as far as known before a call about it.
    fn held<'a>(&'a self, lease: &'a Lease) -> HeldLease<'a> {
        let first = Version::from_fence(&lease.fence).unwrap_or(UNKNOWN);
        HeldLease {
            base: &self.base,
            first,
            unacknowledged: self.unacknowledged.of(&lease.key),
            owner: Owner::of_attrs(&lease.attrs),
        }
    }
}

/// Distinguishes the records of a lease that this node holds or held from others.
struct HeldLease<'a> {
    base: &'a str,
    first: Version,
    /// The etcd lease of a write that may have happened without an acknowledgement.
    unacknowledged: Option<i64>,
    owner: Option<Owner>,
}

impl HeldLease<'_> {
    /// Returns the version of a record if it belongs to this lease.
    fn version(&self, kv: &etcd_client::KeyValue) -> Option<Version> {
        let version = Version::of(kv);
        // Whatever address that write published: the node's address may have changed since.
        let is_ours = self.unacknowledged == Some(version.lease) || {
            let found = wire::record(self.base, kv).lease;
            found.is_ok_and(|found| self.owner.is_some_and(|owner| owner.holds(&found.attrs)))
        };
        (is_ours && (self.first == UNKNOWN || self.first.created == version.created)).then_some(version)
    }
}

/// A fence of another origin, such as another store's state file. It matches no record, so the record is read first.
const UNKNOWN: Version = Version { created: -1, modified: -1, lease: -1 };

/// The owner of a record: its public IP.
#[derive(Clone, Copy)]
struct Owner(IpAddr);

impl Owner {
    fn of(node: &NodeIdentity) -> Result<Self, SubnetError> {
        match node.as_str().parse::<IpAddr>() {
            Ok(addr) if !addr.is_unspecified() => Ok(Self(addr)),
            _ => Err(SubnetError::Invalid {
                at: format!("node identity {node}"),
                reason: "etcd knows a node by its public IP; give NodeIdentity::of_address".to_owned(),
            }),
        }
    }

    fn of_attrs(attrs: &LeaseAttrs) -> Option<Self> {
        attrs.public_ip.v4.or(attrs.public_ip.v6).map(Self)
    }

    fn holds(self, attrs: &LeaseAttrs) -> bool {
        match self.0 {
            IpAddr::V4(_) => attrs.public_ip.v4 == Some(self.0),
            IpAddr::V6(_) => attrs.public_ip.v6 == Some(self.0),
        }
    }
}

/// The configuration, and the state of the store when it was read.
struct ConfigRead {
    config: NetworkConfig,
    /// The revision that wrote it.
    revision: i64,
    /// The state of the store.
    now: Header,
}

/// What an acquire has read.
struct Seen {
    config: NetworkConfig,
    config_revision: i64,
    /// The revision up to which the records are known.
    revision: i64,
    /// The leases of the acquiring node, in the order of their keys, as Go flannel examines them.
    own: Vec<Arc<Lease>>,
    /// The taken subnets, each with the revision that created its record. Limited to what the choice needs: there may
    /// be too many, including newer ones.
    taken: Taken<i64>,
}

impl Seen {
    async fn read(
        store: &Store,
        owner: Owner,
        want: &Want,
        ConfigRead { config, revision, now }: ConfigRead,
    ) -> Result<Self, SubnetError> {
        let start = || Self {
            config: config.clone(),
            config_revision: revision,
            revision: 0,
            own: Vec::new(),
            taken: Taken::of(&config),
        };
        let is_reserved = |lease: &Lease| {
            lease.attrs.are_addresses_alone() && Version::from_fence(&lease.fence).is_some_and(Version::is_reservation)
        };
        let is_own = |lease: &Lease| owner.holds(&lease.attrs) && (want.is_own(lease) || is_reserved(lease));
        let add = |seen: &mut Self, record: &Record| match &record.lease {
            Ok(lease) if is_own(lease) && seen.own.len() < MAX_OWN => seen.own.push(Arc::clone(lease)),
            lease => seen.add(lease),
        };
        let (header, mut seen) =
            store.fold(now, start, add).await.map_err(|fault| fault.into_subnet_error(ACQUIRING))?;
        seen.revision = header.revision;
        Ok(seen)
    }

    /// Adds a record of another node. A bad record is treated as the newest, so it never outranks a lease.
    fn add(&mut self, lease: &Result<Arc<Lease>, Box<BadRecord>>) {
        match lease {
            Ok(lease) => self.keep(lease),
            Err(bad) => self.taken.add(&bad.subnets, i64::MAX),
        }
    }

    fn keep(&mut self, lease: &Lease) {
        self.taken.add(&lease.subnets, created(lease));
    }

    /// Whether a lease of this node may be used again. If another node's lease overlaps and is older, peers would use
    /// that one permanently.
    fn fits(&self, lease: &Lease) -> bool {
        let age = |created: i64, subnets: &Dual<Prefix>| (created, wire::key_text(subnets));
        let own = age(created(lease), &lease.subnets);
        let is_older = |(subnets, created): &(Dual<Prefix>, i64)| age(*created, subnets) < own;
        all_compatible(&self.config, &lease.subnets) && !self.taken.rivals(&lease.subnets).any(is_older)
    }

    /// Chooses in each family the preferred subnet if free, else any free one.
    fn choose(&self, preferred: &Dual<Prefix>) -> Result<Dual<Prefix>, SubnetError> {
        Ok(self.taken.choose(&[preferred], &mut random)?)
    }
}

fn created(lease: &Lease) -> i64 {
    Version::from_fence(&lease.fence).unwrap_or(UNKNOWN).created
}

fn checked_value(attrs: &LeaseAttrs) -> Result<String, SubnetError> {
    wire::value(attrs).map_err(|reason| SubnetError::Invalid {
        at: "lease attributes".to_owned(),
        reason: format!("would not be readable: {reason}; publish other attributes"),
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use flannel_core::allocation::MAX_TAKEN;

    use super::*;

    #[test]
    fn beyond_so_many_records_of_others_a_node_keeps_its_lease_and_gets_no_other() {
        let text = br#"{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fd00::/32","Backend":{"Type":"vxlan"}}"#;
        let config = NetworkConfig::parse(text, Allocation::Pool).unwrap();
        let taken = Taken::of(&config);
        let mut seen = Seen { config, config_revision: 1, revision: 1, own: Vec::new(), taken };
        let lease = |low: u32, created: i64| {
            let addr = Ipv6Addr::new(0xfd00, 0, (low >> 16) as u16, low as u16, 0, 0, 0, 0);
            let subnets = Dual { v4: None, v6: Some(Prefix::new(addr.into(), 64).unwrap()) };
            let fence = Version { created, modified: created, lease: 1 }.fence();
            Lease::new(LeaseKey::new("x"), subnets, LeaseAttrs::default()).fenced(fence)
        };
        let own = lease(1 << 31, 7);
        for n in 1..MAX_TAKEN as u32 {
            seen.add(&Ok(Arc::new(lease(n, 1))));
        }
        assert!(seen.choose(&Dual::default()).is_ok());
        for n in [1 << 30, 1 << 29] {
            seen.add(&Err(Box::new(BadRecord::new(String::new(), lease(n, 1).subnets))));
        }
        let full = seen.choose(&Dual::default());
        assert!(matches!(&full, Err(SubnetError::Exhausted(text)) if text.contains("more than 524288")), "{full:?}");
        assert!(seen.fits(&own));
    }
}
