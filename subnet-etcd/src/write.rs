//! The writes: each a transaction fenced by what was read, each with a definite outcome.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, DeleteOptions, KeyValue, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp,
    TxnOpResponse, TxnResponse,
};
use flannel_core::clock::BootTime;
use flannel_core::lease::LeaseKey;

use crate::connect::Header;
use crate::error::{Fault, Kind};
use crate::store::Store;
use crate::wire::{self, Version};

/// A record to be written.
pub(crate) struct Put<'a> {
    pub(crate) key: &'a LeaseKey,
    pub(crate) value: &'a str,
    /// The conditions of the write.
    pub(crate) when: Vec<Compare>,
    /// What to read if they do not hold.
    pub(crate) or_else: Vec<TxnOp>,
    /// The version to overwrite; `None` for a new record.
    pub(crate) over: Option<Version>,
}

/// The outcome of a write.
pub(crate) enum Outcome {
    /// The record is written.
    Written { version: Version, expires: Option<BootTime> },
    /// The conditions did not hold; this was read instead.
    Refused { header: Header, read: Vec<KeyValue> },
}

/// An etcd lease without a record yet.
#[derive(Clone, Copy)]
pub(crate) struct Granted {
    lease: i64,
    expires: BootTime,
}

/// The etcd leases of records that may have been written without an acknowledgement. The next try uses the same lease,
/// so that a store whose answers are lost does not fill with leases. A record with such a lease belongs to this node.
#[derive(Default)]
pub(crate) struct UnacknowledgedWrites(Mutex<BTreeMap<LeaseKey, Granted>>);

impl UnacknowledgedWrites {
    pub(crate) fn of(&self, key: &LeaseKey) -> Option<i64> {
        Some(self.lock().get(key)?.lease)
    }

    fn take(&self, key: &LeaseKey) -> Option<i64> {
        Some(self.lock().remove(key)?.lease)
    }

    /// Returns the lease to use again, if it lasts until `long_enough`.
    fn lasting(&self, key: &LeaseKey, long_enough: BootTime) -> Option<Granted> {
        self.lock().get(key).filter(|granted| granted.expires >= long_enough).copied()
    }

    fn note(&self, key: &LeaseKey, granted: Granted, now: BootTime) {
        let mut unacknowledged = self.lock();
        unacknowledged.retain(|_, granted| granted.expires > now);
        unacknowledged.insert(key.clone(), granted);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseKey, Granted>> {
        // Every change is one call.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Grants a lease. If the grant was not acknowledged, the lease is revoked: this client chose its id.
    pub(crate) async fn grant(&self) -> Result<Granted, Fault> {
        let lease = i64::try_from(random() >> 1).unwrap_or(1).max(1);
        let asked = self.clock.now();
        let seconds = self.ttl.seconds();
        let grant = |mut client: etcd_client::Client| async move {
            client.lease_grant(seconds, Some(LeaseGrantOptions::new().with_id(lease))).await
        };
        match self.connector.write(grant).await {
            Ok(granted) => {
                let ttl = Duration::from_secs(u64::try_from(granted.ttl()).unwrap_or_default());
                Ok(Granted { lease, expires: asked.after(ttl) })
            }
            Err(fault) => {
                if fault.is_unsettled() {
                    self.revoke(lease).await;
                }
                Err(fault)
            }
        }
    }

    /// Revokes a lease that was not used, or whose use is unknown and must be undone.
    pub(crate) async fn give_back(&self, granted: Granted) {
        self.revoke(granted.lease).await;
    }

    /// Overwrites a record of this node, with its own lease.
    pub(crate) async fn put_leased(&self, put: Put<'_>) -> Result<Outcome, Fault> {
        let now = self.clock.now();
        let granted = match self.unacknowledged.lasting(put.key, now.after(self.ttl.duration() / 2)) {
            Some(granted) => granted,
            None => {
                let granted = self.grant().await?;
                // Before the write, which may be dropped.
                self.unacknowledged.note(put.key, granted, now);
                granted
            }
        };
        let result = self.put_granted(&put, granted).await;
        let is_settled = match &result {
            Ok(Outcome::Written { .. }) => true,
            // A previous try may have written with this lease, or may still be in progress; revoking the lease would
            // delete its record.
            Ok(Outcome::Refused { .. }) => false,
            Err(fault) => fault.kind == Kind::Ended,
        };
        if is_settled {
            self.unacknowledged.take(put.key);
        }
        result
    }

    /// Revokes the lease of a write that can no longer happen.
    pub(crate) async fn drop_unacknowledged(&self, key: &LeaseKey) {
        if let Some(lease) = self.unacknowledged.take(key) {
            self.drop_lease(lease).await;
        }
    }

    /// Writes a record with this lease. If the answer is lost, the record is read back: the lease identifies the write.
    pub(crate) async fn put_granted(&self, put: &Put<'_>, granted: Granted) -> Result<Outcome, Fault> {
        let expires = Some(granted.expires);
        match self.put(put, granted.lease).await {
            Ok(Outcome::Written { version, .. }) => Ok(Outcome::Written { version, expires }),
            Err(fault) if fault.is_unsettled() => match self.record(put.key).await {
                // Another value is from a previous try.
                Ok(Some(kv)) if kv.lease() == granted.lease && kv.value() == put.value.as_bytes() => {
                    Ok(Outcome::Written { version: Version::of(&kv), expires })
                }
                Ok(_) | Err(_) => Err(fault),
            },
            result => result,
        }
    }

    /// Overwrites a reservation, which stays a reservation.
    pub(crate) async fn put_reserved(&self, put: Put<'_>) -> Result<Outcome, Fault> {
        match self.put(&put, 0).await {
            Err(fault) if fault.is_unsettled() => match self.record(put.key).await {
                Ok(Some(kv)) if kv.lease() == 0 && kv.value() == put.value.as_bytes() => {
                    Ok(Outcome::Written { version: Version::of(&kv), expires: None })
                }
                Ok(_) | Err(_) => Err(fault),
            },
            result => result,
        }
    }

    async fn put(&self, put: &Put<'_>, lease: i64) -> Result<Outcome, Fault> {
        let write = TxnOp::put(self.key(put.key), put.value, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when(put.when.clone()).and_then([write]).or_else(put.or_else.clone());
        let response = self.txn(txn).await?;
        let header = Header::of(response.header());
        if !response.succeeded() {
            return Ok(Outcome::Refused { header, read: read(&response) });
        }
        let modified = header.revision;
        let created = put.over.map_or(modified, |over| over.created);
        let version = Version { created, modified, lease };
        self.shared_list.wrote(wire::record_written(put.key, put.value, version), header);
        Ok(Outcome::Written { version, expires: None })
    }

    /// Deletes a record that is unchanged. If it changed, returns the present record.
    pub(crate) async fn delete(&self, key: &LeaseKey, version: Version) -> Result<Option<KeyValue>, Fault> {
        let full = self.key(key);
        let txn = Txn::new()
            .when(unchanged(&full, version))
            .and_then([TxnOp::delete(full.clone(), None::<DeleteOptions>)])
            .or_else([TxnOp::get(full, None)]);
        let response = self.txn(txn).await?;
        Ok(if response.succeeded() { None } else { read(&response).into_iter().next() })
    }

    /// Reads the record under a key.
    pub(crate) async fn record(&self, key: &LeaseKey) -> Result<Option<KeyValue>, Fault> {
        let full = self.key(key);
        let read = |mut client: etcd_client::Client| {
            let full = full.clone();
            async move { client.get(full, None).await }
        };
        Ok(self.connector.read(read).await?.kvs().first().cloned())
    }

    /// Returns the seconds a lease has left, or `None` if it ended.
    pub(crate) async fn seconds_left(&self, lease: i64) -> Result<Option<u64>, Fault> {
        let response =
            self.connector.read(|mut client| async move { client.lease_time_to_live(lease, None).await }).await?;
        Ok(u64::try_from(response.ttl()).ok())
    }

    /// Revokes a lease that no record uses any more. It would expire anyway: a failure costs only time.
    pub(crate) async fn drop_lease(&self, lease: i64) {
        if lease == 0 {
            return;
        }
        let keys = |mut client: etcd_client::Client| async move {
            client.lease_time_to_live(lease, Some(LeaseTimeToLiveOptions::new().with_keys())).await
        };
        match self.connector.read(keys).await {
            Ok(response) if response.ttl() >= 0 && response.keys().is_empty() => self.revoke(lease).await,
            Ok(_) => {}
            Err(fault) => tracing::debug!(error = %fault.error, "an etcd lease is left to end by itself"),
        }
    }

    async fn revoke(&self, lease: i64) {
        let revoke = |mut client: etcd_client::Client| async move { client.lease_revoke(lease).await };
        if let Err(fault) = self.connector.write(revoke).await {
            tracing::debug!(error = %fault.error, "an etcd lease is left to end by itself");
        }
    }

    pub(crate) async fn txn(&self, txn: Txn) -> Result<TxnResponse, Fault> {
        let send = |mut client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        self.connector.write(send).await
    }
}

/// Conditions that a record is unchanged. Revisions alone are not enough: a store restored from a backup reuses them.
pub(crate) fn unchanged(full_key: &str, version: Version) -> [Compare; 2] {
    [
        Compare::mod_revision(full_key, CompareOp::Equal, version.modified),
        Compare::lease(full_key, CompareOp::Equal, version.lease),
    ]
}

/// Returns what the reads of a transaction found.
fn read(response: &TxnResponse) -> Vec<KeyValue> {
    let mut found = Vec::new();
    for answer in response.op_responses() {
        if let TxnOpResponse::Get(mut get) = answer {
            found.append(&mut get.take_kvs());
        }
    }
    found
}

/// Returns 64 random bits that need not be secret.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
