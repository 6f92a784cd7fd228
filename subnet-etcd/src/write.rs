//! The writes: each a transaction fenced by what was read, each with its outcome settled.

use etcd_client::{
    Compare, CompareOp, DeleteOptions, KeyValue, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp,
    TxnOpResponse, TxnResponse,
};
use flannel_core::clock::BootTime;
use flannel_core::lease::LeaseKey;

use crate::backoff::random;
use crate::connect::Header;
use crate::error::Fault;
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

impl Store {
    /// Writes a record with a lease of its own. An answer that is lost is asked for: by the lease one can tell.
    pub(crate) async fn put_leased(&self, put: Put<'_>) -> Result<Outcome, Fault> {
        // The number is ours, so that what was granted can be named even if the answer is lost.
        let lease = i64::try_from(random() >> 1).unwrap_or(1).max(1);
        let asked = self.clock.now();
        let ttl = match self.grant(lease).await {
            Ok(ttl) => ttl,
            Err(fault) => {
                if fault.is_unsettled() {
                    self.revoke(lease).await;
                }
                return Err(fault);
            }
        };
        let expires = Some(asked.after(std::time::Duration::from_secs(ttl)));
        match self.put(&put, lease).await {
            Ok(Outcome::Written { version, .. }) => Ok(Outcome::Written { version, expires }),
            Ok(refused) => {
                self.revoke(lease).await;
                Ok(refused)
            }
            Err(fault) if !fault.is_unsettled() => {
                self.revoke(lease).await;
                Err(fault)
            }
            Err(fault) => match self.record(put.key).await? {
                Some(kv) if kv.lease() == lease => Ok(Outcome::Written { version: Version::of(&kv), expires }),
                _ => {
                    // It may still be under way. A new record then goes with its lease; a record of ours that stood
                    // before must not, so there the lease is left to end.
                    if put.over.is_none() {
                        self.revoke(lease).await;
                    }
                    Err(fault)
                }
            },
        }
    }

    /// Writes over a reservation, which stays one.
    pub(crate) async fn put_reserved(&self, put: Put<'_>) -> Result<Outcome, Fault> {
        match self.put(&put, 0).await {
            Err(fault) if fault.is_unsettled() => match self.record(put.key).await? {
                Some(kv) if kv.lease() == 0 && kv.value() == put.value.as_bytes() => {
                    Ok(Outcome::Written { version: Version::of(&kv), expires: None })
                }
                _ => Err(fault),
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

    async fn grant(&self, lease: i64) -> Result<u64, Fault> {
        let seconds = self.ttl.seconds();
        let grant = |mut client: etcd_client::Client| async move {
            client.lease_grant(seconds, Some(LeaseGrantOptions::new().with_id(lease))).await
        };
        let granted = self.connector.write(grant).await?;
        Ok(u64::try_from(granted.ttl()).unwrap_or_default())
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
