//! The writes: each a transaction fenced by what was read, each with its outcome settled.

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
use crate::wire::Version;

/// A record to be written.
pub(crate) struct Put<'a> {
    pub(crate) key: &'a LeaseKey,
    pub(crate) value: &'a str,
    /// What must hold.
    pub(crate) when: Vec<Compare>,
    /// What to read where it does not.
    pub(crate) or_else: Vec<TxnOp>,
    /// What is written over; `None`: nothing.
    pub(crate) over: Option<Version>,
}

/// What became of it.
pub(crate) enum Outcome {
    /// It is written.
    Written { version: Version, expires: Option<BootTime> },
    /// What must hold did not; this was read instead.
    Refused { header: Header, read: Vec<KeyValue> },
}

/// A lease that no record hangs on yet.
#[derive(Clone, Copy)]
pub(crate) struct Granted {
    lease: i64,
    expires: BootTime,
}

/// The leases of records that may have been written without an acknowledgement. The next try writes with the same one,
/// so that a store whose answers are lost does not fill with leases; a record that hangs on it is ours.
#[derive(Default)]
pub(crate) struct UnacknowledgedWrites(Mutex<BTreeMap<LeaseKey, Granted>>);

impl UnacknowledgedWrites {
    pub(crate) fn of(&self, key: &LeaseKey) -> Option<i64> {
        Some(self.lock().get(key)?.lease)
    }

    fn take(&self, key: &LeaseKey) -> Option<i64> {
        Some(self.lock().remove(key)?.lease)
    }

    /// The lease to write with again, if it lasts until `long_enough`.
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
    /// Gets a lease. One that was granted without an acknowledgement is ended, for its number is ours.
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

    /// Ends a lease that was not used, or whose use is unknown and must not be.
    pub(crate) async fn give_back(&self, granted: Granted) {
        self.revoke(granted.lease).await;
    }

    /// Writes over a record of ours, with a lease of its own.
    pub(crate) async fn put_leased(&self, put: Put<'_>) -> Result<Outcome, Fault> {
        let now = self.clock.now();
        let granted = match self.unacknowledged.lasting(put.key, now.after(self.ttl.duration() / 2)) {
            Some(granted) => granted,
            None => {
                let granted = self.grant().await?;
                // Before the write: that may be dropped midway.
                self.unacknowledged.note(put.key, granted, now);
                granted
            }
        };
        let result = self.put_granted(&put, granted).await;
        let is_settled = match &result {
            Ok(Outcome::Written { .. }) => true,
            // A try before this one may have written with it, or it may still be under way and would go with its lease.
            Ok(Outcome::Refused { .. }) => false,
            Err(fault) => fault.kind == Kind::Ended,
        };
        if is_settled {
            self.unacknowledged.take(put.key);
        }
        result
    }

    /// Ends the lease of a write that cannot happen any more.
    pub(crate) async fn drop_unacknowledged(&self, key: &LeaseKey) {
        if let Some(lease) = self.unacknowledged.take(key) {
            self.drop_lease(lease).await;
        }
    }

    /// Writes a record with this lease. An answer that is lost is asked for: by the lease one can tell.
    pub(crate) async fn put_granted(&self, put: &Put<'_>, granted: Granted) -> Result<Outcome, Fault> {
        let expires = Some(granted.expires);
        match self.put(put, granted.lease).await {
            Ok(Outcome::Written { version, .. }) => Ok(Outcome::Written { version, expires }),
            Err(fault) if fault.is_unsettled() => match self.record(put.key).await {
                // Another value is that of a try before this one.
                Ok(Some(kv)) if kv.lease() == granted.lease && kv.value() == put.value.as_bytes() => {
                    Ok(Outcome::Written { version: Version::of(&kv), expires })
                }
                Ok(_) | Err(_) => Err(fault),
            },
            result => result,
        }
    }

    /// Writes over a reservation, which stays one.
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
        Ok(Outcome::Written { version: Version { created, modified, lease }, expires: None })
    }

    /// Deletes a record that is still what it was. Returns what stands there instead where it is not.
    pub(crate) async fn delete(&self, key: &LeaseKey, version: Version) -> Result<Option<KeyValue>, Fault> {
        let full = self.key(key);
        let txn = Txn::new()
            .when(unchanged(&full, version))
            .and_then([TxnOp::delete(full.clone(), None::<DeleteOptions>)])
            .or_else([TxnOp::get(full, None)]);
        let response = self.txn(txn).await?;
        Ok(if response.succeeded() { None } else { read(&response).into_iter().next() })
    }

    /// The record under a key.
    pub(crate) async fn record(&self, key: &LeaseKey) -> Result<Option<KeyValue>, Fault> {
        let full = self.key(key);
        let read = |mut client: etcd_client::Client| {
            let full = full.clone();
            async move { client.get(full, None).await }
        };
        Ok(self.connector.read(read).await?.kvs().first().cloned())
    }

    /// Seconds a lease has left; `None` where it ended.
    pub(crate) async fn seconds_left(&self, lease: i64) -> Result<Option<u64>, Fault> {
        let response =
            self.connector.read(|mut client| async move { client.lease_time_to_live(lease, None).await }).await?;
        Ok(u64::try_from(response.ttl()).ok())
    }

    /// Ends a lease that no record hangs on any more. It would end by itself: a failure costs nothing but time.
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

    async fn txn(&self, txn: Txn) -> Result<TxnResponse, Fault> {
        let send = |mut client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        self.connector.write(send).await
    }
}

/// A record is what it was. Revisions alone do not tell: a store restored from a backup counts anew from there.
pub(crate) fn unchanged(full_key: &str, version: Version) -> [Compare; 2] {
    [
        Compare::mod_revision(full_key, CompareOp::Equal, version.modified),
        Compare::lease(full_key, CompareOp::Equal, version.lease),
    ]
}

/// What the reads of a transaction found.
fn read(response: &TxnResponse) -> Vec<KeyValue> {
    let mut found = Vec::new();
    for answer in response.op_responses() {
        if let TxnOpResponse::Get(mut get) = answer {
            found.append(&mut get.take_kvs());
        }
    }
    found
}

/// 64 bits that need not be secret.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
